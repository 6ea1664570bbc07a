"""Rules of the repository that a reader relies on."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_cold

# room -> local modules it may import; common imports none.
ROOMS = {
    "common": r"common\.",
    "model": r"(common|model)\.",
    "dataset": r"(common|dataset)\.|model\.(LMConfig|processing|image|labels|files)$",
    "inference": r"(common|model|inference)\.",
    "trainer": r"(common|model|trainer)\.",
    "scripts": r"(common|model|dataset|inference|trainer|scripts)\.|inference$",
}
LOCAL = {*ROOMS, "tests", "train_pretrain_vlm", "train_sft_vlm", "eval_vlm", "web_demo_vlm"}
SCRIPTS = ("train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "web_demo_vlm.py")
SOURCES = [
    *(ROOT / script for script in SCRIPTS),
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def find_imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_who_may_import_whom(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in find_imports(path):
            # The one exception, on call only: model.generate(...) is what users know.
            is_generate = (path.name, name) == ("model_vlm.py", "inference.generate")
            if name.split(".")[0] in LOCAL and not is_generate:
                assert re.match(ROOMS[room], name), f"{path.relative_to(ROOT)} imports {name}"


def test_the_network_imports_neither_pictures_nor_clis_nor_plots():
    """A fresh Python that imports the network, then one that imports the training loop."""
    code = "import sys, {}; print(*sys.modules)"
    network = run_cold("-c", code.format("model.model_vlm")).stdout.split()
    loop = run_cold("-c", code.format("trainer.loop, dataset.mixture")).stdout.split()
    for modules in (network, loop):
        loaded = {name.split(".")[0] for name in modules}
        assert not loaded & {"matplotlib", "pyarrow", "wandb", "streamlit", "scipy", "faiss"}
        assert not any(name.startswith("inference") for name in modules)
    assert "PIL" not in network and "argparse" not in find_imports(ROOT / "model/model_vlm.py")


def test_files_stay_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    rooms = (ROOT / "model", ROOT / "trainer")
    too_long = {
        path.name: n for path, n in lengths.items() if n > 320 and path.parents[0] in rooms
    }
    assert not too_long
    assert lengths[ROOT / "trainer/loop.py"] <= 190


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_comments_are_as_agreed(path):
    """At most 100 columns; comments beside code at most 40 characters; `fmt: skip` is rare."""
    text = path.read_text(encoding="utf-8")
    wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not wide, f"lines {wide} are over 100 columns"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
            is_mark = re.fullmatch(r"# (fmt: skip|noqa: \w+)", token.string)
            comment = token.string.removeprefix("# ")
            assert is_mark or len(comment) <= 40, f"line {token.start[0]}: {comment}"


def test_long_functions_are_cut_into_phases():
    """A function of over 30 lines of code has a comment line of its own."""
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if not body or body[-1].end_lineno - body[0].lineno < 30:
                continue
            own = lines[body[0].lineno - 1 : body[-1].end_lineno]
            has_phase = any(line.strip().startswith("# ") for line in own)
            assert has_phase, f"{path.relative_to(ROOT)}: {node.name} has no phases"


def test_no_bare_patch_count_outside_the_configuration():
    for path in SOURCES:
        if path.parent.name in ("model", "trainer") and path.name != "LMConfig.py":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
            numbers = {value for value in constants if type(value) is int}
            assert not {196, 34} & numbers, path.name
