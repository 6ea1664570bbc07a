"""The first page in three languages: they say the same, and what they name is there."""

import ast
import re
from collections import Counter

import pytest
from PIL import Image

from scripts.docs.published import IGNORED, OTHER, PUBLISHED, SAME
from tests.helpers import ROOT
from tests.test_structure import ROOMS, SCRIPTS

TRANSLATIONS = ("README_zh.md", "README_ja.md")
PAGES = ("README.md", *TRANSLATIONS)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def find_code_blocks(text: str) -> list[str]:
    """Indented by four spaces; an empty line inside belongs to the block."""
    blocks = re.findall(r"(?:^    .*\n|(?<=\n)\n(?=    ))+", text, re.M)
    return [block.strip("\n") for block in blocks if block.strip()]


def find_tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", text, re.M)


def find_numbers(table: str) -> list[list[str]]:
    """Of each row, without those inside links and code."""
    rows = [re.sub(r"\(\S+\)|`[^`]*`", "", row) for row in table.splitlines()]
    return [sorted(re.findall(r"\d+(?:[.,]\d+)*", row)) for row in rows]


def find_links(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", TRANSLATIONS)
def test_translations_have_the_same_commands_figures_and_links(page):
    english, translated = read("README.md"), read(page)
    assert find_code_blocks(english) == find_code_blocks(translated)
    tables, others = find_tables(english), find_tables(translated)
    assert [find_numbers(table) for table in tables] == [find_numbers(table) for table in others]

    # links and names in code may come in another order, as the grammar wants it
    for find in (find_links, lambda text: re.findall(r"`[^`\n]+`", text)):
        here, there = (
            Counter(name for name in find(text) if name not in PAGES)
            for text in (english, translated)
        )
        assert here == there
    assert len(re.findall(r"^## ", english, re.M)) == len(re.findall(r"^## ", translated, re.M))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_links_the_other_languages_at_its_top(page):
    lines = read(page).splitlines()
    assert len(lines) <= 180
    assert set(find_links(lines[2])) == {*PAGES} - {page}


def test_what_the_page_links_to_is_there():
    for link in find_links(read("README.md")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", read(path), re.M)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, link


def test_the_map_has_every_room_and_every_script():
    text = read("README.md")
    map_lines = [line for line in text.splitlines() if line.startswith(("- [", "  ["))]
    linked = {link for line in map_lines for link in find_links(line)}
    assert linked >= {*ROOMS, *SCRIPTS, "tests", "docs", "images", "out", "dev/LOG.md"}


def test_commands_and_flags_of_the_page_exist():
    text = read("README.md")
    targets = re.findall(r"^([\w-]+):", read("Makefile"), re.M)
    for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)?)\b", "\n".join(find_code(text))):
        assert target in targets, f"make {target}"
    flags = {*re.findall(r"--\w+", "\n".join(find_code(text)))}
    # of torchrun, dataset.preview, http.server
    known = {"--nproc_per_node", "--images", "--bind", "--directory"}
    known |= {*re.findall(r"--\w+", read("docs/flags.md"))}
    assert flags <= known, flags - known


def find_code(text: str) -> list[str]:
    return find_code_blocks(text) + re.findall(r"`([^`\n]+)`", text)


def test_python_of_the_page_can_be_parsed():
    """The first one is three lines; tests/scripts/test_elsewhere_tools.py runs the others."""
    snippets = [block for block in find_code_blocks(read("README.md")) if "import" in block]
    trees = [ast.parse("\n".join(line[4:] for line in block.splitlines())) for block in snippets]
    assert len(trees[0].body) == 3


def test_the_published_flags_are_counted_right():
    effects = Counter(row.effect for row in PUBLISHED.values())
    text = read("README.md")
    assert f"its {len(PUBLISHED)} flags | {effects[SAME]} do the same, {effects[OTHER]} " in text
    row = next(line for line in text.splitlines() if line.startswith("| its"))
    ignored = {name for name, published in PUBLISHED.items() if published.effect == IGNORED}
    assert {*re.findall(r"`(--\w+)`", row)} == ignored


def test_the_picture_is_small_and_wide_enough():
    path = ROOT / "images/hero.png"
    assert path.stat().st_size <= 150_000
    with Image.open(path) as image:
        assert image.width >= 1000 and image.mode == "RGBA"


def test_the_license_is_the_same_everywhere():
    assert "Apache License" in read("LICENSE")
    assert 'license = "Apache-2.0"' in read("pyproject.toml")
    assert all("[Apache-2.0](LICENSE)" in read(page) for page in PAGES)
