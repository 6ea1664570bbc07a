"""Serve a model to all that speak OpenAI's API, many requests at a time.

    python -m scripts.serve_openai_api --weights out/demo/sft_vlm_128.pth

From Python, with the official client (pip install openai):

    from base64 import b64encode
    from openai import OpenAI

    client = OpenAI(base_url="http://127.0.0.1:8998/v1", api_key="none")
    picture = b64encode(open("cat.png", "rb").read()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "What is this?"},
    ]
    answer = client.chat.completions.create(
        model="sft_vlm_128", messages=[{"role": "user", "content": parts}]
    )
    print(answer.choices[0].message.content)

or with curl:

    curl http://127.0.0.1:8998/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "sft_vlm_128", "messages": [{"role": "user", "content": "Hello"}]}'

There are POST /v1/chat/completions, GET /v1/models and GET /health.
"""

import os
import socket
import sys

from common.errors import UserError, run_command
from common.flags import parse_flags
from common.packages import check_packages
from inference.paths import find_model
from scripts.serve_openai_api.config import ServeConfig

KEY_VARIABLE = "MINIMIND_API_KEY"


def main() -> None:
    # Flags, packages, files and the port are checked before PyTorch is imported.
    config = parse_flags(ServeConfig(), __doc__)
    check_packages("requirements-serve.txt", "fastapi", "uvicorn")
    options = find_model(config)
    api_key = config.api_key or os.environ.get(KEY_VARIABLE) or None
    listener = bind(config.host, config.port)
    if not config.is_local and api_key is None:
        print(
            f"warning: --host {config.host} without --api_key: everybody who can reach this "
            "machine can ask",
            file=sys.stderr,
            flush=True,
        )

    # serve
    from inference import load_vlm
    from scripts.serve_openai_api.server import Server
    from scripts.serve_openai_api.web_server import run

    vlm = load_vlm(**options)
    path = vlm.weights.resolve()
    name = config.model_name or (path.name if path.is_dir() else path.stem)
    print(describe(config, name, api_key), flush=True)
    run(Server(vlm, config, name, api_key), listener)


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port; UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            # A server that ended a moment ago keeps nobody from its port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Only now is it taken: until then a second server could bind it too.
        listener.listen()
        listener.set_inheritable(True)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be used ({reason}): pass another --port, or end "
            "what runs there"
        ) from None


def describe(config: ServeConfig, name: str, api_key: str | None) -> str:
    """One line: where it is, and what to type."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{config.port}/v1"
    key = "" if api_key is None else " -H 'Authorization: Bearer KEY'"
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"{name} on {address} (Ctrl-C ends it); try: curl {address}/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )


if __name__ == "__main__":
    run_command(main)
