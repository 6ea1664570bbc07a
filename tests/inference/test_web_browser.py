"""The web page in a real browser: what people do with it, and what they write stays text."""

import http.server
import io
import random
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from dataset.scenes.scene import Scene, Thing, draw_scene
from inference.chat import MAX_QUESTION
from scripts.docs.web_page import wait_for_page
from scripts.processes import find_browser, free_port
from tests.helpers import ROOT, picture, start_script

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
PATIENCE = 45_000  # ms; a busy machine is slow

# The page, but a question that begins with "echo" is answered with itself, a character at a time;
# one that ends with "so on" many times.
PAGE = """
import sys, time
from inference.web.worker import Worker

if not hasattr(Worker, "usual_answer"):
    Worker.usual_answer = Worker._answer

    def answer(self, vlm, turn, turns, pictures):
        if not turn.question.startswith("echo"):
            return self.usual_answer(vlm, turn, turns, pictures)
        text = turn.question * (200 if turn.question.endswith("so on") else 1)
        for end in range(1, len(text) + 1):
            turn.change(answer=text[:end], n_tokens=end)
            time.sleep(0.05)
            self._check()
        turn.change(state="done")

    Worker._answer = answer

import web_demo_vlm
web_demo_vlm.main()
"""
# An answer that takes minutes.
LONG = "echo and so on"


def draw(color: str, shape: str, *others: tuple[str, str]) -> bytes:
    """A PNG with one or several medium things."""
    places = [(60, 60), (160, 60), (60, 160), (160, 160)]
    things = tuple(
        Thing(*which, "medium", *place) for which, place in zip([(color, shape), *others], places)
    )
    return encode(draw_scene(Scene(things, (250, 250, 250), jitter=0)))


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of PAGE with the demo's model, as a user starts it; examples are still being tried."""
    script = tmp_path_factory.mktemp("page") / "page.py"
    script.write_text(PAGE)
    port = free_port()
    options = ["--server.headless=true", f"--server.port={port}", "--server.address=localhost"]
    options += ["--server.maxUploadSize=20", "--client.toolbarMode=minimal"]
    options += ["--browser.gatherUsageStats=false", "--server.fileWatcherType=none"]
    flags = ["--weights", ROOT / "model/demo/sft_vlm_128.pth", "--device", "cpu"]
    server = start_script("-m", "streamlit", "run", *options, script, "--", *flags)
    wait_for_page(port)
    yield f"http://localhost:{port}"
    server.kill()
    server.wait(timeout=20)


@contextmanager
def visitor(browser, address: str, **options):
    """A page of a visitor of its own."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(address)
    page.get_by_test_id("stChatInputTextArea").wait_for()
    try:
        yield page
    finally:
        context.close()


def attach(page, *files: tuple[str, bytes]) -> None:
    """Add files to the next question, and wait until they are there."""
    uploads = [{"name": name, "mimeType": "", "buffer": content} for name, content in files]
    page.locator("[data-testid=stChatInput] input[type=file]").set_input_files(uploads)
    page.get_by_test_id("stFileChip").nth(len(files) - 1).wait_for()


def ask(page, question: str) -> None:
    page.get_by_test_id("stChatInputTextArea").fill(question)
    page.get_by_test_id("stChatInputSubmitButton").click()


def wait_for_line(page, text: str) -> None:
    """Until this is in the line to write in."""
    line = "document.querySelector('[data-testid=stChatInputTextArea]').value.trim()"
    page.wait_for_function(f"text => {line} === text", arg=text.strip())


def answers(page):
    """The answers that are complete."""
    return page.locator(".answer")


def wait_for_answer(page, text: str) -> None:
    answers(page).filter(has_text=text).last.wait_for()


def start_anew(page) -> None:
    page.get_by_role("button", name="New chat").click()
    page.locator(".gallery button").first.wait_for()
    page.wait_for_function("!location.search.includes('c=')")
    page.wait_for_function("!document.querySelector('.answer')")


def test_a_conversation(address, browser):
    """Upload, question, answer, a word's map, stop, a second picture, a reload."""
    with visitor(browser, address) as page:
        # a picture and a question
        attach(page, ("circle.png", draw("red", "circle")))
        ask(page, "What color is the circle?")
        answers(page).filter(has_text="The circle is red.").wait_for()
        page.get_by_text("tokens/s").wait_for()
        assert page.get_by_text("knows drawn shapes only").is_visible()

        # a word
        answers(page).locator("span", has_text="red").click()
        page.get_by_text("Where the model looked for “red”").wait_for()
        maps = page.locator("[class*=st-key-maps-] img")
        maps.nth(1).wait_for()
        page.get_by_text("Grey out each patch").click()
        maps.nth(2).wait_for()

        # an answer that is stopped stays, as far as it was
        ask(page, LONG)
        page.get_by_text("echo and so on").nth(1).wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped").wait_for()
        assert "echo and" in answers(page).nth(1).text_content()

        # a question in the middle of an answer ends that one
        ask(page, LONG)
        page.get_by_text("echo and so on").nth(3).wait_for()
        attach(page, ("two.png", draw("blue", "star", ("green", "heart"))))
        ask(page, "What color is the star?")
        answers(page).nth(3).wait_for()
        page.locator("[class*=st-key-bubble-3] img").wait_for()
        assert page.locator("[class*=st-key-bubble-]").count() == 4

        # all of it is there after a reload
        page.reload()
        answers(page).nth(3).wait_for()
        page.locator("[class*=st-key-bubble-] img").nth(1).wait_for()


