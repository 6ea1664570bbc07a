"""What `make demo` shows at its end."""

from PIL import Image

from scripts.demo.answers import RIGHT, WRONG, choose_answers, draw_answers
from tests.helpers import picture


def list_answers(tmp_path, n_right: int, n_wrong: int) -> list[dict]:
    """Entries of a report of eval_vlm.py; as many again are in Chinese."""
    picture(0).save(tmp_path / "a.png")
    answer = {"images": [str(tmp_path / "a.png")], "given": "The star is red.", "answer": "-"}
    verdicts = [True] * n_right + [False] * n_wrong
    questions = ("<image>\nWhat color is the star?", "<image>\n星形是什么颜色？")
    return [
        answer | {"question": question, "is_right": is_right}
        for is_right in verdicts
        for question in questions
    ]


def test_answers_are_shown_right_and_wrong_in_their_proportion(tmp_path):
    for n_right, n_wrong, expected in ((30, 10, 3), (99, 1, 1), (20, 0, 0), (0, 20, 12)):
        chosen = choose_answers(list_answers(tmp_path, n_right, n_wrong), 12)
        assert len(chosen) == 12 and all(answer["question"].isascii() for answer in chosen)
        assert sum(not answer["is_right"] for answer in chosen) == expected


def test_the_picture_has_both_colors_of_answers(tmp_path):
    draw_answers(list_answers(tmp_path, 9, 3), tmp_path / "answers.png")
    with Image.open(tmp_path / "answers.png") as image:
        colors = {color[:3] for _, color in image.getcolors(1 << 24)}
    for name in (RIGHT, WRONG):
        assert tuple(bytes.fromhex(name[1:])) in colors
