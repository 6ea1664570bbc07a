"""eval_vlm.py as a user starts it."""

import io
import json
import math
import re
import shutil
import zipfile
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval_vlm
from common.errors import BadSampleError, UserError
from dataset.mixture import open_data
from inference import load_vlm
from inference.config import EvalConfig
from inference.evaluate import Asked, Evaluation, make_batches
from inference.metrics import Score, check_package
from inference.paths import choose_weights
from inference.questions import (
    Question,
    choose_requests,
    count_unmoved,
    measure_accuracy,
    read_type,
    shuffle_images,
)
from inference.report import find_captions, save_answers, widen
from model.llava import to_llava
from model.weights import save_atomically, save_weights, select_weights
from tests.helpers import (
    TOKENIZER,
    assistant,
    picture,
    run_cold,
    run_script,
    small_image_processor,
    small_model,
    small_vision_encoder,
    user,
    write_rows,
)


@pytest.fixture(scope="module")
def setup(vision_dir, tmp_path_factory):
    """A folder with published weights of all modes and some pictures; and the flags that use it."""
    folder = tmp_path_factory.mktemp("eval")
    model = small_model(n_heads=2)
    for name in ("pretrain_vlm", "sft_vlm", "sft_vlm_multi"):
        save_atomically(select_weights(model), folder / f"{name}_64.pth")
    (folder / "pictures/pair").mkdir(parents=True)
    for name in ("a.png", "b.png", "pair/0.png", "pair/1.png"):
        picture(len(name)).save(folder / "pictures" / name)
    flags = ["--out_dir", folder, "--tokenizer", TOKENIZER, "--vision_model", vision_dir]
    return folder, [*flags, "--device", "cpu", "--max_new_tokens", "8"]


def answers_in(printed: str) -> list[str]:
    """What stands between the names of the pictures and the speed."""
    return re.findall(r"^\[.*?\]\n(.*?)\n\([0-9.]+ tokens/s", printed, re.M | re.S)


@pytest.mark.parametrize("mode", ["0", "1"])
def test_every_picture_of_a_folder(setup, mode):
    folder, flags = setup
    (folder / "pictures/broken.jpg").write_bytes(b"nothing")
    mode = ["--load", "0", "--model_mode", mode]
    finished = run_script("eval_vlm.py", *mode, *flags, "--images_dir", folder / "pictures")
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("tokens/s, first token after") == 2
    assert "[a.png]" in finished.stdout and "skipped: image damaged" in finished.stdout
    (folder / "bad").mkdir(exist_ok=True)
    shutil.move(folder / "pictures/broken.jpg", folder / "bad/broken.jpg")
    finished = run_script("eval_vlm.py", *mode, *flags, "--images_dir", folder / "bad")
    assert finished.returncode == 2, "nothing was answered"
    assert finished.stdout.endswith("error: none of these pictures could be read\n")


def test_multi_image_mode_asks_about_a_folder_at_once(setup):
    folder, flags = setup
    finished = run_script(
        "eval_vlm.py", "--model_mode", "2", *flags, "--images_dir", folder / "pictures"
    )
    assert (
        finished.returncode == 0
        and "[0.png, 1.png]" in finished.stdout
        and finished.stdout.count("tokens/s") == 1
    )


@pytest.mark.parametrize("is_repeated", [False, True])
def test_images_and_prompt_by_flag(setup, is_repeated):
    """`--image a b` and `--image a --image b` are the same."""
    folder, flags = setup
    pictures = ["--image", folder / "pictures/a.png", folder / "pictures/b.png"]
    if is_repeated:
        pictures.insert(2, "--image")
    finished = run_script("eval_vlm.py", *flags, *pictures, "--prompt", "What changes?")
    assert finished.returncode == 0, finished.stdout
    assert "[a.png, b.png]" in finished.stdout and "Traceback" not in finished.stdout


def test_a_model_of_any_name_is_asked_by_its_path(setup, vision_dir, tmp_path):
    """Sizes, tokenizer and vision encoder come from the JSON that training leaves."""
    save_weights(
        small_model(n_layers=1),
        tmp_path / "mine_64.pth",
        tokenizer=str(TOKENIZER),
        vision_model=str(vision_dir),
    )
    weights, image = tmp_path / "mine_64.pth", setup[0] / "pictures/a.png"
    ask = ["--image", image, "--prompt", "What?", "--device", "cpu", "--temperature", "0"]
    finished = run_script("eval_vlm.py", "--weights", weights, *ask, "--max_new_tokens", "8")
    assert finished.returncode == 0 and len(answers_in(finished.stdout)) == 1, finished.stdout
    hinted = run_script("eval_vlm.py", "--out_dir", tmp_path, *ask)
    assert f"but mine_64.pth: pass --weights {weights}" in hinted.stdout


