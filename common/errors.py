"""Errors a person can act on: one line that says what is wrong, the value, and what to do."""

import sys
from collections import Counter
from collections.abc import Callable

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


def list_reasons(reasons: Counter[str]) -> str:
    """Reasons by their counts, such as "12 image missing, 3 empty answer"."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def run_command(main: Callable[[], None]) -> None:
    """Run a script's `main`. A UserError becomes one line on stderr and exit status 2.

    Ctrl-C, also while large packages are being imported, becomes "stopped" and status 130.
    PyTorch's threads are chosen first: `main` is what imports it.
    """
    use_utf8()
    choose_threads()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)


def use_utf8() -> None:
    """Print UTF-8 on any system: a Windows pipe would stop at the first Chinese letter."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
