"""What stands behind the web page: models, the queue, conversations, sharing, three languages."""

import base64
import html.parser
import io
import json
import os
import string
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import BadSampleError, MissingFileError, UserError
from common.files import write_text
from common.text import simplify_answer
from dataset.scenes.scene import draw_scene
from dataset.scenes.write import make_row
from inference import load_vlm
from inference.chat import MAX_QUESTION
from inference.config import WebConfig
from inference.paths import list_model_paths
from inference.web.conversation import MAX_PICTURES, MAX_TURNS, Conversation, Picture, Turn
from inference.web.models import ModelShelf
from inference.web.share import to_html, to_json
from inference.web.words import LANGUAGES, WORDS, Problem, describe_problem, say
from inference.web.worker import Worker
from model.llava import to_llava
from model.weights import save_atomically, save_weights, select_weights
from tests.helpers import ROOT, TOKENIZER, picture, run_cold, small_model

SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "seed": None}
DEMO = ROOT / "model/demo/sft_vlm_128.pth"
MARKUP = "</div><script>alert(1)</script> ![x](http://a.b/c) [y](http://a.b) **z** &amp; \"'`"


def here() -> bool:
    """What a visitor says who is still there."""
    return True


@pytest.fixture(scope="module")
def folder(vision_dir, tmp_path_factory) -> Path:
    """Weights of one and of several pictures, and some that are of no use."""
    folder = tmp_path_factory.mktemp("models")
    model = small_model(n_heads=2)
    facts = {"tokenizer": str(TOKENIZER), "vision_model": str(vision_dir)}
    for name, stage in {
        "pretrain_vlm": "pretrain",
        "sft_vlm": "sft",
        "sft_vlm_multi": "sft",
    }.items():
        save_weights(model, folder / f"{name}_64.pth", stage=stage, **facts)
    return folder


@pytest.fixture(scope="module")
def shelf(folder) -> ModelShelf:
    return ModelShelf(WebConfig(out_dir=str(folder), device="cpu"))


@pytest.fixture
def worker(shelf):
    worker = Worker(shelf)
    yield worker
    worker.close()


@pytest.fixture
def vlm(shelf):
    return shelf.open(shelf.default())


def a_picture(seed: int = 0) -> Picture:
    return Picture.open(f"{seed}.png", picture(seed))


def wait(*tickets, seconds: float = 120) -> None:
    wait_until(lambda: all(ticket.is_finished for ticket in tickets), seconds)


def wait_until(is_so, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.005)


def ask(worker: Worker, question: str = "What?", conversation=None, n: int | None = 1, **options):
    """A turn that is over: of a new conversation about picture `n` if none is given."""
    conversation = conversation or Conversation()
    pictures = [] if n is None else [a_picture(n)]
    sampling = SAMPLING | {name: options.pop(name) for name in [*options] if name in SAMPLING}
    entry = options.pop("entry", None) or worker.shelf.default()
    is_wanted = options.pop("is_wanted", here)
    turn = worker.ask(conversation, entry, question, pictures, sampling, is_wanted, **options)
    wait(turn)
    return turn


class Block:
    """Keeps the worker busy until it is opened."""

    def __init__(self, worker: Worker):
        self.is_open, begun = threading.Event(), threading.Event()

        def work(vlm, pause):
            begun.set()
            self.is_open.wait()
            return "done"

        self.task = worker.run(Conversation(), worker.shelf.default(), work, here)
        assert begun.wait(60)

    def open(self) -> None:
        self.is_open.set()


# Questions and answers.


def test_a_conversation_is_answered_as_in_the_terminal(worker, vlm):
    chat, conversation = vlm.start_chat(), Conversation()
    for question, number in (("What?", 1), ("And this?", 2), ("Which?", None)):
        images = [] if number is None else [picture(number)]
        expected = "".join(chat.ask(question, images, temperature=0, max_new_tokens=8))
        turn = ask(worker, question, conversation, number)
        assert (turn.state, turn.answer) == ("done", expected)
        assert turn.tokens_per_second > 0 and turn.seconds_to_first_token > 0
    assert conversation.context(2)[0] == chat.turns[:-1] and len(conversation.pictures) == 2