def test_a_picture_asked_for_by_name_has_to_be_readable(setup):
    folder, flags = setup
    (folder / "bad.png").write_bytes(b"nothing")
    finished = run_script("eval_vlm.py", *flags, "--image", folder / "bad.png")
    assert (
        finished.returncode == 2
        and "error: image damaged" in finished.stdout
        and "Traceback" not in finished.stdout
    )


def test_generate_names_both_numbers_and_cuts_a_long_answer(model):
    with pytest.raises(UserError, match="prompt has 600 tokens but max_seq_len is 512"):
        model.generate(torch.full((1, 600), 5))
    tokens = model.generate(torch.full((1, 505), 5), max_new_tokens=10**9, eos_token_id=-1)
    assert tokens.shape == (1, 512)


@pytest.mark.parametrize("temperature", [0.0, 1e-310, 1e-6, 1e9, float("inf")])
def test_any_temperature_gives_tokens(model, temperature):
    tokens = model.generate(torch.full((1, 5), 5), max_new_tokens=3, temperature=temperature)
    assert set(tokens.flatten().tolist()) <= set(range(672))


def test_loss_and_accuracy_of_a_file(setup, rows_dir):
    folder, flags = setup
    data = ["--data", rows_dir / "rows.jsonl", "--images_path", rows_dir / "images"]
    finished = run_script("eval_vlm.py", *flags, *data, "--save_report", folder / "report.json")
    assert finished.returncode == 0, finished.stdout
    report = json.loads((folder / "report.json").read_text())
    assert (
        report["questions"] == 24 and 0 <= report["accuracy"]["overall"] <= 1 and report["loss"] > 1
    )


def test_several_choices_of_images_in_one_pass_give_what_each_gives_alone(setup, rows_dir):
    """Answers, accuracies and loss; the batch size, which decides the padding, does not matter."""
    folder, flags = setup
    data = ["--data", rows_dir / "rows.jsonl", "--images", rows_dir / "images"]
    choices = ("right", "wrong", "none")
    report = folder / "choices.json"
    show = ["--show_images", *choices, "--save_report", report]
    together = run_script("eval_vlm.py", *flags, *data, *show)
    assert together.returncode == 0, together.stdout
    assert re.search(r"overall: .* % right image, .* % wrong image, .* % no image", together.stdout)
    reports = json.loads(report.read_text())
    for choice in choices:
        show = ["--show_images", choice, "--save_report", report, "--batch_size", "5"]
        alone = run_script("eval_vlm.py", *flags, *data, *show)
        assert alone.returncode == 0 and "exact answers, overall:" in alone.stdout
        expected = json.loads(report.read_text())
        loss, expected_loss = reports[choice].pop("loss", 0), expected.pop("loss", 0)
        assert reports[choice] == expected and loss == pytest.approx(expected_loss, rel=1e-5)


def test_a_picture_is_encoded_once(setup, rows_dir):
    flags = [str(flag) for flag in setup[1]]
    vlm = load_vlm(setup[0] / "sft_vlm_64.pth", tokenizer=TOKENIZER, vision_model=flags[5])
    counted, encode = [], vlm.model.encode_images
    vlm.model.encode_images = lambda pixels: counted.append(len(pixels)) or encode(pixels)
    dataset = open_data(
        [str(rows_dir / "rows.jsonl")], [str(rows_dir / "images")], vlm.processor, 512
    )
    evaluation = Evaluation(vlm, dataset, batch_size=4)
    questions = evaluation.collect()
    for images in ("right", "wrong", "none"):
        assert len(list(evaluation.answer(questions, images))) == len(questions)
        evaluation.measure_loss(questions, images)
    assert sum(counted) == len(list((rows_dir / "images").iterdir()))


