"""The small run that the tests of training share."""

import pytest

from tests.helpers import TOKENIZER


@pytest.fixture(scope="session")
def options(vision_dir, rows_dir) -> dict:
    """Options of 2 epochs of 3 steps, over 24 rows of 0-2 images."""
    return dict(
        dim=64,
        n_layers=2,
        device="cpu",
        dtype="float32",
        num_workers=0,
        tokenizer=TOKENIZER,
        vision_model=vision_dir,
        data_path=rows_dir / "rows.jsonl",
        images_path=rows_dir / "images",
        epochs=2,
        batch_size=8,
        learning_rate=1e-3,
        log_interval=1,
        init_weights="none",
    )
