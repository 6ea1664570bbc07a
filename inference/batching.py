"""Answers many requests together: they join and leave one running batch (continuous batching).

The way of a request, in one thread that works for all of them:

    waiting    until there is a row for it
    seeing     ── vision encoder ──> features of its pictures, those of several requests at once
    prefilling ── rows.prefill ────> a chunk of its prompt in each round, all requests in turn
    running    ── rows.decode ─────> a token of each row in each round, until the answer ends

So a long prompt keeps nobody waiting for longer than a chunk takes. Each row draws its tokens for
itself: the answer is the one that the request would get alone. Not always so with int8: onnxruntime
rounds by the largest number of all rows, PyTorch has another kernel for more than FEW_ROWS.
"""

from __future__ import annotations

import copy
import secrets
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from common.errors import UserError, is_memory_full
from common.flags import MOST_SEED
from inference.answer_text import AnswerText
from inference.batch_rows import Prompt, Rows
from inference.generate import LEAST_TEMPERATURE, count_free, sample
from inference.load import VLM

# Pictures that the vision encoder sees at once. On a CPU two take as long as one after the other,
# and the first of them has to wait.
PICTURES_AT_ONCE = {"cpu": 1, "cuda": 16}
# Pictures whose features are kept: 77 MB for ViT-B/16.
FEATURES_KEPT = 128
EOS_TOKEN_ID = 2


class Picture(NamedTuple):
    """A picture of a request.

    Args:
        key: the same for the same picture, see `common.files.hash_bytes`.
        pixel_values: float[1, 3, H, W]; None if the features of the key were there already.
        features: float[1, patches, vision_dim], or None.
    """

    key: bytes
    pixel_values: torch.Tensor | None
    features: torch.Tensor | None = None