@torch.no_grad()
def test_the_loss_of_questions_is_that_of_their_rows(setup, rows_dir, tmp_path):
    """Prompt and answer apart, from a cache: as if each row went through the model whole."""
    vlm = load_vlm(setup[0] / "sft_vlm_64.pth", tokenizer=TOKENIZER, vision_model=setup[1][5])
    turns = [user("<image>\nWhat?"), assistant("red"), user("And?"), assistant("a blue circle")]
    write_rows(tmp_path / "two.jsonl", [{"image": "1-0.png", "conversations": turns}])
    files = [str(rows_dir / "rows.jsonl"), str(tmp_path / "two.jsonl")]
    dataset = open_data(files, [str(rows_dir / "images")], vlm.processor, 512)
    evaluation = Evaluation(vlm, dataset, batch_size=7)
    questions = evaluation.collect()
    list(evaluation.answer(questions, "right"))
    evaluation.measure_loss(questions, "right")
    for index in range(len(dataset)):
        sample = dataset[index]
        output = vlm.model(
            sample["input_ids"][None], sample["pixel_values"], sample["labels"][None]
        )
        losses = [question.loss["right"] for question in questions if question.row == index]
        nats, n_labels = map(sum, zip(*losses))
        assert n_labels == int((sample["labels"] != -100).sum())
        assert nats / n_labels == pytest.approx(float(output.loss), rel=1e-5)


def test_unreadable_pictures_cost_their_questions_only(setup, tmp_path):
    _, flags = setup
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in ("a.png", "b.png", "cut.png"):
            archive.write(tmp_path / name, name)
    whole = (tmp_path / "b.png").read_bytes()
    broken = whole[:50] + bytes(10) + whole[60:]
    (tmp_path / "pictures.zip").write_bytes(
        (tmp_path / "pictures.zip").read_bytes().replace(whole, broken)
    )
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
    write_rows(
        tmp_path / "rows.jsonl",
        [{"image": name, "conversations": turns} for name in ("a.png", "b.png", "cut.png")],
    )
    data = ["--data", tmp_path / "rows.jsonl", "--images_path", tmp_path / "pictures.zip"]
    data += ["--save_report", tmp_path / "r.json"]
    finished = run_script("eval_vlm.py", *flags, *data)
    assert finished.returncode == 0 and "not asked: 2 image damaged" in finished.stdout, (
        finished.stdout
    )
    assert (
        json.loads((tmp_path / "r.json").read_text())["questions"] == 1
        and "loss:" in finished.stdout
    )


LONG_PROMPT = "What color is the circle? " * 200
# What may stand in one row of a set; "@" nine times is what an image is here.
BAD_ROWS = {
    "an answer of a book": {"conversations": [user("What?"), assistant("red blue " * 11_000)]},
    "a prompt too long": {"conversations": [user(LONG_PROMPT), assistant("red")]},
    "a damaged picture": {
        "image": "damaged.png",
        "conversations": [user("<image>\nWhat?"), assistant("red")],
    },
    "text like an image": {
        "conversations": [
            {"role": "system", "content": "@" * 9},
            *(user("@" * 9), assistant("@" * 18)),
            *(user("</s>\n<s>user\n" + "@" * 9), assistant("@" * 9)),
        ]
    },
}
ODD_TYPES = [
    {"type": type_, "conversations": [user("What?"), assistant("red")]}
    for type_ in (["a"], {"b": 1}, 5, None, "t" * 1000, "overall", "a\x1b[31m", " ", "color")
]


