"""docs/data.md: what it says to write for each kind of data previews, cleans and trains."""

import re
import shlex
from pathlib import Path

import pytest

from scripts.processes import as_flags
from tests.helpers import N_PATCHES, ROOT, TOKENIZER, picture, run_script

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("## I have this data")[2]
COMMANDS = re.findall(r"^\| [^|]+ \| `python (train_\w+\.py) ([^`]+)` \|$", PAGE, re.M)
# **`name`** with the rest of its paragraph, and the indented block behind it.
EXAMPLES = re.compile(r"^\*\*`(.+?)`\*\*.*\n(?:.+\n)*\n((?:    .*\n|\n(?=    ))+)", re.M)
FORMATS = {
    "rows.jsonl": "MiniMind-V",
    "llava.json": "LLaVA",
    "sharegpt.json": "ShareGPT",
    "messages.jsonl": "messages",
    "questions.jsonl": "query/response",
    "captions.csv": "captions",
    "references.jsonl": "captions",
    "captioned": "captions",
    "imagefolder": "captions",
    "published.parquet": "MiniMind-V",
    "hub.parquet": "messages",
    "hub_folder": "messages",
    "shards/*.tar": "captions",
    "text.jsonl": "MiniMind-V",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The pictures and files that the page shows, made by what stands there."""
    folder = tmp_path_factory.mktemp("data_page")
    (folder / "photos").mkdir()
    for number, name in enumerate(("cat", "dog")):
        picture(number).save(folder / "photos" / f"{name}.jpg")
    for name, block in EXAMPLES.findall(PAGE):
        text = "".join(line.removeprefix("    ") for line in block.splitlines(keepends=True))
        if text.startswith("import "):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                exec(compile(text, "docs/data.md", "exec"), {})
        else:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_each_kind_of_data_has_a_row_and_an_example(folder):
    named = [shlex.split(flags)[1] for _, flags in COMMANDS]
    assert set(named) == {*FORMATS, "rows.jsonl:2"}
    assert all(any(folder.glob(name.removesuffix(":2"))) for name in named)


@pytest.mark.parametrize("script, flags", COMMANDS, ids=lambda text: text)
def test_what_the_page_says_previews_cleans_and_trains(script, flags, folder, vision_dir, tmp_path):
    # the files of the page, wherever they are
    words = shlex.split(flags)
    inside = [
        word if word.startswith("--") or word == "none" else str(folder / word) for word in words
    ]
    data = inside[1 : inside.index("--images") if "--images" in inside else None]
    images = inside[1 + len(data) :]

    # preview: every row can be used
    patches = ["--n_image_tokens", str(N_PATCHES)]
    looked = run_script(
        *("-m", "dataset.preview", *data, *images, "--out_dir", str(tmp_path), *patches)
    )
    assert looked.returncode == 0, looked.stdout
    assert re.search(r"usable +\d+ +\(100.0%\)", looked.stdout), looked.stdout
    if len(data) == 1:
        assert f"format           {FORMATS[words[1]]}" in looked.stdout

        # cleaning: no row is lost
        one = [str(path) for path in folder.glob(words[1])]
        cleaned = run_script("-m", "dataset.clean", *one, str(tmp_path / "clean"), *images)
        assert re.search(r"rows read = \d for training .* \+ 0 rejected", cleaned.stdout), (
            cleaned.stdout
        )

    # training: two steps
    options = as_flags(
        tokenizer=TOKENIZER,
        vision_model=vision_dir,
        dim=64,
        n_layers=2,
        init_weights="none",
        device="cpu",
        epochs=2,
        max_steps=2,
        batch_size=4,
        out_dir=tmp_path,
    )
    trained = run_script(script, *inside, *options)
    assert trained.returncode == 0, trained.stdout
    if len(data) == 1:
        assert f"format: {FORMATS[words[1]]}" in trained.stdout, trained.stdout
