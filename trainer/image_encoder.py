"""Patch features of a batch's images."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from transformers import CLIPVisionModel

from model.vision import normalize_pixels, patch_features
from trainer.collate import Batch
from trainer.feature_cache import FeatureCache
from trainer.runtime import Runtime

UNWRITTEN_BATCHES = 8  # that may wait for the disk before training waits for it


class ImageEncoder:
    """Turns a batch's images into patch features: cached ones as they are, the others by the vision encoder, which are then kept."""

    def __init__(
        self,
        vision_encoder: CLIPVisionModel,
        image_processor,
        cache: FeatureCache | None,
        runtime: Runtime,
    ):
        self.tower, self.cache = vision_encoder, cache
        statistics = torch.tensor(
            [image_processor.image_mean, image_processor.image_std], device=runtime.device
        )
        self.mean, self.std = statistics.view(2, 3, 1, 1)  # each (3, 1, 1)
        self._writer = ThreadPoolExecutor(
            max_workers=1
        )  # disk and checksums do not hold up training
        self._unwritten: deque[Future] = deque()

    def features(self, batch: Batch) -> torch.Tensor | None:
        """[k, patches, width] on the device of the batch, or None without images."""
        if batch.is_cached is None:
            return None
        if batch.pixels is None:
            return batch.cached_features
        features = self._encode(batch.pixels)
        if self.cache is not None:
            features = features.to(self.cache.dtype)  # what a later epoch will read
            fresh = [
                digest
                for digest, is_cached in zip(batch.digests, batch.is_cached.tolist())
                if not is_cached
            ]
            self._keep(fresh, features)
        if batch.cached_features is None:
            return features
        order = (
            batch.is_cached.int().argsort(stable=True).argsort()
        )  # fresh ones first, then cached ones
        return torch.cat((features, batch.cached_features))[
            order.to(features.device, non_blocking=True)
        ]

    def find_features(self, digest: bytes) -> torch.Tensor | None:
        """[patches, width] of an image seen before, on the host."""
        return self.cache.find(digest) if self.cache is not None else None

    def close(self) -> None:
        """Wait until what was computed is on disk."""
        self._writer.shutdown()

    def _keep(self, digests: list[bytes], features: torch.Tensor) -> None:
        if len(self._unwritten) >= UNWRITTEN_BATCHES:
            self._unwritten.popleft().result()
        arrived = torch.cuda.Event() if features.is_cuda else None
        on_host = features.to("cpu", non_blocking=True)
        if arrived:
            arrived.record()
        self._unwritten.append(self._writer.submit(self._write, digests, on_host, arrived))

    def _write(
        self, digests: list[bytes], features: torch.Tensor, arrived: torch.cuda.Event | None
    ) -> None:
        if arrived:
            arrived.synchronize()
        for digest, one in zip(digests, features):
            self.cache.add(digest, one)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8[m, 3, H, W] -> [m, patches, width]. With a cache on a CPU one image at a time: an image's features then do
        not depend, in the last bit, on those it came with, and a resumed run is the same run whatever is cached."""
        alone = self.cache is not None and pixels.device.type == "cpu"
        parts = pixels.split(1 if alone else len(pixels))
        return torch.cat(
            [
                patch_features(self.tower, normalize_pixels(part, self.mean, self.std))
                for part in parts
            ]
        )
