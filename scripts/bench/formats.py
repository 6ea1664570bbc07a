"""What a model runs in: each exported format, asked by the tool that it is for.

The questions are about drawn scenes, which the demo's model knows, or the first ones of --data. The
table says how many answers are those of PyTorch in float32, letter by letter, and how many right.
"""

import json
import os
import shutil
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from common.errors import UserError
from common.files import write_text
from common.packages import check_packages
from common.text import IMAGE_TAG, simplify_answer
from dataset.scenes.write import FILES, write_scene_set
from inference.onnx_files import DECODER_NAMES, EMBEDDINGS_NAME, VISION_NAME
from inference.paths import find_model_files
from scripts.bench import runs
from scripts.bench.format_tools import (
    Ask,
    Reply,
    open_endpoint,
    open_llama_cpp,
    open_ours,
    open_page,
    open_transformers,
)
from scripts.export.ask_gguf import Precision, find_files
from scripts.processes import as_flags, run_python

WORK, TABLE = runs.WORK / "formats", runs.WORK / "formats.md"
EXPORTED = WORK / "exported"
# Forms of the vision encoder for llama.cpp; the first is the one for llama.cpp as it is now.
CLASS_TOKENS = ("last", "first", "none")
# What a tool needs of `python -m scripts.export`.
EXPORTS = {
    "transformers": "transformers",
    "onnxruntime": "onnx",
    "llama.cpp": "gguf",
    "browser": "web",
}
HEADER = """\
| runs in | format | MB | tokens/s | same answers | right answers |
|---|---|---|---|---|---|"""


class Format(NamedTuple):
    """A row of the table.

    Args:
        tool: what runs it, as --tools names it.
        name: of the format.
        files: what the tool needs of the model, files or folders.
        open: gives a way to ask.
    """

    tool: str
    name: str
    files: list[Path]
    open: Callable[[], AbstractContextManager[Ask]]


class Question(NamedTuple):
    picture: Path
    text: str
    answer: str


def measure(args: Namespace) -> list[dict]:
    """Rows of tool, format, megabytes, tokens_per_second, questions, and how many same, right."""
    check_packages("requirements-export.txt", "xllamacpp")
    check_packages("requirements-dev.txt", "openai", "playwright")
    # One thread: the tools share the work in different ways.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    questions = read_questions(args)
    export(args.weights, args.tools)

    # ask
    rows: list[dict] = []
    lines, expected = [HEADER], []
    print(HEADER, flush=True)
    for form in list_formats(args.weights, args.tools):
        replies = ask_all(form, questions)
        expected = expected or [reply.text for reply in replies]
        rows.append(judge(form, questions, replies, expected))
        lines.append(describe(rows[-1]))
        print(lines[-1], flush=True)
    write_text(TABLE, "\n".join(lines) + "\n")
    return rows


def read_questions(args: Namespace) -> list[Question]:
    """The first question of each row with one picture, `args.questions` of them at most."""
    rows, images = args.data, args.images
    if rows is None:
        write_scene_set(WORK / "scenes", {"eval": args.questions})
        rows, images = (WORK / "scenes" / name for name in FILES["eval"])
    questions = []
    lines = rows.read_text(encoding="utf-8").splitlines()[: args.questions]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            asked, answered = (turn["content"] for turn in row["conversations"][:2])
            picture = Path(images or rows.parent, row.get("image", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"line {number} of {rows} is no row as docs/data.md has it") from None
        if picture.is_file():
            questions.append(Question(picture, asked.replace(IMAGE_TAG, "").strip(), answered))
    if not questions:
        raise UserError(f"no row of {rows} has one picture that is there: correct --images")
    return questions


def export(weights: str, tools: list[str]) -> None:
    """Write the formats that the tools need."""
    formats = [EXPORTS[tool] for tool in tools if tool in EXPORTS]
    jobs = [(EXPORTED, formats, CLASS_TOKENS[0])] if formats else []
    if "llama.cpp" in tools:
        jobs += [(WORK / token, ["gguf"], token) for token in CLASS_TOKENS[1:]]
    for folder, to, token in jobs:
        shutil.rmtree(folder, ignore_errors=True)
        flags = as_flags(to=to, out=folder, gguf_class_token=token)
        run_python("-m", "scripts.export", weights, *flags, capture=True)


def list_formats(weights: str, tools: list[str]) -> Iterator[Format]:
    """The rows of the table; the first one is what the others are compared with."""
    files, onnx, web = find_model_files(weights), EXPORTED / "onnx", EXPORTED / "web"
    own = [path for path in (files.weights, files.vision_model) if path is not None]
    if "PyTorch" in tools:
        for dtype in ("float32", "float16", "int8"):
            yield Format("PyTorch", dtype, own, partial(open_ours, weights, dtype=dtype))
    if "transformers" in tools:
        needed = [EXPORTED / "model.safetensors"]
        yield Format("transformers", "float32", needed, partial(open_transformers, EXPORTED))
    if "onnxruntime" in tools:
        graphs = [onnx / VISION_NAME, onnx / EMBEDDINGS_NAME]
        for dtype, decoder in DECODER_NAMES.items():
            open_graphs = partial(open_ours, EXPORTED, backend="onnx", dtype=dtype)
            yield Format("onnxruntime", dtype, [*graphs, onnx / decoder], open_graphs)
    if "llama.cpp" in tools:
        for precision in get_args(Precision):
            needed = [*find_files(EXPORTED, precision)]
            open_server = partial(open_llama_cpp, EXPORTED, precision)
            yield Format("llama.cpp", precision, needed, open_server)
        for token in CLASS_TOKENS[1:]:
            folder, name = WORK / token, f"F16, class token {token}"
            needed = [*find_files(folder, "F16")]
            yield Format("llama.cpp", name, needed, partial(open_llama_cpp, folder, "F16"))
    if "browser" in tools:
        yield Format("browser", "float32", [web / "model"], partial(open_page, web))
    if "endpoint" in tools:
        yield Format("endpoint", "float32", own, partial(open_endpoint, files.weights))


def ask_all(form: Format, questions: list[Question]) -> list[Reply]:
    """The answers; the first question is asked before too, to warm up."""
    with form.open() as ask:
        ask(questions[0].picture, questions[0].text)
        return [ask(question.picture, question.text) for question in questions]


def judge(
    form: Format, questions: list[Question], replies: list[Reply], expected: list[str]
) -> dict:
    """A row; `expected` are the texts that it is compared with."""
    right = [
        simplify_answer(reply.text) == simplify_answer(question.answer)
        for reply, question in zip(replies, questions)
    ]
    # The first token belongs to reading the question. The median, for other programs may slow down
    # some of the answers.
    rates = [(reply.n_tokens - 1) / reply.seconds for reply in replies if reply.seconds]
    return {
        "tool": form.tool,
        "format": form.name,
        "megabytes": sum(map(count_bytes, form.files)) / 1e6,
        "tokens_per_second": statistics.median(rates or [0.0]),
        "same": sum(reply.text == text for reply, text in zip(replies, expected)),
        "right": sum(right),
        "questions": len(questions),
    }


def count_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def describe(row: dict) -> str:
    """A row in Markdown."""
    n = row["questions"]
    cells = (
        row["tool"],
        row["format"],
        f"{row['megabytes']:.1f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['same']} of {n}",
        f"{100 * row['right'] / n:.1f} %",
    )
    return f"| {' | '.join(cells)} |"
