"""Examples that a visitor can click: only those that the loaded model answers exactly right."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock, Thread

from common.errors import UserError
from common.text import simplify_answer
from inference.web.conversation import Conversation, Picture
from inference.web.models import ModelEntry
from inference.web.worker import Worker

# Examples of a language that are shown; no more are tried once so many are right.
MOST_SHOWN = 6
# Tokens of an answer; a right one is as long as the known answer.
MOST_TOKENS = 128


@dataclass(frozen=True)
class Example:
    """A question with a known answer.

    Args:
        question: without image tags.
        pictures: it is about.
        answer: the right one.
        language: "en", "zh" or "ja".
        kind: what it shows; of each kind one is enough.
    """

    question: str
    pictures: tuple[Picture, ...]
    answer: str
    language: str
    kind: str


@dataclass
class Gallery:
    """The examples of one model: `right` grows while the others are tried."""

    right: list[Example] = field(default_factory=list)
    is_complete: bool = False

    def choose(self, language: str) -> list[Example]:
        """Those of the visitor's language, or all if it has none."""
        own = [example for example in self.right if example.language == language]
        return (own or self.right)[:MOST_SHOWN]


class Galleries:
    """A gallery for each model that visitors choose.

    Args:
        worker: what answers.
        find_examples: model -> examples to try.
    """

    def __init__(self, worker: Worker, find_examples: Callable[[ModelEntry], Iterable[Example]]):
        self.worker, self.find_examples = worker, find_examples
        self._by_model: dict[str, Gallery] = {}
        self._lock = Lock()

    def open(self, entry: ModelEntry) -> Gallery:
        """The gallery of a model; the first call begins to try its examples in the background."""
        with self._lock:
            key = str(entry.path)
            if key not in self._by_model:
                self._by_model[key] = Gallery()
                arguments = (entry, self._by_model[key])
                Thread(target=self._try_all, args=arguments, daemon=True).start()
            return self._by_model[key]

    def _try_all(self, entry: ModelEntry, gallery: Gallery) -> None:
        """Ask each example once, as a visitor would, in the queue of all."""
        try:
            for example in self.find_examples(entry):
                if self._is_needed(gallery, example) and self._is_right(entry, example):
                    gallery.right.append(example)
        except UserError as error:
            print(f"examples: {error}", flush=True)
        finally:
            gallery.is_complete = True

    def _is_needed(self, gallery: Gallery, example: Example) -> bool:
        known = [other.kind for other in gallery.right if other.language == example.language]
        return len(known) < MOST_SHOWN and example.kind not in known

    def _is_right(self, entry: ModelEntry, example: Example) -> bool:
        sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": MOST_TOKENS, "seed": 0}
        shelf = self.worker.shelf
        is_automatic = entry.path == shelf.default().path
        entry, _ = shelf.choose_for(len(example.pictures), None if is_automatic else entry)
        if len(example.pictures) > 1 and entry.stage == "sft":
            return False
        turn = self.worker.ask(
            Conversation(), entry, example.question, list(example.pictures), sampling, lambda: True
        )
        while not turn.is_finished:
            time.sleep(0.02)
        if turn.problem:
            raise turn.problem
        return simplify_answer(turn.answer) == simplify_answer(example.answer)
