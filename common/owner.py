"""One owner for the files of a run, and processes that do not outlive the one that started them."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError

# A process that is being ended, or a worker of a killed one, may hold its lock a little longer.
LOCK_SECONDS = 10
# Between looks whether the parent process is there.
LOOK_SECONDS = 1


class Owner:
    """Holds a lock file, which says who it is, until `release` or the end of the process.

    The system lets go of the lock of a process that ended, in whatever way. Where a folder knows no
    locks (some network drives) or is read-only, nothing is held and nothing is refused.

    Args:
        path: of the lock file; its folder is made.
        what: whose files they are, and what else to choose, for the message of the UserError that
            refuses a second owner.
    """

    def __init__(self, path: Path, what: str):
        self.path = path
        # A notebook may train again after an error: the lock that it still holds is its own.
        self.lock = FileLock(path, is_singleton=True, thread_local=False, fallback_to_soft=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=LOCK_SECONDS)
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except Timeout as error:
            raise UserError(f"{self._read()} writes {what}") from error
        except OSError:
            return

    @property
    def is_held(self) -> bool:
        """Whether the lock is held, so that nobody else can be the owner."""
        return self.lock.is_locked

    def _read(self) -> str:
        """Who holds the lock."""
        with suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace")[:200] or "another run"
        return "another run"

    def release(self) -> None:
        if self.is_held:
            # Windows removes no file that is open.
            with suppress(OSError):
                self.path.unlink()
            self.lock.release(force=True)


def sweep_partials(folder: Path, start: str) -> None:
    """Remove what killed processes left of files that were being written, see `atomic_write`.

    Only for the owner of these files: the half of a living process looks the same.

    Args:
        folder: of the files.
        start: what their names begin with.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(f".{start}") and path.suffix == ".partial":
            with suppress(OSError):
                path.unlink()


def live_with_parent() -> None:
    """In a worker: live as long as the process that started it.

    Not shorter: Ctrl-C reaches every process of a terminal, and the main one saves first. Not
    longer: see `follow_parent`.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    follow_parent()


def follow_parent() -> None:
    """From now on SIGTERM comes when the process that started this one is gone.

    A thread looks for it: it works while the main thread waits for a disk or a device.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
