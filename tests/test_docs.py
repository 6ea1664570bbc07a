"""Documents that are written from the code, and what they say of it."""

import re

import pytest

from scripts.docs import FLAGS_PATH, write_flags
from tests.helpers import ROOT, run_script
from tests.test_structure import SCRIPTS


def test_the_page_of_flags_is_that_of_the_code():
    assert FLAGS_PATH.read_text(encoding="utf-8") == write_flags(), "run python -m scripts.docs"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_on_the_page(script):
    printed = run_script(script, "--help").stdout
    page = FLAGS_PATH.read_text(encoding="utf-8")
    flags = re.findall(r"^  (--\w+)", printed, re.M)
    assert flags
    for flag in flags:
        assert f"`{flag}`" in page, f"{script} {flag} is not in docs/flags.md"


def test_documents_name_commands_that_exist():
    """Each `python -m room.thing` and each `python script.py` of the documents is there."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
    documents += [ROOT / "dev/LOG.md", ROOT / "Makefile"]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for module in re.findall(r"-m ((?:scripts|dataset)[\w.]*\w)", text):
            path = ROOT / module.replace(".", "/")
            is_there = (path / "__main__.py").is_file() or path.with_suffix(".py").is_file()
            assert is_there, f"{document.name}: python -m {module}"
        for script in re.findall(r"python3? (\w+\.py)", text):
            assert (ROOT / script).is_file(), f"{document.name}: {script}"
