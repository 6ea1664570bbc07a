"""Rows of Parquet files: every way in which sets have them, and the copy they are read from."""

import base64
import io
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import BadSampleError, UserError
from common.files import hash_bytes
from dataset.images import open_images
from dataset.mixture import open_data
from dataset.parquet_copy import is_placeholder, open_copy
from dataset.parquet_rows import ParquetRows
from dataset.vlm_dataset import VLMDataset
from model.image import load_image
from tests.helpers import SHARED, needs_shared, picture, start_script

SIZE = (64, 56)


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PICTURES = [encode(picture(seed, SIZE)) for seed in range(4)]
BLACK = encode(Image.new("RGB", (8, 8)))


def turns(question: str = "<image>\nWhat?", answer: str = "red") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path: Path, columns: dict, **options) -> Path:
    """A Parquet file; conversations are turns, or text as they are."""
    texts = columns.get("conversations")
    if texts and isinstance(texts[0], list):
        columns = columns | {"conversations": [json.dumps(one) for one in texts]}
    parquet.write_table(pa.table(columns), path, **options)
    return path


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".arrow")


def read_pictures(rows: ParquetRows, number: int) -> list[bytes]:
    return [image.getvalue() for image in rows.images(rows.read(number))]


# Of ../shared/trouble/09: pictures of each row, and a reason for rows that have none.
NO_IMAGE = {"<image> but no image": 6}
WHOLE = {
    "all_null_type": (0, {}),
    "b64_text": (1, {}),
    "big_group": (1, {}),
    "bytes_list_struct": (1, {}),
    "bytes_struct": (1, {}),
    "conv_struct": (1, {}),
    "conv_struct_llava": (1, {}),
    "dict_text": (1, {}),
    "dict_two_groups": (1, {}),
    "hf_image": (1, {}),
    "hf_images_messages": (1, {}),
    "hf_images_texts": (1, {}),
    "large": (1, {}),
    "list_with_none": (1, {"<image> but no image": 3}),
    "null_images": (0, NO_IMAGE),
    "ok": (1, {}),
    "ok_list": (1, {}),
    "text_only_no_col": (0, {}),
    "uppercase": (1, {}),
    "views": (1, {}),
    "zero_rows": (0, {}),
}
REFUSED = {
    "cut": "is cut off after 23,765 bytes: fetch it again",
    "jsonl_named": "holds JSON, not Parquet",
    "lfs_pointer": "is a Git LFS pointer: fetch the file with `git lfs pull`",
}


@needs_shared
@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_of_trouble_are_read(name, tmp_path):
    path = shutil.copy(SHARED / f"trouble/09/{name}.parquet", tmp_path)
    rows, n_images, expected = ParquetRows(Path(path)), *WHOLE[name]
    found = [row for _, _, row in rows.scan()]
    good = [row for row in found if not isinstance(row, BadSampleError)]
    assert Counter(row.args[0] for row in found if isinstance(row, BadSampleError)) == expected
    assert {len(row.images) for row in good} == ({n_images} if good else set())
    assert len(found) == parquet.read_metadata(path).num_rows
    for row in good[:6]:
        assert [load_image(image).size for image in rows.images(row)] == [(96, 96)] * n_images


