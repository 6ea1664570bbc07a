"""How a run ends before its end: Ctrl-C and SIGTERM, once or twice, and data that never come."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import UserError

NUMBERS = (signal.SIGINT, signal.SIGTERM)
# A step that takes longer to end than this hangs: a dead network drive, a lost rank.
PATIENCE = 30.0
# A picture takes milliseconds: after so long a drive is gone, or the way of the batches is blocked.
HANGING_SECONDS = 600
# torchrun sends its ranks the Ctrl-C that they got from the terminal already.
ECHO_SECONDS = 1.0


@dataclass
class StopSignal:
    """Remembers Ctrl-C and SIGTERM until the loop asks (on a GPU not after every step)."""

    number: int = signal.SIGTERM  # stays if another rank got it
    is_requested: bool = False

    @contextmanager
    def listening(self, describe: Callable[[int], str]) -> Iterator[None]:
        """Receive the signals during this block.

        A second one, or PATIENCE seconds after the first, end the process in one line with status
        128 + signal, whatever the main thread waits for. In an interactive Python, whose process
        holds more than this run, the second Ctrl-C is KeyboardInterrupt.

        Args:
            describe: signal -> the line that says what is safe.
        """
        previous = [handle_signal(number, self._receive) for number in NUMBERS]
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        try:
            # The system writes each signal to it, even while the main thread runs no Python.
            earlier = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        except ValueError:
            # a notebook's thread
            earlier = None
        watcher = threading.Thread(target=_watch, args=(receiver, describe), daemon=True)
        if earlier is not None and not is_interactive():
            watcher.start()
        try:
            yield
        finally:
            if earlier is not None:
                signal.set_wakeup_fd(earlier)
            # Loader workers have copies of both ends: closing alone would not end the thread.
            sender.shutdown(socket.SHUT_RDWR)
            sender.close()
            # A thread that is still there when Python ends can abort the process, with status 134.
            if watcher.is_alive():
                watcher.join(timeout=1)
            for number, handler in zip(NUMBERS, previous):
                if handler is not None:
                    handle_signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.number, self.is_requested = number, True
        if is_interactive():
            handle_signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def limit_wait() -> Iterator[None]:
    """UserError where this block waits for data longer than HANGING_SECONDS.

    Where system or thread know no alarms it may wait forever.
    """

    def give_up(number: int, frame) -> None:
        raise UserError(
            f"no data came for {HANGING_SECONDS} seconds: look whether the drive of the pictures "
            "answers, or give /dev/shm more room (docker run --shm-size); --num_workers 0 reads "
            "without it"
        )

    has_alarm = hasattr(signal, "SIGALRM")
    previous = handle_signal(signal.SIGALRM, give_up) if has_alarm else None
    if previous is None:
        yield
        return
    signal.alarm(HANGING_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        handle_signal(signal.SIGALRM, previous)


def handle_signal(number: int, handler) -> object | None:
    """signal.signal, or None where system or thread do not allow it (a notebook's threads)."""
    try:
        return signal.signal(number, handler)
    except (ValueError, OSError):
        return None


def is_interactive() -> bool:
    return hasattr(sys, "ps1")


def _watch(receiver: socket.socket, describe: Callable[[int], str]) -> None:
    """End the process at a second signal, or PATIENCE seconds after the first."""
    with receiver:
        first = _next_signal(receiver, None)
        if first is None:
            return
        heard_at = time.monotonic()
        second = _next_signal(receiver, heard_at + PATIENCE)
        is_rank = "TORCHELASTIC_RUN_ID" in os.environ
        while is_rank and second and time.monotonic() < heard_at + ECHO_SECONDS:
            second = _next_signal(receiver, heard_at + PATIENCE)
        if second is None:
            return

    # Not by print: the main thread may be in the middle of one.
    number = second or first
    os.write(2, f"\n{describe(number)}\n".encode())
    os._exit(128 + number)


def _next_signal(receiver: socket.socket, until: float | None) -> int | None:
    """The number of the next signal, 0 when time is over, None when nobody listens any more."""
    while True:
        receiver.settimeout(None if until is None else max(0.001, until - time.monotonic()))
        try:
            received = receiver.recv(1)
        except TimeoutError:
            return 0
        # The end of a loader worker is a signal too.
        if not received or received[0] in NUMBERS:
            return received[0] if received else None
