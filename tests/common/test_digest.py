"""The digest beside a file is that of sha256sum, and says when a bit has changed."""

import hashlib

import pytest

from common.digest import check_digest, digest_path, write_digest
from common.errors import UserError


def test_it_is_that_of_sha256sum_and_finds_one_bit(tmp_path):
    path = tmp_path / "模型.safetensors"
    path.write_bytes(bytes(3 * 2**20))
    check_digest(path)  # there is none
    write_digest(path)
    line = digest_path(path).read_text(encoding="utf-8")
    assert line == f"{hashlib.sha256(bytes(3 * 2**20)).hexdigest()}  {path.name}\n"
    check_digest(path)
    path.write_bytes(bytes(3 * 2**20 - 1) + b"\1")
    with pytest.raises(UserError, match=r"differs from its checksum in .*sha256: fetch it again"):
        check_digest(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"none  x"])
def test_a_digest_that_is_none_vouches_for_nothing(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(b"x")
    digest_path(path).write_bytes(content)
    with pytest.raises(UserError, match="if you have replaced it, remove x.sha256"):
        check_digest(path)
