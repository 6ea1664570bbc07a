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
    "inference": r"(common|model|inference)\.|inference$",
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


def test_what_is_not_used_is_not_imported():
    """A fresh Python that imports all that training from .jsonl needs."""
    code = "import sys, trainer.loop, dataset.mixture; print(*sys.modules)"
    printed = run_cold("-c", code).stdout
    modules = {name.split(".")[0] for name in printed.split()}
    assert {"torch", "trainer"} <= modules
    others = {"matplotlib", "pyarrow", "wandb", "tensorboard", "streamlit", "faiss", "ftfy"}
    assert not modules & {*others, "inference"}


def test_the_network_is_only_the_network():
    """It imports neither pictures nor command lines nor plots; vision.py loads CLIP on demand."""
    for path in (ROOT / "model").glob("*.py"):
        foreign = {name.split(".")[0] for name in find_imports(path)}
        assert not foreign & {"argparse", "matplotlib", "streamlit", "wandb"}, path.name
        assert "PIL" not in foreign or path.name in ("image.py", "processing.py"), path.name


def test_files_stay_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    rooms = (ROOT / "model", ROOT / "trainer")
    too_long = {path.name: n for path, n in lengths.items() if n > 320 and path.parents[0] in rooms}
    assert not too_long
    assert lengths[ROOT / "trainer/loop.py"] <= 190


def test_lines_and_comments_are_as_agreed():
    """At most 100 columns; a comment beside code has at most 40 characters."""
    problems = []
    for path in [*SOURCES, *TESTS]:
        name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        problems += [f"{name}:{n} is over 100 columns" for n in wide]
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            is_beside = token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
            comment = token.string.removeprefix("# ")
            if is_beside and len(comment) > 40:
                problems.append(f"{name}:{token.start[0]} has a long comment beside code")
    assert not problems


def test_long_functions_are_cut_into_phases():
    """A function of over 30 lines of code has a comment line of its own."""
    problems = []
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if not body or body[-1].end_lineno - body[0].lineno < 30:
                continue
            own = lines[body[0].lineno - 1 : body[-1].end_lineno]
            if not any(line.strip().startswith("# ") for line in own):
                problems.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not problems


def test_no_bare_patch_count_outside_the_configuration():
    for path in SOURCES:
        if path.parent.name in ("model", "trainer") and path.name != "LMConfig.py":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
            numbers = {value for value in constants if type(value) is int}
            assert not {196, 34} & numbers, path.name
