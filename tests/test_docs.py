"""Documents that are written from the code, and what they say of it."""

import dataclasses
import random
import re

import pytest
from PIL import ImageColor

from common.flags import list_published
from dataset.scenes.scene import sample_scene
from dataset.scenes.text import ask
from inference.config import EvalConfig, WebConfig
from scripts.docs.flags_page import FLAGS_PATH, write_flags
from scripts.docs.hero import BUBBLES, WIDTH, draw_hero
from scripts.docs.published import EVAL, PUBLISHED, SAME, TRAIN, WEB
from tests.helpers import ROOT, run_script
from tests.test_structure import SCRIPTS
from trainer.config import TrainConfig


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


@pytest.mark.parametrize(
    "name, config", [(TRAIN, TrainConfig), (EVAL, EvalConfig), (WEB, WebConfig)]
)
def test_the_table_of_published_flags_is_that_of_the_scripts(name, config):
    """Each is an option, or else accepted; and what is accepted is in the table."""
    options = {f"--{field.name}" for field in dataclasses.fields(config)}
    accepted = {flag.names[0] for flag in list_published(config())}
    published = {flag for flag, row in PUBLISHED.items() if name in row.scripts}
    assert published <= options | accepted and accepted <= published
    for flag in published & accepted:
        assert PUBLISHED[flag].effect != SAME


def test_the_picture_of_the_readme_shows_what_was_answered():
    """A wrong answer is drawn as one, long ones wrap, and corners let the page shine through."""
    scene = sample_scene(random.Random(8), held_out=True, n_things=4)
    question = ask(random.Random(8), "color", (scene,), "en")
    right, wrong, long = (
        draw_hero(scene, [(question, answer)])
        for answer in (question.answer, "The heart is at C4.", f"{question.answer} " * 40)
    )
    assert right.mode == "RGBA" and right.width == WIDTH and right.getpixel((0, 0))[3] == 0
    colors = [{color for _, color in image.getcolors(1 << 20)} for image in (right, wrong)]
    bubbles = [ImageColor.getcolor(BUBBLES[is_right], "RGBA") for is_right in (True, False)]
    assert [bubble in found for bubble in bubbles for found in colors] == [True, False, False, True]
    assert long.height > right.height


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
