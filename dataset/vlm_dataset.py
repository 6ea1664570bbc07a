"""Conversations about images, read from the published formats, one encoded sample at a time.

JSON lines keep only each row's place in the file in memory (dataset/row_index.py); rows are checked once, images when they
are needed. Whatever cannot be used is counted by reason, never fatal.
"""

import io
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.row_index import ROW, RowIndex, keep_index, open_index
from model.errors import BadSampleError, MissingFileError, UserError, list_reasons
from model.processing import VLMProcessor, check_conversation, match_image_tags

BYTES_PER_TOKEN = (
    3  # of UTF-8 text with a 6,400-word vocabulary, in English and Chinese alike; only orders rows by length
)


class JsonLinesRows:
    """Rows of a .jsonl file by their byte offsets: one seek to read one."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Iterator[tuple[int, int, dict | None]]:
        """(offset, bytes, row) of every line; the row is None where the line is no JSON object."""
        with (
            open(self.path, "rb") as file,
            tqdm(
                total=self.path.stat().st_size,
                desc=f"check {self.path.name}",
                unit="B",
                unit_scale=True,
                leave=False,
                delay=1,
            ) as progress,
        ):
            offset = 0
            for line in file:
                if line.strip():
                    yield offset, len(line), self._parse(line)
                offset += len(line)
                progress.update(len(line))

    def read(self, offset: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return self._parse(file.readline())

    @staticmethod
    def _parse(line: bytes) -> dict | None:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        return row if isinstance(row, dict) else None


class ParquetRows:
    """Rows of a .parquet file with `conversations` (JSON text) and `image_bytes` (bytes or a list of bytes)."""

    def __init__(self, path: Path):
        try:
            self.table = parquet.read_table(path, columns=["conversations", "image_bytes"], memory_map=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged or lacks conversations and image_bytes: fetch it again") from error

    def scan(self) -> Iterator[tuple[int, int, dict | None]]:
        for number in range(len(self.table)):
            yield number, len(str(self.table["conversations"][number])), self.read(number)

    def read(self, number: int) -> dict | None:
        try:
            conversations = json.loads(self.table["conversations"][number].as_py())
        except (ValueError, TypeError):
            return None
        images = self.table["image_bytes"][number].as_py()
        return {"conversations": conversations, "image_bytes": [images] if isinstance(images, bytes) else images or []}


class VLMDataset(Dataset):
    """`ds[i]` is {input_ids, labels, pixel_values} of usable row i, or raises BadSampleError where its image is damaged.

    data_path: .jsonl or .parquet; images_path: the folder of a .jsonl's images. `lengths[i]` estimates the tokens of row i,
    `skipped` counts rows left out at the start by reason, `repaired` those that had `<image>` tags to spare.
    """

    def __init__(self, data_path: str | Path, images_path: str | Path | None, processor: VLMProcessor, max_length: int):
        self.data_path = Path(data_path)
        self.images_path = Path(images_path).resolve() if images_path else None
        self.processor, self.max_length = processor, max_length
        if not self.data_path.is_file():
            raise MissingFileError(
                f"no data at {data_path}: fetch {self.data_path.name} of jingyaogong/minimind-v_dataset into "
                f"{self.data_path.parent}/, or pass --data"
            )
        self.rows = (
            ParquetRows(self.data_path) if self.data_path.suffix == ".parquet" else JsonLinesRows(self.data_path)
        )
        settings = dict(
            images=str(self.images_path), max_length=max_length, n_image_tokens=processor.config.n_image_tokens
        )
        index = open_index(self.data_path, **settings)
        if index is None:
            index = self._check_rows()
            keep_index(index, self.data_path, **settings)
        self.keys, self.lengths = index.rows["key"], index.rows["length"]
        self.skipped, self.repaired, self.n_images = index.skipped, index.repaired, index.n_images

    def _check_rows(self) -> RowIndex:
        """Find the usable rows without decoding an image."""
        files = self._list_images()
        index, keys, lengths = RowIndex(np.empty(0, ROW)), array("q"), array("i")
        for key, n_bytes, row in self.rows.scan():
            try:
                if row is None:
                    raise BadSampleError("not a JSON object")
                images = self._images(row, files)
                turns = check_conversation(row.get("conversations"))
                if not any(role == "assistant" for role, _ in turns):
                    raise BadSampleError("no answer")
                _, surplus = match_image_tags(turns, len(images))
            except BadSampleError as error:
                index.skipped[error.args[0]] += 1
                continue
            index.repaired += surplus > 0
            index.n_images += len(images)
            keys.append(key)
            lengths.append(
                min(self.max_length, n_bytes // BYTES_PER_TOKEN + len(images) * self.processor.config.n_image_tokens)
            )
        if not keys:
            reasons = list_reasons(index.skipped) or "it is empty"
            raise UserError(f"{self.data_path} has no usable row ({reasons}){self._hint(files, index.skipped)}")
        index.rows = np.empty(len(keys), ROW)
        index.rows["key"], index.rows["length"] = keys, lengths
        return index

    def _list_images(self) -> set[str]:
        """Names of the files in the image folder, read once: faster than asking for half a million one by one."""
        if self.images_path is None or not self.images_path.is_dir():
            return set()
        return {path.name for path in self.images_path.iterdir()}

    def _hint(self, files: set[str], skipped: Counter[str]) -> str:
        if files or not skipped["image missing"]:
            return ""
        if self.images_path is None:
            return "; no image folder is given: pass --images_path"
        archive = f"{self.images_path}.zip"
        action = f"unzip {archive}" if Path(archive).is_file() else "fetch and unzip the images, or pass --images_path"
        return f"; the image folder {self.images_path} is missing or empty: {action}"

    def _images(self, row: dict, files: set[str] | None = None) -> list[Path | io.BytesIO]:
        """What `load_image` takes for each image of the row; with `files`, checks that they exist."""
        if "image_bytes" in row:
            return [io.BytesIO(image) for image in row["image_bytes"]]
        names = row.get("image") or []
        if not isinstance(names, (str, list)):
            raise BadSampleError("image is no name", repr(names))
        paths = []
        for name in names.split(",") if isinstance(names, str) else names:
            name = str(name).strip()
            if self.images_path is None:
                raise BadSampleError("image missing", f"{name}: no image folder is given")
            path = self.images_path / name
            if not path.resolve().is_relative_to(self.images_path):
                raise BadSampleError("image path leaves its folder", name)
            if files is not None and name not in files and not path.is_file():
                raise BadSampleError("image missing", name)
            paths.append(path)
        return paths

    def read(self, index: int) -> tuple[dict, list]:
        """(row, its images as `load_image` takes them), not encoded: what evaluation needs."""
        row = self.rows.read(int(self.keys[index]))
        return row, self._images(row)

    def __len__(self) -> int:
        return len(self.lengths)

    def read_text(self, index: int) -> tuple[dict[str, torch.Tensor], list]:
        """({input_ids, labels}, its images as `load_image` takes them), none opened."""
        row, images = self.read(index)
        return self.processor.encode_text(row["conversations"], images, self.max_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, images = self.read(index)
        return self.processor.encode(row["conversations"], images, self.max_length)
