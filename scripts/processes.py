"""Starting other programs: scripts of this repository, web servers among them, and a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from model.files import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Seconds that a server may take until it answers, and to end.
START_SECONDS, END_SECONDS = 900, 20


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


def find_browser() -> str | None:
    """The program of the Chromium or Chrome that is installed; None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(*command: str, log: Path, **env: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) of a web server, once it answers at /health; it is ended afterwards.

    Args:
        command: "-m", a module and its flags; --host and --port are added.
        log: file for what it prints.
        env: is added to the environment.

    UserError with the last line that it printed if it ends, or does not answer.
    """
    # start
    port = free_port()
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=os.environ | env,
        )
    # wait
    try:
        while not is_healthy(address):
            if process.poll() is not None or time.monotonic() > deadline:
                last = (log.read_text(errors="replace").strip().splitlines() or ["?"])[-1]
                raise UserError(f"{command[1]} does not start: {last:.200}")
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_healthy(address: str) -> bool:
    """Whether a server answers at /health."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False
