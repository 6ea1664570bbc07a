"""Readers of the published formats, and what they do with rows that cannot be used."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from common.errors import BadSampleError, MissingFileError, UserError
from dataset.json_rows import JsonLinesRows
from dataset.vlm_dataset import VLMDataset
from tests.helpers import N_PATCHES, picture, run_cold, write_rows
from trainer.collate import TrainSamples


def row(image=None, question="<image>\nWhat?", answer="red") -> dict:
    turns = {
        "conversations": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
    return turns if image is None else turns | {"image": image}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        picture().save(tmp_path / "images" / name)
    picture().save(tmp_path / "secret.jpg")
    return tmp_path


def read(folder, rows, processor, max_length=200) -> VLMDataset:
    return VLMDataset(
        write_rows(folder / "data.jsonl", rows), folder / "images", processor, max_length
    )


def test_rows_with_no_one_and_two_images(folder, processor):
    rows = [
        row("a.jpg"),
        row("a.jpg, b.jpg", "<image> <image> What changes?"),
        row(
            "a.jpg, sub/c.jpg", "Source: <image> Target: <image> What?<image>"
        ),  # one tag too many, as published
        row(None, "你好"),
    ]
    data = read(folder, rows, processor)
    assert [len(data[i]["pixel_values"]) for i in range(4)] == [1, 2, 2, 0]
    assert [int((data[i]["input_ids"] == 34).sum()) for i in range(4)] == [
        N_PATCHES,
        2 * N_PATCHES,
        2 * N_PATCHES,
        0,
    ]
    assert not data.skipped and data.repaired == {"surplus <image> dropped": 1}
    assert (data.text_only, data.n_images, data.n_pictures) == (1, 5, 3)
    assert data.lengths[1] > data.lengths[0] > data.lengths[3], "estimated lengths order the rows"


def test_unusable_rows_are_counted_by_reason(folder, processor):
    lines = [json.dumps(r) for r in (
        row("a.jpg"), row("missing.jpg"), row("../secret.jpg"), row(str(folder / "secret.jpg")),
        row("a.jpg, b.jpg", "no tag"), row("a.jpg", answer=" "), {"image": "a.jpg"}, row({"x": 1}),
    )]  # fmt: skip
    lines += [
        json.dumps(row("a.jpg", answer="half a \ud83d")),
        json.dumps(row("\ud83d.jpg")),
        json.dumps(row("b.jpg", answer="🐶")),
    ]
    lines += [
        "{broken",
        "[1, 2]",
        "",
        '"text"',
        '{"conversations": [{"role": "user", "content": "only a question"}]}',
    ]
    (folder / "data.jsonl").write_bytes(
        "\n".join(lines).encode() + b"\n\xff\xfe\n" + json.dumps(row("b.jpg")).encode()
    )
    data = VLMDataset(folder / "data.jsonl", folder / "images", processor, 200)
    assert dict(data.skipped) == {
        "image missing": 1, "image path leaves its folder": 2, "fewer <image> than images": 1,
        "empty answer": 1, "no conversation": 1, "image is no name": 2, "not a JSON object": 4,
        "no answer": 1, "half a character": 1,
    }  # fmt: skip
    assert len(data) == 3 and len(data[2]["pixel_values"]) == 1


def test_a_damaged_picture_is_found_when_it_is_needed(folder, processor):
    (folder / "images/b.jpg").write_bytes((folder / "images/a.jpg").read_bytes()[:200])
    data = read(folder, [row("a.jpg"), row("b.jpg")], processor)
    assert len(data) == 2
    with pytest.raises(BadSampleError, match="image damaged"):
        data[1]


def test_what_is_missing_is_named(folder, processor):
    with pytest.raises(
        MissingFileError,
        match=r"no data at .*sft_vlm_data.jsonl: fetch .* with .python -m scripts.download",
    ):
        VLMDataset(folder / "sft_vlm_data.jsonl", folder, processor, 100)
    path = write_rows(folder / "data.jsonl", [row("a.jpg")])
    with pytest.raises(
        UserError, match=r"1 image missing.*is missing or empty: fetch it or its .zip"
    ):
        VLMDataset(path, folder / "pretrain_images", processor, 100)
    (folder / "pretrain_images.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"pretrain_images.zip is no whole .zip"):
        VLMDataset(path, folder / "pretrain_images", processor, 100)
    with pytest.raises(UserError, match="no usable row .it is empty."):
        VLMDataset(write_rows(folder / "empty.jsonl", []), folder, processor, 100)


def test_parquet_gives_what_json_lines_give(folder, processor):
    rows = [row("a.jpg"), row("a.jpg, b.jpg", "<image><image> What?"), row(None, "hello")]
    from_lines = read(folder, rows, processor)
    images = [
        [(folder / "images" / name.strip()).read_bytes() for name in r["image"].split(",")]
        if "image" in r
        else []
        for r in rows
    ]
    texts = [json.dumps(r["conversations"]) for r in rows]
    parquet.write_table(
        pa.table({"conversations": [*texts, "{"], "image_bytes": [*images, []]}),
        folder / "data.parquet",
    )
    data = VLMDataset(folder / "data.parquet", None, processor, 200)
    assert len(data) == 3 and dict(data.skipped) == {"not a JSON object": 1}
    for i in range(3):
        for name, tensor in from_lines[i].items():
            assert torch.equal(data[i][name], tensor)
    single = pa.table(
        {"conversations": texts[:1], "image_bytes": [images[0][0]]}
    )  # bytes instead of a list of bytes
    parquet.write_table(single, folder / "single.parquet")
    assert torch.equal(
        VLMDataset(folder / "single.parquet", None, processor, 200)[0]["pixel_values"],
        data[0]["pixel_values"],
    )
    (folder / "bad.parquet").write_bytes((folder / "data.parquet").read_bytes()[:100])
    with pytest.raises(UserError, match="is cut off after 100 bytes: fetch it again"):
        VLMDataset(folder / "bad.parquet", None, processor, 200)


def test_images_reach_the_sample_in_the_order_of_the_row(folder, processor):
    for name, color in (("a.jpg", "black"), ("b.jpg", "white")):
        picture().resize((60, 60)).point(lambda _, c=color: 0 if c == "black" else 255).save(
            folder / "images" / name
        )
    data = read(folder, [row("b.jpg, a.jpg", "<image> <image> What?")], processor)
    white, black = data[0]["pixel_values"].mean(dim=(1, 2, 3))
    assert white > 1 > -1 > black


def test_memory_holds_offsets_not_rows(folder, processor):
    data = read(folder, [row("a.jpg", "<image>" + "x" * 1000) for _ in range(500)], processor)
    assert data.keys.nbytes == 4000 and data.lengths.nbytes == 2000
    buffer = io.BytesIO()
    torch.save(data.rows.__dict__, buffer)
    assert buffer.tell() < 10_000, "what a loader worker receives does not grow with the text"


def test_a_large_set_is_checked_once(folder, processor, monkeypatch):
    """A cached index opens without a scan and gives the same rows.

    It is dropped when the file or a setting changes, and when it is torn.
    """
    monkeypatch.setattr("dataset.vlm_dataset.CACHED_FROM", 3)
    scans = []
    scan = JsonLinesRows.scan
    monkeypatch.setattr(JsonLinesRows, "scan", lambda rows: scans.append(1) or scan(rows))
    rows = [row("a.jpg"), row("b.jpg", answer=""), row("b.jpg")]
    first, again = (
        read(folder, rows, processor),
        VLMDataset(folder / "data.jsonl", folder / "images", processor, 200),
    )
    assert len(scans) == 1 and isinstance(again.keys.base, np.memmap)
    assert (
        again.lengths.tolist() == first.lengths.tolist()
        and again.skipped == first.skipped
        and again.n_images == 2
    )
    assert all(torch.equal(first[i]["input_ids"], again[i]["input_ids"]) for i in range(2))
    monkeypatch.chdir(folder)
    VLMDataset("data.jsonl", "images", processor, 200)
    assert len(scans) == 1, "the same folder"
    VLMDataset(folder / "data.jsonl", folder / "images", processor, 190)
    assert len(scans) == 2, "another max_length"
    index = folder / ".data.jsonl.rows.npy"
    index.write_bytes(index.read_bytes()[:-4])
    assert (
        len(VLMDataset(folder / "data.jsonl", folder / "images", processor, 190)) == 2
        and len(scans) == 3
    )
    assert len(read(folder, [*rows, row("a.jpg")], processor)) == 3 and len(scans) == 4
    read(folder, [*rows, row("late.jpg")], processor)
    picture().save(folder / "images" / "late.jpg")
    assert len(VLMDataset(folder / "data.jsonl", folder / "images", processor, 200)) == 3, (
        "an image that came later"
    )


def test_a_set_of_text_and_pictures_needs_no_pyarrow(folder, tmp_path):
    """What a run does not use is not imported; a missing package is asked for in one line."""
    write_rows(folder / "data.jsonl", [row("a.jpg"), row(r"sub\c.jpg")])
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from dataset.mixture import find_sources, open_data\n"
        "from dataset.rows import open_rows\n"
        f"find_sources([{str(folder / 'data.jsonl')!r}], None)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
        f"rows = open_rows({str(folder / 'data.jsonl')!r}, {str(folder / 'images')!r})\n"
        "print([len(rows.check_images(row)) for _, _, row in rows.scan()])\n"
        "import dataset.vlm_dataset\n"
        "from common.errors import run_command\n"
        f"run_command(lambda: open_rows({str(folder / 'data.parquet')!r}, None))\n"
    )
    (folder / "data.parquet").touch()
    finished = run_cold("-c", code)
    assert finished.returncode == 2
    assert finished.stdout.splitlines() == [
        "False False",
        "[1, 1]",
        "error: reading Parquet needs pyarrow: pip install -r requirements.txt",
    ]


def test_an_image_that_vanishes_costs_its_row(folder, processor):
    data = read(folder, [row("a.jpg"), row("b.jpg")], processor)
    (folder / "images" / "b.jpg").unlink()
    samples = TrainSamples(data)
    assert samples[1] == (1, "image missing") and len(samples[0][1]["images"]) == 1
