"""Patch features of images, computed once: the vision encoder is frozen, so what it says of a picture never changes.

A cache folder belongs to one vision_encoder, one preprocessing and one number format. In it, each process that writes has a pair
of files of its own: NAME.features, slots of equal size, and NAME.index, one record a slot, written after it. A record
holds the digest of the image file and a checksum of the slot, so neither a changed picture nor a torn write is ever used.
"""

import hashlib
import json
import os
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModel

from trainer.runtime import Runtime

RECORD = np.dtype([("head", "<u8"), ("tail", "<u8"), ("checksum", "<u4")])
UNWRITTEN_BATCHES = 8  # that may wait for the disk before training waits for it
KEEP_FREE = 2 * 10**9  # bytes of the disk that the cache leaves alone
REFRESH_SECONDS = 5  # how often a reader looks for what others have written


class FeatureCache:
    """Features [patches, width] in 16 bits by the digest of an image's file; safe with many readers and writers."""

    def __init__(
        self, folder: Path, shape: tuple[int, int], dtype: torch.dtype, limit_bytes: float
    ):
        self.folder, self.shape, self.dtype, self.limit_bytes = folder, shape, dtype, limit_bytes
        self.slot_bytes = 2 * shape[0] * shape[1]
        self.damaged = 0  # slots whose checksum was wrong
        self.closed_reason = ""  # why nothing more is written
        self._written: dict[bytes, tuple[Path, int, int]] = {}
        self._files = None
        folder.mkdir(parents=True, exist_ok=True)
        self._load_index()

    def __len__(self) -> int:
        return len(self._index) + len(self._written)

    def find(self, digest: bytes) -> torch.Tensor | None:
        """[patches, width], or None where the image is not there or its slot is damaged."""
        place = self._written.get(digest) or self._look_up(digest)
        if place is None and time.monotonic() > self._loaded_at + REFRESH_SECONDS:
            self._load_index()
            place = self._look_up(digest)
        if place is None:
            return None
        path, slot, checksum = place
        with open(path, "rb") as file:
            file.seek(slot * self.slot_bytes)
            stored = file.read(self.slot_bytes)
        if len(stored) < self.slot_bytes or zlib.crc32(stored) != checksum:
            self.damaged += 1
            return None
        return torch.frombuffer(bytearray(stored), dtype=self.dtype).view(self.shape)

    def add(self, digest: bytes, features: torch.Tensor) -> None:
        """Keep [patches, width]; silently nothing once the limit or the end of the disk is reached (`closed_reason`)."""
        if self.closed_reason or digest in self._written:
            return
        if (len(self) + 1) * self.slot_bytes > self.limit_bytes:
            self.closed_reason = "the limit is reached (--feature_cache_gb)"
        elif shutil.disk_usage(self.folder).free < KEEP_FREE:
            self.closed_reason = "the disk is nearly full"
        else:
            try:
                self._append(
                    digest, features.to(self.dtype).contiguous().view(torch.int16).numpy().tobytes()
                )
            except OSError as error:
                self.closed_reason = str(error)

    def _append(self, digest: bytes, stored: bytes) -> None:
        if self._files is None:
            path = self.folder / f"{time.time_ns():x}-{os.getpid()}.features"
            self._files = (
                open(path, "ab", buffering=0),
                open(path.with_suffix(".index"), "ab", buffering=0),
            )
        features, index = self._files
        slot, checksum = features.tell() // self.slot_bytes, zlib.crc32(stored)
        features.write(stored)
        index.write(np.array((*np.frombuffer(digest, "<u8"), checksum), dtype=RECORD).tobytes())
        self._written[digest] = (Path(features.name), slot, checksum)

    def _load_index(self) -> None:
        """Read the records of all writers, sorted by digest: 36 bytes an image in memory."""
        self._loaded_at = time.monotonic()
        self._shards = sorted(self.folder.glob("*.features"))
        own = self._files[0].name if self._files else None
        records, places = [np.empty(0, RECORD)], [np.empty((0, 2), np.int32)]
        for number, path in enumerate(self._shards):
            if str(path) == own or not path.with_suffix(".index").is_file():
                continue
            whole = min(
                path.stat().st_size // self.slot_bytes,
                path.with_suffix(".index").stat().st_size // RECORD.itemsize,
            )
            records.append(np.fromfile(path.with_suffix(".index"), RECORD, whole))
            places.append(
                np.stack([np.full(whole, number), np.arange(whole)], axis=1).astype(np.int32)
            )
        self._index, self._places = np.concatenate(records), np.concatenate(places)
        order = np.argsort(self._index["head"], kind="stable")
        self._index, self._places = self._index[order], self._places[order]
        self._heads = np.ascontiguousarray(
            self._index["head"]
        )  # a search in a field would copy it each time

    def _look_up(self, digest: bytes) -> tuple[Path, int, int] | None:
        head, tail = np.frombuffer(digest, "<u8")
        at = np.searchsorted(self._heads, head)
        while at < len(self._heads) and self._heads[at] == head:
            if self._index["tail"][at] == tail:
                number, slot = self._places[at]
                return self._shards[number], int(slot), int(self._index["checksum"][at])
            at += 1
        return None


def name_cache(vision_encoder: CLIPVisionModel, image_processor, dtype: torch.dtype) -> str:
    """A folder name that changes with any weight of the vision encoder, the preprocessing, or the number format."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(vision_encoder.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode())
    return f"{digest.hexdigest()}-{str(dtype).removeprefix('torch.')}"


def open_cache(
    args, model, image_processor, n_images: int, runtime: Runtime
) -> FeatureCache | None:
    """The cache of this vision encoder below --feature_cache, after saying how large it will become; None where it would not fit."""
    shape = (model.config.n_image_tokens, model.config.vision_dim)
    size = 2 * shape[0] * shape[1] * n_images
    line = f"feature cache: {n_images:,} images take up to {size / 1e6:,.0f} MB"
    if not args.feature_cache_gb or not n_images:
        return None
    if size > args.feature_cache_gb * 1e9:
        runtime.say(f"{line}: off, --feature_cache_gb is {args.feature_cache_gb:g}")
        return None
    dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float16
    folder = Path(args.feature_cache or f"{args.out_dir}/features") / name_cache(
        model.vision_encoder, image_processor, dtype
    )
    cache = FeatureCache(folder, shape, dtype, args.feature_cache_gb * 1e9)
    free = shutil.disk_usage(folder).free
    runtime.say(
        f"{line} in {folder} ({len(cache):,} are there; {free / 1e9:.0f} GB of the disk are free)"
    )
    return cache