def test_examples_are_answered_as_they_say(address, browser):
    with visitor(browser, address) as page:
        page.locator(".gallery button").first.click()
        answers(page).wait_for()
        assert answers(page).text_content().startswith("The ")
        start_anew(page)


def test_what_waits_in_the_line_stays_there(address, browser):
    """A question and a picture: an example is asked before, and an answer comes and ends."""
    with visitor(browser, address) as page:
        page.locator(".gallery button").first.wait_for()
        attach(page, ("circle.png", draw("red", "circle")))
        page.get_by_test_id("stChatInputTextArea").fill("What color is the circle?")
        page.locator(".gallery button").first.click()
        answers(page).wait_for()
        wait_for_line(page, "What color is the circle?")
        page.get_by_test_id("stChatInputSubmitButton").click()
        wait_for_answer(page, "The circle is red.")

    # in the middle of the first answer
    with visitor(browser, address) as page:
        attach(page, ("circle.png", draw("red", "circle")))
        ask(page, LONG)
        page.get_by_text("echo and so on").nth(1).wait_for()
        attach(page, ("star.png", draw("blue", "star")))
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped").wait_for()
        ask(page, "What color is the star?")
        page.locator("[class*=st-key-bubble-1] img").wait_for()


def test_back_shows_the_conversation_before(address, browser):
    with visitor(browser, address) as page:
        for shape in ("circle", "star"):
            attach(page, (f"{shape}.png", draw("red", shape)))
            ask(page, f"What color is the {shape}?")
            wait_for_answer(page, f"The {shape} is red.")
            start_anew(page)
        page.go_back()
        wait_for_answer(page, "The star is red.")
        page.get_by_role("button", name="Regenerate").click()
        wait_for_answer(page, "The star is red.")


def test_visitors_have_their_own_conversations(address, browser):
    """All of them ask at once, and each gets the answer about their own picture."""
    rng, colors = random.Random(0), ("red", "yellow", "green", "blue")
    colors = [rng.choice(colors) for _ in range(6)]
    contexts = [visitor(browser, address) for _ in colors]
    pages = [context.__enter__() for context in contexts]
    for page, color in zip(pages, colors):
        attach(page, ("mine.png", draw(color, "circle")))
    for page in pages:
        ask(page, "What color is the circle?")
    for page, color in zip(pages, colors):
        wait_for_answer(page, f"The circle is {color}.")
    for context in contexts:
        context.__exit__(None, None, None)


def test_who_leaves_frees_the_model(address, browser):
    with visitor(browser, address) as first, visitor(browser, address) as second:
        for page in (first, second):
            attach(page, ("circle.png", draw("red", "circle")))
        ask(first, LONG)
        first.get_by_text("echo and so on").nth(1).wait_for()
        ask(second, "What color is the circle?")
        second.get_by_text("before you").wait_for()
        first.context.close()
        wait_for_answer(second, "The circle is red.")


