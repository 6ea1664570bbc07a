"""Where the pictures that rows name are found: a folder, or a .zip that is never unpacked.

Both classes have the same methods: `find(name)` gives what `load_image` takes, `identify(name)`
asks whether it is there, and which one, without reading it, `count()` says how many there are.
A name is found as it is, in another spelling that looks the same, or without the folder that all
pictures share; where there is none, the error names the file that may be meant.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from common.errors import BadSampleError, UserError
from common.files import hash_to_int
from dataset.image_names import NearMisses, normalize_name, spell
from dataset.image_zip import ImageZip

# Archives that are not read: somebody has to unpack them.
OTHER_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")


class ImageFolder:
    """Pictures as files below a folder, or as symbolic links to files anywhere."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        # An absolute name may begin with either.
        self.roots = (f"{os.path.abspath(path)}{os.sep}", f"{self.path}{os.sep}")
        self._listed: dict[str, set[str]] = {}

    def __getstate__(self) -> dict:
        # The names stay in the process that checks the rows: a loader worker only opens pictures.
        return {"path": self.path, "roots": self.roots, "_listed": {}}

    def count(self) -> int:
        return len(self._list(""))

    def find(self, name: str) -> Path:
        """Where a file of that name would be. BadSampleError for a name that leaves the folder."""
        names = self._spell(name)
        there = (one for one in names if os.path.lexists(self.path / one))
        return self.path / (names[0] if len(names) == 1 else next(there, names[0]))

    def identify(self, name: str) -> int:
        """64 bits that tell a file from others. BadSampleError unless it is there."""
        return hash_to_int(os.fsencode(self.roots[1] + self._look_up(name)))

    @cached_property
    def _near_misses(self) -> NearMisses:
        return NearMisses(self._walk())

    def _look_up(self, name: str) -> str:
        """The name below the folder of the file that a row names."""
        # nearly always one in the folder itself
        if name in self._list(""):
            return name
        names = self._spell(name)
        for one in names:
            folder, _, file = one.rpartition("/")
            # Or it is newer than the list of names.
            if file in self._list(folder) or os.path.isfile(self.path / one):
                return one
        if any(os.path.exists(self.path / one) for one in names):
            raise BadSampleError("image is no file", f"{name} is a folder, a pipe or a device")
        raise BadSampleError("image missing", self._near_misses.explain(name))

    def _spell(self, name: str) -> list[str]:
        """The names below the folder that may be meant."""
        if os.path.isabs(name):
            inside = os.path.normpath(name)
            for root in self.roots:
                inside = inside.removeprefix(root)
            # one that is not inside stays as it is, and is refused
            name = name if os.path.isabs(inside) else inside
        return spell(normalize_name(name), self.path.name)

    def _list(self, folder: str) -> set[str]:
        """Names of the files in a folder below this one, listed once.

        Faster than asking for half a million one by one.
        """
        if folder not in self._listed:
            try:
                with os.scandir(self.path / folder) as entries:
                    self._listed[folder] = {entry.name for entry in entries if _is_file(entry)}
            except (OSError, ValueError) as error:
                # A row may name any folder; this one has to be readable.
                if not folder and self.path.is_dir():
                    raise UserError(f"cannot list the pictures in {self.path} ({error})") from error
                self._listed[folder] = set()
        return self._listed[folder]

    def _walk(self) -> Iterator[str]:
        """Names of all files, such as "sub/a.jpg", those of the folder itself first."""
        for folder, _, files in os.walk(self.path):
            below = os.path.relpath(folder, self.path).replace(os.sep, "/")
            yield from files if below == "." else (f"{below}/{file}" for file in files)


def _is_file(entry: os.DirEntry) -> bool:
    """Whether it is a file, or a symbolic link to one; FIFOs and folders are none."""
    try:
        return entry.is_file()
    except OSError:
        # such as a link to itself
        return False


def open_images(path: str | Path | None) -> ImageFolder | ImageZip | None:
    """The folder or .zip at `path`; if there is no such folder, the .zip of that name beside it.

    UserError where there is something else: a file, or an archive that has to be unpacked.
    """
    if path is None:
        return None
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return ImageZip(path)
        if path.name.lower().endswith(OTHER_ARCHIVES):
            raise UserError(f"{path} is an archive, but no .zip: unpack it or zip it")
        raise UserError(f"{path} is no folder and no .zip: name one that holds the pictures")
    suffixes = (".zip", ".ZIP", *OTHER_ARCHIVES)
    beside = (path.with_name(f"{path.name}{suffix}") for suffix in suffixes)
    found = next(filter(Path.is_file, beside), None)
    if found is None:
        return ImageFolder(path)
    if found.suffix.lower() == ".zip":
        return ImageZip(found)
    raise UserError(f"there is no folder {path}, but there is {found.name}: unpack it or zip it")
