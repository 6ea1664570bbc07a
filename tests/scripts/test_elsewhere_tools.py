"""docs/export.md and README.md: what they tell people to paste works as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from common.errors import UserError
from inference import load_vlm
from scripts.bench.__main__ import TOOLS
from scripts.bench.format_tools import Reply
from scripts.bench.formats import Format, Question, describe, judge, read_questions
from scripts.processes import as_flags, find_browser, free_port
from tests.helpers import DEMO, ROOT, run_script

PAGE = (ROOT / "docs/export.md").read_text(encoding="utf-8")
# A block of code with the paragraph before it and the one behind it.
BLOCK = re.compile(r"((?:^\S.*\n)*)\n((?:^    .*\n|(?<=\n)\n(?=    ))+)(?=\n((?:^\S.*\n)*))", re.M)
ROW = '{"image": "a.png", "conversations": [{"content": "What?"}, {"content": "red"}]}'
LMMS_EVAL = ROOT / ".venv/lmms-eval"
NOT_RUN_HERE = ("# not run here", "pip install", "http.server", "scripts.bench")


class Block(NamedTuple):
    """What a person pastes.

    Args:
        code: of Python, of a shell, or of a file.
        file: the name of that file.
        printed: what the page says that it prints.
    """

    code: str
    file: str | None
    printed: str | None

    @property
    def is_python(self) -> bool:
        return self.code.startswith(("import ", "from "))

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code] if self.is_python else ["bash", "-ec", self.code]


def find_blocks(title: str, page: str = PAGE) -> list[Block]:
    """The blocks of a section that are run here."""
    (section,) = (part for part in page.split("\n## ") if part.startswith(title + "\n"))
    blocks = []
    for before, code, after in BLOCK.findall(section + "\n\n"):
        if any(words in code for words in NOT_RUN_HERE):
            continue
        file = re.fullmatch(r"`(\S+)`:\n", before)
        printed = re.match(r"It prints `([^`]+)`", after)
        code = "\n".join(line[4:] for line in code.splitlines())
        blocks.append(Block(code, file and file[1], printed and printed[1]))
    return blocks


def run_section(title: str, folder: Path) -> None:
    """Run the blocks of a section in a folder, one after the other; servers run until its end."""
    port = str(free_port())
    with ExitStack() as servers:
        for block in find_blocks(title):
            block = block._replace(code=block.code.replace("8998", port))
            if block.file:
                (folder / block.file).write_text(block.code, encoding="utf-8")
            elif "serve_openai_api" in block.code:
                servers.enter_context(serving(f"exec {block.code} --port {port}", port, folder))
            else:
                assert (block.printed or "") in run(block.command, folder)


def run(command: list[str], folder: Path) -> str:
    """What a command prints that a user types in a folder."""
    finished = subprocess.run(
        command, cwd=folder, env=user_environment(folder), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def user_environment(home: Path) -> dict[str, str]:
    """The virtual environment is active, and no module of this repository helps a snippet."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{sys.prefix}/bin{os.pathsep}{env['PATH']}"
    return env | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "out/hf")}


@contextmanager
def serving(command: str, port: str, folder: Path):
    """Runs a server of OpenAI's API until nobody asks it any more."""
    server = subprocess.Popen(["bash", "-c", command], cwd=folder, env=user_environment(folder))
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait(timeout=30)


def make_clone(folder: Path) -> Path:
    """A folder that looks like a fresh clone of the repository."""
    for path in ROOT.iterdir():
        if path.name not in (".git", "out", "exported"):
            (folder / path.name).symlink_to(path)
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def small_export(tmp_path_factory) -> Path:
    """A clone with what most tools need; it is written in seconds."""
    clone = make_clone(tmp_path_factory.mktemp("clone"))
    formats = ["transformers", "gguf"]
    flags = as_flags(to=formats, gguf_class_token="last", out=clone / "exported")
    finished = run_script("-m", "scripts.export", DEMO, *flags)
    assert finished.returncode == 0, finished.stdout
    return clone


