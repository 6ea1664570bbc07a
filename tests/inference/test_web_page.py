"""The web page: it answers, says what is wrong in a line, and what people write stays text."""

import importlib.util
import io
import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.uploaded_file_manager import UploadedFileRec

import inference.web.page as page_module
import web_demo_vlm
from common.errors import MissingFileError, UserError
from inference.chat import MAX_QUESTION
from inference.config import WebConfig
from inference.web.conversation import Conversation, Picture, Task, Turn, describe_speed
from inference.web.gallery import Example, Galleries
from inference.web.looks import Look
from inference.web.service import MOST_UPLOADED, MOST_WAITING, bound_uploads
from inference.web.store import ConversationStore
from inference.web.turns import describe_state
from inference.web.visit import Visit
from inference.web.words import say
from model.weights import save_atomically, select_weights
from scripts.docs.web_page import wait_for_page
from scripts.processes import free_port
from tests.helpers import (
    TOKENIZER,
    assistant,
    picture,
    run_cold,
    small_model,
    start_script,
    user,
    write_rows,
)


@pytest.fixture(scope="module")
def flags(vision_dir, tmp_path_factory) -> list[str]:
    """Of a page with a small model."""
    folder = tmp_path_factory.mktemp("page")
    save_atomically(select_weights(small_model(n_heads=2)), folder / "sft_vlm_64.pth")
    names = {"--out_dir": folder, "--tokenizer": TOKENIZER, "--vision_model": vision_dir}
    parts = [str(part) for pair in names.items() for part in pair]
    return [*parts, "--device", "cpu", "--max_new_tokens", "8"]


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PNG = encode(picture())


# Starting it.


@pytest.mark.parametrize("host, is_local", [("localhost", True), ("0.0.0.0", False)])
def test_the_web_page_listens_where_it_is_told_to(flags, host, is_local):
    port = free_port()
    flags = [*flags, "--port", port, "--host", host]
    server = start_script("web_demo_vlm.py", *flags, start_new_session=True)
    try:
        wait_for_page(port)
        listening = open("/proc/net/tcp").read().splitlines()[1:]
        local = [line.split()[1].split(":") for line in listening if line.split()[3] == "0A"]
        addresses = {address for address, its_port in local if its_port == f"{port:04X}"}
        assert addresses == {"0100007F" if is_local else "00000000"}
    finally:
        # Streamlit's own process is of the same group.
        os.killpg(server.pid, signal.SIGKILL)
        printed, _ = server.communicate(timeout=20)
    assert ("warning: --host 0.0.0.0: everybody" in printed) == (not is_local)