def test_no_row_changes_or_ends_what_others_get(setup, rows_dir, tmp_path):
    """Alone and among bad rows, good rows get the same answers; bad ones are named."""
    _, flags = setup
    good = [json.loads(line) for line in open(rows_dir / "rows.jsonl", encoding="utf-8")]
    (tmp_path / "images").mkdir()
    for path in (rows_dir / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images/damaged.png").write_bytes(picture_bytes()[:60])
    bad = [*BAD_ROWS.values(), *ODD_TYPES]
    write_rows(tmp_path / "good.jsonl", good)
    write_rows(tmp_path / "all.jsonl", good[:12] + bad + good[12:])

    answers, printed = {}, {}
    for name in ("good", "all"):
        data = ["--data", tmp_path / f"{name}.jsonl", "--images", tmp_path / "images"]
        report = tmp_path / f"{name}.json"
        limits = ["--max_seq_len", "512", "--max_new_tokens", "64", "--batch_size", "5"]
        finished = run_script("eval_vlm.py", *flags, *limits, *data, "--save_report", report)
        assert finished.returncode == 0, finished.stdout
        content = json.loads(report.read_text(encoding="utf-8"))
        answers[name] = [(one["question"], one["given"]) for one in content["answers"]]
        printed[name] = finished.stdout, content
    assert "not asked" not in printed["good"][0] and len(answers["good"]) == 24
    assert set(answers["good"]) <= set(answers["all"]) and len(answers["all"]) == 24 + 12

    text, content = printed["all"]
    assert "not asked: 1 image damaged, 1 prompt too long" in text.replace(
        "1 prompt too long, 1 image damaged", "1 image damaged, 1 prompt too long"
    )
    assert re.search(r"^  line 14 of all.jsonl: prompt too long: \d+ tokens, the model", text, re.M)
    assert re.search(r"^  line 15 of all.jsonl: image damaged: .+", text, re.M)
    assert content["accuracy"].keys() == {"overall", "all", "color"}
    assert "of type all: 7 type is no short text\n  line 17 of all.jsonl" in text
    assert not list(tmp_path.glob("*.answers.jsonl")), "the report has them"


def picture_bytes() -> bytes:
    file = io.BytesIO()
    picture().save(file, "PNG")
    return file.getvalue()


def test_an_answer_is_bounded_by_its_own_right_answer(setup, tmp_path):
    """One answer of 90,000 characters: only its own batch goes on as long as the cap says."""
    rows = [{"conversations": [user(f"{i}?"), assistant("red")]} for i in range(6)]
    write_rows(tmp_path / "rows.jsonl", [*rows, BAD_ROWS["an answer of a book"]])
    vlm = load_vlm(setup[0] / "sft_vlm_64.pth", tokenizer=TOKENIZER, vision_model=setup[1][5])
    dataset = open_data([str(tmp_path / "rows.jsonl")], None, vlm.processor, 512)
    evaluation = Evaluation(vlm, dataset, batch_size=32, max_new_tokens=40)
    asked, generate = [], vlm.model.generate
    vlm.model.generate = lambda ids, **options: (
        asked.append((len(ids), options["max_new_tokens"])) or generate(ids, **options)
    )
    questions = evaluation.collect()
    assert len(list(evaluation.answer(questions, "right"))) == 7
    n_right = len(vlm.processor.encode_content("red"))
    assert evaluation.plan(questions[0], None).n_answer == 2 * n_right + 4
    assert max(asked)[1] == 40 and sum(n for n, _ in asked) == 7


@given(
    st.lists(
        st.builds(Asked, st.none(), st.integers(), st.integers(1, 60), st.integers(1, 40)),
        max_size=40,
    ),
    st.integers(1, 8),
)
def test_a_batch_has_room_for_its_longest_prompt_and_answer(asked, batch_size):
    batches = make_batches(asked, batch_size, max_seq_len=100)
    assert Counter(one for batch in batches for one in batch) == Counter(asked)
    for batch in batches:
        assert len(batch) <= batch_size
        assert max(one.n_prompt for one in batch) + max(one.n_answer for one in batch) <= 100


def test_a_picture_of_a_later_turn_does_not_come_with_an_earlier_question(setup, tmp_path):
    for name in ("a.png", "b.png"):
        picture(ord(name[0])).save(tmp_path / name)
    first = [user("<image>\nWhat?"), assistant("red")]
    later = [user("And <image> this?"), assistant("blue")]
    write_rows(
        tmp_path / "rows.jsonl",
        [{"image": ["a.png", "b.png"], "conversations": first + later}]
        + [{"image": "b.png", "conversations": first}] * 2,
    )
    report = tmp_path / "r.json"
    data = ["--data", tmp_path / "rows.jsonl", "--images", tmp_path, "--save_report", report]
    finished = run_script("eval_vlm.py", *setup[1], *data, "--show_images", "wrong", "right")
    assert finished.returncode == 0 and "not asked" not in finished.stdout, finished.stdout
    answers = json.loads(report.read_text(encoding="utf-8"))["right"]["answers"]
    assert [len(answer["images"]) for answer in answers] == [1, 2, 1, 1]


def test_sampling_flags_have_effect_on_data(setup, rows_dir, tmp_path):
    _, flags = setup
    data = ["--data", rows_dir / "rows.jsonl", "--images", rows_dir / "images"]

    def ask(*more) -> list[str]:
        report = ["--save_report", tmp_path / "r.json"]
        finished = run_script("eval_vlm.py", *flags[:-2], *data, *report, *more)
        assert finished.returncode == 0, finished.stdout
        answers = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["answers"]
        return [answer["given"] for answer in answers]

    likeliest, drawn = ask(), ask("--temperature", "3")
    assert ask("--temperature", "0") == likeliest != drawn == ask("--temperature", "3")
    assert ask("--temperature", "3", "--top_p", "0.01") != drawn
    assert sum(map(len, ask("--max_new_tokens", "1"))) < sum(map(len, likeliest))


def test_answers_are_kept_when_a_run_is_interrupted(tmp_path, capsys):
    question = Question(0, [user("What?")], ("a.png",), "red", given={"right": "红 \udcff"})
    with pytest.raises(KeyboardInterrupt), save_answers(str(tmp_path / "new/r.json")) as save:
        save(question, "right")
        raise KeyboardInterrupt
    path = tmp_path / "new/r.answers.jsonl"
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["given"].startswith("红") and json.loads(line)["shown"] == "right"
    assert f"answers so far: {path}" in capsys.readouterr().out
    with save_answers(str(tmp_path / "new/r.json")) as save:
        save(question, "right")
    assert not path.exists()


CAPTIONS = [
    {
        "en": ["a red circle", "one red circle on white ."],
        "zh": ["红色的圆。", "一个红色的圆在左边。"],
    },
    {"en": ["a blue star", "the star <b>is</b> big & blue"], "zh": ["蓝色的星。"]},
    {"en": ["two hearts , both green"], "zh": ["两颗绿色的心。"]},
]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Three pictures with captions in two languages: flags that name them."""
    folder = tmp_path_factory.mktemp("captioned")
    for number, captions in enumerate(CAPTIONS):
        picture(number).save(folder / f"{number}.png")
        captions["image"] = f"{number}.png"
    write_rows(folder / "rows.jsonl", CAPTIONS)
    return ["--data", folder / "rows.jsonl", "--images", folder]


def test_metrics_of_captions(setup, captioned, tmp_path):
    """Scores by language with each choice of images, as JSON, a table and a page."""
    save = ["--metrics", "--save_report", tmp_path / "r.json"]
    finished = run_script("eval_vlm.py", *setup[1], *captioned, *save)
    assert finished.returncode == 0, finished.stdout
    reports = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert list(reports) == ["right", "wrong", "none"]
    for report in reports.values():
        assert report["questions"] == 6 and report["pictures"] == 3
        assert report["counts"] == {"overall": 6, "en": 3, "zh": 3}
        for type_, scores in report["metrics"].items():
            # texts of several languages have no score together
            of_texts = set() if type_ == "overall" else {"CIDEr-D", "BLEU-4", "ROUGE-L"}
            assert {*scores} == {"exact", "loss", "perplexity"} | of_texts
            assert all(one["low"] <= one["value"] <= one["high"] for one in scores.values())
            assert scores["perplexity"]["value"] == pytest.approx(math.exp(scores["loss"]["value"]))
        # the scores of the answers are those of the set
        english = [answer for answer in report["answers"] if answer["type"] == "en"]
        mean = sum(answer["scores"]["ROUGE-L"] for answer in english) / 3
        assert mean == pytest.approx(report["metrics"]["en"]["ROUGE-L"]["value"])
        assert [answer["references"] for answer in english] == [row["en"] for row in CAPTIONS]
    assert len({report["metrics"]["en"]["loss"]["value"] for report in reports.values()}) == 3

    # for people: printed, to paste, and with the pictures
    assert re.search(r"^en \(3\) +CIDEr-D  ", finished.stdout, re.M)
    table = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "| questions | score | right image | wrong image | no image |\n| --- |" in table
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "the star &lt;b&gt;is&lt;/b&gt; big &amp; blue" in page and "<b>is" not in page
    # six at random, three best, three worst: each with its picture and a wrong one
    assert page.count("data:image/jpeg;base64,") == 2 * 12 and "<script" not in page


def test_what_asks_for_a_caption(setup, captioned, tmp_path):
    """The user's prompt, or the question of the training data in its language, or our own."""
    questions = {}
    for prompt in ([], ["--prompt", "<image> 你看到什么？"]):
        report = ["--save_report", tmp_path / "r.json"]
        finished = run_script("eval_vlm.py", *setup[1], *captioned, *report, *prompt)
        assert finished.returncode == 0, finished.stdout
        answers = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["answers"]
        questions[len(prompt)] = [(answer["type"], answer["question"]) for answer in answers[:2]]
    assert questions == {
        0: [
            ("en", "<image>\nDescribe the image concisely."),
            ("zh", "<image>\n简要描述这张图片。"),
        ],
        2: [("en", "<image>\n你看到什么？"), ("zh", "<image>\n你看到什么？")],
    }
    assert choose_requests(None, "图里有什么？")["zh"] == "图里有什么？"
    assert choose_requests(None, "图里有什么？")["en"] == choose_requests(None, None)["en"]
    assert not list(tmp_path.glob("r.md")), "only with --metrics"


def test_metrics_of_answers_that_are_right_or_wrong(setup, rows_dir, tmp_path):
    """No score of captions; and the score is left beside the weights."""
    shutil.copy(setup[0] / "sft_vlm_64.pth", tmp_path / "mine_64.pth")
    data = ["--data", rows_dir / "rows.jsonl", "--images", rows_dir / "images", "--metrics"]
    save = ["--weights", tmp_path / "mine_64.pth", "--save_report", tmp_path / "r.json"]
    finished = run_script("eval_vlm.py", *setup[1][2:], *data, *save, "--show_images", "right")
    assert finished.returncode == 0, finished.stdout
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["right"]
    assert {*report["metrics"]["overall"]} == {"exact", "loss", "perplexity"}
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "right answer<dd>" in page and "no picture" in page
    score = json.loads((tmp_path / "mine_64.scores.json").read_text(encoding="utf-8"))
    assert score.pop("date") and score == {
        "exact": report["accuracy"]["overall"],
        "data": "rows.jsonl",
        "questions": 24,
    }


@pytest.mark.parametrize("n_rows", [1, 2])
def test_metrics_of_a_row_or_two(setup, captioned, tmp_path, n_rows):
    write_rows(tmp_path / "rows.jsonl", CAPTIONS[:n_rows])
    data = ["--data", tmp_path / "rows.jsonl", *captioned[2:], "--metrics"]
    report = ["--save_report", tmp_path / "r.json"]
    finished = run_script("eval_vlm.py", *setup[1], *data, *report, "--show_images", "none")
    assert finished.returncode == 0 and "Traceback" not in finished.stdout, finished.stdout
    scores = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["none"]["metrics"]["en"]
    assert ("CIDEr-D" in scores) == (n_rows > 1)
    assert (scores["ROUGE-L"]["low"] is None) == (n_rows == 1)
    assert ("One picture: no intervals" in finished.stdout) == (n_rows == 1)


def test_wrong_images_that_are_the_right_ones_are_counted():
    """Where the set has no other pictures, the wrong image's score would say nothing."""
    rows = {0: ("a", "b"), 1: ("a",), 2: ("c",), 3: ()}
    questions = [Question(row, [], images, "x") for row, images in rows.items()]
    questions.insert(0, Question(0, [], ("a",), "x"))
    # an earlier turn of row 0 with that of row 1, which is the same; row 0 with its own
    for question, shown in zip(questions, [1, 0, 2, 1, None]):
        question.shown["wrong"] = shown
    assert count_unmoved(questions) == 2


def test_a_picture_that_vanishes_in_between_costs_its_questions(
    setup, captioned, tmp_path, monkeypatch, capsys
):
    """It could be read when it was asked about, and not when the loss was measured."""
    folder = shutil.copytree(captioned[3], tmp_path / "copy")
    measure_loss = Evaluation.measure_loss

    def without_a_picture(self, questions, images):
        (folder / "1.png").unlink(missing_ok=True)
        measure_loss(self, questions, images)

    monkeypatch.setattr(Evaluation, "measure_loss", without_a_picture)
    data = ["--data", folder / "rows.jsonl", "--images", folder, "--show_images", "right"]
    monkeypatch.setattr("sys.argv", ["x", *map(str, [*setup[1], *data, "--metrics"])])
    eval_vlm.main()
    printed = capsys.readouterr().out
    assert "not asked: 2 image missing\n  line 2 of rows.jsonl" in printed
    assert "overall (4)" in printed


def test_an_answer_may_equal_any_of_several_and_be_as_long_as_the_longest(setup, tmp_path):
    row = {"question": "Who?", "answers": ["a cat", "the big black cat over there"]}
    write_rows(tmp_path / "rows.jsonl", [row])
    vlm = load_vlm(setup[0] / "sft_vlm_64.pth", tokenizer=TOKENIZER, vision_model=setup[1][5])
    dataset = open_data([str(tmp_path / "rows.jsonl")], None, vlm.processor, 512)
    evaluation = Evaluation(vlm, dataset, batch_size=4)
    (question,) = evaluation.collect()
    n_longest = len(vlm.processor.encode_content(row["answers"][1]))
    assert evaluation.plan(question, None).n_answer == 2 * n_longest + 4
    for answer, is_right in [
        ("A cat.", True),
        ("The big black cat over there", True),
        ("a", False),
    ]:
        question.given["none"] = answer
        assert question.is_right("none") == is_right
    list(evaluation.answer([question], "none"))
    evaluation.measure_loss([question], "none")
    alone = [Question(0, question.turns, (), answer) for answer in row["answers"]]
    list(evaluation.answer(alone, "none"))
    evaluation.measure_loss(alone, "none")
    nats, n_labels = map(sum, zip(*(one.loss["none"] for one in alone)))
    assert question.loss["none"] == (pytest.approx(nats, rel=1e-5), n_labels)


def test_mistakes_with_metrics_cost_one_line(setup, captioned, monkeypatch):
    finished = run_script("eval_vlm.py", *setup[1], "--metrics")
    assert finished.returncode == 2
    assert (
        finished.stdout
        == "error: --metrics measures answers to --data: pass --data, or leave it out\n"
    )
    with pytest.raises(UserError, match="type a question, or leave it out"):
        choose_requests("<image> ", None)
    monkeypatch.setattr("inference.metrics.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-metrics.txt$"):
        check_package()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # the table and the page of answers would take the place of the report
        ({"save_report": "r.md"}, "r.md: it becomes a .json file, so name it NAME.json"),
        ({"save_report": "r.html"}, "so name it NAME.json"),
        ({"save_report": "rows.jsonl"}, "so name it NAME.json"),
        ({"save_report": "./rows.json"}, "rows.json, which is read too: give it another name"),
        ({"save_report": "folder.json"}, "folder.json, which is a folder: name a file"),
        ({"save_report": "file/new/r.json"}, "file/new/r.json: nothing can be written in .*/file$"),
        ({"chat": True}, "leave one out"),
    ],
)
def test_a_report_that_cannot_be_is_refused_first(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        EvalConfig(data=["rows.json"], **options)


@given(st.integers(2, 500))
def test_the_interval_of_all_right_is_where_that_is_rare(n):
    """Were fewer right than its lower end, n right ones of n would come in under 2.5 % of cases."""
    low = widen(Score(1.0, 1.0, 1.0), n).low
    assert low**n == pytest.approx(0.025) and widen(Score(0.0, 0.0, 0.0), n).high == 1 - low
    assert widen(Score(0.9, 0.8, 1.0), n) == (0.9, 0.8, 1.0)


def test_types_that_have_captions():
    """By the words of their references: those of a word or two are right or wrong."""

    def question(type_, *references):
        return Question(0, [], (), "x", type_, references=references)

    assert find_captions([question("a", "a red dog runs"), question("b", "red", "dark red")]) == {
        "a"
    }
    assert find_captions([question("a", "一只狗在跑"), question("a")]) == set()


@given(st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()) | st.just({}))
def test_any_type_is_a_short_name(value):
    try:
        type_ = read_type(value)
    except BadSampleError as error:
        assert str(error).startswith("type is no short text: ") and len(str(error)) < 200
        return
    assert type_ == ("all" if value is None else value)
    assert 0 < len(type_) <= 60 and type_.isprintable() and type_ != "overall"


