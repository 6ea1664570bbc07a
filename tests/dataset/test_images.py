"""Where pictures are found: names in folders and archives, and what is said where none are."""

import contextlib
import json
import os
import pickle
import socket
import struct
import unicodedata
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import BadSampleError, UserError
from common.files import IMAGE_SUFFIXES
from dataset import image_zip
from dataset.image_names import SUFFIX
from dataset.image_zip import ImageZip, list_entries
from dataset.images import ImageFolder, open_images
from dataset.row_images import is_name
from model.image import FORMATS
from tests.helpers import SHARED, needs_shared, write_zip

TROUBLE = SHARED / "trouble"


names = st.text(
    st.characters(exclude_characters="/\\\0:", exclude_categories=("Cs",)), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..") and not name.startswith("._"))


def has(images, name: str) -> bool:
    try:
        images.identify(name)
    except BadSampleError as error:
        assert error.args[0] == "image missing"
        return False
    return True


@given(
    st.dictionaries(names, st.binary(max_size=300), min_size=1, max_size=8),
    st.sampled_from(["", "images/"]),
    st.booleans(),
)
def test_a_zip_gives_what_was_put_in(tmp_path_factory, content, folder, packed):
    """By the names that rows use: without a folder that all entries share."""
    path = tmp_path_factory.mktemp("zip") / "images.zip"
    write_zip(path, {folder + name: one for name, one in content.items()}, 8 if packed else 0)
    archive = ImageZip(path)
    # of two spellings of one name, one is kept
    spelled = {unicodedata.normalize("NFC", name) for name in content}
    for name, one in content.items():
        assert has(archive, name) and has(archive, folder + name)
        assert archive.find(name).getvalue() == one or len(spelled) < len(content)
    assert not has(archive, "no such name") and archive.count() == len(content)
    assert len({archive.identify(name) for name in content}) == len(spelled)


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
    monkeypatch.setattr(image_zip, "list_entries", lambda path: parsed.append(path))
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
    entry = list_entries(path)[0][0]
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
        source.identify(name)
        found = source.find(name)
        return found.read() if packed else found.read_bytes()

    inside = ["sub/a.jpg", r"sub\a.jpg", "./sub/a.jpg", "sub//a.jpg", r".\sub\..\sub\a.jpg"]
    assert [read(name) for name in inside] == [b"a"] * 5 and read(r".\b.jpg") == b"b"
    outside = [r"..\secret.jpg", "../secret.jpg", "sub/../../secret.jpg", "..", "/etc/passwd"]
    outside += [r"C:\a.jpg", "c:/a.jpg", "C:a.jpg", r"\\server\share\a.jpg", r"\a.jpg"]
    for name in outside:
        for ask in (source.identify, source.find):
            with pytest.raises(BadSampleError, match="image path leaves its folder"):
                ask(name)
    assert not has(source, "sub/none.jpg")
    with pytest.raises(BadSampleError, match="image is no name"):
        source.identify("a\0.jpg")


def test_a_folder_is_listed_once_and_its_names_stay_behind(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / f"{number}.jpg").touch()
    folder = ImageFolder(tmp_path)
    listings = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listings.append(path) or scandir(path))
    monkeypatch.setattr(os.path, "isfile", lambda path: pytest.fail("asked for a listed file"))
    assert all(has(folder, f"{number}.jpg") for number in range(300)) and folder.count() == 300
    assert len(listings) == 1
    monkeypatch.undo()
    assert len(pickle.dumps(folder)) < 500 and pickle.loads(pickle.dumps(folder)).path == tmp_path
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
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    for name, expected in entries.items():
        try:
            found = archive.find(name.removeprefix("images/")).read()
        except BadSampleError:
            continue
        assert found == expected


def test_a_hostile_or_damaged_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(image_zip, "MAX_IMAGE_BYTES", 100_000)
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