def test_the_web_page_needs_streamlit(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo_vlm.py", *flags])
    monkeypatch.delitem(sys.modules, "streamlit", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the web page needs Streamlit: pip install streamlit"):
        web_demo_vlm.main()


def test_any_model_in_the_folder_will_do(tmp_path):
    (tmp_path / "sft_vlm_multi_64.pth").touch()
    web_demo_vlm.check_files(WebConfig(out_dir=str(tmp_path)))
    with pytest.raises(UserError, match="no weights at .*nowhere"):
        web_demo_vlm.check_files(WebConfig(out_dir=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="gone.pth"):
        web_demo_vlm.check_files(WebConfig(out_dir=str(tmp_path), weights="gone.pth"))


def test_a_model_that_was_named_has_to_be_there(tmp_path, monkeypatch, capsys):
    for missing in (WebConfig(out_dir=str(tmp_path)), WebConfig(weights="gone.pth")):
        with pytest.raises(MissingFileError):
            web_demo_vlm.check_files(missing)
    # nothing is named, and nothing was trained: the model that is shipped
    monkeypatch.setattr(web_demo_vlm, "list_models", lambda folder: [])
    monkeypatch.setattr(web_demo_vlm, "find_model", raise_missing)
    web_demo_vlm.check_files(WebConfig())
    assert "sft_vlm" in capsys.readouterr().out


def raise_missing(config):
    raise MissingFileError("no weights at out/sft_vlm_512.pth")


# What it shows, in Streamlit's own test, without a browser.


def open_page(*flags: str, **query: str):
    from streamlit.testing.v1 import AppTest

    argv = ["web_demo_vlm.py", *flags]
    program = f"import sys\nsys.argv = {argv!r}\nimport web_demo_vlm\nweb_demo_vlm.main()\n"
    page = AppTest.from_string(program, default_timeout=60)
    for name, value in query.items():
        page.query_params[name] = value
    return page.run()


def ask(page, question: str, *files: tuple[str, bytes]):
    for name, content in files:
        page.chat_input[0].upload(name, content, "image/png")
    return page.chat_input[0].set_value(question).run()


def button(page, label: str):
    return next(button for button in page.button if button.label == label)


def texts(page) -> list[str]:
    return [element.value for element in page.text]


def test_it_answers_and_keeps_what_was_said(flags):
    page = open_page(*flags)
    assert not page.exception and page.slider(key="max_new_tokens").value == 8
    ask(page, "What color?", ("a.png", PNG))
    ask(page, "And now?")
    assert not page.exception
    shown = texts(page)
    assert "What color?" in shown and "And now?" in shown
    assert len([text for text in shown if "tokens/s" in text]) == 2
    # the picture stands in the question it came with
    assert len(page.get("image")) == 1

    # a reload finds it again, another visitor does not
    id = page.query_params["c"]
    again = open_page(*flags, c=id if isinstance(id, str) else id[0])
    assert "And now?" in texts(again)
    assert "And now?" not in texts(open_page(*flags))


def test_regenerate_edit_and_a_new_chat(flags):
    page = ask(open_page(*flags), "First?", ("a.png", PNG))
    ask(page, "Second?")
    assert not page.chat_input[0].proto.set_value, "it was sent"
    button(page, "Regenerate").click().run()
    assert [text for text in texts(page) if text.endswith("?")] == ["First?", "Second?"]
    # an edited question takes the place of the old one, and what followed goes
    button(page, "Edit").click().run()
    page.text_area[0].set_value("Other?")
    button(page, "Ask again").click().run()
    assert not page.exception
    assert [text for text in texts(page) if text.endswith("?")] == ["Other?"]
    assert len(page.get("image")) == 1
    button(page, "New chat").click().run()
    assert "Other?" not in texts(page) and "c" not in page.query_params


def test_what_is_wrong_stands_where_it_was_sent(flags):
    page = ask(open_page(*flags), "What?")
    assert say("no_picture") in texts(page)
    assert "Regenerate" not in [button.label for button in page.button], "it cannot help"
    assert page.chat_input[0].proto.value == "What?", "it need not be typed again"
    # an empty question is not sent, and its picture waits for the next one
    ask(page, "  ", ("a.png", PNG))
    assert texts(page)[-1] == say("blank") and len(page.get("image")) == 1
    ask(page, "What?", ("broken.png", b"nothing"))
    assert f"broken.png: {say('image damaged')}" in texts(page)
    assert any("tokens/s" in text for text in texts(page))
    ask(page, "a" * MAX_QUESTION)
    assert say("question_too_long") in texts(page)
    ask(page, "b" * (MAX_QUESTION + 1))
    assert page.chat_input[0].proto.value == "b" * (MAX_QUESTION + 1)
    ask(page, "Still here?")
    assert not page.exception and len([text for text in texts(page) if "tokens/s" in text]) == 2
    assert any("gone.pth" in text for text in texts(open_page(*flags, "--weights", "gone.pth")))


def test_settings_say_what_is_known_of_each_model(flags, tmp_path):
    for file in Path(flags[1]).iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "sft_vlm_64.scores.json").write_text(
        '{"exact": 0.8714, "cider": 0.3214, "data": "my *eval*.jsonl"}'
    )
    (tmp_path / "torn.pth").write_bytes(b"PK torn")
    page = open_page("--out_dir", str(tmp_path), *flags[2:])
    assert not page.exception
    shown = "\n".join(texts(page))
    assert "Score: my *eval*.jsonl · 87.1 % exactly right · CIDEr-D 32.1" in shown
    assert say("unusable", names="torn") in shown
    assert "torn" not in page.selectbox(key="model").options


def test_an_answer_grows_in_the_visitors_language():
    turn = Turn("What?")
    turn.change(answer="A star", n_tokens=2, state="answering")
    visit = SimpleNamespace(say=lambda key, **values: say(key, "zh", **values))
    assert describe_state(visit, turn) == "2 个 token"
    # on a slow machine too
    turn.change(tokens_per_second=0.42)
    assert "0.4 token/s" in describe_speed(turn, "zh")


def test_another_word_keeps_what_was_found_out(monkeypatch):
    """Its maps are there already, those of hidden patches took minutes."""
    look = Look(0, 0, Task(), occluding=Task())
    visit = SimpleNamespace(state={"look": look}, conversation=Conversation())
    for state in ("waiting", "answering", "done"):
        look.watching.change(state=state)
        Visit.look_at(visit, 0, 5)
        assert visit.state == {"look": look} and look.place == 5 and look.occluding
    # its turn was cut off in another window
    Visit.look_at(visit, 3, 0)
    assert visit.state["notice"].key == "gone" and visit.state["look"] is look


def test_only_so_many_pictures_are_used(flags):
    files = [(f"{number}.png", PNG) for number in range(9)]
    page = ask(open_page(*flags, "--max_seq_len", "1024"), "What?", *files)
    assert f"8.png: {say('first_pictures', most=8)}" in texts(page)


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_it_speaks_other_languages(flags, language):
    page = open_page(*flags, lang=language)
    assert page.subheader[0].value == say("tagline", language)
    ask(page, "What?")
    assert say("no_picture", language) in texts(page)


MARKUP = "![x](http://127.0.0.1:9/leak) [y](http://a.b) **z** $x^2$ :red[q] :smile: <b>w</b>\n红"


def test_no_markdown_is_given_what_people_write(flags):
    """A question, a file's name, what is wrong with a file; the answer, as a component's data."""
    page = open_page(*flags)
    names = [f"{MARKUP}.png", f"{MARKUP} broken.png"]
    ask(page, MARKUP, (names[0], PNG), (names[1], b"nothing"))
    button(page, "Edit").click().run()
    ask(page, MARKUP + "a" * MAX_QUESTION)
    assert not page.exception
    assert texts(page).count(f"{names[1][:200]}: {say('image damaged')}") == 1
    elements = list(page.main)
    theirs = {element.type for element in elements if "leak" in str(element.proto)}
    assert theirs <= {"text", "text_area", "chat_input"}, "all others read Markdown"


def test_large_pictures_are_decoded_once_and_kept_small(flags, tmp_path):
    """Two PNGs of 36 million pixels each, several clicks: a process of its own, its peak memory.

    One of them takes 144 MB while it is decoded.
    """
    Image.new("RGB", (6000, 6000), "red").save(tmp_path / "big.png")
    program = f"""
import resource
import inference.web.conversation as conversation
from tests.inference.test_web_page import ask, open_page
opened, load_image = [], conversation.load_image
conversation.load_image = lambda *a, **k: opened.append(len(a)) or load_image(*a, **k)
page = open_page(*{flags!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
content = open({str(tmp_path / "big.png")!r}, "rb").read()
ask(page, "What?", ("a.png", content), ("b.png", content))
ask(page, "And?")
assert not page.exception, page.exception
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(opened.count(2), (peak - before) // 1024)
"""
    finished = run_cold("-c", program)
    n_opened, grown = map(int, finished.stdout.splitlines()[-1].split())
    assert n_opened == 2 and grown < 350


def test_uploads_that_nobody_sends_are_bounded():
    """By number for one visitor, by bytes for all of them."""
    manager = MemoryUploadedFileManager("/upload")
    bound_uploads(manager)

    def add(visitor: str, n_bytes: int = 1) -> None:
        # counted by what `len` says, so that no test needs a gigabyte
        content = type("Content", (), {"__len__": lambda self: n_bytes})()
        manager.add_file(visitor, UploadedFileRec(str(next(ids)), "a.png", "image/png", content))

    ids = itertools.count()
    for _ in range(MOST_WAITING):
        add("first")
    with pytest.raises(UserError, match="no room"):
        add("first")
    add("second", MOST_UPLOADED - MOST_WAITING)
    with pytest.raises(UserError, match="no room"):
        add("third")
    # what is sent or given up makes room
    manager.remove_session_files("first")
    add("third")


# Examples and conversations.


def test_examples_come_in_without_another_line_to_write_in(flags, monkeypatch):
    """It is drawn once while they are found, and once with all of them."""
    kinds = ["color", "shape", "size", "count", "relation", "description"]

    def find_slowly(config, entry):
        for kind in kinds:
            time.sleep(0.3)
            yield Example(f"Which {kind}?", (Picture.open("a.png", picture()),), "", "en", kind)

    draws, show_composer = [], page_module.show_composer
    monkeypatch.setattr(web_demo_vlm, "find_examples", find_slowly)
    monkeypatch.setattr(Galleries, "_is_right", lambda self, entry, example: True)
    monkeypatch.setattr(
        page_module, "show_composer", lambda visit: draws.append(1) or show_composer(visit)
    )
    # options that no other test has, for a service of its own
    page = open_page(*flags, "--top_p", "0.9")
    assert not page.exception and len(draws) <= 2
    assert f"{say('examples')} {say('examples_checked')}" in texts(page)
    cards = [element for element in page.main if "Which description?" in str(element.proto)]
    assert cards and say("examples_tried") not in texts(page)


def test_only_examples_that_are_answered_right_are_shown(tmp_path):
    """A model that always says the same, and rows of which one has that as its answer."""
    images = tmp_path / "images"
    images.mkdir()
    picture().save(images / "a.png")
    turns = [
        ("<image>\nWhat color?", "Red."),
        ("<image>\nWhat shape?", "A star."),
        ("<image>\nIs it red or blue?", "red"),
    ]
    rows = [{"image": "a.png", "conversations": [user(q), assistant(a)]} for q, a in turns]
    rows += [{"image": "gone.png", "conversations": rows[0]["conversations"]}, {"text": "no row"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = WebConfig(examples=[str(path)], examples_images=[str(images)])
    entry = SimpleNamespace(path="m.pth", stage="sft", knows=None)
    shelf = SimpleNamespace(default=lambda: entry, choose_for=lambda n, chosen: (entry, None))

    class Worker:
        def ask(self, conversation, entry, question, pictures, sampling, is_wanted):
            assert sampling["temperature"] == 0 and len(pictures) == 1
            turn = Turn(question, pictures)
            turn.change(answer="red", state="done")
            return turn

    worker = Worker()
    worker.shelf = shelf
    gallery = Galleries(worker, lambda entry: web_demo_vlm.find_examples(config, entry)).open(entry)
    for _ in range(500):
        if gallery.is_complete:
            break
        time.sleep(0.02)
    assert [example.question for example in gallery.choose("en")] == [
        "What color?",
        "Is it red or blue?",
    ]


def test_the_demos_examples_are_held_out_scenes():
    examples = list(web_demo_vlm.draw_examples())
    assert {example.language for example in examples} == {"en", "zh"}
    assert all("<image>" not in example.question for example in examples)
    entry = SimpleNamespace(knows=None)
    assert list(web_demo_vlm.find_examples(WebConfig(), entry)) == [], "a model of photographs"


def test_conversations_are_forgotten_the_oldest_first():
    store = ConversationStore(most=2)
    first, second = (store.keep(Conversation()) for _ in range(2))
    assert store.find(first) is not None, "looked at last"
    busy = Conversation()
    busy.turns.append(Turn("?"))
    third = store.keep(busy)
    assert store.find(second) is None and store.find(first) is not None
    store.keep(Conversation())
    assert store.find(first) is None and store.find(third) is busy, "one that is being answered"

    # pictures count by their bytes
    large = Conversation()
    large.turns.append(Turn("?", [Picture("a", bytes(900), b"")]))
    large.turns[0].stop()
    store = ConversationStore(most_bytes=1000)
    old = store.keep(large)
    store.keep(Conversation())
    assert store.find(old) is large
    other = Conversation()
    other.turns.append(Turn("?", [Picture("b", bytes(900), b"")]))
    store.keep(other)
    assert store.find(old) is None and len(store) == 1
