"""Patch features of images, computed once: a frozen vision encoder always says the same.

A cache folder belongs to one vision encoder, one preprocessing and one format. In it, each process
that writes has two files of its own: NAME.features, slots of equal size, and NAME.index, one record
a slot, written after it. A record holds the image's key and a checksum of its slot, so that neither
a changed picture nor a torn write is ever used.
"""

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.files import hash_bytes
from model.vision import as_vision_encoder
from trainer.feature_format import FeatureFormat

# The two halves of a key, and the checksum of the slot.
RECORD = np.dtype([("head", "<u8"), ("tail", "<u8"), ("checksum", "<u4")])
KEEP_FREE = 2 * 10**9  # bytes of the disk left alone
REFRESH_SECONDS = 5  # between looks for others' files


class FeatureCache:
    """Features [patches, vision_dim] by key; safe with many readers and writers.

    A key is `hash_bytes` of the picture's file, 16 bytes.

    Args:
        folder: made if it is missing.
        format: of its slots.
        limit_bytes: largest size of all slots.
        n_expected: pictures that may come, for the message that the limit is reached.
    """

    def __init__(
        self, folder: Path, format: FeatureFormat, limit_bytes: float, n_expected: int = 0
    ):
        self.folder, self.format, self.limit_bytes = folder, format, limit_bytes
        self.slot_bytes = format.slot_bytes
        self.closed_reason = ""  # why it stores no more
        self._n_damaged = 0
        self._written: dict[bytes, tuple[Path, int, int]] = {}
        self._files = None
        folder.mkdir(parents=True, exist_ok=True)
        self._load_index()
        self.wanted_bytes = (len(self) + n_expected) * self.slot_bytes

    def __len__(self) -> int:
        return len(self._index) + len(self._written)

    def find(self, key: bytes) -> torch.Tensor | None:
        """[patches, vision_dim], or None where the image is not there or its slot is damaged."""
        place = self._written.get(key) or self._look_up(key)
        # Perhaps another process has stored it in the meantime.
        if place is None and time.monotonic() > self._loaded_at + REFRESH_SECONDS:
            self._load_index()
            place = self._look_up(key)
        if place is None:
            return None
        path, slot, checksum = place
        with open(path, "rb") as file:
            file.seek(slot * self.slot_bytes)
            stored = file.read(self.slot_bytes)
        if len(stored) < self.slot_bytes or zlib.crc32(stored) != checksum:
            self._n_damaged += 1
            return None
        slot = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
        return self.format.unpack(slot[None])[0]

    def take_damaged(self) -> int:
        """How many damaged slots were met since the last call."""
        n_damaged, self._n_damaged = self._n_damaged, 0
        return n_damaged

    def add(self, key: bytes, slot: torch.Tensor) -> None:
        """Store a picture; nothing once `closed_reason` says why no more is stored.

        Args:
            key: of the picture.
            slot: uint8[slot_bytes] on the host, as `format` packs its features.
        """
        if self.closed_reason or key in self._written:
            return
        if (len(self) + 1) * self.slot_bytes > self.limit_bytes:
            limit, enough = f"{self.limit_bytes / 1e9:g} GB", needed_gb(self.wanted_bytes)
            self.closed_reason = (
                f"its limit of {limit} is reached: --feature_cache_gb {enough} would do"
            )
        elif shutil.disk_usage(self.folder).free < KEEP_FREE:
            self.closed_reason = f"less than {KEEP_FREE / 1e9:g} GB of the disk are free"
        else:
            try:
                self._append(key, slot.numpy().tobytes())
            except OSError as error:
                self.closed_reason = str(error)

    def _append(self, key: bytes, stored: bytes) -> None:
        if self._files is None:
            path = self.folder / f"{time.time_ns():x}-{os.getpid()}.features"
            paths = (path, path.with_suffix(".index"))
            self._files = tuple(open(path, "ab", buffering=0) for path in paths)
        features, index = self._files
        slot, checksum = features.tell() // self.slot_bytes, zlib.crc32(stored)
        # The record comes second: what has a record is whole.
        features.write(stored)
        index.write(np.array((*np.frombuffer(key, "<u8"), checksum), dtype=RECORD).tobytes())
        self._written[key] = (Path(features.name), slot, checksum)

    def _load_index(self) -> None:
        """Read the records of all writers, sorted by key: 36 bytes of memory an image."""
        self._loaded_at = time.monotonic()
        self._shards = sorted(self.folder.glob("*.features"))
        own = self._files[0].name if self._files else None
        records, places = [np.empty(0, RECORD)], [np.empty((0, 2), np.int32)]
        for number, path in enumerate(self._shards):
            index_path = path.with_suffix(".index")
            if str(path) == own or not index_path.is_file():
                continue
            # A writer that was killed may have left a part of a slot or of a record.
            n_slots = path.stat().st_size // self.slot_bytes
            n_whole = min(n_slots, index_path.stat().st_size // RECORD.itemsize)
            records.append(np.fromfile(index_path, RECORD, n_whole))
            place = np.stack([np.full(n_whole, number), np.arange(n_whole)], axis=1)
            places.append(place.astype(np.int32))
        self._index, self._places = np.concatenate(records), np.concatenate(places)
        order = np.argsort(self._index["head"], kind="stable")
        self._index, self._places = self._index[order], self._places[order]
        # np.searchsorted in a field of records would copy the field at each call.
        self._heads = np.ascontiguousarray(self._index["head"])

    def _look_up(self, key: bytes) -> tuple[Path, int, int] | None:
        """(file, slot, checksum) of a key in the index."""
        head, tail = np.frombuffer(key, "<u8")
        at = np.searchsorted(self._heads, head)
        while at < len(self._heads) and self._heads[at] == head:
            if self._index["tail"][at] == tail:
                number, slot = self._places[at]
                return self._shards[number], int(slot), int(self._index["checksum"][at])
            at += 1
        return None


def needed_gb(n_bytes: float) -> str:
    """The --feature_cache_gb that is enough, to a tenth."""
    return f"{max(1, math.ceil(n_bytes / 1e8)) / 10:g}"


def name_cache(vision_encoder: nn.Module, image_processor, format: FeatureFormat) -> str:
    """A folder name that changes with all that a stored number depends on.

    That is any weight, how features are made of it, the preprocessing, and the format.
    """
    encoder = as_vision_encoder(vision_encoder)

    def contents() -> Iterator[bytes]:
        for name, weight in sorted(encoder.network.state_dict().items()):
            yield name.encode() + weight.cpu().flatten().view(torch.uint8).numpy().tobytes()
        yield json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode()
        yield encoder.recipe.encode()

    return f"{hash_bytes(contents(), size=8).hex()}-{format.name}"
