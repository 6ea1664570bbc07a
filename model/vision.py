"""The frozen CLIP vision encoder: find it, load its vision half, turn pictures into patch features."""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from common.errors import MissingFileError, UserError

VISION_MODEL_PATH = (
    "model/vision_model"  # the vision encoder lies here, or in clip-vit-base-patch16/ below
)


def find_vision_model(path: str | Path = VISION_MODEL_PATH) -> Path:
    """The folder that holds the vision encoder's config.json: `path` itself or `path`/clip-vit-base-patch16."""
    for folder in (Path(path), Path(path) / "clip-vit-base-patch16"):
        if (folder / "config.json").is_file():
            return folder
    raise MissingFileError(
        f"no CLIP in {path}: fetch it with `python -m scripts.download clip`, or point --vision_model to it"
    )


@contextmanager
def quiet_transformers():
    """No progress bars, and no report of the keys that were left out on purpose (CLIP's text half)."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def load_vision_encoder(
    path: str | Path = VISION_MODEL_PATH,
) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """(frozen vision encoder in eval mode and fp32, image processor). Of a whole CLIP only the vision half is read."""
    folder = find_vision_model(path)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            vision_encoder, loading = CLIPVisionModel.from_pretrained(
                folder,
                config=getattr(config, "vision_config", config),
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            image_processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot load the vision encoder in {folder} ({reason}): fetch it again"
        ) from error
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise UserError(
            f"the vision encoder in {folder} lacks {len(missing)} weights, such as {missing[0]}: fetch it again"
        )
    return vision_encoder.requires_grad_(False).eval(), image_processor


def normalize_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8[k, 3, H, W] -> float32[k, 3, H, W], as CLIPImageProcessor's rescaling and normalisation; mean, std float[3, 1, 1]."""
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def patch_features(vision_encoder: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """float[k, 3, H, W] -> float[k, patches, width]: the last layer's states without the class token, before post_layernorm."""
    return vision_encoder(pixel_values=pixel_values.to(vision_encoder.dtype)).last_hidden_state[
        :, 1:
    ]
