"""Rules of the repository that a reader relies on."""

import ast
import re
import sys

import pytest

from tests.helpers import ROOT, run_script

LAYERS = {  # folder -> local modules it may import
    "model": r"model(\.|$)",
    "dataset": r"dataset(\.|$)|model\.(LMConfig|errors|processing)$",
    "trainer": r"trainer(\.|$)|model(\.|$)",
}
LOCAL = {
    "model",
    "dataset",
    "trainer",
    "scripts",
    "train_pretrain_vlm",
    "train_sft_vlm",
    "eval_vlm",
    "web_demo_vlm",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("layer", LAYERS)
def test_who_may_import_whom(layer):
    for path in (ROOT / layer).rglob("*.py"):
        for name in imports(path):
            if name.split(".")[0] in LOCAL:
                assert re.match(LAYERS[layer], name), f"{path.name} imports {name}"


def test_evaluation_and_web_need_no_trainer():
    for name in ("eval_vlm.py", "web_demo_vlm.py"):
        local = {module.split(".")[0] for module in imports(ROOT / name)} & LOCAL
        assert local <= {"model", "dataset"}


def test_files_stay_short():
    too_long = {
        p.name: n
        for p in ROOT.rglob("*.py")
        if ".venv" not in p.parts and (n := len(p.read_text().splitlines())) > 320
    }
    assert not too_long


@pytest.mark.parametrize(
    "script", ["train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "web_demo_vlm.py"]
)
def test_every_flag_has_help_and_is_in_the_readme(script):
    printed = run_script(script, "--help").stdout
    flags = re.findall(r"^  (--\w+)", printed, re.M)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for flag in flags:
        assert f"`{flag}`" in readme, f"{script} {flag} is not in the README"
    assert sys.version_info >= (3, 10)


def test_no_bare_patch_count_outside_the_configuration():
    for layer in ("model", "trainer"):
        for path in (ROOT / layer).rglob("*.py"):
            if path.name != "LMConfig.py":
                constants = [
                    n.value
                    for n in ast.walk(ast.parse(path.read_text()))
                    if isinstance(n, ast.Constant)
                ]
                assert not {196, 34} & {c for c in constants if isinstance(c, int)}, path.name