@given(st.one_of(st.text(max_size=40), st.text(st.sampled_from("./a\\\0"), max_size=600)))
def test_any_name_is_inside_the_folder_or_a_reason(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "pictures"
    folder.mkdir(exist_ok=True)
    source = ImageFolder(folder)
    with contextlib.suppress(BadSampleError):
        path = source.find(name)
        assert os.path.normpath(path).startswith(str(folder.resolve()))
        source.identify(name)
        assert path.is_file()
    with contextlib.suppress(BadSampleError):
        assert ImageZip(write_zip(folder / "x.zip", {"a.jpg": b"a"})).find(name).read() == b"a"


def test_links_are_followed_and_a_row_may_name_a_place_inside_in_full(tmp_path):
    """As in the cache of the Hub: the folder itself and each file may be links to elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0a1b").write_bytes(b"a")
    (tmp_path / "real").mkdir()
    (tmp_path / "images").symlink_to("real")
    (tmp_path / "real/a.jpg").symlink_to("../blobs/0a1b")
    (tmp_path / "real/sub").symlink_to(tmp_path / "blobs")
    (tmp_path / "real/gone.jpg").symlink_to("nowhere")
    (tmp_path / "real/loop.jpg").symlink_to("loop.jpg")
    source = ImageFolder(tmp_path / "images")
    names = ["a.jpg", "sub/0a1b", str(tmp_path / "images/a.jpg"), str(tmp_path / "real/./a.jpg")]
    for name in names:
        source.identify(name)
        assert source.find(name).read_bytes() == b"a"
    assert source.identify("a.jpg") == source.identify(names[2]) == source.identify("./a.jpg")
    assert source.identify("a.jpg") != source.identify("sub/0a1b")
    assert not has(source, "gone.jpg") and not has(source, "loop.jpg")
    for name in (str(tmp_path / "blobs/0a1b"), f"{tmp_path}/images/../blobs/0a1b"):
        with pytest.raises(BadSampleError, match="image path leaves its folder"):
            source.identify(name)


def test_a_link_to_nothing_is_called_so(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(BadSampleError, match=r"a\.jpg is a link to a file that is not there"):
        ImageFolder(tmp_path).identify("a.jpg")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO in a folder")
def test_what_is_no_file_is_no_picture(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    source = ImageFolder(tmp_path)
    assert source.count() == 0
    for name in ("fifo.jpg", "folder.jpg", "folder.jpg/", "socket.jpg", "device.jpg", "."):
        with pytest.raises(BadSampleError, match="image is no file"):
            source.identify(name)


@pytest.mark.parametrize("packed", [False, True])
def test_a_name_is_found_as_people_write_it(tmp_path, packed):
    names = [
        *("red, green.jpg", "with space.jpg", " lead.jpg", "emoji😀.jpg", "full，width.jpg"),
        *("[1].jpg", "hash#1?.jpg", "-dash.jpg", "a%20b.jpg", "no_ext", "中文 图.jpg", "sub/x.JPG"),
        *(unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "がぞう.jpg")),
    ]
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    entries = {name: name.encode() for name in names}
    source = ImageZip(write_zip(tmp_path / "photos.zip", entries)) if packed else None
    source = source or ImageFolder(folder)
    for name in names:
        for form in ("NFC", "NFD"):
            # a row may name the folder too, or have a space too many
            for row in (name, f"photos/{name}", f"{name} " if name[0] != " " else name):
                row = unicodedata.normalize(form, row)
                found = source.find(row)
                assert (found.read() if packed else found.read_bytes()) == name.encode()
                assert source.identify(row) == source.identify(name)
    for name, near in {
        "WITH SPACE.JPG": "with space.jpg",
        "sub/x.jpg": "sub/x.JPG",
        "x.jpeg": "sub/x.JPG",
        "no_ext.jpg": "no_ext",
        "a b.jpg": "a%20b.jpg",
        "full,width.jpg": "full，width.jpg",
        "other/no_ext": "no_ext",
    }.items():
        with pytest.raises(BadSampleError, match="image missing") as error:
            source.identify(name)
        assert f"{name}: there is {near}" in str(error.value)
    with pytest.raises(BadSampleError) as error:
        source.identify("nothing like it.jpg")
    assert "there is" not in str(error.value)


def test_a_name_in_full_goes_first_then_one_without_shared_folders(tmp_path):
    entries = {"sft/images/a.jpg": b"1", "sft/images/images/a.jpg": b"2", "README": b"x"}
    entries |= {".DS_Store": b"x", "sft/Thumbs.db": b"x", "__MACOSX/sft/._a.jpg": b"x"}
    archive = ImageZip(write_zip(tmp_path / "set.zip", entries))
    for name, content in {
        "a.jpg": b"1", "images/a.jpg": b"1", "sft/images/a.jpg": b"1", "README": b"x",
        "images/images/a.jpg": b"2", "sft/images/images/a.jpg": b"2", "set/a.jpg": b"1",
    }.items():  # fmt: skip
        assert archive.find(name).read() == content, name
    assert archive.count() == 3 and not has(archive, ".DS_Store")


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "cp949", "cp437", "utf-8"])
def test_archives_of_other_alphabets(tmp_path, encoding):
    """Their names do not say which one it is: the row's name says it."""
    name = {"gb18030": "图片/狗.jpg", "shift_jis": "ソが.jpg", "cp949": "한국.jpg"}
    name = name.get(encoding, "é.jpg")
    content = write_zip(tmp_path / "x.zip", {"a" * len(name.encode(encoding)): b"a"}).read_bytes()
    replaced = content.replace(b"a" * len(name.encode(encoding)), name.encode(encoding))
    (tmp_path / "x.zip").write_bytes(replaced)
    assert ImageZip(tmp_path / "x.zip").find(name).read() == b"a"


def test_an_archive_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    entries = {"a.jpg": b"a", "b.jpg": b"b"}
    for method, name in ((zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")):
        path = write_zip(tmp_path / f"{name}.zip", entries, method)
        with pytest.raises(UserError, match=rf"packed by {name}: repack with deflate"):
            open_images(path)
    for content, line in {
        b"<!DOCTYPE html><p>404": "is a web page", b"\n<html>": "is a web page",
        b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer: fetch",
        bytes(257) + b"ustar" + bytes(300): "is a .tar archive: unpack it",
    }.items():  # fmt: skip
        (tmp_path / "x.zip").write_bytes(content)
        with pytest.raises(UserError, match=line):
            open_images(tmp_path / "x.zip")
    with pytest.raises(UserError, match="holds no files"):
        open_images(write_zip(tmp_path / "x.zip", {"sub/": b"", ".DS_Store": b"x"}))
    with pytest.raises(UserError, match=r"holds other archives \(part1.zip\): unpack it first"):
        open_images(write_zip(tmp_path / "x.zip", {"part1.zip": b"", "part2.zip": b""}))
    locked = write_zip(tmp_path / "x.zip", {"a.jpg": b"a"})
    content = bytearray(locked.read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    locked.write_bytes(content)
    with pytest.raises(UserError, match="is encrypted: unpack it to a folder"):
        open_images(locked)
    # one entry of many costs its rows only
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"a")
        archive.writestr("b.jpg", b"b", zipfile.ZIP_BZIP2)
    source = open_images(tmp_path / "x.zip")
    assert source.find("a.jpg").read() == b"a"
    with pytest.raises(BadSampleError, match="image packed by bzip2"):
        source.find("b.jpg")
    (tmp_path / "x.zip").unlink()
    with pytest.raises(BadSampleError, match="image cannot be read"):
        source.find("a.jpg")


def test_a_folder_an_archive_or_what_stands_in_its_place(tmp_path):
    assert open_images(None) is None
    assert isinstance(open_images(tmp_path), ImageFolder)
    write_zip(tmp_path / "upper.ZIP", {"a.jpg": b"a"})
    assert isinstance(open_images(tmp_path / "upper"), ImageZip)
    assert isinstance(open_images(tmp_path / "upper.ZIP"), ImageZip)
    (tmp_path / "pics.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"there is pics\.tar: unpack it or zip it"):
        open_images(tmp_path / "pics")
    with pytest.raises(UserError, match=r"pics\.tar .*unpack it or zip it"):
        open_images(tmp_path / "pics.tar")
    (tmp_path / "rows.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"rows\.jsonl is no folder and no \.zip"):
        open_images(tmp_path / "rows.jsonl")


# what `find` gives for the names of rows.jsonl, or the line in its place
PICTURES = ["猫一.jpg", "图片/狗 二.jpg", "ok2.jpg"]
ARCHIVES = {
    **dict.fromkeys(
        (
            *("backslash.zip", "dotslash.zip", "upper.ZIP", "utf8_noflag.zip", "mac.zip"),
            *("mac_root_dsstore.zip", "two_levels.zip", "windows_thumbs.zip"),
        ),
        PICTURES,
    ),
    "bzip2.zip": "packed by bzip2: repack with deflate",
    "lzma.zip": "packed by lzma: repack with deflate",
    "empty.zip": "holds no files",
    "html.zip": "is a web page",
    "nested.zip": "holds other archives",
    "pics": "there is pics.tar: unpack it or zip it",
    "pics.tar": "unpack it or zip it",
    "tar_named.zip": "is a .tar archive: unpack it",
}


@needs_shared
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_as_people_have_them(name):
    right = ARCHIVES[name]
    if isinstance(right, str):
        with pytest.raises(UserError, match=right):
            open_images(TROUBLE / "10" / name)
        return
    source = open_images(TROUBLE / "10" / name)
    with_folder = ["pics/" + one for one in right] if "pics/" in str(show_names(source)) else []
    for one in [*right, *with_folder]:
        source.identify(one)
        assert source.find(one).read(3) == b"\xff\xd8\xff"


def show_names(source: ImageZip) -> list[str]:
    with zipfile.ZipFile(source.path) as archive:
        return archive.namelist()


@needs_shared
def test_names_as_people_write_them():
    source = ImageFolder(TROUBLE / "12/set")
    reasons = {
        "IMG_6003.jpg": "there is IMG_6003.JPG",
        "a b.jpg": "there is a%20b.jpg",
        "x.jpg": "there is x.jpeg",
        "/sub/dir.png.jpg": "image path leaves its folder",
        "sub/": "image is no file",
    }
    for line in (TROUBLE / "12/rows.jsonl").read_text(encoding="utf-8").splitlines():
        names = json.loads(line)["image"]
        for name in names if isinstance(names, list) else [names]:
            if name in reasons:
                with pytest.raises(BadSampleError, match=reasons.pop(name)):
                    source.identify(name)
            else:
                source.identify(name)
                assert source.find(name).is_file()
    assert not reasons


def test_every_format_that_is_opened_is_known_by_a_suffix():
    formats = Image.registered_extensions()
    assert {formats.get(suffix) for suffix in IMAGE_SUFFIXES} == {*FORMATS, None}
    for name in ("a.jpg", "a.b.HEIC", "a.tga", "a.Jp2", "a.jpeg "):
        assert is_name(name) and SUFFIX.search(name)
    assert not is_name("a.txt") and not is_name("a.jpg.zip")
