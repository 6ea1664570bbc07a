"""Download what training and chatting need, each to its place, and check it.

python -m scripts.download clip tokenizer lm-512 pretrain-data sft-data
python -m scripts.download --source modelscope all
python -m scripts.download --check
"""

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

from common.digest import write_digest
from common.errors import MissingFileError, UserError, run_command
from common.flags import program_name
from model.files import ROOT
from scripts.download.hubs import HUBS, HuggingFace, ModelScope, RemoteFile, is_whole
from scripts.download.items import ITEMS, choose_files, describe_files, list_present, next_command


class Fetch(NamedTuple):
    """A file to fetch: from where, to where, and what of it is there already."""

    repo: str
    kind: str
    file: RemoteFile
    folder: Path
    whole: bool
    begun: int  # bytes


def main() -> None:
    args = parse_args()
    names = choose_names(args)
    if not args.check:
        hub = HUBS[args.source]()
        plan = plan_fetches(names, hub, args)
        names = list(plan)
        show_plan(plan, args.root)
        fetches = [fetch for fetches in plan.values() for fetch in fetches if not fetch.whole]
        check_space(fetches)
        for fetch in fetches:
            make_folder(fetch.folder)
            hub.fetch(fetch.repo, fetch.kind, fetch.file, fetch.folder)
            # A .pth has checksums of its own.
            if fetch.file.name.endswith(".safetensors"):
                write_digest(fetch.folder / fetch.file.name)
    check_items(names, args.root, lists_all=args.check and not args.what)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read a command line; sys.argv if not given."""
    parser = argparse.ArgumentParser(program_name(), description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"one or more of: {', '.join(ITEMS)}, all")
    add(
        "--source",
        choices=HUBS,
        default="huggingface",
        help="hub to fetch from (default: huggingface)",
    )
    add("--repo", help="repository (OWNER/NAME) to fetch from, instead of the published one")
    add(
        "--root",
        type=Path,
        default=ROOT,
        help="folder that everything goes below; this repository if not given",
    )
    add("--overwrite", action="store_true", help="replace files unlike the published ones")
    add(
        "--check",
        action="store_true",
        help="fetch nothing: check what is there and list what is missing; with WHAT, fail unless "
        "all of it is ready",
    )
    return parser.parse_args(arguments)


def choose_names(args: argparse.Namespace) -> list[str]:
    """Names of ITEMS, in the table's order. UserError for a name it does not have."""
    unknown = sorted(set(args.what) - ITEMS.keys() - {"all"})
    choices = f"{', '.join(ITEMS)}, all"
    if unknown:
        raise UserError(f"nothing is called {', '.join(unknown)}: choose from {choices}")
    if not args.what and not args.check:
        raise UserError(f"nothing to fetch: name one or more of {choices}")
    if not args.what or "all" in args.what:
        return list(ITEMS)
    return [name for name in ITEMS if name in args.what]


def plan_fetches(
    names: list[str], hub: HuggingFace | ModelScope, args: argparse.Namespace
) -> dict[str, list[Fetch]]:
    """The files of each name. UserError if the repository lacks them or a file would be lost."""
    # list the repositories
    published = {name: ITEMS[name].repos[args.source] for name in names}
    if args.repo and len(set(published.values())) > 1:
        raise UserError(
            f"--repo {args.repo} cannot hold all of {', '.join(names)}: fetch what is of one "
            "repository at a time"
        )
    sources = {name: (args.repo or published[name], ITEMS[name].kind) for name in names}
    listings = {
        source: {file.name: file for file in hub.list_files(*source)}
        for source in dict.fromkeys(sources.values())
    }

    # choose files
    plan = {}
    for name in names:
        item, listing, repo = ITEMS[name], listings[sources[name]], sources[name][0]
        chosen = choose_files(item, set(listing))
        if chosen is None and item.optional and "all" in args.what:
            print(f"{name}: {repo} does not have it; going on without")
        elif chosen is None:
            found = ", ".join(sorted(listing)[:8]) or "nothing"
            raise UserError(
                f"{repo} has no {describe_files(item)} (it has {found}): pass --repo or another "
                "--source"
            )
        else:
            folder = args.root / item.folder
            plan[name] = [
                plan_file(listing[file], sources[name], folder, hub, args.overwrite)
                for file in chosen
            ]
    return plan


def plan_file(
    file: RemoteFile,
    source: tuple[str, str],
    folder: Path,
    hub: HuggingFace | ModelScope,
    overwrite: bool,
) -> Fetch:
    """How to get one file. UserError if there is another one in its place.

    Args:
        file: as listed.
        source: repository and kind.
        folder: where it goes.
        hub: where a part of it may be.
        overwrite: replace the other one.
    """
    path, partial = folder / file.name, hub.partial_path(folder, file)
    is_unpacked = not path.exists() and file.name in list_present(folder)
    whole = is_whole(path, file) or is_unpacked
    if path.exists() and not whole and not overwrite:
        raise UserError(
            f"{path} is not the file of {source[0]}: move it away to keep it, or pass --overwrite"
        )
    begun = min(partial.stat().st_size, file.size) if partial.is_file() else 0
    return Fetch(*source, file, folder, whole, begun)


def show_plan(plan: dict[str, list[Fetch]], root: Path) -> None:
    for name, fetches in plan.items():
        print(f"{name}: {fetches[0].repo} -> {fetches[0].folder.relative_to(root)}/")
        for fetch in fetches:
            state = f"goes on at {show_size(fetch.begun)}" if fetch.begun else ""
            state = "already there" if fetch.whole else state
            print(f"  {fetch.file.name:<28}{show_size(fetch.file.size):>10}  {state}".rstrip())


def check_space(fetches: list[Fetch]) -> None:
    """Show what is to come and what is free; UserError if a disk is too small."""
    # disk -> [bytes to come, a folder on it]
    needed: dict[int, list] = {}
    for fetch in fetches:
        parents = (fetch.folder, *fetch.folder.resolve().parents)
        folder = next(path for path in parents if path.exists())
        needed.setdefault(folder.stat().st_dev, [0, folder])[0] += fetch.file.size - fetch.begun
    for n_bytes, folder in needed.values():
        free = shutil.disk_usage(folder).free
        print(f"to fetch: {show_size(n_bytes)}, free disk: {show_size(free)}", flush=True)
        if n_bytes > free:
            raise UserError(
                f"{show_size(n_bytes)} do not fit into the {show_size(free)} that are free at "
                f"{folder}: free some space, or choose another --root"
            )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder} ({error.strerror}): move what is there, or choose another --root"
        ) from error


def show_size(n_bytes: int) -> str:
    """ "598.6 MB" """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"


def check_items(names: list[str], root: Path, lists_all: bool) -> None:
    """Print what is ready and what is missing, then the command that comes next.

    UserError for what is wrong; and, unless `lists_all`, for what is missing.
    """
    from scripts.download.check import check_item

    missing, wrong = [], []
    for name in names:
        try:
            print(f"ready: {name}: {check_item(name, root)}", flush=True)
        except MissingFileError as error:
            missing.append(name)
            print(f"missing: {name}: {error}", flush=True)
        except UserError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise UserError("; ".join(wrong))
    if missing and not lists_all:
        command = f"python -m scripts.download {' '.join(missing)}"
        raise UserError(f"not there: {', '.join(missing)}: fetch with `{command}`")
    command = next_command([name for name in names if name not in missing] or names, root)
    if "scripts.download" in command and root.resolve() != ROOT.resolve():
        command += f" --root {root}"
    print(f"next: {command}")


if __name__ == "__main__":
    run_command(main)
