"""The web page: it answers, and what people write stays text, also in a real browser."""

import http.server
import importlib.util
import io
import os
import shutil
import signal
import sys
import threading
import time
import urllib.request

import pytest
from PIL import Image

import web_demo_vlm
from common.errors import UserError
from inference.chat import MAX_QUESTION
from model.weights import save_atomically, select_weights
from tests.helpers import TOKENIZER, free_port, picture, run_cold, small_model, start_script

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def flags(vision_dir, tmp_path_factory) -> list[str]:
    """Of a page with a small model."""
    folder = tmp_path_factory.mktemp("page")
    save_atomically(select_weights(small_model(n_heads=2)), folder / "sft_vlm_64.pth")
    names = {"--out_dir": folder, "--tokenizer": TOKENIZER, "--vision_model": vision_dir}
    parts = [str(part) for pair in names.items() for part in pair]
    return [*parts, "--device", "cpu", "--max_new_tokens", "8"]


def wait_for_page(port: int) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("no answer from the page")


def test_the_web_page_starts_and_listens_on_this_machine_only(flags):
    port = free_port()
    server = start_script("web_demo_vlm.py", "--port", port, *flags, start_new_session=True)
    try:
        wait_for_page(port)
        listening = open("/proc/net/tcp").read().splitlines()[1:]
        local = [line.split()[1].split(":") for line in listening]
        addresses = {address for address, its_port in local if its_port == f"{port:04X}"}
        assert addresses <= {"0100007F"}, "listens beyond this machine"
    finally:
        # Streamlit's own process is of the same group.
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=20)


