"""The response to a chat, whole or piece by piece."""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from inference.batching import Answer
from scripts.serve_openai_api.errors import explain, respond
from scripts.serve_openai_api.server import Events, Server

# Seconds that a client may take to read the next piece.
READ_SECONDS = 60


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
            event = {"type": "http.response.body", "body": body, "more_body": more}
            # Who reads no more would keep its place in the queue for ever.
            try:
                await asyncio.wait_for(send(event), READ_SECONDS)
            except asyncio.TimeoutError:
                raise ClientDisconnect from None

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
