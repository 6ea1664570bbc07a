"""The web application: its end points."""

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from scripts.serve_openai_api.chat_response import ChatResponse
from scripts.serve_openai_api.errors import ApiError, check_model, respond
from scripts.serve_openai_api.server import Server

# Seconds in which a body that is refused is read to its end.
REFUSED_SECONDS = 5


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
        check_model(name, server.name)
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

    @app.exception_handler(HTTPException)
    async def tell_of_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path:.80}: {error.detail}"
        return respond(ApiError(message, status=error.status_code).content, error.status_code)

    return app


def describe_model(server: Server) -> dict[str, Any]:
    return {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "minimind-v",
    }
