"""From a conversation and its images to what the model takes: the chat format, the placeholders, the labels."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import BadSampleError, MissingFileError, UserError
from model.image import load_image
from model.LMConfig import IMAGE_TOKEN, VLMConfig

TOKENIZER_PATH = "model/minimind_tokenizer"
IMAGE_TAG = "<image>"
IGNORE_INDEX = -100  # label of a token that is not learned
_OTHER_ROLE = {"user": "assistant", "assistant": "user"}


def load_tokenizer(path: str | Path = TOKENIZER_PATH) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`; UserError unless it has the ids the model counts on (0 pad, 1 <s>, 2 </s>, 34 '@')."""
    if not (Path(path) / "tokenizer.json").is_file():
        raise MissingFileError(
            f"no tokenizer in {path}: fetch it with `python -m scripts.download tokenizer`, or point --tokenizer to it"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, IMAGE_TOKEN: VLMConfig().image_token_id}
    wrong = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    wrong = {token: token_id for token, token_id in wrong.items() if token_id != expected[token]}
    if wrong:
        raise UserError(
            f"the tokenizer in {path} gives {wrong} instead of {expected}: it was not made for MiniMind-V"
        )
    return tokenizer


def check_conversation(
    conversations: list[dict], blank_answers: bool = False
) -> list[tuple[str, str]]:
    """[(role, content)] with user and assistant in turn, after at most one system turn. BadSampleError says what is wrong.

    Roles may be missing: user and assistant alternate then. A last user turn without an answer is kept.
    `blank_answers` are refused as training data, but a model may well have given one earlier in a chat.
    """
    if not isinstance(conversations, list) or not conversations:
        raise BadSampleError("no conversation")
    turns: list[tuple[str, str]] = []
    expected = "user"
    for index, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise BadSampleError("turn without text content", f"turn {index}")
        try:
            turn["content"].encode()
        except UnicodeEncodeError as error:  # a lone "\\ud83d" in JSON, which no tokenizer takes
            raise BadSampleError(
                "half a character", f"turn {index}: {turn['content']!r:.60}"
            ) from error
        role = turn.get("role") or expected
        if role == "system" and index == 0:
            turns.append((role, turn["content"]))
            continue
        if role != expected:
            raise BadSampleError(
                "wrong roles", f"turn {index} is by {role!r}, expected {expected!r}"
            )
        if role == "assistant" and not blank_answers and not turn["content"].strip():
            raise BadSampleError("empty answer", f"turn {index}")
        turns.append((role, turn["content"]))
        expected = _OTHER_ROLE[role]
    return turns


def count_labels(labels: torch.Tensor) -> int:
    """Label tokens of int64[…, T] that a loss is a mean over: the first of a row has nothing before it."""
    return len(find_labels(labels))


def find_labels(labels: torch.Tensor) -> torch.Tensor:
    """int64[n]: where the label tokens of int64[…, T] are, counted over all rows."""
    is_label = labels != IGNORE_INDEX
    is_label[..., 0] = False  # nothing comes before it
    return is_label.flatten().nonzero().squeeze(-1)


def match_image_tags(
    turns: list[tuple[str, str]], n_images: int
) -> tuple[list[tuple[str, str]], int]:
    """(turns, surplus): `<image>` tags beyond the number of images are dropped, as the published multi-image set needs.

    Fewer tags than images are a BadSampleError. Tags count in user turns only.
    """
    n_tags = sum(content.count(IMAGE_TAG) for role, content in turns if role == "user")
    if n_tags < n_images:
        raise BadSampleError("fewer <image> than images", f"{n_tags} for {n_images}")
    left, matched = n_images, []
    for role, content in turns:
        if role == "user":
            kept = min(left, content.count(IMAGE_TAG))
            left -= kept
            pieces = content.split(IMAGE_TAG)
            content = IMAGE_TAG.join(pieces[: kept + 1]) + "".join(pieces[kept + 1 :])
        matched.append((role, content))
    return matched, n_tags - n_images


