"""A glance at some rows of a set: what is asked first, and which pictures come with it."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from common.errors import BadSampleError
from common.text import IMAGE_TAG
from model.processing import check_conversation

# At the start of a run: a longer look at a set of millions would keep it waiting.
ROWS_LOOKED_AT = 500


def glance(data, indices: Iterable[int]) -> Iterator[tuple[str, list]]:
    """(first question without its image tags, images) of some rows of a set.

    Rows without images, and those that cannot be read, are passed over.

    Args:
        data: a VLMDataset or MixedDataset.
        indices: of the rows.
    """
    for index in indices:
        try:
            row, images = data.read(index)
            turns = check_conversation(row.conversations)
        except BadSampleError:
            continue
        if images:
            opening = next((content for role, content in turns if role == "user"), "")
            yield opening.replace(IMAGE_TAG, "").strip(), images


def spread(data, n_rows: int) -> list[int]:
    """Indices of at most `n_rows` rows, spread evenly over a set."""
    return np.linspace(0, len(data) - 1, min(len(data), n_rows)).astype(int).tolist()


def find_opening_questions(data) -> dict[str, str | None]:
    """The questions that open most rows with one image ("question"), and with several.

    They are what eval_vlm.py asks if it is given no question.
    """
    questions = {"question": Counter(), "question_for_several": Counter()}
    for question, images in glance(data, spread(data, ROWS_LOOKED_AT)):
        name = "question" if len(images) == 1 else "question_for_several"
        questions[name][question] += 1
    for counts in questions.values():
        counts.pop("", None)
    return {name: max(counts, key=counts.get, default=None) for name, counts in questions.items()}
