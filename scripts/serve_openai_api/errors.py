"""What a client is told of an error, in OpenAI's form."""

from typing import Any


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
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        error = {
            "message": self.message,
            "type": kinds.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}
