"""What every test may ask for."""

import sys
from pathlib import Path

import pytest

from model.LMConfig import VLMConfig
from model.processing import VLMProcessor, load_tokenizer
from scripts.processes import find_browser
from tests.helpers import (
    TOKENIZER,
    picture,
    small_image_processor,
    small_model,
    small_vision_encoder,
    write_rows,
)


@pytest.fixture(autouse=True)
def own_main_script():
    """Streamlit's tests leave their program as the main script, which child processes would run."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def model():
    return small_model()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return VLMProcessor(
        tokenizer,
        small_image_processor(),
        VLMConfig.for_vision_encoder(small_vision_encoder().config, vocab_size=len(tokenizer)),
    )


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory) -> Path:
    """A folder as CLIP's: config, weights, preprocessing."""
    folder = tmp_path_factory.mktemp("vision_encoder")
    small_vision_encoder().save_pretrained(folder)
    small_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory) -> Path:
    """24 rows with 0, 1 or 2 images, in rows.jsonl and images/."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "images").mkdir()
    rows = []
    for index in range(24):
        names = [f"{index}-{k}.png" for k in range(index % 3)]
        for k, name in enumerate(names):
            picture(2 * index + k).save(folder / "images" / name)
        question = "<image>\n" * len(names) + "What color is the circle?" * (1 + index % 4)
        row = {
            "conversations": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "red blue"[: 3 + index % 6]},
            ]
        }
        rows.append(row | ({"image": ", ".join(names)} if names else {}))
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def browser():
    """Chromium or Chrome, without a window."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
