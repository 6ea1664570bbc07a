"""Errors a person can act on: one line that says what is wrong, the value, and what to do."""

import sys
from collections import Counter


class UserError(ValueError):
    """Something in the input, the files or the flags is wrong. The message is one line for the person at the terminal."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that has to be there is not. The message says how to get it."""

    def __str__(self) -> str:  # FileNotFoundError would add its errno
        return self.args[0]


class BadSampleError(UserError):
    """A row or an image cannot be used. `args[0]` is the reason without details, so that equal reasons can be counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.detail}" if self.detail else self.args[0]

    def __reduce__(self):  # loader workers send it to the main process
        return BadSampleError, (self.args[0], self.detail)


def list_reasons(reasons: Counter[str]) -> str:
    """ "12 image missing, 3 empty answer" """
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def run_command(main) -> None:
    """Run a script's `main`; a UserError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say("stopped", 130))


def _say(line: str, status: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return status
