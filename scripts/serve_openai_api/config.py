"""What `python -m scripts.serve_openai_api` can be told."""

from dataclasses import dataclass

from common.errors import UserError
from common.flags import option
from inference.config import AskConfig

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeConfig(AskConfig):
    """Options of the server; those for an answer are used where a request says nothing."""

    host: str = option(
        "127.0.0.1",
        "address that the server listens on; with any other than localhost, everybody who can "
        "reach this machine can ask: pass --api_key too",
        group="server",
    )
    port: int = option(8998, "port of the server", least=1, most=65_535)
    api_key: str | None = option(
        None,
        "key that clients have to send; if not given, the environment variable MINIMIND_API_KEY, "
        "and without that nobody is asked for one",
    )
    model_name: str | None = option(
        None, "name of the model for clients; that of its file if not given"
    )
    allow_urls: bool = option(
        False,
        "fetch pictures that requests name by http or https, from public addresses only; if not "
        "given, pictures come inside of the request",
    )
    max_batch: int = option(
        16, "answers at a time; further requests wait", least=1, most=1024, group="limits"
    )
    max_queue: int = option(
        64, "requests that may wait; beyond it the answer is 429", least=0, most=100_000
    )
    max_images: int = option(8, "pictures of a conversation", least=0, most=1024)
    max_image_mb: int = option(20, "MB of a picture's file", least=1, most=64)
    max_body_mb: int = option(32, "MB of a request", least=1, most=1024)

    def __post_init__(self):
        super().__post_init__()
        # what the shell makes of a variable that is not set
        if self.api_key == "":
            raise UserError("--api_key is empty: give a key, or leave it out")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOCAL_HOSTS