def test_twenty_visitors_at_once_get_their_own_right_answers():
    """The demo's model, held-out scenes: the same answers as alone, and most of them right."""
    vlm = load_vlm(DEMO, device="cpu")
    visitors = []
    for index in range(20):
        # five types of questions; descriptions are left out
        row, (scene,) = make_row("eval", 6 * (index // 5) + index % 5, ["en"], seed=5)
        question, answer = (turn["content"] for turn in row["conversations"])
        visitors.append((draw_scene(scene), question.removeprefix("<image>\n"), answer))
    alone = [vlm.ask(image, question, temperature=0) for image, question, _ in visitors]
    assert len(set(alone)) > 8

    worker = Worker(ModelShelf(WebConfig(weights=str(DEMO), device="cpu")))
    entry, turns = worker.shelf.default(), [None] * 20
    start = threading.Barrier(20)

    def visit(index: int) -> None:
        image, question, _ = visitors[index]
        start.wait()
        turns[index] = worker.ask(
            Conversation(),
            entry,
            question,
            [Picture.open("a", image)],
            SAMPLING | {"max_new_tokens": 512},
            here,
        )
        wait(turns[index])

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.close()
    assert [turn.answer for turn in turns] == alone
    right = [simplify_answer(turn.answer) for turn in turns]
    assert sum(got == simplify_answer(visitor[2]) for got, visitor in zip(right, visitors)) >= 14


def test_a_question_without_any_readable_picture_gets_one_line(worker):
    conversation = Conversation()
    refused = [("a.heic", describe_problem(BadSampleError("HEIC is not supported", "x")))]
    turn = ask(worker, "What?", conversation, n=None, refused=refused)
    assert turn.state == "failed" and str(turn.problem).startswith("Add a picture first")
    assert turn.refused[0][1].say("zh") == "不支持 HEIC：请转换为 JPEG 或 PNG"
    # then one comes, and what was asked in vain is not part of what the model is shown
    turn = ask(worker, "And now?", conversation)
    assert turn.state == "done" and turn.problem is None
    assert conversation.context(1)[0] == [{"role": "user", "content": "<image>\nAnd now?"}]


@pytest.mark.parametrize("question", ["", " \n\t", "\u3000"])
def test_blanks_are_refused_and_the_conversation_is_as_before(worker, question):
    conversation = Conversation()
    ask(worker, "What?", conversation)
    with pytest.raises(Problem, match="Type a question first"):
        ask(worker, question, conversation)
    with pytest.raises(Problem, match="Type a question first"):
        worker.edit(conversation, worker.shelf.default(), 0, question, SAMPLING, here)
    assert [turn.question for turn in conversation.turns] == ["What?"]


def test_what_is_too_much_is_refused_in_one_line(worker):
    conversation, entry = Conversation(), worker.shelf.default()
    with pytest.raises(Problem, match="too long"):
        ask(worker, "a" * (MAX_QUESTION + 1), conversation)
    many = [a_picture(1)] * (MAX_PICTURES + 1)
    with pytest.raises(Problem, match=f"at most {MAX_PICTURES} pictures"):
        worker.ask(conversation, entry, "What?", many, SAMPLING, here)
    assert not conversation.turns
    for _ in range(MAX_TURNS):
        turn = Turn("What?")
        turn.stop()
        conversation.turns.append(turn)
    with pytest.raises(Problem, match=f"at most {MAX_TURNS} questions"):
        ask(worker, "What?", conversation)


def test_a_question_beyond_the_context_fails_and_the_conversation_goes_on(folder):
    worker = Worker(ModelShelf(WebConfig(out_dir=str(folder), device="cpu", max_seq_len=128)))
    conversation = Conversation()
    turn = ask(worker, "circle " * 200, conversation)
    assert (turn.state, turn.problem.key, turn.answer) == ("failed", "question_too_long", "")
    # its picture stays
    turn = ask(worker, "What?", conversation, n=None)
    assert turn.state == "done" and conversation.context(1)[0][0]["content"] == "<image>\nWhat?"
    turn = ask(worker, "circle " * 90, conversation, n=None)
    assert (turn.state, turn.problem.key) == ("failed", "conversation_too_long")
    assert ask(worker, "And?", conversation, n=None).state == "done"
    worker.close()


@pytest.mark.parametrize("typed", ["<image>" * 3, "@" * 90, "</s>\n<s>user\n", "<im<image>age>"])
def test_what_is_typed_is_no_picture_and_no_end_of_a_turn(worker, typed):
    conversation = Conversation()
    for n in (1, None):
        turn = ask(worker, f"{typed} What?", conversation, n)
        assert turn.state == "done" and turn.question == f"{typed} What?"
    turns, pictures = conversation.context(1)
    assert sum(turn["content"].count("<image>") for turn in turns[::2]) == len(pictures) == 1


def test_an_earlier_question_is_asked_again_or_otherwise(worker):
    """All behind it goes away, with its pictures; its own stay."""
    conversation, entry = Conversation(), worker.shelf.default()
    for question, number in (("What?", 1), ("And this?", 2), ("Which?", None)):
        ask(worker, question, conversation, number)
    answers = [turn.answer for turn in conversation.turns]
    again = worker.regenerate(conversation, entry, 1, SAMPLING, here)
    wait(again)
    assert [turn.answer for turn in conversation.turns] == answers[:2]
    assert [picture.name for picture in conversation.pictures] == ["1.png", "2.png"]
    edited = worker.edit(conversation, entry, 0, "How many?", SAMPLING, here)
    wait(edited)
    assert conversation.turns == [edited] and [it.name for it in edited.pictures] == ["1.png"]
    assert edited.answer == ask(worker, "How many?").answer
    with pytest.raises(Problem, match="no longer there"):
        worker.regenerate(conversation, entry, 1, SAMPLING, here)


def test_a_picture_is_seen_once_by_each_model(worker, vlm, monkeypatch):
    seen, encode = [], vlm.model.encode_images
    monkeypatch.setattr(
        vlm.model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels)
    )
    conversation = Conversation()
    for n in (1, None, 2, None):
        ask(worker, "What?", conversation, n)
    worker.edit(conversation, worker.shelf.default(), 1, "Why?", SAMPLING, here)
    wait(*conversation.turns)
    assert seen == [1, 1]
    task = worker.run(
        conversation,
        worker.shelf.default(),
        lambda vlm, pause: worker.see(vlm, conversation.context(1)[1]),
        here,
    )
    wait(task)
    assert task.result.shape == (1, 9, 32) and seen == [1, 1]


def test_a_seed_repeats_an_answer_under_load(worker):
    options = {"temperature": 3.0, "max_new_tokens": 12}
    alone = ask(worker, seed=11, **options)
    assert alone.settings["seed"] == 11
    others = [Conversation() for _ in range(6)]
    entry = worker.shelf.default()
    turns = [
        worker.ask(it, entry, "What?", [a_picture(1)], SAMPLING | options | {"seed": seed}, here)
        for it, seed in zip(others, (1, 11, 2, None, 11, None))
    ]
    wait(*turns)
    same = [turn.answer == alone.answer for turn in turns]
    assert same == [False, True, False, False, True, False]
    assert ask(worker, seed=-1).problem.key == "other_problem"
    # a random seed is told, so that the answer can be had again
    assert ask(worker, seed=turns[3].settings["seed"], **options).answer == turns[3].answer


# Stopping, leaving, waiting.


def endless(worker, **options):
    """A long answer that has begun."""
    sampling = SAMPLING | {"max_new_tokens": 480}
    turn = worker.ask(
        options.pop("conversation", None) or Conversation(),
        worker.shelf.default(),
        "What?",
        [a_picture(1)],
        sampling,
        options.pop("is_wanted", here),
    )
    wait_until(lambda: turn.n_tokens >= 3)
    return turn


@pytest.fixture
def slowly(vlm, monkeypatch):
    """The model waits before each token, and no token ends an answer: a test sees it at work."""
    monkeypatch.setattr(vlm.model, "generate", partial(vlm.model.generate, eos_token_id=-1))
    handle = vlm.model.norm.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    yield
    handle.remove()


def test_a_stopped_answer_keeps_its_text_and_the_next_question_may_follow_at_once(worker, slowly):
    conversation = Conversation()
    turn = endless(worker, conversation=conversation)
    with pytest.raises(Problem, match="still on its way"):
        ask(worker, "And?", conversation)
    turn.stop()
    text, n_tokens = turn.answer, turn.n_tokens
    assert turn.state == "stopped" and text and conversation.turns == [turn]
    following = ask(worker, "And?", conversation, n=None)
    assert following.state == "done" and (turn.answer, turn.n_tokens) == (text, n_tokens)
    assert conversation.context(1)[0][1] == {"role": "assistant", "content": text}


def test_a_visitor_who_leaves_frees_the_model(worker, slowly):
    """A long answer ends, and whoever waited is answered."""
    left = threading.Event()
    turn = endless(worker, is_wanted=lambda: not left.is_set())
    following = worker.ask(
        Conversation(), worker.shelf.default(), "What?", [a_picture(2)], SAMPLING, here
    )
    assert following.place == 1
    left.set()
    wait(following)
    assert turn.state == "stopped" and turn.n_tokens < 400 and following.state == "done"


@pytest.mark.parametrize("how", ["leaves", "stops", "closes"])
def test_the_vision_encoder_stops_too(worker, vlm, how):
    """However long it takes: not one more of its modules runs."""
    runs, left = [], threading.Event()
    modules = [*vlm.model.vision_encoder.modules()]

    def run_slowly(module, _):
        runs.append(module)
        assert left.wait(60)
        time.sleep(0.3)  # longer than the worker's patience

    handles = [module.register_forward_pre_hook(run_slowly) for module in modules]
    turn = worker.ask(
        Conversation(),
        worker.shelf.default(),
        "What?",
        [a_picture(3)],
        SAMPLING,
        lambda: how != "leaves" or not left.is_set(),
    )
    wait_until(lambda: runs)
    if how == "stops":
        turn.stop()
    if how == "closes":
        worker.close()
    left.set()
    wait(turn)
    time.sleep(0.1)
    for handle in handles:
        handle.remove()
    assert turn.state == "stopped" and len(runs) <= 2 < len(modules)
    if how != "closes":
        assert ask(worker, n=3).state == "done", "the next visitor is answered"


def test_first_come_first_served_and_everybody_knows_their_place(worker):
    block, entry = Block(worker), worker.shelf.default()
    left, order = threading.Event(), []
    turns = [
        worker.ask(
            Conversation(),
            entry,
            "What?",
            [a_picture(n)],
            SAMPLING,
            (lambda: not left.is_set()) if n == 1 else here,
        )
        for n in range(5)
    ]
    assert [turn.place for turn in turns] == [1, 2, 3, 4, 5]
    assert {turn.state for turn in turns} == {"waiting"}
    # one leaves, one stops: those behind move up
    left.set()
    wait(turns[1])
    turns[3].stop()
    assert [turn.place for turn in turns] == [1, 0, 2, 0, 3]
    assert [turn.state for turn in turns[1::2]] == ["stopped"] * 2
    for turn in turns:
        turn.change = noting(turn, order)
    block.open()
    wait(*turns, block.task)
    assert order == [turns[0], turns[2], turns[4]] and [turn.place for turn in turns] == [0] * 5


def noting(turn: Turn, order: list):
    """`change` that notes when the turn begins to be answered."""
    change = turn.change

    def note(**attributes):
        if attributes.get("state") == "answering":
            order.append(turn)
        return change(**attributes)

    return note


def test_a_question_goes_before_the_next_part_of_a_task(worker):
    """A heat map of many steps keeps nobody waiting for all of them."""
    conversation, entry, steps = Conversation(), worker.shelf.default(), []
    asked = ask(worker, "What?", conversation)

    def work(vlm, pause):
        for step in range(3):
            steps.append(step)
            if step == 1:
                wait_until(lambda: worker._waiting)
            pause()
        return "a map"

    task = worker.run(conversation, entry, work, here)
    wait_until(lambda: 1 in steps)
    other = worker.ask(Conversation(), entry, "What?", [a_picture(1)], SAMPLING, here)
    wait(other)
    assert other.answer == asked.answer
    wait(task)
    assert (task.state, task.result, steps) == ("done", "a map", [0, 1, 2])


def test_a_task_is_replaced_by_the_next_one_of_its_visitor_and_ends_when_it_is_stopped(worker):
    conversation, entry = Conversation(), worker.shelf.default()

    def work_forever(vlm, pause):
        while True:
            pause()

    first = worker.run(conversation, entry, work_forever, here)
    other = worker.run(Conversation(), entry, lambda vlm, pause: "other", here)
    second = worker.run(conversation, entry, lambda vlm, pause: "second", here)
    wait(first, second, other)
    assert [task.state for task in (first, second, other)] == ["stopped", "done", "done"]
    assert (first.result, second.result, other.result) == (None, "second", "other")


# What goes wrong.


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (RuntimeError("nobody expects this"), "unknown_problem"),
        (MemoryError(), "no_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "no_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "no_memory"),
        (UserError("a line"), "other_problem"),
        (KeyboardInterrupt(), "unknown_problem"),
    ],
)
def test_an_error_ends_one_turn_and_the_worker_goes_on(worker, vlm, monkeypatch, capfd, error, key):
    conversation = Conversation()
    with monkeypatch.context() as patch:
        patch.setattr(vlm.model, "generate", lambda *_, **__: (_ for _ in ()).throw(error))
        turn = ask(worker, "What?", conversation)
    assert (turn.state, turn.problem.key) == ("failed", key)
    assert len(str(turn.problem).splitlines()) == 1
    assert ("Traceback" in capfd.readouterr().err) == (key == "unknown_problem")
    assert ask(worker, "And?", conversation, n=None).state == "done"


