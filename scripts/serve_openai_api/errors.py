"""What a client is told of an error, in OpenAI's form."""

import json
import traceback
from typing import Any

from fastapi.responses import Response

from common.errors import BadSampleError, UserError, is_memory_full
from inference.chat import TooLongError


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        message: one line, for a person.
        status: of HTTP.
        code: short and stable, for programs.
        param: the option that is wrong, such as "messages[0].role".
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.headers = headers or {}

    @property
    def content(self) -> dict[str, Any]:
        """The body of the response."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": kinds.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def check_model(name: str, own_name: str) -> None:
    """ApiError where a client asks for another model than the one that is here."""
    if name != own_name:
        raise ApiError(
            f"the model {name!r:.80} is not here: the one that is has the name {own_name!r}",
            status=404,
            code="model_not_found",
            param="model",
        )


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
    if is_memory_full(error):
        return ApiError("the memory of the server is full: try again later", status=503)
    traceback.print_exception(error)
    return ApiError("something went wrong in the server: what it printed says more", status=500)


def respond(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: half a character of a message would be no UTF-8."""
    return Response(json.dumps(content), status, headers, "application/json")