def test_the_web_page_needs_streamlit(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo_vlm.py", *flags])
    monkeypatch.delitem(sys.modules, "streamlit", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the web page needs Streamlit: pip install streamlit"):
        web_demo_vlm.main()


def open_page(*flags: str):
    """The page in Streamlit's own test, without a browser."""
    from streamlit.testing.v1 import AppTest

    argv = ["web_demo_vlm.py", *flags]
    program = f"import sys\nsys.argv = {argv!r}\nimport web_demo_vlm\nweb_demo_vlm.main()\n"
    return AppTest.from_string(program, default_timeout=60).run()


def texts(page) -> list[str]:
    return [element.value for element in page.text]


def test_the_web_page_answers_and_shows_errors(flags):
    page = open_page(*flags)
    assert not page.exception and page.title[0].value == "MiniMind-V"
    assert page.sidebar.slider[2].value == 8, "sliders begin with what the flags say"
    page.sidebar.slider[2].set_value(24).run()
    page.chat_input[0].set_value("What color?").run()
    assert not page.exception
    assert [message.name for message in page.chat_message] == ["user", "assistant"]
    page.chat_input[0].set_value("And now?").run()
    roles = [message.name for message in page.chat_message]
    assert roles == ["user", "assistant"] * 2, "the conversation goes on"
    assert "no weights at" in texts(open_page(*flags, "--dim", "128"))[0]


MARKUP = "![x](http://127.0.0.1:9/leak) [y](http://a.b) **z** $x^2$ :red[q] :smile: <b>w</b>\n红"


def test_no_markdown_is_given_what_people_write(flags):
    """A question, a file's name, what is wrong with a file, too long a question."""
    page = open_page(*flags)
    names = [f"{MARKUP}.png", f"{MARKUP} broken.png"]
    file = io.BytesIO()
    picture().save(file, "PNG")
    uploads = [(names[0], file.getvalue(), "image/png"), (names[1], b"nothing", "image/png")]
    page.file_uploader[0].set_value(uploads).run()
    page.chat_input[0].set_value(MARKUP).run()
    page.chat_input[0].set_value(MARKUP + "a" * MAX_QUESTION).run()
    assert not page.exception
    shown = texts(page)
    assert MARKUP in shown and names[0] in shown
    assert any(text.startswith(f"⚠️ {names[1]}: image damaged") for text in shown)
    assert shown[-2] == (MARKUP + "a" * MAX_QUESTION)[:MAX_QUESTION]
    assert shown[-1].startswith("⚠️ the conversation has ")
    elements = [element for part in (page.main, page.sidebar) for element in part]
    theirs = [element.type for element in elements if "leak" in str(element.proto)]
    assert theirs == ["text"] * 4, "all others read Markdown"


def test_only_the_first_pictures_are_used_and_one_taken_away_begins_anew(flags):
    file = io.BytesIO()
    picture().save(file, "PNG")
    uploads = [(f"{number}.png", file.getvalue(), "image/png") for number in range(9)]
    page = open_page(*flags)
    page.file_uploader[0].set_value(uploads).run()
    shown = texts(page)
    assert shown == ["⚠️ 9 pictures: only the first 8 are used.", *(f"{n}.png" for n in range(8))]
    page.chat_input[0].set_value("What?").run()
    assert len(page.chat_message) == 2 and len(page.session_state.opened) == 8
    page.file_uploader[0].set_value(uploads[:1]).run()
    assert "starts anew" in page.info[0].value and not page.chat_message
    assert len(page.session_state.opened) == 1


def big_png(side: int) -> bytes:
    """A small file of many pixels."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


def test_large_pictures_are_decoded_once_and_kept_small(flags, tmp_path):
    """Two PNGs of 36 million pixels each, several clicks: a process of its own, its peak memory.

    One of them takes 144 MB while it is decoded.
    """
    (tmp_path / "big.png").write_bytes(big_png(6000))
    program = f"""
import resource, sys
from tests.inference.test_web_page import open_page
import model.image, inference.web_page
opened, load_image = [], inference.web_page.load_image
inference.web_page.load_image = lambda *a, **k: opened.append(1) or load_image(*a, **k)
page = open_page(*{flags!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
content = open({str(tmp_path / "big.png")!r}, "rb").read()
page.file_uploader[0].set_value([(f"{{n}}.png", content, "image/png") for n in range(2)]).run()
page.chat_input[0].set_value("What?").run()
page.chat_input[0].set_value("And?").run()
assert not page.exception, page.exception
assert len(page.chat_message) == 4
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(opened), (peak - before) // 1024)
"""
    finished = run_cold("-c", program)
    n_opened, grown = map(int, finished.stdout.splitlines()[-1].split())
    assert n_opened == 2 and grown < 350


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


# The page of a model that answers with the question itself.
ECHO_PAGE = """
import sys
from inference.chat import Chat

def echo(self, prompt, images=(), **sampling):
    self.turns += [{"role": role, "content": prompt} for role in ("user", "assistant")]
    for start in range(0, len(prompt), 7):
        yield prompt[start : start + 7]

Chat.ask = echo
import web_demo_vlm
web_demo_vlm.main()
"""


@pytest.fixture
def echo_page(flags, tmp_path):
    """Address of a real Streamlit process that shows ECHO_PAGE."""
    (tmp_path / "echo_page.py").write_text(ECHO_PAGE)
    port = free_port()
    options = ["--server.headless=true", f"--server.port={port}", "--server.address=localhost"]
    command = ["-m", "streamlit", "run", *options, "--browser.gatherUsageStats=false"]
    server = start_script(*command, tmp_path / "echo_page.py", "--", *flags)
    wait_for_page(port)
    yield f"http://localhost:{port}"
    server.kill()
    server.wait(timeout=20)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_fetches_nothing_that_people_write(echo_page, listener):
    """A picture in Markdown, in a question, its answer and the name of a file."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    port, paths = listener
    question = f"![x](http://127.0.0.1:{port}/leak) **bold** $x^2$ :red[a] :smile:"
    # A name cannot have a slash, but Markdown reads this one as the same address.
    name = f"![x](http:&#47;&#47;127.0.0.1:{port}&#47;name).png"
    file = io.BytesIO()
    picture().save(file, "PNG")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(180_000)  # ms; a busy machine is slow
        page.goto(echo_page)
        upload = {"name": name, "mimeType": "image/png", "buffer": file.getvalue()}
        page.locator("input[type=file]").first.set_input_files([upload])
        page.get_by_test_id("stText").get_by_text(name, exact=True).wait_for()
        # the second question draws the first and its answer again
        for text in (question, "Again?\n红色的圆形"):
            page.get_by_test_id("stChatInputTextArea").fill(text)
            page.keyboard.press("Enter")
            page.get_by_test_id("stChatMessage").get_by_text(text, exact=True).nth(1).wait_for()
        messages = page.get_by_test_id("stChatMessage")
        assert messages.get_by_text(question, exact=True).count() == 2
        assert messages.locator("a, strong, img, .katex").count() == 0
        # the listener would have heard of a picture: it hears of this one
        page.evaluate(f"new Image().src = 'http://127.0.0.1:{port}/heard'")
        for _ in range(100):
            if paths:
                break
            page.wait_for_timeout(100)
        assert paths == ["/heard"]
        browser.close()
