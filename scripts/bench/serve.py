"""Serving: our server and `transformers serve`, asked by 1 to 32 clients at once.

Both serve the same exported directory and get the same requests in turn: each client streams an
answer of NEW_TOKENS about one picture, and asks the next when it has it. If the directory has ONNX
graphs, our server runs on them too.
"""

import asyncio
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import httpx2
import numpy as np
import psutil
from PIL import Image

from common.errors import UserError
from common.packages import check_packages
from scripts.export.ask_gguf import to_data_url
from scripts.processes import run_python, serving

LEAST_REQUESTS = 8
NEW_TOKENS = 32
SECONDS = 900  # that an answer may take
# Pictures: a new one for each request, or a few that the server has seen.
KINDS = ("new", "seen")
SEEN_PICTURES = 4
PICTURE_SIDE = 224


class Server(NamedTuple):
    """A server that runs."""

    address: str
    model: str  # its name there
    process: psutil.Process

    def read_cpu(self) -> float:
        """Seconds that it has computed, on all cores together."""
        times = self.process.cpu_times()
        return times.user + times.system


class Outcome(NamedTuple):
    """One answer."""

    text: str
    n_tokens: int
    seconds_to_first: float
    seconds: float


def measure(args: Namespace) -> list[dict]:
    """Rows of server, pictures, clients, requests_per_second, tokens_per_second, first_median,
    first_max, seconds_95 (of a whole answer), cpu_seconds (of the server, for a request), same
    (share of answers equal to transformers').
    """
    # what all serve
    check_packages("requirements-serve.txt", "fastapi", "uvicorn")
    if find_spec("accelerate") is None:
        raise UserError("`transformers serve` needs accelerate: pip install accelerate==1.15.0")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        exported = (args.exported or export(args.weights, Path(folder) / "exported")).resolve()
        if not (exported / "config.json").is_file():
            raise UserError(f"--exported {exported} is no transformers directory: export one")
        servers = {
            name: stack.enter_context(running(command, Path(folder) / f"{name}.log"))
            for name, command in list_commands(exported).items()
        }
        for server in servers.values():
            asyncio.run(ask_all(server, make_requests(0, 2, 2), 1))

        # Each case with one after the other: other programs disturb all alike, and who is not
        # asked does nothing.
        rows: list[dict] = []
        print(
            f"{'server':14}{'pictures':>9}{'clients':>8}{'requests/s':>11}{'tokens/s':>9}"
            f"{'first token, median':>20}{'max':>8}{'answer, 95 %':>13}{'CPU':>9}{'same text':>10}"
        )
        for kind, n_clients in product(KINDS, args.clients):
            # New ones are others for each number of clients.
            n_requests, is_new = max(LEAST_REQUESTS, n_clients), kind == "new"
            n_pictures = n_requests if is_new else SEEN_PICTURES
            requests = make_requests(n_clients if is_new else 0, n_pictures, n_requests)
            texts = None
            for name, server in servers.items():
                if not is_new:
                    asyncio.run(ask_all(server, requests[:n_pictures], 1))
                cpu, started = server.read_cpu(), time.perf_counter()
                outcomes = asyncio.run(ask_all(server, requests, n_clients))
                seconds, cpu = time.perf_counter() - started, server.read_cpu() - cpu
                texts = texts or [outcome.text for outcome in outcomes]
                row = {"server": name, "pictures": kind, "clients": n_clients}
                rows.append(row | summarize(outcomes, seconds, cpu, texts))
                show(rows[-1])
    show_ratios(rows)
    return rows


def list_commands(exported: Path) -> dict[str, list[str]]:
    """The servers, and what starts them; the first one's texts are compared with."""
    ours = ["-m", "scripts.serve_openai_api", "--weights", str(exported), "--temperature", "0"]
    ours += ["--device", "cpu", "--max_batch", "32"]
    theirs = ["-m", "transformers.cli.transformers", "serve", str(exported), "--device", "cpu"]
    commands = {"transformers": theirs, "ours": ours}
    if (exported / "onnx").is_dir():
        for dtype in ("float32", "int4"):
            commands[f"ours, {dtype}"] = [*ours, "--backend", "onnx", "--dtype", dtype]
    return commands


def export(weights: str, folder: Path) -> Path:
    """A model as a transformers directory."""
    command = ("scripts.export", weights, "--to", "transformers", "--out", str(folder))
    run_python("-m", *command, capture=True)
    return folder


