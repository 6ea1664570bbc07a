"""The text of an answer, token by token, up to a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerText:
    """Turns tokens into pieces of text, each of which is final.

    Args:
        tokenizer: of the model; no other thread may use it meanwhile.
        stops: strings before which the answer ends.

    Attributes:
        is_stopped: whether one of them has come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.is_stopped = False
        # Tokens whose last character is not whole yet, and text that may begin a stop string.
        self._tokens: list[int] = []
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain with one more token; often "" while a stop string may come."""
        # This sign means that the last character's other bytes are still to come.
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""
        self._tokens.clear()
        self._held += text

        # the first stop string ends it
        found = [self._held.find(stop) for stop in self.stops]
        found = [index for index in found if index >= 0]
        if found:
            self.is_stopped = True
            return self._give(min(found))
        n_held = max((count_begun(self._held, stop) for stop in self.stops), default=0)
        return self._give(len(self._held) - n_held)

    def finish(self) -> str:
        """What was held back; nothing if a stop string has come."""
        return "" if self.is_stopped else self._give(len(self._held))

    def _give(self, n_characters: int) -> str:
        piece, self._held = self._held[:n_characters], self._held[n_characters:]
        return piece


def count_begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
