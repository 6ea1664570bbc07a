"""Starting a script of this repository in a process of its own."""

import os
import subprocess
import sys

from common.errors import UserError
from model.files import ROOT


def as_flags(**options: object) -> list[str]:
    """["--dim", "128", "--dims", "1", "2", "--ddp"] for (dim=128, dims=[1, 2], ddp=True)."""
    flags = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def run_python(*command: str, capture: bool = False, **env: str) -> str:
    """Run `python COMMAND`; UserError if it fails.

    Args:
        command: a script and its flags, or "-m", a module and its flags.
        capture: return what it prints, instead of letting it print.
        env: is added to the environment.
    """
    pipe = subprocess.PIPE if capture else None
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | env,
        stdout=pipe,
        stderr=pipe,
        encoding="utf-8",
        errors="replace",
    )
    if finished.returncode:
        sys.stderr.write(finished.stderr or "")
        name = command[1] if command[0] == "-m" else command[0]
        status = finished.returncode
        raise UserError(f"{name} stopped with status {status}; its message is above")
    return finished.stdout or ""
