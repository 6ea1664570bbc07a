"""What a visitor has asked, about which pictures, and what was answered.

A Turn is written by the worker while the page reads it: each attribute is replaced whole, and a
turn that is over stays as it is.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from weakref import WeakKeyDictionary

from PIL import Image

from inference.chat import PICTURE_SIDE, add_image_tags
from inference.web.words import Problem, say
from model.image import load_image

if TYPE_CHECKING:
    import torch

    from inference.load import VLM

MAX_PICTURES, MAX_TURNS = 8, 100  # of a conversation
MAX_NAME = 200  # characters of a picture's name
THUMBNAIL_SIDE = 320  # pixels
# Of a ticket, in this order; the last three are the ends.
STATES = ("waiting", "loading", "answering", "done", "stopped", "failed")
ENDS = ("done", "stopped", "failed")


def make_encodable(text: str) -> str:
    """With "?" for half a character, which no file and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


@dataclass(eq=False)
class Picture:
    """A picture that came with a question; as a file, for decoded it takes three times as much.

    Args:
        name: of the file.
        encoded: PNG, at most PICTURE_SIDE pixels on its longer side, without loss.
        thumbnail: JPEG.
    """

    name: str
    encoded: bytes
    thumbnail: bytes
    # float[1, patches, vision_dim] by model: each model's vision encoder sees it once.
    features: WeakKeyDictionary[VLM, torch.Tensor] = field(default_factory=WeakKeyDictionary)

    @classmethod
    def open(cls, name: str, file: str | Path | BinaryIO | Image.Image) -> Picture:
        """From what `load_image` takes; BadSampleError where it cannot be read."""
        image = load_image(file, PICTURE_SIDE)
        encoded, thumbnail = io.BytesIO(), io.BytesIO()
        image.save(encoded, "PNG", compress_level=1)
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(thumbnail, "JPEG", quality=85)
        return cls(make_encodable(name[:MAX_NAME]), encoded.getvalue(), thumbnail.getvalue())

    @property
    def image(self) -> Image.Image:
        """RGB, decoded anew each time."""
        return load_image(io.BytesIO(self.encoded))

    @property
    def n_bytes(self) -> int:
        """Memory that it takes, about."""
        features = sum(tensor.nbytes for tensor in list(self.features.values()))
        return len(self.encoded) + len(self.thumbnail) + features


class Ticket:
    """Something that was asked of the worker and may be on its way.

    Attributes:
        state: see STATES.
        problem: why it failed; None if all is well.
    """

    def __init__(self):
        self.state = "waiting"
        self.problem: Problem | None = None
        self._lock = threading.Lock()
        # Says how many are before it; the worker sets it while it has the ticket.
        self.find_place: Callable[[], int] | None = None

    @property
    def is_finished(self) -> bool:
        return self.state in ENDS

    @property
    def place(self) -> int:
        """How many are before it; 0 when it is its turn."""
        find_place = self.find_place
        return 0 if self.is_finished or find_place is None else find_place()

    def stop(self) -> None:
        """End it now; what there is of it stays. Nothing happens if it is over."""
        self.change(state="stopped")

    def change(self, **attributes) -> bool:
        """Set attributes, unless it is over; returns whether it was not."""
        with self._lock:
            if self.is_finished:
                return False
            state = attributes.pop("state", self.state)
            for name, value in attributes.items():
                setattr(self, name, value)
            # Last, so that who reads "done" finds the whole answer.
            self.state = state
            return True


class Task(Ticket):
    """Work with the model beside questions; `result` is what came of it."""

    def __init__(self):
        super().__init__()
        self.result: Any = None


class Turn(Ticket):
    """A question and its answer.

    Args:
        question: as the visitor typed it.
        pictures: that came with it.
        refused: name of a file, and why it is none of them.
        model: name of what is asked.
        settings: temperature, top_p, max_new_tokens and seed.

    Attributes:
        answer: so far.
        n_tokens: of the answer.
        tokens_per_second: of the language model.
        seconds_to_first_token: since it was its turn, with the time of the vision encoder.
    """

    def __init__(
        self,
        question: str,
        pictures: Iterable[Picture] = (),
        refused: Iterable[tuple[str, Problem]] = (),
        model: str = "",
        settings: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.question, self.model = make_encodable(question), model
        self.settings, self.pictures = settings or {}, list(pictures)
        self.refused = [(make_encodable(name[:MAX_NAME]), problem) for name, problem in refused]
        self.answer, self.n_tokens = "", 0
        self.tokens_per_second = self.seconds_to_first_token = 0.0

    @property
    def is_answered(self) -> bool:
        """Whether the model is told of this turn when the next question is asked."""
        return self.state == "done" or (self.state == "stopped" and bool(self.answer))


def describe_speed(turn: Turn, language: str) -> str:
    """Tokens of an answer, tokens a second, and how long the first one took."""
    return say(
        "speed",
        language,
        n_tokens=turn.n_tokens,
        tokens_per_second=f"{turn.tokens_per_second:.1f}",
        seconds=f"{turn.seconds_to_first_token:.2f}",
    )


class Conversation:
    """Turns of one visitor; only the page adds some or takes some away."""

    def __init__(self):
        self.turns: list[Turn] = []

    @property
    def pictures(self) -> list[Picture]:
        """Of all turns, in order."""
        return [picture for turn in self.turns for picture in turn.pictures]

    @property
    def is_busy(self) -> bool:
        """Whether an answer is waited for."""
        return any(not turn.is_finished for turn in self.turns)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes, about."""
        n_characters = sum(len(turn.question) + len(turn.answer) for turn in self.turns)
        return 2 * n_characters + sum(picture.n_bytes for picture in self.pictures)

    def find(self, number: int) -> Turn:
        """Turn `number`; Problem where it is no longer there, cut off in another window."""
        if not 0 <= number < len(self.turns):
            raise Problem("gone")
        return self.turns[number]

    def cut(self, number: int) -> list[Turn]:
        """Take away turn `number` and all behind it, with their pictures; returns them."""
        removed = self.turns[number:]
        del self.turns[number:]
        for turn in removed:
            turn.stop()
        return removed

    def context(self, number: int) -> tuple[list[dict], list[Picture]]:
        """What the model is shown for a question.

        Turns that came to no answer are left out; their pictures come with the next question.

        Args:
            number: of the turn with the question.

        Returns:
            turns: {"role": ..., "content": ...} up to the question, with `<image>` tags.
            pictures: one for each tag.

        Problem where the turn is no longer there.
        """
        question = self.find(number)
        turns, all_pictures, new = [], [], []
        for turn in self.turns[: number + 1]:
            is_last = turn is question
            new = new + turn.pictures
            if not (turn.is_answered or is_last):
                continue
            turns.append({"role": "user", "content": add_image_tags(turn.question, len(new))})
            all_pictures, new = all_pictures + new, []
            if not is_last:
                turns.append({"role": "assistant", "content": turn.answer})
        return turns, all_pictures
