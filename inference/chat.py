"""A dialogue about pictures, behind the command line, the web page and `load_vlm` alike.

The way of one question:

    prompt  ── check_prompt ───> neither blank nor a book
            ── add_image_tags ─> one `<image>` for each new picture
    turns   ── encode_turns ───> input_ids, no longer than the model takes
    images  ── vision encoder ─> image_features, once for each picture
            ── AnswerStream ───> pieces of text, as they come
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.errors import UserError
from common.text import IMAGE_TAG
from inference.answer_text import AnswerText
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, match_image_tags

# Characters of a question; a book would be encoded for minutes before it is found too long.
MAX_QUESTION = 20_000
# Pixels of the longer side of a picture that is kept open: CLIP takes 224 of the shorter one.
PICTURE_SIDE = 1024
# To whoever asks about a picture that the model has not got: it would answer all the same.
NO_PICTURE = "add a picture first: without one the model can only guess"


class TooLongError(UserError):
    """More than the model takes; `what` is "question" or "conversation"."""

    def __init__(self, what: str, size: str, limit: str):
        advice = "shorten it" if what == "question" else "start a new one"
        super().__init__(f"the {what} has {size} but {limit}: {advice}")
        self.what = what


class BlankError(UserError):
    """A question without a word."""


@dataclass
class Exchange:
    """A question and its answer.

    Args:
        question: with an `<image>` tag for each picture that came with it.
        answer: as far as it came.
        image_features: float[k, patches, vision_dim] of these pictures; None for none.
    """

    question: str
    answer: str
    image_features: torch.Tensor | None = None


class Chat:
    """One conversation; two share nothing but the model.

    It ends where the model's max_seq_len is full, so its memory is bounded.

    Attributes:
        exchanges: what was asked and answered; `del chat.exchanges[n:]` goes back to before
            question n, whose pictures go with it.
        tokens_per_second: of the last answer.
        seconds_to_first_token: of the last answer, with the time of the vision encoder.
    """

    def __init__(self, model: MiniMindVLM, processor: VLMProcessor):
        self.model, self.processor = model, processor
        self.exchanges: list[Exchange] = []
        self.tokens_per_second = 0.0
        self.seconds_to_first_token = 0.0

    @property
    def turns(self) -> list[dict]:
        """One {"role": ..., "content": ...} for each question and each answer."""
        turns = []
        for exchange in self.exchanges:
            turns.append({"role": "user", "content": exchange.question})
            turns.append({"role": "assistant", "content": exchange.answer})
        return turns

    @property
    def n_images(self) -> int:
        """How many pictures the model has been shown."""
        return sum(len(features) for features in self._list_features())

    @property
    def image_features(self) -> torch.Tensor | None:
        """float[k, patches, vision_dim] of all pictures, in order; None for none."""
        features = self._list_features()
        return torch.cat(features) if features else None

    def _list_features(self) -> list[torch.Tensor]:
        features = (exchange.image_features for exchange in self.exchanges)
        return [some for some in features if some is not None]

    def ask(self, prompt: str, images: list = (), **sampling) -> Iterator[str]:
        """Stream the answer, piece by piece.

        The conversation grows when the answer is complete. If the caller stops earlier, it keeps
        the answer so far; a question without a word of an answer leaves no trace.

        Args:
            prompt: the question.
            images: new pictures (or their paths), which stay for the rest of the conversation.
            sampling: temperature, top_p, max_new_tokens, seed, as `generate` takes them.

        BadSampleError for a picture that cannot be read, UserError for a question that is blank,
        and for a question or conversation that is too long.
        """
        # the question, and all before it
        started, images = time.perf_counter(), list(images)
        check_prompt(prompt)
        question = add_image_tags(prompt, len(images))
        turns = self.turns + [{"role": "user", "content": question}]
        n_images, longest = self.n_images + len(images), self.model.config.max_seq_len
        input_ids = encode_turns(self.processor, turns, n_images, longest)

        # the vision encoder runs once for each picture
        exchange = Exchange(question, "", self._encode_images(images) if images else None)
        features = [*self._list_features(), exchange.image_features]
        features = [some for some in features if some is not None]

        # the answer
        stream = AnswerStream(
            self.model,
            self.processor,
            input_ids,
            torch.cat(features) if features else None,
            started=started,
            **sampling,
        )
        is_whole = False
        try:
            yield from stream
            is_whole = True
        finally:
            if is_whole or stream.text:
                exchange.answer = stream.text
                self.exchanges.append(exchange)
            self.tokens_per_second = stream.tokens_per_second
            self.seconds_to_first_token = stream.seconds_to_first_token

    def _encode_images(self, images: list) -> torch.Tensor:
        """float[k, patches, vision_dim] of pictures, or of what `load_image` takes."""
        device = self.model.tok_embeddings.weight.device
        return self.model.encode_images(self.processor.preprocess(images).to(device))


class AnswerStream:
    """An answer as it comes: iterate over its pieces.

    Args:
        model, processor: what answers.
        input_ids: int64[1, T], see `encode_turns`.
        image_features: float[k, patches, vision_dim] of all pictures; None for none.
        started: when the work for this question began (time.perf_counter); now, if not given.
        sampling: options of `generate`.

    Attributes:
        text: the answer so far.
        n_tokens: how many tokens it has, with the one that ends it.
        seconds_to_first_token: since `started`.
        tokens_per_second: of the language model alone, so far.
    """

    def __init__(
        self,
        model: MiniMindVLM,
        processor: VLMProcessor,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None,
        *,
        started: float | None = None,
        **sampling,
    ):
        self.text, self.n_tokens = "", 0
        self.seconds_to_first_token = self.tokens_per_second = 0.0
        self._started = time.perf_counter() if started is None else started
        self._pieces = AnswerText(processor.tokenizer)
        self._steps = model.generate(
            input_ids.to(model.tok_embeddings.weight.device),
            image_features=image_features,
            stream=True,
            **sampling,
        )

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; one may be empty, so that each token gives the caller a turn."""
        began = time.perf_counter()
        for tokens in self._steps:
            # speed
            now = time.perf_counter()
            self.n_tokens += 1
            if self.n_tokens == 1:
                self.seconds_to_first_token = now - self._started
            self.tokens_per_second = self.n_tokens / (now - began)

            # text
            piece = self._pieces.add(int(tokens[0, -1]))
            self.text += piece
            yield piece


