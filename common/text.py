"""What stands for a picture in a text, and what makes two answers the same one."""

import unicodedata

# Where an image belongs in the text of a user turn.
IMAGE_TAG = "<image>"


def simplify_answer(answer: str) -> str:
    """The same for answers that differ only in case, spaces and the full stop at their end."""
    text = unicodedata.normalize("NFKC", answer).casefold()
    return " ".join(text.split()).rstrip(".。! ")
