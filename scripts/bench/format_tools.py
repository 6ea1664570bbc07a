"""Each exported format, asked by the tool that it is for: see formats.py.

Every tool is a context manager that gives a function ask(picture, question) -> Reply. It takes the
likeliest token each time, and computes with one thread where it can be told so.
"""

from __future__ import annotations

import functools
import http.server
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image

from common.errors import UserError
from model.image import load_image
from model.pretrained import quiet_transformers
from scripts.export.ask_gguf import LlamaCpp, make_square, to_data_url
from scripts.processes import as_flags, find_browser, serving

# Longest answer, in tokens.
MOST_TOKENS = 64
# Seconds that a page may take until it is there.
PATIENCE = 180


class Reply(NamedTuple):
    """An answer.

    Args:
        text: of the answer.
        n_tokens: how many it has, with the one that ends it.
        seconds: from its first token to its last.
    """

    text: str
    n_tokens: int
    seconds: float


Ask = Callable[[Path, str], Reply]


@contextmanager
def open_ours(weights: Path, **options) -> Iterator[Ask]:
    """Our own loop, in PyTorch or over ONNX graphs; `options` are those of `load_vlm`."""
    from inference import load_vlm

    vlm = load_vlm(weights, device="cpu", **options)

    def ask(picture: Path, question: str) -> Reply:
        sampling = {"temperature": 0.0, "max_new_tokens": MOST_TOKENS}
        pieces, times = clock(vlm.ask(picture, question, stream=True, **sampling))
        # A piece comes with every token.
        return Reply("".join(pieces), len(pieces), times[-1] - times[0])

    yield ask


@contextmanager
def open_transformers(folder: Path) -> Iterator[Ask]:
    """transformers' own LLaVA."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with quiet_transformers():
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)

    def ask(picture: Path, question: str) -> Reply:
        content = [{"type": "image", "url": str(picture)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        times = TokenTimes()
        tokens = model.generate(
            **inputs, do_sample=False, max_new_tokens=MOST_TOKENS, streamer=times
        )
        new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(new_tokens, skip_special_tokens=True)
        return Reply(text, len(new_tokens), times[-1] - times[1])

    yield ask


class TokenTimes(list):
    """When the prompt was passed on and when each token came: a streamer of transformers."""

    def put(self, _) -> None:
        self.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def open_llama_cpp(folder: Path, precision: str) -> Iterator[Ask]:
    """llama.cpp's server with the files of folder/gguf; it needs square pictures."""
    model = LlamaCpp(folder, precision)

    def read(picture: Path) -> Image:
        return make_square(load_image(picture), model.image_size, model.is_clip)

    yield ask_client(f"{model.address}/v1", precision, read)


@contextmanager
def open_endpoint(weights: Path) -> Iterator[Ask]:
    """Our endpoint, started as a user starts it."""
    command = ["-m", "scripts.serve_openai_api"]
    command += as_flags(weights=weights.resolve(), device="cpu")
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(*command, log=Path(folder, "log")) as (address, _),
    ):
        yield ask_client(f"{address}/v1", weights.stem, load_image)


def ask_client(address: str, model: str, read: Callable[[Path], Image]) -> Ask:
    """How OpenAI's client asks; `read` opens a picture."""
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none")

    def ask(picture: Path, question: str) -> Reply:
        content = [
            {"type": "image_url", "image_url": {"url": to_data_url(read(picture))}},
            {"type": "text", "text": question},
        ]
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=MOST_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks, times = clock(stream)
        pieces = [chunk.choices[0].delta.content or "" if chunk.choices else "" for chunk in chunks]
        written = [moment for piece, moment in zip(pieces, times) if piece] or times[:1]
        # A piece may have several tokens.
        n_tokens = chunks[-1].usage.completion_tokens
        return Reply("".join(pieces), n_tokens, written[-1] - written[0])

    return ask


@contextmanager
def open_page(folder: Path) -> Iterator[Ask]:
    """The page of a folder in Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    program = find_browser()
    if program is None:
        raise UserError("no Chromium or Chrome is installed: leave browser out of --tools")
    with serve_folder(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(address)
        page.locator("#ask:enabled").wait_for()

        def ask(picture: Path, question: str) -> Reply:
            for button in page.locator("#gallery button").all():
                button.click()
            page.locator("#file").set_input_files(picture)
            page.locator("#gallery li:not(.waiting)").wait_for()
            page.locator("#question").fill(question)
            page.locator("#ask").click()
            answer = page.locator("#answer.complete")
            answer.wait_for()
            n_tokens = len(answer.get_attribute("data-ids").split())
            rate = re.search(r"then (\d+) a second", page.locator("#speed").inner_text())
            seconds = (n_tokens - 1) / int(rate[1]) if rate else 0.0
            return Reply(answer.inner_text(), n_tokens, seconds)

        yield ask
        browser.close()


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """The address of a web server for its files, as `python -m http.server` is one."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    handler = functools.partial(Handler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def clock(stream: Iterable) -> tuple[list, list[float]]:
    """(what comes out of a stream, when each of it came)."""
    pairs = [(one, time.perf_counter()) for one in stream]
    return [one for one, _ in pairs], [moment for _, moment in pairs]