def check_prompt(prompt: str) -> None:
    """BlankError or TooLongError for what cannot be a question, whatever the conversation."""
    if not prompt.strip():
        raise BlankError("the question is blank: type one")
    if len(prompt) > MAX_QUESTION:
        raise TooLongError("question", f"{len(prompt)} characters", f"may have {MAX_QUESTION}")


def add_image_tags(prompt: str, n_images: int) -> str:
    """The question with exactly `n_images` tags; those that are not in it come before it.

    An `<image>` that somebody typed beyond them is no picture: it is left out.
    """
    tags = f"{IMAGE_TAG}\n" * max(0, n_images - prompt.count(IMAGE_TAG))
    ((_, question),), _ = match_image_tags([("user", tags + prompt)], n_images)
    # "<im<image>age>" without its tag is another one
    while question.count(IMAGE_TAG) > n_images:
        ((_, question),), _ = match_image_tags([("user", question)], n_images)
    return question


def encode_turns(
    processor: VLMProcessor, turns: list[dict], n_images: int, max_seq_len: int
) -> torch.Tensor:
    """int64[1, T] of a conversation that ends with a question.

    Args:
        processor: of the model.
        turns: with `n_images` `<image>` tags.
        n_images: pictures of the whole conversation.
        max_seq_len: tokens that the model takes.

    TooLongError where it leaves no room for an answer.
    """
    input_ids = processor.encode_prompt(turns, n_images)
    n_tokens = input_ids.shape[1]
    if n_tokens < max_seq_len:
        return input_ids

    # what to do depends on whether the question alone is too long
    own = turns[-1:]
    n_own = processor.encode_prompt(own, own[0]["content"].count(IMAGE_TAG)).shape[1]
    limit = f"the model takes {max_seq_len} (--max_seq_len)"
    if n_own >= max_seq_len:
        raise TooLongError("question", f"{n_own} tokens", limit)
    raise TooLongError("conversation", f"{n_tokens} tokens", limit)
