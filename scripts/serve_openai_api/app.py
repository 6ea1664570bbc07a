"""The web application: from HTTP to the batcher, and back."""

import asyncio
import hmac
import json
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from common.errors import BadSampleError, UserError
from common.files import hash_bytes
from inference.batching import Answer, Batcher, Picture
from inference.chat import TooLongError, encode_turns
from inference.load import VLM
from scripts.serve_openai_api.chat_request import PictureUrl, read_request
from scripts.serve_openai_api.config import LOCAL_HOSTS, ServeConfig
from scripts.serve_openai_api.errors import ApiError
from scripts.serve_openai_api.fetch import fetch

# Seconds in which the body of a request has to come, and one that is refused unread.
BODY_SECONDS, REFUSED_SECONDS = 60, 5
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

    async def _fetch_all(self, pictures: list[bytes | PictureUrl]) -> list[bytes]:
        """The files of pictures; those that are elsewhere are fetched."""
        loop, limit = asyncio.get_running_loop(), self.config.max_image_mb * 2**20

        async def get(picture: bytes | PictureUrl) -> bytes:
            if isinstance(picture, bytes):
                return picture
            return await loop.run_in_executor(self.fetchers, fetch, picture.url, limit)

        return await asyncio.gather(*map(get, pictures))

    def _encode(self, turns: list[dict], files: list[bytes]) -> tuple[Any, list[Picture]]:
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


def build_app(server: Server) -> FastAPI:
    """The end points."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        server.close()

    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        return respond({"status": "ok", "open": server.n_open, "running": server.batcher.n_running})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        server.check_caller(request)
        return respond({"object": "list", "data": [describe_model(server)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        server.check_caller(request)
        if name != server.name:
            raise ApiError(
                f"the model {name!r:.80} is not here: the one that is has the name {server.name!r}",
                status=404,
                code="model_not_found",
            )
        return respond(describe_model(server))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        server.check_caller(request)
        if server.n_open >= server.most_open:
            raise ApiError(
                f"{server.n_open} requests are open already: try again in a second",
                status=429,
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        server.n_open += 1
        return ChatResponse(server, request)

    @app.exception_handler(ApiError)
    async def tell(request: Request, error: ApiError) -> Response:
        # Read, for a connection that is closed with bytes in it may lose the response.
        with suppress(asyncio.TimeoutError, ClientDisconnect):
            await asyncio.wait_for(server.receive(request, 0), REFUSED_SECONDS)
        return respond(error.content, error.status, error.headers)

    @app.exception_handler(StarletteHTTPException)
    async def tell_of_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path:.80}: {error.detail}"
        return respond(ApiError(message, status=error.status_code).content, error.status_code)

    return app


class ChatResponse(Response):
    """Answers a request for a chat; its row is free as soon as the client has gone.

    Args:
        server: has counted it as open.
        request: is read here.
    """

    def __init__(self, server: Server, request: Request):
        super().__init__()
        self.server, self.request = server, request
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    async def __call__(self, scope, receive, send) -> None:
        """Called by the web server."""
        started, events, result = time.perf_counter(), None, "200"
        try:
            events = await self.server.begin(self.request)
            watcher = asyncio.create_task(cancel_when_gone(receive, events.answer))
            try:
                answer = self._stream if events.stream else self._answer
                await answer(events, scope, receive, send)
            finally:
                watcher.cancel()
        except ClientDisconnect:
            result = "the client has gone"
        except Exception as error:
            error = explain(error)
            result = f"{error.status} {error.message!r:.200}"
            await respond(error.content, error.status, error.headers)(scope, receive, send)
        finally:
            if events is not None:
                events.answer.cancel()
            self.server.n_open -= 1
            log(result, events and events.answer, time.perf_counter() - started)

    async def _answer(self, events: Events, scope, receive, send) -> None:
        """The whole answer."""
        text = "".join([piece async for piece in events])
        answer = events.answer
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.end,
        }
        content = self._head("chat.completion") | {"choices": [choice], "usage": count(answer)}
        await respond(content)(scope, receive, send)

    async def _stream(self, events: Events, scope, receive, send) -> None:
        """The answer piece by piece, as server-sent events."""
        head = self._head("chat.completion.chunk")
        if events.include_usage:
            head["usage"] = None

        async def send_event(content: dict | str, more: bool = True) -> None:
            text = content if isinstance(content, str) else json.dumps(content)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def send_delta(delta: dict, finish_reason: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            await send_event(head | {"choices": [choice]})

        # What goes wrong before the first piece still has a status of its own.
        pieces = aiter(events)
        first = await anext(pieces, "")
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})
        await send_delta({"role": "assistant", "content": first})

        # piece by piece
        try:
            async for piece in pieces:
                await send_delta({"content": piece})
        except ClientDisconnect:
            raise
        except Exception as error:
            await send_event(explain(error).content, more=False)
            return
        await send_delta({}, events.answer.end)
        if events.include_usage:
            await send_event(head | {"choices": [], "usage": count(events.answer)})
        await send_event("[DONE]", more=False)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.server.name,
            "system_fingerprint": None,
        }


async def cancel_when_gone(receive: Callable[[], Awaitable[dict]], answer: Answer) -> None:
    """Cancel an answer when its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


def explain(error: BaseException) -> ApiError:
    """What the client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TooLongError):
        return ApiError(str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, BadSampleError):
        status = 413 if error.args[0] == "image too large" else 400
        return ApiError(str(error), status=status, code="invalid_image", param="messages")
    if isinstance(error, UserError):
        return ApiError(str(error), param="messages")
    # PyTorch reports a full memory in words of its own
    is_full = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    if is_full or "can't allocate memory" in str(error):
        return ApiError("the memory of the server is full: try again later", status=503)
    traceback.print_exception(error)
    return ApiError("something went wrong in the server, which shows what", status=500)


def respond(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: half a character of a message would be no UTF-8."""
    return Response(json.dumps(content), status, headers, "application/json")


def describe_model(server: Server) -> dict[str, Any]:
    return {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "minimind-v",
    }


def count(answer: Answer) -> dict[str, int]:
    """The usage of an answer, in tokens."""
    return {
        "prompt_tokens": answer.n_prompt_tokens,
        "completion_tokens": answer.n_tokens,
        "total_tokens": answer.n_prompt_tokens + answer.n_tokens,
    }


def log(result: str, answer: Answer | None, seconds: float) -> None:
    """One line for each request."""
    line = f"{time.strftime('%H:%M:%S')} {result}"
    if answer is not None:
        n_pictures = len(answer.pictures)
        line += (
            f", {n_pictures} picture{'s' * (n_pictures != 1)}, {answer.n_prompt_tokens} + "
            f"{answer.n_tokens} tokens, the first after {answer.seconds_to_first_token:.2f} s"
        )
    print(f"{line}, {seconds:.2f} s", flush=True)