@contextmanager
def running(command: list[str], log: Path) -> Iterator[Server]:
    """A server, see `list_commands`; what it prints goes to a file."""
    with serving(*command, log=log, HF_HUB_OFFLINE="1") as (address, process):
        # transformers names a model by its folder
        is_theirs = "serve" in command
        model = command[command.index("serve") + 1] if is_theirs else read_name(address)
        yield Server(address, model, psutil.Process(process.pid))


def read_name(address: str) -> str:
    """Name of the one model that our server has."""
    return httpx2.get(f"{address}/v1/models").json()["data"][0]["id"]


def make_requests(seed: int, n_pictures: int, n_requests: int) -> list[list[dict]]:
    """The messages of each request; `seed` makes the pictures, which come in turn."""
    random, urls = np.random.default_rng(seed), []
    for _ in range(n_pictures):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        urls.append(to_data_url(Image.fromarray(pixels).resize((PICTURE_SIDE, PICTURE_SIDE))))
    requests = []
    for index in range(n_requests):
        number = index % n_pictures
        parts = [
            {"type": "image_url", "image_url": {"url": urls[number]}},
            {"type": "text", "text": f"Tell me about picture {number}."},
        ]
        requests.append([{"role": "user", "content": parts}])
    return requests


async def ask_all(server: Server, requests: list[list[dict]], n_clients: int) -> list[Outcome]:
    """The answers, in the order of the requests."""
    waiting, outcomes = iter(enumerate(requests)), {}

    async def work(client: httpx2.AsyncClient) -> None:
        for index, messages in waiting:
            outcomes[index] = await ask(client, server, messages)

    limits = httpx2.Limits(max_connections=n_clients)
    async with httpx2.AsyncClient(timeout=SECONDS, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(n_clients)))
    return [outcomes[index] for index in range(len(requests))]


async def ask(client: httpx2.AsyncClient, server: Server, messages: list[dict]) -> Outcome:
    """Stream one answer."""
    # what both understand
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, pieces, n_tokens = time.perf_counter(), None, [], 0
    url = f"{server.address}/v1/chat/completions"
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise UserError(f"a server answers with {response.status_code}: {text:.200}")
        # its events
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            event = json.loads(data)
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            if delta.get("content"):
                first = first or time.perf_counter()
                pieces.append(delta["content"])
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    ended = time.perf_counter()
    return Outcome("".join(pieces), n_tokens, (first or ended) - started, ended - started)


def summarize(outcomes: list[Outcome], seconds: float, cpu: float, texts: list[str]) -> dict:
    """What all answers took together. `texts` are those that another server gave."""
    firsts = [outcome.seconds_to_first for outcome in outcomes]
    same = [outcome.text == text for outcome, text in zip(outcomes, texts)]
    return {
        "requests_per_second": len(outcomes) / seconds,
        "tokens_per_second": sum(outcome.n_tokens for outcome in outcomes) / seconds,
        "first_median": statistics.median(firsts),
        "first_max": max(firsts),
        "seconds_95": float(np.quantile([outcome.seconds for outcome in outcomes], 0.95)),
        "cpu_seconds": cpu / len(outcomes),
        "same": statistics.mean(same),
    }


def show(row: dict) -> None:
    """A line of the table."""
    print(
        f"{row['server']:14}{row['pictures']:>9}{row['clients']:8}"
        f"{row['requests_per_second']:11.2f}{row['tokens_per_second']:9.1f}"
        f"{row['first_median']:18.2f} s{row['first_max']:6.2f} s{row['seconds_95']:11.2f} s"
        f"{row['cpu_seconds']:7.2f} s{100 * row['same']:8.0f} %",
        flush=True,
    )


def show_ratios(rows: list[dict]) -> None:
    """How many times as many tokens ours give."""
    theirs = {}
    for row in rows:
        case = (row["pictures"], row["clients"])
        first = theirs.setdefault(case, row)
        if first is not row:
            ratio = row["tokens_per_second"] / first["tokens_per_second"]
            cpu = first["cpu_seconds"] / row["cpu_seconds"]
            print(
                f"{row['server']}, {case[0]} pictures, {case[1]} clients: {ratio:.1f} times the "
                f"tokens/s, {cpu:.1f} times the answers for a second of CPU"
            )
