"""A directory that transformers reads without any code of ours, and other tools after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model.llava import to_llava

if TYPE_CHECKING:
    from inference import VLM
    from scripts.export.config import ExportConfig


def write(vlm: VLM, folder: Path, config: ExportConfig) -> None:
    """Write the model, its tokenizer and its processor."""
    to_llava(vlm.model).save_pretrained(folder)
    vlm.processor.tokenizer.save_pretrained(folder)
    vlm.processor.image_processor.save_pretrained(folder)
