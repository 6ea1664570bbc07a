"""From a conversation and its images to what the model takes: token ids, labels and pixels.

The way of one row:

    conversations ── check_conversation ──> [(role, content)], user and assistant in turn
                  ── match_image_tags ────> as many `<image>` tags as there are images
                  ── encode_turns ────────> input_ids, labels; each `<image>` is 196 image tokens
    images        ── preprocess ──────────> pixel_values float[k, 3, H, W]

The chat format is `<s>role\\ncontent</s>\\n` for each turn, a system turn first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from common.errors import BadSampleError
from common.text import IMAGE_TAG
from model.files import TOKENIZER_PATH
from model.image import load_image
from model.image_processor import picture_side, pixel_statistics, resize_picture
from model.labels import IGNORE_INDEX, count_labels, find_labels
from model.LMConfig import VLMConfig
from model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

__all__ = [
    "IGNORE_INDEX",
    "TOKENIZER_PATH",
    "VLMProcessor",
    "check_conversation",
    "count_labels",
    "find_labels",
    "load_tokenizer",
    "match_image_tags",
]

# All pieces of the chat format.
FORMAT = ("<s>system\n", "<s>user\n", "<s>assistant\n", "</s>", "\n")
_OTHER_ROLE = {"user": "assistant", "assistant": "user"}


def check_conversation(
    conversations: list[dict], blank_answers: bool = False
) -> list[tuple[str, str]]:
    """Check a conversation and return it as [(role, content)].

    User and assistant take turns, after at most one system turn; where roles are missing, they
    alternate. A last user turn without an answer is allowed.

    Args:
        conversations: one {"role": ..., "content": ...} for each turn.
        blank_answers: allow answers without text. Nothing can be learned from one, but a model
            may have given one earlier in a chat.

    BadSampleError says what is wrong.
    """
    if not isinstance(conversations, list) or not conversations:
        raise BadSampleError("no conversation")
    turns: list[tuple[str, str]] = []
    expected = "user"
    for index, turn in enumerate(conversations):
        # the text
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise BadSampleError("turn without text content", f"turn {index}")
        content = turn["content"]
        try:
            content.encode()
        except UnicodeEncodeError as error:
            # A lone "\ud83d" is valid in JSON, but no tokenizer takes it.
            raise BadSampleError("half a character", f"turn {index}: {content!r:.60}") from error

        # the role
        role = turn.get("role") or expected
        if role == "system" and index == 0:
            turns.append((role, content))
            continue
        if role != expected:
            raise BadSampleError(
                "wrong roles", f"turn {index} is by {role!r}, expected {expected!r}"
            )
        if role == "assistant" and not blank_answers and not content.strip():
            raise BadSampleError("empty answer", f"turn {index}")
        turns.append((role, content))
        expected = _OTHER_ROLE[role]
    return turns


def match_image_tags(
    turns: list[tuple[str, str]], n_images: int
) -> tuple[list[tuple[str, str]], int]:
    """Drop the `<image>` tags beyond `n_images`; return (turns, how many were dropped).

    The rows of the published multi-image set have one tag too many. Tags count in user turns only.
    BadSampleError where there are fewer tags than images.
    """
    n_tags = sum(content.count(IMAGE_TAG) for role, content in turns if role == "user")
    if n_tags < n_images:
        raise BadSampleError("fewer <image> than images", f"{n_tags} for {n_images}")
    if n_tags == n_images:
        return turns, 0
    n_left, matched = n_images, []
    for role, content in turns:
        if role == "user":
            n_used = min(n_left, content.count(IMAGE_TAG))
            n_left -= n_used
            pieces = content.split(IMAGE_TAG)
            content = IMAGE_TAG.join(pieces[: n_used + 1]) + "".join(pieces[n_used + 1 :])
        matched.append((role, content))
    return matched, n_tags - n_images


class VLMProcessor:
    """Turns conversations and pictures into samples, and prompts, of a model.

    Text and images are encoded piece by piece, so what a prompt looks like to the model does not
    depend on what comes before or after it.

    Args:
        tokenizer: see `load_tokenizer`.
        image_processor: the one that belongs to the vision encoder.
        config: sizes of the model; it gives the image token and how many an image has.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        config: VLMConfig,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        # Attributes of a configuration are slow to read, and these are read for each token.
        self.image_token_id = config.image_token_id
        self.image_ids = list(config.image_ids)
        self._special_tokens = tokenizer.all_special_tokens
        # Encoded once and before any text: a tokenizer that is shared by several threads has one
        # setting of whether "<s>" is a special token.
        self._format_ids = {
            piece: tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in FORMAT
        }
        # The chat template puts its own system turn before a conversation that has none.
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        system_turn = rendered.split("<s>user\n")[0]
        self.default_system = system_turn.removeprefix("<s>system\n").removesuffix("</s>\n")

    def encode(
        self, conversations: list[dict], images: list, max_length: int
    ) -> dict[str, torch.Tensor]:
        """Make one training sample.

        Args:
            conversations: see `check_conversation`.
            images: pictures or what `load_image` takes, one for each `<image>` tag.
            max_length: most tokens; the sample is cut there, never inside an image.

        Returns:
            input_ids int64[T]; labels int64[T], the answers and their `</s>`, -100 elsewhere,
            aligned with input_ids (the model shifts them); pixel_values float32[k, 3, H, W].

        BadSampleError where the row or a picture cannot be used, or no label is left.
        """
        sample, images = self.encode_text(conversations, images, max_length)
        return sample | {"pixel_values": self.preprocess(images)}

    def encode_text(
        self, conversations: list[dict], images: list, max_length: int
    ) -> tuple[dict[str, torch.Tensor], list]:
        """({input_ids, labels} of `encode`, the images left after cutting), no image opened."""
        turns, _ = match_image_tags(check_conversation(conversations), len(images))
        # Nothing can be learned from a question without an answer.
        if turns[-1][0] == "user":
            turns = turns[:-1]
        input_ids, labels = self.encode_turns(turns)
        length, n_images = self._cut(input_ids, max_length)
        input_ids, labels = torch.tensor(input_ids[:length]), torch.tensor(labels[:length])
        if not count_labels(labels):
            raise BadSampleError("no answer within max_length", f"{max_length} tokens")
        return {"input_ids": input_ids, "labels": labels}, images[:n_images]

    def encode_prompt(self, conversations: list[dict], n_images: int) -> torch.Tensor:
        """int64[1, T]: a conversation that ends with a question, ready for `generate`.

        `<image>` tags beyond `n_images` are dropped. BadSampleError for a malformed conversation.
        """
        turns, _ = match_image_tags(check_conversation(conversations, blank_answers=True), n_images)
        return self.encode_pieces(turns)

    def encode_pieces(self, turns: list[tuple[str, str | list[str]]]) -> torch.Tensor:
        """int64[1, T]: the same for turns that are checked already.

        A user turn may be a list, the pieces of text between its images: an `<image>` in one of
        them is text.
        """
        input_ids, _ = self.encode_turns(turns)
        return torch.tensor([input_ids + self._format_ids["<s>assistant\n"]])

    def preprocess(self, images: list) -> torch.Tensor:
        """float32[k, 3, H, W] of k pictures (or what `load_image` takes), for the encoder."""
        if not images:
            side = picture_side(self.image_processor)
            return torch.empty(0, 3, side, side)
        # one after the other: a photograph takes 70 MB while it is open
        each = (self.image_processor(load_image(image), return_tensors="pt") for image in images)
        return torch.cat([one["pixel_values"] for one in each])

    def resize(self, image) -> torch.Tensor:
        """uint8[3, H, W]: `preprocess` of one image up to the point where bytes become floats.

        A quarter of the memory; `model.vision.normalize_pixels` does the rest.
        """
        return resize_picture(self.image_processor, load_image(image))

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What `preprocess` made its floats of: float[k, 3, H, W] -> uint8[k, 3, H, W]."""
        mean, std = pixel_statistics(self.image_processor)
        pixels = 255 * (pixel_values.float().cpu() * std + mean)
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def encode_turns(self, turns: list[tuple[str, str | list[str]]]) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of `<s>role\\ncontent</s>\\n` for each turn, a system turn first."""
        if not turns or turns[0][0] != "system":
            turns = [("system", self.default_system)] + turns
        input_ids, labels = [], []

        def add(tokens: list[int], is_label: bool = False) -> None:
            input_ids.extend(tokens)
            labels.extend(tokens if is_label else [IGNORE_INDEX] * len(tokens))

        for role, content in turns:
            is_answer = role == "assistant"
            add(self._format_ids[f"<s>{role}\n"])
            if role == "user":
                add(self._encode_question(content))
            else:
                add(self.encode_content(content), is_answer)
            add(self._format_ids["</s>"], is_answer)
            add(self._format_ids["\n"])
        return input_ids, labels

    def encode_content(self, text: str) -> list[int]:
        """Ids of what somebody wrote, whatever the role: it can pose neither as format nor image.

        A "</s>" in it is four characters and cannot end a turn. A run of '@' as long as an image's
        is broken by a line break, or it would be one.
        """
        # no special token
        if any(token in text for token in self._special_tokens):
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            tokens = encoded["input_ids"]
        else:
            # The same ids, ten times as fast.
            tokens = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

        # no run of an image's length
        if tokens.count(self.image_token_id) < len(self.image_ids):
            return tokens
        n_run, broken = 0, []
        for token in tokens:
            n_run = n_run + 1 if token == self.image_token_id else 0
            if n_run == len(self.image_ids):
                broken += self._format_ids["\n"]
                n_run = 1
            broken.append(token)
        return broken

    def _encode_question(self, content: str | list[str]) -> list[int]:
        """Ids of a user turn, with the image tokens of an image for every `<image>`, or gap.

        The model tells an image from the text's own '@' by the length of the run. So a line break
        keeps an '@' of the text away from the image tokens.
        """
        line_break = self._format_ids["\n"]
        tokens = []
        pieces = content.split(IMAGE_TAG) if isinstance(content, str) else content
        for index, piece in enumerate(pieces):
            piece_tokens = self.encode_content(piece)
            if index > 0:
                tokens += self.image_ids
                if piece_tokens[:1] == [self.image_token_id]:
                    tokens += line_break
            tokens += piece_tokens
            if index < len(pieces) - 1 and piece_tokens[-1:] == [self.image_token_id]:
                tokens += line_break
        return tokens

    def _cut(self, input_ids: list[int], max_length: int) -> tuple[int, int]:
        """(tokens, images) left after cutting at `max_length`, before an image that is too long."""
        size, position, n_images = len(self.image_ids), 0, 0
        length = min(len(input_ids), max_length)
        while position < length:
            is_image = (
                input_ids[position] == self.image_token_id
                and input_ids[position : position + size] == self.image_ids
            )
            if is_image and position + size > length:
                return position, n_images
            n_images += is_image
            position += size if is_image else 1
        return length, n_images