def test_a_visitor_about_whom_nothing_can_be_learned_has_left(worker, capfd):
    turn = ask(worker, is_wanted=lambda: 1 / 0)
    assert turn.state == "stopped" and "ZeroDivisionError" in capfd.readouterr().err
    assert ask(worker).state == "done"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"nothing", "image damaged"),
        (b"", "image damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not supported"),
        (b"\0\0\0\x18ftypheic", "HEIC is not supported"),
        ("truncated", "image damaged"),
        # the first bytes of one of 20,000 x 20,000 pixels
        (b"P6 20000 20000 255\n" + bytes(300), "image too large"),
        ("narrow", "image too narrow"),
    ],
)
def test_a_bad_picture_has_its_reason_in_three_languages(content, reason):
    if isinstance(content, str):
        file = io.BytesIO()
        (Image.new("1", (2000, 2)) if content == "narrow" else picture(1)).save(file, "PNG")
        content = file.getvalue()[: 500 if content == "truncated" else None]
    with pytest.raises(BadSampleError, match=reason) as caught:
        Picture.open("a.png", io.BytesIO(content))
    problem = describe_problem(caught.value)
    assert problem.key == reason and len({problem.say(language) for language in LANGUAGES}) == 3


def test_a_picture_is_kept_small_and_without_loss():
    file = io.BytesIO()
    picture(1, (3000, 2000)).save(file, "JPEG")
    kept = Picture.open("n" * 1000, file)
    assert max(kept.image.size) == 1024 and len(kept.name) == 200 and kept.n_bytes < 4e6
    assert max(Image.open(io.BytesIO(kept.thumbnail)).size) <= 320
    exact = picture(2, (200, 120))
    assert Picture.open("a", exact).image.tobytes() == exact.tobytes()