class VLMProcessor:
    """Joins a tokenizer, CLIP's image processor and the model's sizes. Text and placeholders are encoded piece by piece,
    so what a prompt looks like to the model does not depend on what comes before or after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor, config: VLMConfig):
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self.image_token_id, self.image_ids = (
            config.image_token_id,
            list(config.image_ids),
        )  # a config is slow to ask
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        self._fixed: dict[str, list[int]] = {}  # ids of the chat format's own pieces
        self._special_tokens = tokenizer.all_special_tokens
        self.default_system = (
            rendered.split("<s>user\n")[0].removeprefix("<s>system\n").removesuffix("</s>\n")
        )

    def encode(
        self, conversations: list[dict], images: list, max_length: int
    ) -> dict[str, torch.Tensor]:
        """One training sample: input_ids int64[T], labels int64[T], pixel_values float[k, 3, H, W].

        Labels are the answers and their `</s>`, -100 elsewhere, aligned with input_ids (the model shifts them). Cut at
        `max_length`, never inside an image; BadSampleError where no label is left or the row is malformed.
        """
        sample, images = self.encode_text(conversations, images, max_length)
        return sample | {"pixel_values": self.preprocess(images)}

    def encode_text(
        self, conversations: list[dict], images: list, max_length: int
    ) -> tuple[dict, list]:
        """({input_ids, labels}, the images that are left after cutting) of `encode`; no image is opened."""
        turns, _ = match_image_tags(check_conversation(conversations), len(images))
        if turns[-1][0] == "user":
            turns = turns[:-1]  # nothing to learn from a question without an answer
        input_ids, labels = self.encode_turns(turns)
        length, n_images = self._cut(input_ids, max_length)
        input_ids, labels = torch.tensor(input_ids[:length]), torch.tensor(labels[:length])
        if not count_labels(labels):
            raise BadSampleError("no answer within max_length", f"{max_length} tokens")
        return {"input_ids": input_ids, "labels": labels}, images[:n_images]

    def encode_prompt(self, conversations: list[dict], n_images: int) -> torch.Tensor:
        """int64[1, T]: a dialogue that ends with a question, ready for `generate`. Surplus `<image>` tags are dropped."""
        turns, _ = match_image_tags(check_conversation(conversations, blank_answers=True), n_images)
        input_ids, _ = self.encode_turns(turns)
        return torch.tensor([input_ids + self._format_tokens("<s>assistant\n")])

    def preprocess(self, images: list) -> torch.Tensor:
        """Pictures or what `load_image` takes -> float[k, 3, H, W], exactly as CLIPImageProcessor does."""
        if not images:
            size = self.image_processor.crop_size
            return torch.empty(0, 3, size["height"], size["width"])
        return self.image_processor([load_image(image) for image in images], return_tensors="pt")[
            "pixel_values"
        ]

    def resize(self, image) -> torch.Tensor:
        """uint8[3, H, W]: `preprocess` up to the point where bytes become floats, a quarter of the memory."""
        resized = self.image_processor(
            load_image(image), do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        return resized["pixel_values"][0].to(torch.uint8)

    def _format_tokens(self, text: str) -> list[int]:
        """Ids of a piece of the chat format, such as "<s>user\\n"; there are few, so each is encoded once."""
        if text not in self._fixed:
            self._fixed[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._fixed[text]

    def _content_tokens(self, text: str) -> list[int]:
        """Ids of what somebody wrote: a "</s>" in it is four characters and cannot end a turn."""
        if any(token in text for token in self._special_tokens):
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        return self.tokenizer.backend_tokenizer.encode(
            text, add_special_tokens=False
        ).ids  # ten times as fast

    def encode_turns(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of `<s>role\\ncontent</s>\\n` for each turn, a system turn first."""
        if turns[:1] == [] or turns[0][0] != "system":
            turns = [("system", self.default_system)] + turns
        input_ids, labels = [], []

        def add(tokens: list[int], learned: bool) -> None:
            input_ids.extend(tokens)
            labels.extend(tokens if learned else [IGNORE_INDEX] * len(tokens))

        for role, content in turns:
            add(self._format_tokens(f"<s>{role}\n"), learned=False)
            if role == "user":
                add(self._expand_images(content), learned=False)
            else:
                add(self._content_tokens(content), learned=role == "assistant")
            add(self._format_tokens("</s>"), learned=role == "assistant")
            add(self._format_tokens("\n"), learned=False)
        return input_ids, labels

    def _expand_images(self, content: str) -> list[int]:
        """Tokens of a user turn with every `<image>` as its run of placeholder ids. An '@' of the text keeps its distance
        from the run, so that the run's length tells an image from text."""
        tokens = []
        pieces = content.split(IMAGE_TAG)
        for index, piece in enumerate(pieces):
            piece_tokens = self._break_long_runs(self._content_tokens(piece))
            if index > 0:
                tokens += self.image_ids
                if piece_tokens[:1] == [self.image_token_id]:
                    tokens += self._format_tokens("\n")
            tokens += piece_tokens
            if index < len(pieces) - 1 and piece_tokens[-1:] == [self.image_token_id]:
                tokens += self._format_tokens("\n")
        return tokens

    def _break_long_runs(self, tokens: list[int]) -> list[int]:
        """Split a run of '@' in the text that is as long as an image's, lest it stand for one."""
        unbroken, whole = [], []
        for token in tokens:
            unbroken = unbroken + [token] if token == self.image_token_id else []
            if len(unbroken) == len(self.image_ids):
                whole += self._format_tokens("\n")
                unbroken = [token]
            whole.append(token)
        return whole

    def _cut(self, input_ids: list[int], max_length: int) -> tuple[int, int]:
        """(length, images) of the sample after cutting at `max_length`, before an image that would not fit."""
        size, position, n_images = len(self.image_ids), 0, 0
        length = min(len(input_ids), max_length)
        while position < length:
            if (
                input_ids[position] == self.image_token_id
                and input_ids[position : position + size] == self.image_ids
            ):
                if position + size > length:
                    return position, n_images
                n_images += 1
                position += size
            else:
                position += 1
        return length, n_images
