"""An answer cut into words, and where its tokens and those of the pictures stand in the input."""

from __future__ import annotations

import math
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.errors import UserError
from model.model_vlm import MiniMindVLM, find_image_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inference.load import VLM

# What Unicode calls the characters of Chinese and Japanese, which has no spaces between words.
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC")
# Joins characters to one, such as the people of a family emoji.
JOINER = "\u200d"


class Word(NamedTuple):
    """A word of an answer, with the space at its side.

    Args:
        text: as it stands in the answer.
        tokens: indices of its tokens, into those of the answer.
    """

    text: str
    tokens: range


class AnswerTokens(NamedTuple):
    """A conversation and the answer to it, as the model reads them.

    Args:
        input_ids: int64[1, T], prompt and answer.
        image_tokens: int64[k * n_image_tokens], indices of the tokens of k pictures.
        n_prompt: tokens of the prompt.
        words: of the answer.
    """

    input_ids: torch.Tensor
    image_tokens: torch.Tensor
    n_prompt: int
    words: list[Word]


def encode_answer(vlm: VLM, turns: list[dict], answer: str, n_images: int) -> AnswerTokens:
    """Tokens of a conversation up to and with the question, and of an answer to it.

    UserError where the answer has no word, the conversation no picture, or both are too long;
    BadSampleError for a malformed conversation.
    """
    if not answer.strip():
        raise UserError("the answer is empty: there is no word to look at")
    if not n_images:
        raise UserError("the conversation has no picture: there is nothing to look at")
    config, device = vlm.model.config, vlm.model.tok_embeddings.weight.device
    prompt = vlm.processor.encode_prompt(turns, n_images)
    # Of the prompt alone: however many '@' an answer has, they are text.
    image_tokens = find_image_tokens(prompt, config.image_token_id, config.n_image_tokens)
    answer_ids, words = split_words(vlm.processor.tokenizer, answer)
    input_ids = torch.cat((prompt, torch.tensor([answer_ids])), dim=1).to(device)
    return AnswerTokens(input_ids, image_tokens.to(device), prompt.shape[1], words)


def split_words(tokenizer: PreTrainedTokenizerBase, answer: str) -> tuple[list[int], list[Word]]:
    """(token ids of an answer, its words); the texts of the words, joined, are the answer.

    A word has at least a token, and a character of several tokens stays in one piece. Where a
    language writes spaces, they stay at a word (" red"). Words of Chinese and Japanese are
    characters, or tokens where one holds several.
    """
    encoded = tokenizer(
        answer, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    words: list[Word] = []
    # of the word that grows: its first character and token; `covered`: characters seen so far
    start = first = covered = 0
    for index, (begin, end) in enumerate(encoded["offset_mapping"]):
        # Tokens that are bytes of one character have the same place in the text.
        is_new = begin >= covered and answer[start:begin].strip()
        if is_new and not goes_on(answer[begin - 1], answer[begin]):
            words.append(Word(answer[start:begin], range(first, index)))
            start, first = begin, index
        covered = max(covered, end)

    # the last one; blanks at the end are no word
    n_tokens = len(encoded["input_ids"])
    if words and not answer[start:].strip():
        start, first = len("".join(word.text for word in words[:-1])), words.pop().tokens.start
    if n_tokens:
        words.append(Word(answer[start:], range(first, n_tokens)))
    return encoded["input_ids"], words


def goes_on(before: str, after: str) -> bool:
    """Whether two neighboring characters are of one word: those of "C5" are, not those of "d."."""
    if unicodedata.category(after).startswith("M") or JOINER in (before, after):
        return True
    return is_letter(before) and is_letter(after)


def is_letter(character: str) -> bool:
    """Whether words are made of it, in languages with spaces."""
    if character in "'’" or unicodedata.category(character).startswith("M"):
        return True
    return character.isalnum() and not unicodedata.name(character, "").startswith(CJK)


def find_grid(model: MiniMindVLM) -> tuple[int, int]:
    """(rows, cols) of the patches of a picture."""
    side = math.isqrt(model.config.n_image_tokens)
    return getattr(model.vision_encoder, "grid", (side, side))