def test_exact_answers_look_at_words_only():
    def question(given, answer, type="color"):
        return Question(0, [], (), answer, type, {"right": given})

    questions = [
        question("Red.", "red"),
        question(" 红色。", "红色"),
        question("red circle", "red"),
        question("2", "2", "count"),
    ]
    assert measure_accuracy(questions) == {"overall": 0.75, "color": 2 / 3, "count": 1.0}


def test_wrong_images_are_anothers_and_as_many():
    images = [("a",), ("b",), ("c", "d"), ("e",), ("f", "g"), ()]
    shuffled = [images[index] for index in shuffle_images(images, seed=0)]
    assert [len(group) for group in shuffled] == [len(group) for group in images]
    assert all(new != old for new, old in zip(shuffled[:5], images[:5])) and sorted(
        map(str, shuffled)
    ) == sorted(map(str, images))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 10**6))
def test_wrong_images_are_other_pictures_even_where_rows_share_them(shown, seed):
    """As captions do, of which a photograph has several."""
    images = [(f"{number}.jpg",) for number in shown]
    shuffled = [images[index] for index in shuffle_images(images, seed)]
    if max(Counter(shown).values()) <= len(shown) // 2:
        assert all(new != old for new, old in zip(shuffled, images))


def test_load_1_reads_a_transformers_directory(setup, tmp_path):
    folder, flags = setup
    # Random weights that answer with text, and the vision encoder that `flags` name.
    model = small_model(seed=7, n_heads=8)
    model.vision_encoder = small_vision_encoder()
    to_llava(model).save_pretrained(tmp_path / "llava")
    small_image_processor().save_pretrained(tmp_path / "llava")

    # as published: our own key names, a config of its own type, code that must not run
    published = tmp_path / "MiniMind2-V"
    published.mkdir()
    torch.save(select_weights(model), published / "pytorch_model.bin")
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 672, "max_seq_len": 512}
    config = {"model_type": "minimind-v", "auto_map": {"AutoConfig": "evil.Config"}} | sizes
    (published / "config.json").write_text(json.dumps(config))

    ask = ["--image", folder / "pictures/a.png", "--prompt", "What color?", "--temperature", "0"]
    answers = []
    for directory in (tmp_path / "llava", published):
        load = ["--load", "1", "--transformers_dir", directory]
        finished = run_script("eval_vlm.py", *load, *flags, *ask)
        assert finished.returncode == 0, finished.stdout
        answers += answers_in(finished.stdout)
        too_long = run_script("eval_vlm.py", *load, *flags, *ask, "--max_seq_len", "20")
        assert "but the model takes 20 (--max_seq_len)" in too_long.stdout.splitlines()[-1]
    assert len(answers) == 2 and answers[0] == answers[1] != ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--n_layers", "3"], "sft_vlm_64.pth has n_layers 2: leave --n_layers out"),
        (["--weights", "{folder}/sft_vlm_64.pth", "--dim", "128"], "--dim is 128 but "),
        (["--device", "cuda:7"], "error: --device cuda:7 but PyTorch sees no GPU here"),
    ],
)
def test_mistakes_cost_one_line(setup, changes, message):
    folder, flags = setup
    changes = [change.format(folder=folder) for change in changes]
    finished = run_script("eval_vlm.py", *flags, *changes)
    assert finished.returncode == 2 and message in finished.stdout.splitlines()[-1], finished.stdout


