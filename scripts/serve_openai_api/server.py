"""One model for many clients: who may ask, and how a request becomes an answer on its way."""

import asyncio
import hmac
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import torch
from fastapi import Request
from starlette.requests import ClientDisconnect

from common.errors import BadSampleError
from common.files import hash_bytes
from inference.batching import Answer, Batcher, Picture
from inference.chat import encode_turns
from inference.load import VLM
from scripts.serve_openai_api.chat_request import read_request
from scripts.serve_openai_api.config import LOCAL_HOSTS, ServeConfig
from scripts.serve_openai_api.errors import ApiError, explain
from scripts.serve_openai_api.fetch import fetch

# Seconds in which the body of a request has to come.
BODY_SECONDS = 60
# Threads that read requests and open pictures: a large one takes 0.4 GB for a moment.
READERS, FETCHERS = 2, 8


class Server:
    """One model for many clients.

    Args:
        vlm: the model.
        config: flags.
        name: of the model.
        api_key: that clients have to send; None for none.
    """

    def __init__(self, vlm: VLM, config: ServeConfig, name: str, api_key: str | None):
        self.vlm, self.config, self.name = vlm, config, name
        self.api_key = None if api_key is None else api_key.encode()
        self.created, self.n_open = int(time.time()), 0
        self.most_open = config.max_batch + config.max_queue
        self.body_limit = config.max_body_mb * 2**20
        self.batcher = Batcher(vlm, config.max_batch)
        self.readers = ThreadPoolExecutor(READERS, "reader")
        self.fetchers = ThreadPoolExecutor(FETCHERS, "fetcher")
        # One thread at a time may encode with a tokenizer.
        self.tokenizer_lock = threading.Lock()

    def close(self) -> None:
        """End all answers and threads."""
        for pool in (self.readers, self.fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.batcher.close()

    # Who may ask, and how much.

    def check_caller(self, request: Request) -> None:
        """ApiError for another host name than this machine's own, and for a wrong key."""
        # A web page could otherwise reach a local server by a name of its own (DNS rebinding).
        host = request.headers.get("host", "").rpartition("@")[2]
        host = host.split("]")[0].strip("[") if host.startswith("[") else host.split(":")[0]
        if self.config.is_local and host.lower() not in LOCAL_HOSTS:
            raise ApiError(f"this server is not {host!r:.80}: ask {self.config.host}", status=403)
        if self.api_key is None:
            return
        sent = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(sent, b"Bearer " + self.api_key):
            raise ApiError(
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def read_body(self, request: Request) -> bytes:
        """The body; ApiError where it is too large, too slow or of another type."""
        # A web page of another site can send any type but this one.
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("send the header Content-Type: application/json")
        try:
            body = await asyncio.wait_for(self.receive(request, self.body_limit), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(f"the body was not there within {BODY_SECONDS} s", status=408) from None
        if body is None:
            raise ApiError(
                f"the request has over {self.config.max_body_mb} MB: send smaller pictures",
                status=413,
                code="request_too_large",
            )
        return bytes(body)

    async def receive(self, request: Request, most: int) -> bytearray | None:
        """The body, of at most so many bytes; None if it has more."""
        # A larger one is read on for a while: most clients look for the response only at its end.
        body, n_bytes = bytearray(), 0
        async for chunk in request.stream():
            n_bytes += len(chunk)
            if n_bytes <= most:
                body += chunk
            else:
                body.clear()
            if n_bytes > 4 * self.body_limit:
                break
        return body if n_bytes <= most else None

    # From a request to an answer.

    async def begin(self, request: Request) -> "Events":
        """Read a request and submit it."""
        loop = asyncio.get_running_loop()
        body = await self.read_body(request)
        asked = await loop.run_in_executor(self.readers, read_request, body, self.name, self.config)
        files = await self._fetch_all(asked.pictures)
        input_ids, pictures = await loop.run_in_executor(
            self.readers, self._encode, asked.turns, files
        )
        events = Events(loop, asked.stream, asked.include_usage)
        events.answer = Answer(
            input_ids, pictures, stops=asked.stops, on_piece=events.put, **asked.sampling
        )
        self.batcher.submit(events.answer)
        return events

    async def _fetch_all(self, pictures: list[bytes | str]) -> list[bytes]:
        """The files of pictures; those that are elsewhere are fetched."""
        loop, limit = asyncio.get_running_loop(), self.config.max_image_mb * 2**20

        async def get(picture: bytes | str) -> bytes:
            if isinstance(picture, bytes):
                return picture
            return await loop.run_in_executor(self.fetchers, fetch, picture, limit)

        return await asyncio.gather(*map(get, pictures))

    def _encode(self, turns: list[dict], files: list[bytes]) -> tuple[torch.Tensor, list[Picture]]:
        """(input_ids, pictures) of a conversation; a picture that was seen lately is not opened."""
        # what costs little is checked first
        longest = self.vlm.model.config.max_seq_len
        with self.tokenizer_lock:
            input_ids = encode_turns(self.vlm.processor, turns, len(files), longest)
        pictures = []
        for index, file in enumerate(files):
            key = hash_bytes(file)
            features = self.batcher.pictures.get(key)
            pixel_values = None
            if features is None:
                try:
                    pixel_values = self.vlm.processor.preprocess([BytesIO(file)])
                except BadSampleError as error:
                    number = f"picture {index + 1} of {len(files)}"
                    detail = f"{number}, {error.detail}" if error.detail else number
                    raise BadSampleError(error.args[0], detail) from error
            pictures.append(Picture(key, pixel_values, features))
        return input_ids, pictures


class Events:
    """Pieces of an answer, from the thread that answers to the event loop.

    Args:
        loop: that reads them.
        stream, include_usage: how the client wants them.
    """

    answer: Answer

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: bool, include_usage: bool):
        self.stream, self.include_usage = stream, include_usage
        self._loop, self._queue = loop, asyncio.Queue()

    def put(self, piece: str) -> None:
        """Called by the batcher."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:
            # The server has ended, and nobody waits.
            self.answer.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Each piece; ApiError where the answer failed, ClientDisconnect where nobody waits."""
        while piece := await self._queue.get():
            yield piece
        if self.answer.end == "failed":
            raise explain(self.answer.error)
        if self.answer.end == "cancelled":
            gone, ended = ClientDisconnect(), ApiError("the server has been ended", status=503)
            raise gone if self.answer.is_cancelled else ended
