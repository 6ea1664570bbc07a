"""Where rows and pictures may come from: archives, Parquet files, several sources at once."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import struct
import zipfile
from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadSampleError, MissingFileError, UserError
from dataset import images
from dataset.images import ImageFolder, ImageZip, open_images
from dataset.mixture import find_sources, open_data, repeat_rows, split_weight
from dataset.parquet_rows import ParquetRows, copy_to_arrow
from tests.helpers import picture, run_script, write_rows
from trainer.sampler import StepSampler


def as_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def row(name: str | None, answer: str) -> dict:
    question = "<image>\nWhat?" if name else "What?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns} | ({"image": name} if name else {})


def write_zip(path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def write_parquet(path, rows: list[tuple[str, list[bytes]]], **options):
    texts = [
        json.dumps([{"content": "<image>" * len(pictures) + "?"}, {"content": text}])
        for text, pictures in rows
    ]
    table = pa.table({"conversations": texts, "image_bytes": [pictures for _, pictures in rows]})
    parquet.write_table(table, path, **options)
    return path


names = st.text(
    st.characters(exclude_characters="/\\\0:", exclude_categories=("Cs",)), min_size=1, max_size=12
).filter(lambda name: name not in (".", ".."))


def has(images, name: str) -> bool:
    try:
        images.check(name)
    except BadSampleError as error:
        assert error.args[0] == "image missing"
        return False
    return True


@given(
    st.dictionaries(names, st.binary(max_size=300), max_size=8),
    st.sampled_from(["", "images/"]),
    st.booleans(),
)
def test_a_zip_gives_what_was_put_in(tmp_path_factory, content, folder, packed):
    """By the names that rows use: without a folder that all entries share."""
    path = tmp_path_factory.mktemp("zip") / "images.zip"
    write_zip(path, {folder + name: one for name, one in content.items()}, 8 if packed else 0)
    archive = ImageZip(path)
    for name, one in content.items():
        assert has(archive, name) and archive.find(name).getvalue() == one
    assert not has(archive, "no such name") and archive.count() == len(content)


def test_folders_in_an_archive_and_what_a_mac_adds(tmp_path):
    entries = {"top/a.jpg": b"a", "top/sub/b.jpg": b"b", "top/": b"", "__MACOSX/top/._a.jpg": b"?"}
    archive = ImageZip(write_zip(tmp_path / "images.zip", entries))
    assert archive.find("a.jpg").read() == b"a" and archive.find("sub/b.jpg").read() == b"b"
    assert len(archive.entries) == 2
    apart = ImageZip(write_zip(tmp_path / "apart.zip", {"x/a.jpg": b"a", "y/a.jpg": b"b"}))
    assert apart.find("x/a.jpg").read() == b"a" and apart.find("y/a.jpg").read() == b"b"


def test_an_archive_of_more_than_65535_entries(tmp_path, monkeypatch):
    """ZIP64, as the published ones are; the index is cached, and dropped when the file changes."""
    path = write_zip(tmp_path / "images.zip", {f"images/{n}.jpg": b"%d" % n for n in range(70_000)})
    archive = ImageZip(path)
    assert archive.find("69999.jpg").read() == b"69999" and archive.find("0.jpg").read() == b"0"
    parsed = []
    monkeypatch.setattr(images, "list_entries", lambda path: parsed.append(path))
    again = ImageZip(path)
    assert (
        isinstance(again.entries, np.memmap)
        and not parsed
        and again.find("69999.jpg").read() == b"69999"
    )
    assert len(pickle.dumps(again)) < 5_000_000
    monkeypatch.undo()
    write_zip(path, {"images/new.jpg": b"new"})
    assert ImageZip(path).find("new.jpg").read() == b"new"


def test_a_large_entry_has_zip64_sizes(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "images.zip", "w") as archive,
        archive.open("a.jpg", "w", force_zip64=True) as file,
    ):
        file.write(b"picture")
    assert ImageZip(tmp_path / "images.zip").find("a.jpg").read() == b"picture"


def test_sizes_and_offsets_that_are_in_the_zip64_field(tmp_path):
    """The directory of an archive over 4 GB says 0xFFFFFFFF; the true figures are in a field."""
    path = write_zip(tmp_path / "images.zip", {"a.jpg": b"picture"})
    whole = path.read_bytes()
    at, end = whole.find(b"PK\x01\x02"), whole.find(b"PK\x05\x06")
    record = bytearray(whole[at:end])
    extra = struct.pack("<HHQQQ", 1, 24, 7, 7, 0)
    record[20:28] = b"\xff" * 8
    record[42:46] = b"\xff" * 4
    record[30:32] = struct.pack("<H", len(extra))
    tail = bytearray(whole[end:])
    tail[12:16] = struct.pack("<I", len(record) + len(extra))
    path.write_bytes(whole[:at] + record + extra + tail)
    assert ImageZip(path).find("a.jpg").read() == b"picture"
    entry = images.list_entries(path)[0]
    assert (entry["size"], entry["packed"], entry["offset"]) == (7, 7, 0)


def test_names_that_do_not_say_which_alphabet_they_are_in(tmp_path):
    """Many archives hold UTF-8 names without the flag for it."""
    path = write_zip(tmp_path / "images.zip", {"图片.jpg": b"a", "é.jpg": b"b", "c.jpg": b"c"})
    content = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = content.find(magic)
        while at >= 0:
            content[at + flags : at + flags + 2] = b"\0\0"
            at = content.find(magic, at + 1)
    path.write_bytes(content)
    archive = ImageZip(path)
    assert [archive.find(name).read() for name in ("图片.jpg", "é.jpg", "c.jpg")] == [
        b"a",
        b"b",
        b"c",
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_one_rule_for_names_on_any_system(tmp_path, packed):
    """Folders may be written with backslashes; only ".." and absolute paths leave the folder."""
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/sub/a.jpg").write_bytes(b"a")
    (tmp_path / "images/b.jpg").write_bytes(b"b")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    source = ImageFolder(tmp_path / "images")
    if packed:
        source = ImageZip(write_zip(tmp_path / "x.zip", {"sub\\a.jpg": b"a", "b.jpg": b"b"}))

    def read(name: str) -> bytes:
        source.check(name)
        found = source.find(name)
        return found.read() if packed else found.read_bytes()

    inside = ["sub/a.jpg", r"sub\a.jpg", "./sub/a.jpg", "sub//a.jpg", r".\sub\..\sub\a.jpg"]
    assert [read(name) for name in inside] == [b"a"] * 5 and read(r".\b.jpg") == b"b"
    outside = [r"..\secret.jpg", "../secret.jpg", "sub/../../secret.jpg", "..", "/etc/passwd"]
    outside += [r"C:\a.jpg", "c:/a.jpg", "C:a.jpg", r"\\server\share\a.jpg", r"\a.jpg"]
    for name in outside:
        for ask in (source.check, source.find):
            with pytest.raises(BadSampleError, match="image path leaves its folder"):
                ask(name)
    assert not has(source, "sub/none.jpg") and not has(source, ".")
    with pytest.raises(BadSampleError, match="image is no name"):
        source.check("a\0.jpg")


def test_a_folder_is_listed_once_and_its_names_stay_behind(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / f"{number}.jpg").touch()
    folder = ImageFolder(tmp_path)
    listings = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listings.append(path) or listdir(path))
    monkeypatch.setattr(os.path, "isfile", lambda path: pytest.fail("asked for a listed file"))
    assert all(has(folder, f"{number}.jpg") for number in range(300)) and folder.count() == 300
    assert len(listings) == 1
    monkeypatch.undo()
    assert len(pickle.dumps(folder)) < 300 and pickle.loads(pickle.dumps(folder)).path == tmp_path
    (tmp_path / "late.jpg").touch()
    assert has(folder, "late.jpg") and not has(folder, "none.jpg")
    assert ImageFolder(tmp_path / "nothing").count() == 0


@given(st.data())
def test_an_archive_with_any_bytes_changed_is_read_right_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.zip"
    entries = {f"images/{n}.jpg": bytes([n]) * 40 for n in range(4)}
    content = bytearray(write_zip(path, entries, data.draw(st.sampled_from([0, 8]))).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] or content)
    try:
        archive = ImageZip(path)
    except UserError as error:
        assert "is no whole .zip" in str(error) and "\n" not in str(error)
        return
    for name, expected in entries.items():
        try:
            found = archive.find(name.removeprefix("images/")).read()
        except BadSampleError:
            continue
        assert found == expected


def test_a_hostile_or_damaged_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100_000)
    bomb = write_zip(
        tmp_path / "bomb.zip", {"a.jpg": bytes(10**7), "b.jpg": bytes(50_000)}, zipfile.ZIP_DEFLATED
    )
    with pytest.raises(BadSampleError, match="image too large"):
        ImageZip(bomb).find("a.jpg")
    lying = bytearray(bomb.read_bytes())
    at = lying.find(b"PK\x01\x02")
    # The directory says that ten million bytes are a thousand.
    lying[at + 24 : at + 28] = struct.pack("<I", 1000)
    (tmp_path / "lying.zip").write_bytes(lying)
    with pytest.raises(BadSampleError, match="image damaged"):
        ImageZip(tmp_path / "lying.zip").find("a.jpg")
    flipped = bytearray(
        write_zip(tmp_path / "plain.zip", {"a.jpg": b"some bytes of a picture"}).read_bytes()
    )
    flipped[45] ^= 1
    (tmp_path / "plain.zip").write_bytes(flipped)
    with pytest.raises(BadSampleError, match="checksum"):
        ImageZip(tmp_path / "plain.zip").find("a.jpg")
    for name, content in (
        ("cut.zip", bomb.read_bytes()[:-30]),
        ("none.zip", b"no archive"),
        ("empty.zip", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"is no whole \.zip .*fetch it again"):
            ImageZip(tmp_path / name)


@given(st.one_of(st.text(max_size=40), st.text(st.sampled_from("./a\0"), max_size=600)))
def test_any_name_is_inside_the_folder_or_a_reason(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "pictures"
    folder.mkdir(exist_ok=True)
    source = ImageFolder(folder)
    try:
        found = [source.find(one) for one in images.split_names(name)]
    except BadSampleError:
        return
    assert all(os.path.normpath(path).startswith(str(folder.resolve())) for path in found)
    with contextlib.suppress(BadSampleError):
        for one in images.split_names(name):
            source.check(one)
            assert source.find(one).is_file()


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


def test_parquet_files_of_many_row_groups_give_any_row(tmp_path, processor):
    rows = [(f"answer {number}", [as_bytes(number)] * (number % 3)) for number in range(600)]
    write_parquet(tmp_path / "part-0.parquet", rows[:500], row_group_size=70)
    write_parquet(tmp_path / "part-1.parquet", rows[500:])
    data = open_data([str(tmp_path / "part-*.parquet")], None, processor, 200)
    assert len(data) == 600
    for number in (0, 69, 70, 499, 500, 599):
        found, pictures = data.read(number)
        assert (
            found["conversations"][1]["content"] == f"answer {number}"
            and len(pictures) == number % 3
        )
    copy = tmp_path / ".part-0.parquet.arrow"
    made = copy.stat().st_mtime_ns
    assert ParquetRows(tmp_path / "part-0.parquet").read(3) and copy.stat().st_mtime_ns == made, (
        "copied once"
    )
    assert len(pickle.dumps(data.parts[0].rows)) < 1000, (
        "a worker that is not forked opens the copy itself"
    )
    assert pickle.loads(pickle.dumps(data)).read(3)[0] == data.read(3)[0]
    copy.write_bytes(copy.read_bytes()[:1000])
    write_parquet(tmp_path / "part-1.parquet", rows[:7])
    assert len(open_data([str(tmp_path / "part-*.parquet")], None, processor, 200)) == 507, (
        "torn, and changed"
    )


def test_processes_that_open_a_parquet_file_together_copy_it_once(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [("x", [as_bytes()])] * 400)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        copies = pool.map(copy_to_arrow, [path] * 3)
    assert copies == [tmp_path / ".rows.parquet.arrow"] * 3
    made = copies[0].stat().st_mtime_ns
    assert len(ParquetRows(path).keys()) == 400 and copies[0].stat().st_mtime_ns == made
    assert not list(tmp_path.glob("*.partial"))


def test_a_parquet_file_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "rows.parquet", [("x", [])])
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert ParquetRows(path).arrow_path.parent.name == "elsewhere"


def test_a_mixture_has_each_source_as_often_as_its_weight(tmp_path, processor):
    for name, n_rows in (("a", 100), ("b", 60), ("c", 90)):
        write_rows(
            tmp_path / f"{name}.jsonl", [row(None, f"{name}{number}") for number in range(n_rows)]
        )
    entries = [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl", f"{tmp_path}/c.jsonl:.34"]
    data = open_data(entries, None, processor, 200)
    counts = Counter(
        data.read(index)[0]["conversations"][1]["content"] for index in range(len(data))
    )
    assert all(counts[f"a{number}"] == 2 for number in range(100)) and all(
        counts[f"b{n}"] == 1 for n in range(60)
    )
    assert sum(count for text, count in counts.items() if text[0] == "c") == 30
    assert len(data) == 290 == len(data.lengths)
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
