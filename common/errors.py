"""Errors a person can act on: one line that says what is wrong, the value, and what to do."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from common.threads import choose_threads


class UserError(ValueError):
    """Something in the input, the files or the flags is wrong; the message is one line."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that has to be there is not. The message says how to get it."""

    def __str__(self) -> str:
        # FileNotFoundError would add its errno.
        return self.args[0]


class BadSampleError(UserError):
    """A row or an image cannot be used.

    `args[0]` is the reason without details, so that equal reasons can be counted; `detail` is
    what the reason is about, a file name for example.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.detail}" if self.detail else self.args[0]

    def __reduce__(self):
        # Data loader workers send this error to the main process.
        return BadSampleError, (self.args[0], self.detail)


def is_memory_full(error: BaseException) -> bool:
    """Whether this is an error of a full memory; PyTorch reports one in words of its own."""
    is_named = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return is_named or "allocate memory" in str(error)


def list_reasons(reasons: Counter[str]) -> str:
    """Reasons by their counts, such as "12 image missing, 3 empty answer"."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def run_command(main: Callable[[], None]) -> None:
    """Run a script's `main`. A UserError becomes one line on stderr and exit status 2.

    So does what the system refuses: a full disk, a name that is too long, a folder that is not
    ours. Ctrl-C, also while large packages are being imported, becomes "stopped" and status 130.
    PyTorch's threads are chosen first: `main` is what imports it.
    """
    replace_unprintable()
    choose_threads()
    try:
        main()
    except UserError as error:
        stop(f"error: {error}", 2)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has enough; flushing would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.strerror is None:
            raise
        place = "" if error.filename is None else f"{error.filename!s:.200}: "
        stop(f"error: {place}{error.strerror}", 2)
    except KeyboardInterrupt:
        stop("stopped", 130)


def stop(line: str, status: int) -> NoReturn:
    """Print a line on stderr and end."""
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def replace_unprintable() -> None:
    """Print "?" for a letter that the terminal or file cannot show: cp1252 and ASCII lack many."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
