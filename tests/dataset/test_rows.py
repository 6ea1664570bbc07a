"""Where rows and pictures may come from: archives, Parquet files, several sources at once."""

import base64
import io
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadSampleError, MissingFileError, UserError
from dataset.clean.examine import examine_rows
from dataset.clean.settings import Settings
from dataset.images import ImageFolder, ImageZip, open_images
from dataset.mixture import find_sources, open_data, repeat_rows, split_weight
from dataset.rows import open_rows
from tests.helpers import picture, run_script, write_rows, write_zip
from trainer.sampler import StepSampler


def as_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def row(name: str | None, answer: str) -> dict:
    question = "<image>\nWhat?" if name else "What?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns} | ({"image": name} if name else {})


def write_parquet(path, rows: list[tuple[str, list[bytes]]], **options):
    texts = [
        json.dumps([{"content": "<image>" * len(pictures) + "?"}, {"content": text}])
        for text, pictures in rows
    ]
    table = pa.table({"conversations": texts, "image_bytes": [pictures for _, pictures in rows]})
    parquet.write_table(table, path, **options)
    return path


def test_rows_with_a_packed_folder_train(tmp_path, processor):
    """`--images dataset/pretrain_images` finds its .zip where the folder is missing."""
    write_zip(
        tmp_path / "images.zip", {"images/a.jpg": as_bytes(1), "images/b.jpg": as_bytes(2)[:300]}
    )
    path = write_rows(
        tmp_path / "rows.jsonl", [row("a.jpg", "red"), row("b.jpg", "x"), row("c.jpg", "x")]
    )
    data = open_data([str(path)], [str(tmp_path / "images")], processor, 200)
    assert isinstance(data.rows.image_source, ImageZip) and dict(data.skipped) == {
        "image missing": 1
    }
    assert len(data[0]["pixel_values"]) == 1
    with pytest.raises(BadSampleError, match="image damaged"):
        data[1]
    (tmp_path / "images").mkdir()
    assert isinstance(open_images(tmp_path / "images"), ImageFolder)


def test_one_picture_is_counted_once_whatever_says_it(tmp_path, processor):
    write_parquet(tmp_path / "a.parquet", [("red", [as_bytes(1)]), ("blue", [as_bytes(2)])])
    inside = "data:image/jpeg;base64," + base64.b64encode(as_bytes(1)).decode()
    write_rows(tmp_path / "b.jsonl", [row(inside, "red"), row(inside, "rot")])
    paths = [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]
    assert open_data(paths, None, processor, 200).n_pictures == 2

    # a file, however its name is spelled
    (tmp_path / "caf\u00e9.jpg").write_bytes(as_bytes(3))
    names = ["caf\u00e9.jpg", "cafe\u0301.jpg", "./caf\u00e9.jpg", f"{tmp_path}/caf\u00e9.jpg"]
    path = write_rows(tmp_path / "c.jsonl", [row(name, f"red {name}") for name in names])
    assert open_data([str(path)], [str(tmp_path)], processor, 200).n_pictures == 1
    settings = Settings(data=str(path), images=str(tmp_path), out=str(tmp_path / "clean"))
    rows, images, *_ = examine_rows(settings, open_rows(path, tmp_path).keys())
    assert list(rows["n_images"]) == [1] * 4 and len(set(images)) == 1