def test_memory_stays_flat_over_500_questions(folder):
    """New conversations with new pictures, stopped ones, failed ones: a process of its own."""
    program = f"""
import gc, os
from tests.inference.test_web_engine import *

def measure():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

worker = Worker(ModelShelf(WebConfig(out_dir={str(folder)!r}, device="cpu")))
for number in range(500):
    if number == 100:
        before = measure()
    conversation = Conversation()
    ask(worker, "circle " * 900 if number % 10 == 1 else "What?", conversation, n=number,
        max_new_tokens=4)
    if number % 10 == 2:
        ask(worker, "And?", conversation, max_new_tokens=4, is_wanted=lambda: False)
time.sleep(0.5)
caches = [it for it in gc.get_objects() if type(it).__name__ in ("KVCache", "Turn", "Picture")]
print(len(caches), measure() - before)
"""
    finished = run_cold("-c", program)
    n_left, grown = finished.stdout.splitlines()[-1].split()
    # the last conversation
    assert int(n_left) <= 2 and float(grown) < 20, finished.stdout


# Models.


def test_the_shelf_lists_what_there_is_and_what_is_wrong_with_it(folder, vision_dir, tmp_path):
    """Damaged weights, those of a language model, a damaged JSON, a folder of transformers."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (folder / "sft_vlm_64.pth").read_bytes()
    (tmp_path / "cut_64.pth").write_bytes(whole[:5000])
    (tmp_path / "noise_64.pth").write_bytes(b"\x80\x02" + b"noise" * 100)
    (tmp_path / "lm_64.pth").write_bytes(whole)
    blind = {name: it for name, it in select_weights(small_model()).items() if "proj" not in name}
    save_atomically(blind, tmp_path / "blind_64.pth")
    write_text(tmp_path / "sft_vlm_multi_64.json", "{")
    scores = {"exact": 0.91, "cider": "high", "data": "eval.jsonl", "questions": 480}
    write_text(tmp_path / "sft_vlm_64.scores.json", json.dumps(scores))
    write_text(tmp_path / "pretrain_vlm_64.scores.json", "[")
    parts = {"tokenizer": str(TOKENIZER), "vision_model": str(vision_dir), "device": "cpu"}
    shelf = ModelShelf(WebConfig(out_dir=str(tmp_path), **parts))
    entries = {entry.name: entry for entry in shelf.list()}
    names = ["blind_64", "cut_64", "noise_64", "pretrain_vlm_64", "sft_vlm_64", "sft_vlm_multi_64"]
    assert [*entries] == names
    assert "has not learned to see" in entries["blind_64"].problem
    assert "damaged" in entries["cut_64"].problem and "damaged" in entries["noise_64"].problem
    assert "sft_vlm_multi_64.json is damaged" in entries["sft_vlm_multi_64"].problem
    good = entries["sft_vlm_64"]
    own = select_weights(small_model(n_heads=2))
    n_parameters = sum(it.numel() for name, it in own.items() if name != "output.weight")
    assert (good.problem, good.stage, good.n_parameters) == (None, "sft", n_parameters)
    assert good.n_bytes == len(whole) and good.knows is None
    assert good.score == {"exact": 0.91, "data": "eval.jsonl", "questions": 480}
    assert entries["pretrain_vlm_64"].score is None
    assert good.trained_at.timestamp() == pytest.approx(
        (tmp_path / "sft_vlm_64.pth").stat().st_mtime
    )
    # weights that were trained again have not been measured
    os.utime(tmp_path / "sft_vlm_64.scores.json", (1e9, 1e9))
    assert next(entry for entry in shelf.list() if entry.name == good.name).score is None
    # a file that changes is looked at again, as is one that turns out not to fit
    (tmp_path / "cut_64.pth").write_bytes(whole)
    shelf.config = WebConfig(
        out_dir=str(tmp_path), device="cpu", vision_model=str(DEMO.parent / "vision_model")
    )
    cut = next(entry for entry in shelf.list() if entry.name == "cut_64")
    assert cut.version != entries["cut_64"].version
    worker = Worker(shelf)
    turn = ask(worker, entry=good)
    assert turn.state == "failed" and turn.problem.key == "other_problem"
    assert next(it for it in shelf.list() if it.name == "sft_vlm_64").problem == str(turn.problem)
    worker.close()


def test_what_can_be_chosen_and_what_is_chosen_for_several_pictures(folder, tmp_path):
    shelf = ModelShelf(WebConfig(out_dir=str(folder), device="cpu"))
    pretrained, single, several = shelf.list()
    assert [entry.stage for entry in shelf.list()] == ["pretrain", "sft", "sft_multi"]
    assert shelf.default() == single
    # left to us
    assert shelf.choose_for(1) == (single, None) and shelf.choose_for(2) == (several, None)
    # the visitor's own choice comes first; what fits better is told
    assert shelf.choose_for(1, single) == (single, None)
    assert shelf.choose_for(2, single) == (single, several)
    assert shelf.choose_for(2, several) == (several, None)
    assert shelf.choose_for(2, pretrained) == (pretrained, None)
    # two of one name are told apart
    (tmp_path / single.path.name).write_bytes(single.path.read_bytes())
    twice = WebConfig(out_dir=str(folder), weights=str(tmp_path / single.path.name))
    names = [entry.name for entry in ModelShelf(twice).list()]
    assert names[0] == str(tmp_path / single.path.name) and str(single.path) in names
    # the flags name another
    named = WebConfig(out_dir=str(folder), weights=str(pretrained.path))
    assert ModelShelf(named).default() == pretrained and len(ModelShelf(named).list()) == 3
    named = ModelShelf(WebConfig(out_dir=str(folder), model_mode=2))
    assert named.choose_for(1) == (several, None)


def test_where_nothing_was_trained_the_shipped_model_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("inference.paths.DEMO_FOLDERS", (tmp_path / "none", DEMO.parent))
    config = WebConfig(out_dir=str(tmp_path))
    (demo,) = ModelShelf(config).list()
    assert (demo.name, demo.stage, demo.knows) == ("sft_vlm_128", "sft", "scenes")
    assert 1.28e6 < demo.n_parameters < 1.29e6 and ModelShelf(config).default() == demo
    # the demo's own report
    write_text(tmp_path / "report.json", json.dumps({"accuracy": {"overall": 0.92}}))
    (tmp_path / DEMO.name).write_bytes(DEMO.read_bytes())
    facts = json.loads(DEMO.with_suffix(".json").read_text())
    facts |= {name: str(ROOT / facts[name]) for name in ("tokenizer", "vision_model")}
    write_text(tmp_path / "sft_vlm_128.json", json.dumps(facts))
    assert ModelShelf(config).default().score == {"exact": 0.92, "data": "eval.jsonl"}
    # what is named has to be there
    for missing in ({"weights": "none.pth"}, {"load": 1, "transformers_dir": "none"}):
        with pytest.raises(MissingFileError):
            list_model_paths(WebConfig(out_dir=str(tmp_path), **missing))


def test_a_transformers_directory_is_on_the_list(folder, vision_dir, tmp_path):
    """The published form, and a LLaVA: the same number of parameters as the weights themselves."""
    model = small_model(n_heads=2)
    (expected,) = {
        entry.n_parameters for entry in ModelShelf(WebConfig(out_dir=str(folder))).list()
    }
    llava = tmp_path / "llava"
    to_llava(model).save_pretrained(llava)
    for file in TOKENIZER.iterdir():
        (llava / file.name).write_bytes(file.read_bytes())
    (llava / "preprocessor_config.json").write_bytes(
        (vision_dir / "preprocessor_config.json").read_bytes()
    )
    config = WebConfig(out_dir=str(folder), transformers_dir=str(llava), device="cpu")
    shelf = ModelShelf(config)
    entry = shelf.list()[-1]
    # it has a row more in its embeddings, that of <image>
    assert (entry.name, entry.problem, entry.n_parameters) == ("llava", None, expected + 64)
    assert entry.trained_at and entry.n_bytes > 4 * expected
    worker = Worker(shelf)
    # an exported tokenizer has a token more; this one is of the demo
    assert ask(worker, entry=entry).state == "done"
    worker.close()


def test_two_who_want_a_model_at_once_load_it_once_and_two_are_kept(folder, monkeypatch):
    shelf = ModelShelf(WebConfig(out_dir=str(folder), device="cpu"))
    loaded, load = [], load_vlm

    def load_slowly(path, **options):
        loaded.append(path.stem)
        time.sleep(0.05)
        return load(path, **options)

    monkeypatch.setattr("inference.load.load_vlm", load_slowly)
    pretrained, single, several = shelf.list()
    found = []
    threads = [threading.Thread(target=lambda: found.append(shelf.open(single))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["sft_vlm_64"] and len({id(vlm) for vlm in found}) == 1

    # the one that was used longest ago goes, and with it its memory
    shelf.open(several)
    shelf.open(single)
    forgotten = weakref.ref(shelf.open(several))
    shelf.open(single)
    shelf.open(pretrained)
    assert [shelf.is_open(it) for it in (pretrained, single, several)] == [True, True, False]
    assert forgotten() is None
    # never one that is in use
    with shelf.using(single), shelf.using(pretrained):
        shelf.open(several)
        assert shelf.is_open(single) and shelf.is_open(pretrained)
    assert loaded == ["sft_vlm_64", "sft_vlm_multi_64", "pretrain_vlm_64", "sft_vlm_multi_64"]


# Sharing, and words.


def shared_conversation(worker) -> Conversation:
    conversation = Conversation()
    refused = [(f"{MARKUP}.heic", Problem("other_problem", reason=MARKUP))]
    turn = worker.ask(
        conversation,
        worker.shelf.default(),
        MARKUP,
        [Picture.open(f"{MARKUP}.png", picture(1))],
        SAMPLING,
        here,
        refused,
    )
    wait(turn)
    ask(worker, "circle " * 900 + "\ud83d", conversation, n=None)
    stopped = Turn("Stopped?", model=MARKUP)
    stopped.change(answer=MARKUP, state="stopped", n_tokens=3)
    conversation.turns.append(stopped)
    return conversation


def test_json_has_all_of_a_conversation(worker):
    conversation = shared_conversation(worker)
    text = to_json(conversation)
    text.encode()
    content = json.loads(text)
    assert content["format"] == "minimind-v conversation 1"
    first, second, third = content["turns"]
    assert first["question"] == MARKUP and first["answer"] == conversation.turns[0].answer
    assert first["settings"] == conversation.turns[0].settings and first["settings"]["seed"] >= 0
    assert (first["model"], first["state"]) == ("sft_vlm_64", "done")
    (shown,) = first["pictures"]
    assert shown["name"] == f"{MARKUP}.png"
    assert Image.open(io.BytesIO(base64.b64decode(shown["jpeg"]))).size == (64, 56)
    assert first["refused"] == [{"name": f"{MARKUP}.heic", "problem": MARKUP}]
    assert (second["state"], third["state"]) == ("failed", "stopped") and second["problem"]


class Elements(html.parser.HTMLParser):
    """Tags and text of a page, as a browser would find them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("language", [*LANGUAGES, "xx"])