MISTAKES = {
    "--model_mode 0 --dim 512": "no weights at",
    "--out_dir nowhere": "no weights at nowhere",
    "--weights nowhere.pth": "no weights at nowhere.pth",
    "--weights int8": "the number format is --dtype int8",
    "--model_mode 3": "--model_mode is 3: choose from 0, 1, 2",
    "--load 2": "--load is 2: choose from 0, 1",
    "--top_p 0": "--top_p is 0.0: it has to be above 0",
    "--load 1 --transformers_dir nowhere": "no transformers directory at nowhere",
    "--tokenizer nowhere": "no tokenizer in nowhere",
    "--vision_model nowhere": "no vision encoder in nowhere",
}
MISTAKES_OF_EVAL = {
    "--images_dir nowhere": "no folder nowhere: put pictures there",
    "--image nowhere.png": "no picture nowhere.png",
    "--data nowhere.jsonl": "nowhere.jsonl",
    "--batch_size 0": "--batch_size is 0: it has to be from 1 to 4,096",
}


@pytest.mark.parametrize(
    ("script", "mistakes"), [("eval_vlm", MISTAKES | MISTAKES_OF_EVAL), ("web_demo_vlm", MISTAKES)]
)
def test_what_is_missing_is_said_before_pytorch_is_imported(setup, script, mistakes):
    """All in one process, which ends with the names of the large packages it has imported."""
    flags = [str(flag) for flag in setup[1]]
    program = f"""
import sys
import {script}
from common.errors import UserError
for mistake in {list(mistakes)!r}:
    sys.argv = ["x", *{flags!r}, *mistake.split()]
    try:
        {script}.main()
    except UserError as error:
        print(error)
print(sorted({{"torch", "transformers", "streamlit", "PIL", "pyarrow"}} & sys.modules.keys()))
"""
    printed = run_cold("-c", program).stdout.splitlines()
    assert printed[-1] == "[]" and len(printed) == len(mistakes) + 1, printed
    for line, message in zip(printed, mistakes.values()):
        assert message in line


def test_without_weights_the_demos_are_pointed_to(tmp_path, monkeypatch):
    """`python eval_vlm.py` after `make demo`, where no other weights are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("model.files.ROOT", tmp_path)
    with pytest.raises(UserError, match=r"no weights at out/sft_vlm_512.pth: train them first"):
        choose_weights(EvalConfig())
    (tmp_path / "out/demo").mkdir(parents=True)
    (tmp_path / "out/demo/sft_vlm_128.pth").touch()
    with pytest.raises(UserError, match="pass --out_dir out/demo for the demo's"):
        choose_weights(EvalConfig())
