"""Refusals: errors that a client is told of, with their status and in OpenAI's JSON form."""

from __future__ import annotations

from typing import Any

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    507: "server_error",
}


class Refusal(Exception):
    """A request that is not done.

    Args:
        status: status of HTTP.
        message: what came, what was expected, how to fix it; never a key, never another user's text.
        code: a word for programs.
        param: name of the field of the request that it is about.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers


def invalid(message: str, param: str | None, code: str = "invalid_value") -> Refusal:
    """The refusal, 400, of a field's value."""
    return Refusal(400, message, code, param=param)
