"""uvicorn, which speaks HTTP."""

import socket
from types import FrameType

import uvicorn

from scripts.serve_openai_api.app import build_app
from scripts.serve_openai_api.server import Server


class WebServer(uvicorn.Server):
    """Ends at once: answers on their way are cancelled, or it would wait for them.

    Args:
        server: what answers.
    """

    def __init__(self, server: Server):
        settings = uvicorn.Config(
            build_app(server),
            # Whatever else is installed: h11 bounds headers, and there is nothing for WebSockets.
            http="h11",
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        super().__init__(settings)
        self.server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by Ctrl-C and SIGTERM."""
        self.server.batcher.close(wait=False)
        super().handle_exit(sig, frame)


def run(server: Server, listener: socket.socket) -> None:
    """Serve on a socket that has its port, until Ctrl-C."""
    WebServer(server).run(sockets=[listener])
