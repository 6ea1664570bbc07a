"""Patch features of a batch's images: cached ones, and the others by the vision encoder."""

import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from model.image_processor import pixel_statistics
from model.model_vlm import MiniMindVLM
from model.vision import normalize_pixels, patch_features
from trainer.collate import Batch
from trainer.config import TrainConfig
from trainer.feature_cache import FeatureCache, name_cache, needed_gb
from trainer.feature_format import FeatureFormat
from trainer.runtime import Runtime

UNWRITTEN_BATCHES = 8  # more: training waits for the disk


class ImageEncoder:
    """The second half of the way that collate.py draws.

    Args:
        vision_encoder: frozen, on the device.
        image_processor: the encoder's, for how bytes become floats.
        device: of the batches.
        cache: what is computed is stored there; None computes every image each time.
    """

    def __init__(
        self,
        vision_encoder: torch.nn.Module,
        image_processor,
        device: torch.device,
        cache: FeatureCache | None = None,
    ):
        self.vision_encoder, self.cache = vision_encoder, cache
        self.mean, self.std = (each.to(device) for each in pixel_statistics(image_processor))
        # Checksums and the disk do not hold up training.
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._unwritten: deque[Future] = deque()

    def features(self, batch: Batch) -> torch.Tensor | None:
        """[k, patches, vision_dim] on the device of the batch, or None without images."""
        if batch.is_cached is None:
            return None
        if batch.pixels is None:
            return batch.cached_features
        features = self._encode(batch.pixels)
        if self.cache is not None:
            # The same numbers that a later epoch will read.
            slots = self.cache.format.pack(features)
            features = self.cache.format.unpack(slots)
            is_cached = batch.is_cached.tolist()
            keys = [key for key, is_there in zip(batch.keys, is_cached) if not is_there]
            self._store(keys, slots)
        if batch.cached_features is None:
            return features
        # Joined fresh ones first, then put into the order of the images: the second argsort turns
        # "which image comes at this place" into "at which place is this image". (A mask would make
        # the host wait for a GPU.)
        order = batch.is_cached.int().argsort(stable=True).argsort()
        joined = torch.cat((features, batch.cached_features))
        return joined[order.to(features.device, non_blocking=True)]

    def close(self) -> None:
        """Wait until what was computed is on disk."""
        self._writer.shutdown()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8[m, 3, H, W] -> [m, patches, vision_dim].

        With a cache on a CPU one image at a time: the last bits of an image's features then do not
        depend on the images beside it, and a resumed run is the same run whatever is cached.
        """
        one_by_one = self.cache is not None and pixels.device.type == "cpu"
        parts = pixels.split(1 if one_by_one else len(pixels))
        normalized = (normalize_pixels(part, self.mean, self.std) for part in parts)
        return torch.cat([patch_features(self.vision_encoder, part) for part in normalized])

    def _store(self, keys: list[bytes], slots: torch.Tensor) -> None:
        """Hand uint8[m, slot_bytes], the features of these images, to the writing thread."""
        if len(self._unwritten) >= UNWRITTEN_BATCHES:
            self._unwritten.popleft().result()
        # The copy to the host runs beside training; the event says when it has arrived.
        arrived = torch.cuda.Event() if slots.is_cuda else None
        on_host = slots.to("cpu", non_blocking=slots.is_cuda)
        if arrived:
            arrived.record()
        self._unwritten.append(self._writer.submit(self._write, keys, on_host, arrived))

    def _write(
        self, keys: list[bytes], slots: torch.Tensor, arrived: torch.cuda.Event | None
    ) -> None:
        if arrived:
            arrived.synchronize()
        for key, slot in zip(keys, slots):
            self.cache.add(key, slot)


def open_image_encoder(
    model: MiniMindVLM, train_data, val_data, config: TrainConfig, runtime: Runtime
) -> ImageEncoder:
    """The image encoder of a run, with the cache that --feature_cache asks for.

    How large the cache will become is printed before; it is off where it would not fit.
    """
    image_processor = train_data.processor.image_processor
    # its size: each distinct picture once
    shape = (model.config.n_image_tokens, model.config.vision_dim)
    dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float16
    format = FeatureFormat(shape, dtype, is_int8=config.feature_cache_dtype == "int8")
    n_pictures = train_data.n_pictures + (val_data.n_pictures if val_data else 0)
    size, limit = n_pictures * format.slot_bytes, config.feature_cache_gb * 1e9
    line = f"feature cache: {n_pictures:,} pictures take up to {size / 1e6:,.0f} MB"

    cache = None
    if size > limit:
        enough = needed_gb(size)
        smaller = needed_gb(n_pictures * replace(format, is_int8=True).slot_bytes)
        hint = f", or {smaller} with --feature_cache_dtype int8" if smaller != enough else ""
        given = f"{config.feature_cache_gb:g}"
        runtime.print(f"{line}: off, --feature_cache_gb is {given}; {enough} would do{hint}")
    elif n_pictures:
        root = Path(config.feature_cache or f"{config.out_dir}/features")
        folder = root / name_cache(model.vision_encoder, image_processor, format)
        cache = FeatureCache(folder, format, limit, n_pictures)
        free = shutil.disk_usage(folder).free / 1e9
        runtime.print(
            f"{line} in {folder} ({len(cache):,} are there; {free:.0f} GB of the disk are free)"
        )
    return ImageEncoder(model.vision_encoder, image_processor, runtime.device, cache)