@needs_shared
@pytest.mark.parametrize("name", REFUSED)
def test_other_files_of_trouble_are_called_what_they_are(name, tmp_path):
    path = shutil.copy(SHARED / f"trouble/09/{name}.parquet", tmp_path)
    with pytest.raises(UserError, match=REFUSED[name]):
        ParquetRows(Path(path))
    assert not copies(tmp_path)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n {}", "holds JSON, not Parquet: name it .json"),
        (b"[1]", "holds JSON, not Parquet: name it .json"),
        (b"<!DOCTYPE html>", "is a web page: fetch"),
        (b"PAR1", "is cut off after 4 bytes: fetch it again"),
        (b"PAR1" + b"x" * 50, "is cut off after 54 bytes: fetch it again"),
        (b"PAR1" + b"x" * 50 + b"PAR1", "cannot be read"),
        (b"text", "is no Parquet file"),
        (b"PARE....PARE", "is encrypted"),
    ],
)
def test_what_is_no_parquet_file_is_called_what_it_is(content, words, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        ParquetRows(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_text_says_what_it_has_and_what_it_needs(tmp_path):
    path = write(tmp_path / "a.parquet", {"pixels": [1], "label": ["x"]})
    with pytest.raises(UserError, match="has columns pixels, label, needs conversations, messages"):
        ParquetRows(path)


def test_a_page_that_is_damaged_is_said_once_and_no_copy_is_left(tmp_path):
    path = write(tmp_path / "a.parquet", {"conversations": [turns()] * 500})
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"nothing can be read beyond row 0 of .*: fetch it again"):
        ParquetRows(path)
    assert not copies(tmp_path) and not [*tmp_path.glob("*.partial")]


def as_struct(content: bytes) -> dict:
    return {"bytes": content, "path": "a.jpg"}


SHAPES = {
    "bytes": lambda content: content,
    "list": lambda content: [content],
    "struct": as_struct,
    "list of structs": lambda content: [as_struct(content), None],
    "base64": lambda content: base64.b64encode(content).decode(),
    "list of base64": lambda content: [base64.b64encode(content).decode()],
    "numbers": lambda content: [*content],
}


@pytest.mark.parametrize("column", ["image_bytes", "image", "images", "Image"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_picture_is_the_same_picture(shape, column, tmp_path):
    values = [SHAPES[shape](PICTURES[number % 2]) for number in range(8)]
    columns = {"conversations": [turns()] * 8, column: values}
    rows = ParquetRows(write(tmp_path / "a.parquet", columns))
    identities = [rows.check_images(row) for _, _, row in rows.scan()]
    keys = [int.from_bytes(hash_bytes(content)[:8], "little") for content in PICTURES[:2]]
    assert identities == [[keys[0]], [keys[1]]] * 4, "the identity that the feature cache has"
    assert read_pictures(rows, 5) == [PICTURES[1]]
    assert rows.check_images(rows.read(5)) == [keys[1]], "of a row that was read, too"


@pytest.mark.parametrize(
    "kind", ["binary", "large_binary", "binary_view", "dictionary", "large list"]
)
def test_every_arrow_type_is_read(kind, tmp_path):
    numbers = [number % 3 for number in range(100)]
    images = pa.array([PICTURES[number] for number in numbers], pa.binary())
    texts = pa.array([json.dumps(turns(answer=str(number))) for number in range(100)])
    if kind == "dictionary":
        images, texts = images.dictionary_encode(), texts.dictionary_encode()
    elif kind == "large list":
        images = pa.LargeListArray.from_arrays(np.arange(101), images)
    else:
        images = images.cast(getattr(pa, kind)())
    rows = ParquetRows(
        write(tmp_path / "a.parquet", {"conversations": texts, "image": images}, row_group_size=30)
    )
    for number in (0, 31, 32, 64, 99):
        assert rows.read(number).conversations[1]["content"] == str(number)
        assert read_pictures(rows, number) == [PICTURES[numbers[number]]]


def test_columns_that_are_not_needed_cost_no_row(tmp_path):
    """Dates that Python does not have, zones that nobody knows, names of pictures beside them."""
    columns = {
        "conversations": pa.array([json.dumps(turns()).encode()] * 3, pa.binary()),
        "image": ["elsewhere.jpg"] * 3,
        "image_bytes": [PICTURES[0]] * 3,
        "late": pa.array([2**62] * 3, pa.timestamp("us")),
        "zone": pa.array([1] * 3, pa.timestamp("us", "Mars/Phobos")),
    }
    rows = ParquetRows(write(tmp_path / "a.parquet", columns))
    assert [row.conversations for _, _, row in rows.scan()] == [turns()] * 3
    assert read_pictures(rows, 2) == [PICTURES[0]]


def test_pictures_that_a_file_only_names_are_looked_up(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    columns = {"caption": ["red"] * 2, "image": [{"bytes": None, "path": "a.jpg"}] * 2}
    path = write(tmp_path / "a.parquet", columns)
    rows = ParquetRows(path, open_images(tmp_path))
    row = rows.read(1)
    assert row.images == ["a.jpg"] and load_image(rows.images(row)[0]).size == SIZE
    alone = ParquetRows(path)
    with pytest.raises(BadSampleError, match="image missing: a.jpg: no image folder is given"):
        alone.check_images(alone.read(0))


def test_a_placeholder_without_a_tag_is_a_row_of_text(tmp_path, processor):
    questions = ["What is up?", "<image>\nWhat?", "What?", "<image>\nWhat?"]
    columns = {
        "conversations": [turns(question) for question in questions],
        "image_bytes": [BLACK, PICTURES[0], PICTURES[0], BLACK],
    }
    path = write(tmp_path / "a.parquet", columns)
    data = VLMDataset(path, None, processor, 100)
    assert len(data) == 4 and not data.skipped
    assert data.text_only == 1 and sum(data.repaired.values()) == 1
    assert (data.n_images, data.n_pictures) == (3, 2)
    assert [len(data.read(number)[1]) for number in range(4)] == [0, 1, 1, 1]
    assert data.rows.read_raw(0)["image_bytes"] == [BLACK], "a row of rejects is as it came"


@pytest.mark.parametrize(
    "size, color, kind, expected",
    [
        ((8, 8), "black", "JPEG", True),
        ((1, 1), "white", "PNG", True),
        ((15, 15), (120, 30, 200), "PNG", True),
        ((16, 16), "black", "PNG", False),
        ((8, 40), "black", "PNG", False),
    ],
)
def test_a_placeholder_is_smaller_than_a_patch_and_of_one_color(size, color, kind, expected):
    assert is_placeholder(encode(Image.new("RGB", size, color), kind)) == expected


def test_no_placeholder():
    assert not is_placeholder(encode(picture(0, SIZE).resize((8, 8)), "PNG")), "two colors or more"
    assert not is_placeholder(b"") and not is_placeholder(b"x" * 100)


def test_a_bad_value_costs_its_row(tmp_path, processor):
    texts = pa.array(
        [json.dumps(turns()).encode(), b'"\xff\xfe"', b"{", json.dumps(turns()).encode()]
    )
    # As a writer that does not check what it is given.
    texts = pa.Array.from_buffers(pa.string(), 4, texts.buffers())
    images = [PICTURES[0], PICTURES[1], PICTURES[2], PICTURES[0][:60]]
    path = write(tmp_path / "a.parquet", {"conversations": texts, "image_bytes": images})
    data = VLMDataset(path, None, processor, 100)
    assert dict(data.skipped) == {"row damaged": 1, "not a JSON object": 1}
    assert len(data[0]["input_ids"]) > 0
    with pytest.raises(BadSampleError, match="image damaged"):
        data[1]
    assert data.rows.read_raw(1) == {"conversations": None, "image_bytes": []}
    assert data.rows.read_raw(2) == {"conversations": "{", "image_bytes": [PICTURES[2]]}


values = st.none() | st.sampled_from(PICTURES[:2]) | st.binary(min_size=1, max_size=30)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "conversations": texts,
                "image_bytes": values | st.lists(values, max_size=3),
                "id": st.none() | st.integers(-(2**63), 2**63 - 1),
                "extra": st.none() | st.fixed_dictionaries({"a": texts, "b": values}),
            }
        ),
        max_size=70,
    ),
    as_list=st.booleans(),
    group=st.integers(1, 80),
    compression=st.sampled_from(["snappy", "zstd", "none"]),
    use_dictionary=st.booleans(),
)
def test_rows_are_those_of_the_file(rows, as_list, group, compression, use_dictionary):
    """Whatever a table holds, any of its rows comes back as it is."""
    kind = pa.list_(pa.binary()) if as_list else pa.binary()
    for row in rows:
        value = row["image_bytes"]
        values = value if isinstance(value, list) else [value]
        row["image_bytes"] = values if as_list else next(iter(values), None)
    schema = pa.schema(
        [
            ("conversations", pa.string()),
            ("image_bytes", kind),
            ("id", pa.int64()),
            ("extra", pa.struct([("a", pa.string()), ("b", pa.binary())])),
        ]
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        parquet.write_table(
            pa.Table.from_pylist(rows, schema=schema),
            path,
            row_group_size=group,
            compression=compression,
            use_dictionary=use_dictionary,
        )
        read = ParquetRows(path)
        assert [*map(read.read_record, range(len(rows)))] == rows
        assert read.keys().tolist() == [*range(len(rows))]
        assert len([*read.scan()]) == len(rows)


def test_a_copy_is_no_larger_than_its_file(tmp_path):
    """Each distinct picture is once on disk, with however many rows it comes."""
    random = np.random.default_rng(0)
    images = [random.bytes(int(size)) for size in random.integers(2000, 9000, 300)]
    chosen = random.integers(0, len(images), 3000)
    words = ["a", "dog", "red", "house", "on", "the", "left"]
    texts = [turns(answer=" ".join(random.choice(words, 40))) for _ in chosen]
    columns = {"conversations": texts, "image_bytes": [images[number] for number in chosen]}
    path = write(tmp_path / "a.parquet", columns, dictionary_pagesize_limit=2**30)
    rows = ParquetRows(path)
    assert sum(copy.stat().st_size for copy in copies(tmp_path)) < path.stat().st_size
    assert path.stat().st_size < 1.5 * sum(map(len, images)), "each picture once in the file, too"
    assert read_pictures(rows, 2999) == [images[chosen[2999]]]


def test_files_of_many_row_groups_give_any_row(tmp_path, processor):
    columns = {
        "conversations": [
            turns("<image>" * (number % 3) + "?", f"answer {number}") for number in range(600)
        ],
        "image_bytes": [[PICTURES[0]] * (number % 3) for number in range(600)],
    }
    first, second = tmp_path / "part-0.parquet", tmp_path / "part-1.parquet"
    write(first, {name: column[:500] for name, column in columns.items()}, row_group_size=70)
    write(second, {name: column[500:] for name, column in columns.items()})
    data = open_data([str(tmp_path / "part-*.parquet")], None, processor, 200)
    assert len(data) == 600
    for number in (0, 69, 70, 499, 500, 599):
        row, pictures = data.read(number)
        assert row.conversations[1]["content"] == f"answer {number}"
        assert len(pictures) == number % 3

    # copied once, and anew where it is torn or its file has changed
    made = [path.stat().st_mtime_ns for path in copies(tmp_path)]
    assert ParquetRows(first).read(3)
    assert [path.stat().st_mtime_ns for path in copies(tmp_path)] == made
    assert len(pickle.dumps(data.parts[0].rows)) < 1000, "a worker opens the copy itself"
    assert pickle.loads(pickle.dumps(data)).read(3)[0] == data.read(3)[0]
    for copy in copies(tmp_path)[:2]:
        copy.write_bytes(copy.read_bytes()[:1000])
    write(second, {name: column[:7] for name, column in columns.items()})
    assert len(open_data([str(tmp_path / "part-*.parquet")], None, processor, 200)) == 507


def count_rows(path: Path) -> int:
    return len(ParquetRows(path).keys())


def test_processes_that_open_a_file_together_copy_it_once(tmp_path):
    path = write(tmp_path / "a.parquet", {"conversations": [turns()] * 400})
    code = (
        "from pathlib import Path; from dataset.parquet_rows import ParquetRows\n"
        f"print(len(ParquetRows(Path({str(path)!r})).keys()))"
    )
    processes = [start_script("-c", code) for _ in range(3)]
    # What comes before it is a progress bar, on a busy machine.
    assert all(process.communicate()[0].endswith("400\n") for process in processes)
    made = [copy.stat().st_mtime_ns for copy in copies(tmp_path)]
    assert count_rows(path) == 400
    assert [copy.stat().st_mtime_ns for copy in copies(tmp_path)] == made
    assert not [*tmp_path.glob("*.partial")]


def test_what_a_killed_process_left_is_swept(tmp_path):
    path = write(tmp_path / "a.parquet", {"conversations": [turns()]})
    left = tmp_path / "..a.parquet.rows.arrow.999999.partial"
    left.write_bytes(b"half a copy")
    other = tmp_path / "..b.parquet.rows.arrow.999999.partial"
    other.write_bytes(b"of another file, which may be in the making")
    assert count_rows(path) == 1
    assert not left.exists() and other.exists()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"conversations": [turns()] * 100})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10**8))
        with pytest.raises(UserError, match="needs more room: less than 1 GB .* free some space"):
            ParquetRows(path)
    assert [one.name for one in tmp_path.iterdir() if "arrow" in one.name] == []
    assert count_rows(path) == 100


