"""The JavaScript packages that the web page runs on: fetched by npm once, then kept in out/.

Visitors run this code, so an archive counts only if it is the very one that was tried here.
"""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.errors import MissingFileError, UserError
from model.files import ROOT

CACHE = ROOT / "out/.web_library"
SECONDS = 600  # that npm may take for 33 MB


@dataclass(frozen=True)
class Package:
    """A package of the npm registry.

    Args:
        name: with its version, as npm takes it.
        archive: the file that `npm pack` makes of it.
        sha256: of that file.
        files: what the page needs of it -> its name beside the page, in lib/.
    """

    name: str
    archive: str
    sha256: str
    files: dict[str, str]


PACKAGES = (
    Package(
        "onnxruntime-web@1.30.0",
        "onnxruntime-web-1.30.0.tgz",
        "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
        {
            f"package/dist/{name}": name
            for name in (
                "ort.wasm.min.mjs",
                "ort-wasm-simd-threaded.mjs",
                "ort-wasm-simd-threaded.wasm",
            )
        },
    ),
    Package(
        "@huggingface/tokenizers@0.2.0",
        "huggingface-tokenizers-0.2.0.tgz",
        "2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a",
        {
            "package/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
            "package/LICENSE": "tokenizers-LICENSE.txt",
        },
    ),
)
COMMAND = " ".join(["npm pack", *(package.name for package in PACKAGES)])


def find_library(folder: str | None) -> Path:
    """The folder with the archives of PACKAGES: `folder`, or out/.web_library where it is None.

    What that one has not yet, npm fetches. UserError says what to do where it cannot be had.
    """
    found = CACHE if folder is None else Path(folder)
    missing = [package for package in PACKAGES if not (found / package.archive).is_file()]
    if missing and folder is not None:
        raise MissingFileError(f"no {missing[0].archive} in {folder}: type `{COMMAND}` in there")
    if missing:
        fetch(missing)
    for package in PACKAGES:
        path = found / package.archive
        if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
            raise UserError(f"{path} is not {package.name} as it was published: delete it")
    return found


def fetch(packages: list[Package]) -> None:
    """Let npm fetch archives into CACHE. It runs nothing of them, and brings nothing else along."""
    elsewhere = f"type `{COMMAND}` on another computer, and pass the folder as --web_library"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the web page's library comes by npm: install Node.js; or {elsewhere}")
    print(f"fetching the web page's library, 33 MB, for this and later exports: {COMMAND}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as partial:
        try:
            finished = subprocess.run(
                [npm, "pack", "--ignore-scripts", *(package.name for package in packages)],
                cwd=partial,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"npm takes over {SECONDS} s: try again; or {elsewhere}") from None
        if finished.returncode:
            lines = (*finished.stderr.strip().splitlines(), f"status {finished.returncode}")
            raise UserError(f"npm failed ({lines[0]:.200}): is there a network? Or {elsewhere}")
        for package in packages:
            os.replace(Path(partial, package.archive), CACHE / package.archive)


def copy_library(source: Path, target: Path) -> None:
    """Unpack what the page needs of the archives in `source`, see `find_library`."""
    for package in PACKAGES:
        with tarfile.open(source / package.archive) as archive:
            for name, short_name in package.files.items():
                (target / short_name).write_bytes(archive.extractfile(name).read())