@pytest.fixture(scope="module")
def whole_export(tmp_path_factory) -> Path:
    """A clone with all formats, by the command of the page."""
    if shutil.which("npm") is None:
        pytest.skip("the web page's library comes by npm")
    clone = make_clone(tmp_path_factory.mktemp("clone"))
    # what npm has fetched before
    library = ROOT / "out/.web_library"
    library.mkdir(parents=True, exist_ok=True)
    (clone / "out/.web_library").symlink_to(library)
    run_section("# Use a model elsewhere", clone)
    return clone


@pytest.mark.parametrize("title", ["transformers", "llama.cpp", "OpenAI's API"])
def test_pasted_snippets_answer(title, small_export):
    run_section(title, small_export)


@pytest.mark.slow
def test_pasted_commands_of_onnx_answer(whole_export):
    run_section("ONNX", whole_export)


@pytest.mark.slow
def test_snippets_of_the_readme_answer(whole_export):
    """Those for transformers, llama.cpp, and for OpenAI's client with our server."""
    page, port = (ROOT / "README.md").read_text(encoding="utf-8"), str(free_port())
    snippets = [block for block in find_blocks("Use it elsewhere", page) if block.is_python]
    assert snippets
    (llama_cpp,) = re.findall(r"python -m scripts\.export\.ask_gguf (?:.*\\\n)*.*", page)
    (server,) = re.findall(r"python -m scripts\.serve_openai_api .*", page)
    with serving(f"exec {server} --port {port}", port, whole_export):
        for code in (llama_cpp, *(block.code.replace("8998", port) for block in snippets)):
            printed = run(Block(code, None, None).command, whole_export)
            assert "The square is yellow." in printed


@pytest.mark.slow
@pytest.mark.skipif(not LMMS_EVAL.is_dir(), reason="lmms-eval is not installed: make test-all")
def test_lmms_eval_scores_the_export_as_we_do(whole_export):
    """Its own class for LLaVA, on the task of the page, against our own answers."""
    run_section("Benchmarks with lmms-eval", whole_export)
    (results,) = whole_export.glob("out/lmms-eval/*/*_results.json")
    score = json.loads(results.read_text())["results"]["scenes"]["exact_match,none"]

    # the same questions
    vlm, scenes = load_vlm(DEMO, device="cpu"), whole_export / "out/scenes/eval_images"
    rows = [json.loads(row) for row in open(scenes / "metadata.jsonl", encoding="utf-8")]
    answers = [
        vlm.ask(scenes / row["file_name"], row["question"], temperature=0, max_new_tokens=64)
        for row in rows
    ]
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows))
    assert score == pytest.approx(right / len(rows)) and right > len(rows) / 2


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_one_command_fills_the_table(whole_export):
    """Each format is asked by its own tool, and those that compute in float32 answer the same."""
    run([sys.executable, "-m", "scripts.bench", "formats", "--questions", "3"], whole_export)
    rows = json.loads((whole_export / "out/bench.json").read_text())["formats"]
    assert {row["tool"] for row in rows} == {*TOOLS}
    assert all(row["megabytes"] > 1 and row["tokens_per_second"] > 1 for row in rows)
    same = [row["same"] for row in rows if row["format"] == "float32"]
    assert same == [3] * len(same) and len(same) == 5
    table = (whole_export / "out/bench/formats.md").read_text().splitlines()
    assert len(table) == len(rows) + 2


@pytest.mark.parametrize(
    "line, message",
    [('{"image": "a.png"}', "line 1 of"), ("[]", "line 1 of"), (ROW, "correct --images")],
)
def test_rows_that_cannot_be_asked_are_one_line(line, message, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(line)
    with pytest.raises(UserError, match=message):
        read_questions(Namespace(data=rows, images=None, questions=5))


def test_a_row_of_the_table_counts_same_and_right_answers(tmp_path):
    (tmp_path / "model.bin").write_bytes(bytes(2_000_000))
    form = Format("a tool", "float32", [tmp_path], open=None)
    questions = [Question(tmp_path, "What?", answer) for answer in ("It is red.", "blue", "It.")]
    replies = [Reply("It is red.", 5, 0.1), Reply("green", 3, 0.1), Reply("It.", 2, 0.0)]
    row = judge(form, questions, replies, ["It is red.", "green", "it"])
    assert describe(row) == "| a tool | float32 | 2.0 | 30 | 2 of 3 | 66.7 % |"