def test_files_of_one_name_in_read_only_folders_have_a_copy_each(tmp_path, monkeypatch):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        columns = {"conversations": [turns("What?", f"set {name}")]}
        paths.append(write(tmp_path / name / "train-00000-of-00001.parquet", columns))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = [ParquetRows(path) for path in paths]
    answers = [rows.read(0).conversations[1]["content"] for rows in map(copy_by_pickle, opened)]
    assert answers == ["set a", "set b"]
    assert [len([*path.parent.iterdir()]) for path in paths] == [1, 1]
    folder = tmp_path / "cache" / "minimind-v"
    assert len(copies(folder)) == 4
    assert os.name != "posix" or folder.stat().st_mode & 0o777 == 0o700


def copy_by_pickle(rows: ParquetRows) -> ParquetRows:
    return pickle.loads(pickle.dumps(rows))


def test_a_copy_that_came_with_a_read_only_folder_is_used(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"conversations": [turns()]})
    ParquetRows(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_copy(path).rows.path.parent == tmp_path and not (tmp_path / "cache").exists()


def test_what_looks_like_the_mark_of_a_picture_is_one_picture_or_none(tmp_path):
    contents = [b"\0picture" + number.to_bytes(8, "little") for number in (0, 1, 2**40)]
    columns = {"conversations": [turns()] * 3, "image": contents}
    rows = ParquetRows(write(tmp_path / "a.parquet", columns))
    for _, _, row in rows.scan():
        assert len(rows.check_images(row)) == len(rows.images(row)) == 1
    for number in range(3):
        row = rows.read(number)
        assert len(rows.check_images(row)) == len(rows.images(row)) == 1


def test_a_damaged_copy_costs_a_row_and_no_run(tmp_path):
    columns = {"conversations": [turns("What?", f"{number} " * 50) for number in range(300)]}
    path = write(tmp_path / "a.parquet", columns)
    ParquetRows(path)
    copy = copies(tmp_path)[1]
    content = bytearray(copy.read_bytes())
    start = content.index(b"\x28\xb5\x2f\xfd") + 20  # in the first block that zstd wrote
    content[start : start + 200] = bytes(200)
    copy.write_bytes(content)
    rows, bad = ParquetRows(path), 0
    for number in range(300):
        try:
            rows.read(number)
        except BadSampleError as error:
            assert error.args[0]
            bad += 1
    assert 0 < bad <= 64
