"""llama.cpp in a process of its own: if it aborts or hangs, one test fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

SECONDS = 120


class LlamaCppProcess:
    """Opens models and asks them, each by the path of its folder and its precision."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def ask(self, folder: Path, questions: list[tuple], precision: str = "F16", **options) -> list:
        """`LlamaCpp.complete` of each (images, prompt)."""
        return self._call("ask", folder, precision, questions, options)

    def tokenize(self, folder: Path, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in which nothing is a special token."""
        return self._call("tokenize", folder, "F16", texts, {})

    def _call(self, *request) -> list:
        self.pipe.send(request)
        if not self.pipe.poll(SECONDS):
            pytest.fail(f"llama.cpp has not answered in {SECONDS} seconds")
        try:
            answer = self.pipe.recv()
        except EOFError:
            pytest.fail("llama.cpp has ended")
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def start_llama_cpp() -> Iterator[LlamaCppProcess]:
    """A process, which is killed at the end."""
    pipe, other = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(other,), daemon=True)
    process.start()
    other.close()
    yield LlamaCppProcess(pipe)
    process.kill()
    process.join()


def _serve(pipe: Connection) -> None:
    """Answer requests until the other side is gone."""
    from scripts.export.ask_gguf import LlamaCpp

    while True:
        what, folder, precision, inputs, options = pipe.recv()
        try:
            model = LlamaCpp(folder, precision)
            if what == "ask":
                answer = [model.complete(*question, **options) for question in inputs]
            else:
                answer = [_tokenize(model.address, text) for text in inputs]
        except Exception as error:
            answer = error
        pipe.send(answer)


def _tokenize(address: str, text: str) -> list[int]:
    import json
    import urllib.request

    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(
        f"{address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["tokens"]