BROKEN = {
    "notes.png": (b"nothing", "damaged"),
    "cut.png": (draw("red", "circle")[:700], "damaged"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG cannot be read here"),
    "photo.HEIC": (b"\0\0\0\x18ftypheic" + bytes(90), "HEIC cannot be read here"),
}


def test_what_cannot_be_used_is_said_where_it_was_sent(address, browser, tmp_path):
    with visitor(browser, address) as page:
        # nothing, and files that are none
        ask(page, "What color is the circle?")
        page.get_by_text("Add a picture first").wait_for()
        # it need not be typed again
        wait_for_line(page, "What color is the circle?")
        attach(page, *((name, content) for name, (content, _) in BROKEN.items()))
        page.get_by_test_id("stChatInputSubmitButton").click()
        for name, (_, reason) in BROKEN.items():
            line = page.locator("[class*=st-key-problem]").get_by_text(name)
            line.wait_for()
            assert reason in line.text_content()
        page.get_by_text("Add a picture first").nth(1).wait_for()
        wait_for_line(page, "What color is the circle?")

        # more pixels than memory, more bytes than an upload may have
        huge, large = tmp_path / "huge.png", tmp_path / "large.png"
        Image.new("1", (20_000, 20_000)).save(huge)
        large.write_bytes(bytes(100 * 2**20))
        chooser = page.locator("[data-testid=stChatInput] input[type=file]")
        chooser.set_input_files([huge])
        page.get_by_test_id("stFileChip").wait_for()
        page.wait_for_timeout(2000)
        chooser.set_input_files([large])
        page.get_by_text("must be 20.0MB or smaller").wait_for()
        ask(page, "What color is the circle?")
        page.get_by_text("huge.png: it is too large").wait_for()
        page.get_by_text("large.png: it did not arrive").wait_for()
        wait_for_line(page, "What color is the circle?")

        # blanks, and more than the model can read
        attach(page, ("circle.png", draw("red", "circle")))
        ask(page, "   ")
        page.get_by_text("Type a question first").wait_for()
        wait_for_line(page, "   ")
        ask(page, "a" * (MAX_QUESTION + 1))
        page.get_by_text("too long").wait_for()
        wait_for_line(page, "a" * (MAX_QUESTION + 1))
        ask(page, "龘" * (MAX_QUESTION // 5))
        page.locator("[class*=st-key-turn-]").get_by_text("too long").wait_for()

        # the session goes on; the picture of the blank question has waited
        ask(page, "What color is the circle?")
        wait_for_answer(page, "The circle is red.")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_all_of_it(address, browser, dark):
    scheme = "dark" if dark else "light"
    size = {"width": 390, "height": 844}
    with visitor(browser, address, viewport=size, color_scheme=scheme) as page:
        assert page.get_by_test_id("stChatInputFileUploadButton").is_visible()
        assert page.get_by_text("Deploy").count() == 0
        attach(page, ("circle.png", draw("red", "circle")))
        ask(page, "What color is the circle?")
        wait_for_answer(page, "The circle is red.")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        box = page.get_by_test_id("stChatInput").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390


@pytest.mark.parametrize("locale, word", [("zh-CN", "设置"), ("ja-JP", "設定")])
def test_the_page_speaks_the_language_of_the_browser(address, browser, locale, word):
    with visitor(browser, address, locale=locale) as page:
        page.get_by_role("button", name=word).wait_for()


@pytest.fixture
def listener():
    """(port, paths): a server on this machine that notes what it is asked for."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, paths
    server.shutdown()
    server.server_close()


def test_a_browser_fetches_nothing_that_people_write(address, browser, listener):
    """A picture in Markdown and in HTML: in a question, its answer, the name of a file."""
    port, paths = listener
    link = f"http://127.0.0.1:{port}"
    question = (
        f"echo ![x]({link}/leak) **bold** $x^2$ :red[a] :smile: <img src={link}/img> <b>b</b>"
    )
    # A name cannot have a slash, but Markdown reads this one as the same address.
    name = f"![x](http:&#47;&#47;127.0.0.1:{port}&#47;name)"
    with visitor(browser, address) as page:
        attach(page, (f"{name}.png", encode(picture())), (f"{name} broken.png", b"nothing"))
        ask(page, question)
        wait_for_text = page.locator(".answer").filter(has_text="<b>b</b>")
        wait_for_text.wait_for()
        # the second question draws the first and its answer again
        ask(page, "echo again?\n红色的圆形")
        page.locator(".answer").nth(1).wait_for()
        assert page.locator(".answer").first.text_content() == question
        page.locator(".answer span", has_text="bold").click()
        page.get_by_text("Where the model looked for “bold").wait_for()
        body = page.get_by_test_id("stMain")
        assert body.locator("a, strong:has-text('bold'), .katex, b").count() == 0
        assert page.locator("[class*=st-key-problem]").get_by_text(name).count() == 1
        # the listener would have heard of a picture: it hears of this one
        page.evaluate(f"new Image().src = '{link}/heard'")
        for _ in range(100):
            if paths:
                break
            page.wait_for_timeout(100)
        assert paths == ["/heard"]