def test_the_shared_page_is_self_contained_and_shows_text_as_text(worker, language):
    conversation = shared_conversation(worker)
    page = to_html(conversation, language)
    page.encode()
    found = Elements(page)
    assert not {"script", "a", "iframe", "link", "strong", "form"} & {*found.tags}
    # question, name of the picture, of the refused file, its reason, the stopped answer, its model
    assert found.text.count(MARKUP) == 6 and found.tags.count("img") == 1
    sources = [value for name, value in found.attributes if name == "src"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not [name for name, _ in found.attributes if name in ("href", "onclick", "onerror")]
    assert found.tags.count("article") == 3 and "viewport" in page


def test_all_languages_have_the_same_placeholders():
    for key, texts in WORDS.items():
        assert texts.keys() == LANGUAGES.keys(), key
        names = [
            {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            for text in texts.values()
        ]
        assert names[0] == names[1] == names[2], key
        assert all(text.strip() for text in texts.values()), key
    assert say("place", "zh", place=3) == "排队中：前面还有 3 个。"
    assert say("place", "xx", place=3) == say("place", "en", place=3)
    # what a reason brings along is no template
    assert Problem("other_problem", reason="{x}").say("ja").endswith("{x}")


def test_every_reason_why_a_picture_is_refused_has_its_words():
    from model.image import OTHER_FILES

    for _, reason, _ in OTHER_FILES:
        assert reason in WORDS
    for reason in ("damaged", "too large", "too narrow", "missing", "cannot be read", "is no file"):
        key = f"image {reason}"
        assert key in WORDS