def test_a_mixture_has_each_source_as_often_as_its_weight(tmp_path, processor):
    for name, n_rows in (("a", 100), ("b", 60), ("c", 90)):
        write_rows(
            tmp_path / f"{name}.jsonl", [row(None, f"{name}{number}") for number in range(n_rows)]
        )
    entries = [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl", f"{tmp_path}/c.jsonl:.34"]
    data = open_data(entries, None, processor, 200)
    counts = Counter(data.read(index)[0].conversations[1]["content"] for index in range(len(data)))
    assert all(counts[f"a{number}"] == 2 for number in range(100)) and all(
        counts[f"b{n}"] == 1 for n in range(60)
    )
    assert sum(count for text, count in counts.items() if text[0] == "c") == 30
    assert len(data) == 290 == len(data.lengths) and (data.text_only, data.n_images) == (290, 0)
    order = [index for batch in StepSampler(data.lengths, 4, seed=1) for index in batch]
    assert sorted(order) == list(range(290))
    for share in np.split(data.part[order], 5):
        assert (
            np.abs(np.bincount(share, minlength=3) / 58 - np.array([200, 60, 30]) / 290).max()
            < 0.15
        ), "shuffled together"


@given(st.integers(0, 300), st.integers(1, 400), st.integers(1, 100))
def test_repeats_are_as_many_as_the_weight_says_and_spread(n_rows, numerator, denominator):
    rows = repeat_rows(n_rows, Fraction(numerator, denominator))
    times = np.bincount(rows, minlength=n_rows)
    assert len(rows) == n_rows * numerator // denominator
    assert n_rows == 0 or times.max() - times.min() <= 1
    if n_rows:
        halves = times[: n_rows // 2].sum(), times[n_rows - n_rows // 2 :].sum()
        assert abs(int(halves[0]) - int(halves[1])) <= 1


def test_what_data_may_say(tmp_path):
    colon = write_rows(tmp_path / "odd:3", [])
    assert split_weight(str(colon)) == (str(colon), 1), "a file of that very name"
    assert split_weight("a.jsonl:0.25") == ("a.jsonl", Fraction(1, 4)) and split_weight(
        "C:/a.jsonl"
    ) == ("C:/a.jsonl", 1)
    for entry in ("a.jsonl:0", "a.jsonl:1000"):
        with pytest.raises(UserError, match="a weight has to be above 0 and at most 100"):
            split_weight(entry)
    with pytest.raises(MissingFileError, match=r"no data fits .*\*\.parquet"):
        find_sources([str(tmp_path / "*.parquet")], None)
    with pytest.raises(MissingFileError, match=r"no data at .*none.jsonl: fetch the published"):
        find_sources([str(colon), str(tmp_path / "none.jsonl:2")], None)
    with pytest.raises(UserError, match="--images gives 2 folders for 3 entries"):
        find_sources(["a", "b", "c"], ["x", "y"])
    two = [str(colon), str(write_rows(tmp_path / "b.jsonl", [])) + ":2"]
    assert [source.images for source in find_sources(two, ["x", "y"])] == ["x", "y"]
    assert [source.images for source in find_sources(two, ["x"])] == ["x", "x"]
    assert [source.weight for source in find_sources(two, ["x"])] == [1, 2]
    assert len(repeat_rows(10**6, split_weight("a.jsonl:0.3333333333333333333")[1])) == 333_333


def test_a_script_trains_on_a_mixture(tmp_path, rows_dir, vision_dir):
    """A folder, an archive and Parquet files in one run."""
    write_zip(tmp_path / "zipped.zip", {"z.jpg": as_bytes(1)})
    write_rows(tmp_path / "zipped.jsonl", [row("z.jpg", "red")] * 5)
    write_parquet(tmp_path / "p0.parquet", [("blue", [as_bytes(2)])] * 4)
    finished = run_script(
        "train_sft_vlm.py", "--dim", "64", "--n_layers", "2", "--epochs", "1", "--num_workers", "2",
        "--device", "cpu", "--dtype", "float32", "--init_weights", "none", "--out_dir", tmp_path,
        "--tokenizer", "model/demo/tokenizer", "--vision_model", vision_dir,
        "--data", rows_dir / "rows.jsonl", f"{tmp_path}/zipped.jsonl:2", f"{tmp_path}/p*.parquet",
        "--images", rows_dir / "images", tmp_path / "zipped.zip", "none",
    )  # fmt: skip
    assert finished.returncode == 0 and "data: 38 rows" in finished.stdout, finished.stdout
    assert "skipped" not in finished.stdout and "left out" not in finished.stdout
