"""README.md of an exported directory: what a model page of a hub shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference import VLM
    from scripts.export.config import ExportConfig


def model_card(vlm: VLM, config: ExportConfig) -> str:
    """The Markdown text."""
    return "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n"