class Answer:
    """A request, and the answer to it as it grows.

    Args:
        input_ids: int64[1, T], the prompt, shorter than the model's max_seq_len.
        pictures: of the prompt, in order.
        temperature, top_p, max_new_tokens, seed: see `generate`.
        stops: strings before which the answer ends.
        on_piece: called with each new piece of text, and with "" when the answer has ended; by the
            thread that answers, so it has to be quick.

    Attributes:
        end: why it has ended: "stop" (by the model, or a stop string), "length" (max_new_tokens, or
            the model is full), "cancelled", "failed"; None before.
        error: why it has failed.
        n_tokens: how many it has, with the one that ends it.
        seconds_to_first_token: since it was made.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        pictures: list[Picture] = (),
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        seed: int | None = None,
        stops: Iterable[str] = (),
        on_piece: Callable[[str], None] = lambda piece: None,
    ):
        self.input_ids, self.pictures = input_ids, list(pictures)
        self.temperature, self.top_p = temperature, top_p
        self.max_new_tokens, self.stops, self.on_piece = max_new_tokens, tuple(stops), on_piece
        self.seed = secrets.randbelow(MOST_SEED) if seed is None else seed
        self.end: str | None = None
        self.error: BaseException | None = None
        self.n_tokens, self.last_token = 0, 0
        self.seconds_to_first_token = 0.0
        self.is_cancelled = False
        self._made = time.perf_counter()
        # set by the batcher
        self.features: dict[bytes, torch.Tensor] = {}
        self.prompt: Prompt | None = None
        self.text: AnswerText | None = None
        self.generator: torch.Generator | None = None

    @property
    def n_prompt_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def unseen(self) -> dict[bytes, torch.Tensor]:
        """key -> pixel_values of the pictures that the vision encoder has yet to see."""
        return {
            picture.key: picture.pixel_values
            for picture in self.pictures
            if picture.key not in self.features
        }

    def cancel(self) -> None:
        """Nobody wants it any more: its row is free before the next token."""
        self.is_cancelled = True

    def add(self, token: int) -> None:
        """Grow by a token; `end` says whether it was the last one."""
        # the token
        if self.n_tokens == 0:
            self.seconds_to_first_token = time.perf_counter() - self._made
        self.n_tokens += 1
        self.last_token = token

        # its text; the last token may be the one that ends the answer
        if token == EOS_TOKEN_ID:
            self.finish("stop")
            return
        if piece := self.text.add(token):
            self.on_piece(piece)
        if self.text.is_stopped:
            self.finish("stop")
        elif self.n_tokens == self.max_new_tokens:
            self.finish("length")

    def finish(self, end: str, error: BaseException | None = None) -> None:
        """It has ended."""
        if self.end is not None:
            return
        held = self.text.finish() if self.text and end in ("stop", "length") else ""
        if held:
            self.on_piece(held)
        self.end, self.error = end, error
        self.prompt, self.features = None, {}
        self.on_piece("")


class FeatureCache:
    """Features of the pictures that were seen last; any thread may use it.

    Args:
        most: pictures that are kept.
    """

    def __init__(self, most: int = FEATURES_KEPT):
        self.most = most
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> torch.Tensor | None:
        """float[1, patches, vision_dim]; None if it is not there."""
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
            return self._features.get(key)

    def put(self, key: bytes, features: torch.Tensor) -> None:
        """Keep them; those that were used least recently go."""
        with self._lock:
            self._features[key] = features
            while len(self._features) > self.most:
                self._features.popitem(last=False)


class Batcher:
    """The thread that answers.

    Args:
        vlm: the model.
        max_rows: most answers at a time; further ones wait.

    Attributes:
        pictures: features of the pictures that it has seen.
    """

    def __init__(self, vlm: VLM, max_rows: int = 16):
        # A copy: a tokenizer that another thread encodes with cannot decode meanwhile.
        self.tokenizer = copy.deepcopy(vlm.processor.tokenizer)
        self.max_seq_len, self.max_rows = vlm.model.config.max_seq_len, max_rows
        self.rows = Rows(vlm.model, max_rows)
        self.pictures_at_once = PICTURES_AT_ONCE.get(self.rows.device.type, 1)
        self.pictures = FeatureCache()
        # Answers on their way, as at the top of this file. `_waiting` is shared with other threads.
        self._waiting: deque[Answer] = deque()
        self._seeing: list[Answer] = []
        self._prefilling: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="batcher", daemon=True)
        self._thread.start()

    @property
    def n_open(self) -> int:
        """Answers that are waiting or at work."""
        return len(self._waiting) + self._n_at_work

    @property
    def n_running(self) -> int:
        """Rows of the batch."""
        return len(self._running)

    @property
    def _n_at_work(self) -> int:
        return len(self._seeing) + len(self._prefilling) + len(self._running)

    def submit(self, answer: Answer) -> Answer:
        """Begin to answer; returns at once. UserError where the prompt fills the model."""
        n_free = count_free(answer.n_prompt_tokens, self.max_seq_len)
        answer.max_new_tokens = min(answer.max_new_tokens, n_free)
        with self._changed:
            if self._is_closed:
                raise UserError("the model has been closed: load it again")
            self._waiting.append(answer)
            self._changed.notify_all()
        return answer

    def close(self, wait: bool = True) -> None:
        """Cancel all answers, and end the thread; a signal's handler should not wait for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if wait:
            self._thread.join()

    # The thread.

    def _serve(self) -> None:
        """Round after round, while there is something to do."""
        while True:
            with self._changed:
                while not (self._waiting or self._n_at_work or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    break
            try:
                self.do_round()
            # No answer's own fault, a full memory while rows move: the thread has to live on.
            except BaseException as error:
                self._fail([*self._seeing, *self._prefilling, *self._running], error)
                self._seeing, self._prefilling, self._running = [], deque(), []
                # `clear` may need memory; the first row that joins does the rest.
                self.rows.starts = []
        for answer in [*self._waiting, *self._seeing, *self._prefilling, *self._running]:
            answer.finish("cancelled")

    def do_round(self) -> None:
        """Go on with all answers by one step."""
        self._drop_cancelled()
        self._admit()
        self._see()
        self._prefill()
        self._decode()

    def _drop_cancelled(self) -> None:
        """Forget what nobody waits for any more."""
        for answer in (answer for answer in self._running if answer.is_cancelled):
            answer.finish("cancelled")
        self._free_rows()
        with self._changed:
            places = (self._waiting, self._seeing, self._prefilling)
            for place in places:
                for answer in [answer for answer in place if answer.is_cancelled]:
                    place.remove(answer)
                    answer.finish("cancelled")

    def _admit(self) -> None:
        """As many of those that wait as there are rows for."""
        with self._changed:
            while self._waiting and self._n_at_work < self.max_rows:
                self._seeing.append(self._waiting.popleft())

    def _see(self) -> None:
        """Show the vision encoder the next pictures; who has seen all of its own goes on."""
        # Who can have a first token now has it before others see.
        if any(answer.prompt.n_done == 0 for answer in self._prefilling):
            return

        # what is known already
        unseen: dict[bytes, torch.Tensor] = {}
        for answer in self._seeing:
            for picture in answer.pictures:
                known = picture.features
                known = self.pictures.get(picture.key) if known is None else known
                if known is not None:
                    answer.features[picture.key] = known
            unseen |= answer.unseen

        # the next pictures, each once
        keys = list(unseen)[: self.pictures_at_once]
        if keys:
            try:
                features = self.rows.encode_images(torch.cat([unseen[key] for key in keys]))
            except BaseException as error:
                self._fail([answer for answer in self._seeing if answer.unseen], error)
                keys = []
            for key, one in zip(keys, features.split(1) if keys else ()):
                # A copy: a part would keep the memory of all of them.
                one = one.clone()
                self.pictures.put(key, one)
                for answer in self._seeing:
                    if key in answer.unseen:
                        answer.features[key] = one

        # on to the prompt
        for answer in [answer for answer in self._seeing if not answer.unseen or answer.end]:
            self._seeing.remove(answer)
            if answer.end is None:
                self._open(answer)

    def _open(self, answer: Answer) -> None:
        """Begin with the prompt of an answer."""
        features = [answer.features[picture.key] for picture in answer.pictures]
        try:
            answer.prompt = self.rows.open_prompt(
                answer.input_ids, torch.cat(features) if features else None
            )
        except BaseException as error:
            self._fail([answer], error)
            return
        answer.text = AnswerText(self.tokenizer, answer.stops)
        answer.generator = torch.Generator(self.rows.device).manual_seed(answer.seed)
        self._prefilling.append(answer)

    def _prefill(self) -> None:
        """The next chunk of one prompt; one that is whole joins the batch."""
        if not self._prefilling:
            return
        answer = self._prefilling.popleft()
        try:
            logits = self.rows.prefill(answer.prompt)
            if logits is None:
                self._prefilling.append(answer)
                return
            (token,) = choose(logits, [answer])
            answer.add(token)
            if answer.end is None:
                self.rows.join(answer.prompt)
                answer.prompt = None
                self._running.append(answer)
        except BaseException as error:
            self._fail([answer], error)

    def _decode(self) -> None:
        """A token of each row."""
        if not self._running:
            return
        try:
            logits = self.rows.decode([answer.last_token for answer in self._running])
            for answer, token in zip(self._running, choose(logits, self._running)):
                answer.add(token)
            self._free_rows()
        except BaseException as error:
            self._fail(self._running, error)
            self._running = []
            self.rows.clear()

    def _free_rows(self) -> None:
        """Take those that have ended out of the batch."""
        # The last row takes the place of one that leaves, so from the last to the first.
        for row in reversed(range(len(self._running))):
            if self._running[row].end is not None:
                self.rows.leave(row)
                self._running[row] = self._running[-1]
                self._running.pop()

    def _fail(self, answers: list[Answer], error: BaseException) -> None:
        """Whatever goes wrong is the end of these answers only."""
        if not isinstance(error, UserError) and not is_memory_full(error):
            traceback.print_exception(error, file=sys.stderr)
        for answer in answers:
            answer.finish("failed", error)


def choose(logits: torch.Tensor, answers: list[Answer]) -> list[int]:
    """A token of each row, float[rows, vocab_size], as its own request wants it."""
    # The likeliest of all rows at once; most requests want nothing else.
    tokens = logits.argmax(dim=-1)  # (rows,)
    for row, answer in enumerate(answers):
        if answer.temperature >= LEAST_TEMPERATURE:
            tokens[row : row + 1] = sample(
                logits[row : row + 1], answer.temperature, answer.top_p, answer.generator
            )
    return tokens.tolist()
