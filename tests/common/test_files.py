"""Whole files, the hash, and a picture's bytes with their limit."""

import hashlib
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import files
from common.errors import BadSampleError, UserError
from common.files import (
    atomic_write,
    folder_in_one_go,
    hash_bytes,
    hash_to_int,
    read_image_bytes,
    read_small_file,
    write_text,
)


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new folder" / "文件.txt"
    write_text(path, "first")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("stopped in the middle")
    assert path.read_text() == "first" and os.listdir(path.parent) == [path.name]
    write_text(path, "第二 \ud83d")
    assert path.read_bytes().decode() == "第二 \\ud83d"


def test_a_folder_that_cannot_be_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*free some space or choose another folder"):
        write_text(tmp_path / "file" / "below", "x")


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_the_hash_is_blake2b_of_the_parts_joined(parts):
    whole = b"".join(parts)
    assert hash_bytes(parts) == hash_bytes(whole)
    assert hash_bytes(whole) == hashlib.blake2b(whole, digest_size=16).digest()
    assert hash_to_int(whole).to_bytes(8, "little") == hash_bytes(whole)[:8]


def test_bytes_of_a_picture_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 10)
    path = tmp_path / "a.jpg"
    for content in (b"picture", b"picture of more"):
        path.write_bytes(content)
        for source in (path, io.BytesIO(content)):
            if len(content) <= 10:
                assert read_image_bytes(source) == content
            else:
                with pytest.raises(BadSampleError, match="image too large: .*it has over"):
                    read_image_bytes(source)
    with pytest.raises(BadSampleError, match=r"image missing: .*b.jpg \(No such file"):
        read_image_bytes(tmp_path / "b.jpg")
    monkeypatch.undo()
    with pytest.raises(BadSampleError, match="image is no file"):
        read_image_bytes(tmp_path)
    with pytest.raises(BadSampleError, match="text is no file"):
        read_small_file(tmp_path, "text", 100)


def test_a_folder_appears_with_all_its_files_or_not_at_all(tmp_path):
    path = tmp_path / "above" / "folder"
    with pytest.raises(RuntimeError), folder_in_one_go(path) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("stopped in the middle")
    assert os.listdir(path.parent) == []
    with folder_in_one_go(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists()
    assert os.listdir(path.parent) == ["folder"] and os.listdir(path) == ["a"]

    # what lies there stays
    refused = pytest.raises(UserError, match="cannot write .*choose another folder")
    with refused, folder_in_one_go(path) as folder:
        (folder / "b").write_text("b")
    assert os.listdir(path.parent) == ["folder"] and os.listdir(path) == ["a"]
