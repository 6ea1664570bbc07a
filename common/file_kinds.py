"""What a file is instead of rows, pictures or weights, by how it begins, and what to do then."""

import shlex
from pathlib import Path

# Bytes that tell: the longest of them is in the header of a .tar.
HEAD = 512
_SPACE = b"\xef\xbb\xbf \t\r\n"
_BEGINNINGS = {
    b"\x1f\x8b": "is packed by gzip: unpack it with `gunzip -k {path}`",
    b"BZh": "is packed by bzip2: unpack it with `bunzip2 -k {path}`",
    b"\xfd7zXZ\0": "is packed by xz: unpack it with `unxz -k {path}`",
    b"\x28\xb5\x2f\xfd": "is packed by zstd: unpack it with `unzstd {path}`",
    b"PK\x03\x04": "is a .zip archive: unpack it",
    b"Rar!": "is a .rar archive: unpack it",
    b"7z\xbc\xaf": "is a .7z archive: unpack it",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"PARE": "is encrypted: write it anew without encryption",
    b"ARROW1": "is an Arrow file: write it as Parquet",
    b"\xff\xff\xff\xff": "is an Arrow file: write it as Parquet",
    b"ORC": "is an ORC file: write it as Parquet",
    b"\x89HDF": "is an HDF5 file: write it as Parquet",
    b"\x93NUMPY": "is a NumPy file: write it as Parquet",
    b"SQLite format 3": "is a database: write a table of it as CSV",
    b"\xd0\xcf\x11\xe0": "is an Excel file: save it as CSV in UTF-8",
    b"\x80\x04\x95": "is a pickle, which may run anything: write it in another format",
    b"\x80\x05\x95": "is a pickle, which may run anything: write it in another format",
    b"\xff\xd8\xff": "is a picture",
    b"\x89PNG": "is a picture",
    b"%PDF-": "is a PDF",
    b"version https://git-lfs": "is a Git LFS pointer: fetch the file with `git lfs pull`",
    b"<!doctype html": "is a web page: fetch the file again",
    b"<html": "is a web page: fetch the file again",
    b"<?xml": "is XML, which may say why there is no file: fetch it again",
}


def name_kind(path: Path, head: bytes) -> str | None:
    """ "is packed by gzip: unpack it with ..."; None where it may be what it was taken for.

    Args:
        path: the file.
        head: its first HEAD bytes, or more.
    """
    if head[257:262] == b"ustar":
        return "is a .tar archive: unpack it"
    if head.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in head[:HEAD]:
        return "is an Office file: save it as CSV in UTF-8"
    start = head[:HEAD].lstrip(_SPACE)
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning) or start[: len(beginning)].lower() == beginning:
            return kind.format(path=shlex.quote(str(path)))
    return None
