"""A picture of what the demo's model says: twelve held-out scenes, each with a question."""

import textwrap
from pathlib import Path

from common.files import atomic_write

ROWS, COLUMNS = 3, 4
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_answers(answers: list[dict], path: Path) -> None:
    """Write a PNG of twelve English questions, those that were answered wrong among them.

    Args:
        answers: of the report of eval_vlm.py.
        path: of the PNG.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(12, 12), dpi=100, layout="constrained")
    axes = figure.subplots(ROWS, COLUMNS).flat
    for axis, answer in zip(axes, choose_answers(answers, ROWS * COLUMNS)):
        # the scene
        with Image.open(answer["images"][0]) as image:
            axis.imshow(image)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)

        # the question above it, the answer below, and what is right if that is something else
        question = answer["question"].removeprefix("<image>").strip()
        is_right = answer["is_right"]
        said = _wrap(answer["given"])
        if not is_right:
            said += "\n" + _wrap(f"right: {answer['answer']}")
        axis.set_title(_wrap(question), fontsize=11)
        axis.set_xlabel(said, color=RIGHT if is_right else WRONG, fontsize=11)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def choose_answers(answers: list[dict], n: int) -> list[dict]:
    """`n` answers in English, right and wrong in the proportion in which they come.

    Matplotlib's own font has no Chinese characters.
    """
    english = [answer for answer in answers if answer["question"].isascii()]
    right = [answer for answer in english if answer["is_right"]]
    wrong = [answer for answer in english if not answer["is_right"]]
    # At least one wrong answer, if there is any: what fails is worth seeing.
    n_wrong = min(len(wrong), max(1, round(n * len(wrong) / max(1, len(english)))))
    return right[: n - n_wrong] + wrong[:n_wrong]


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 32))
