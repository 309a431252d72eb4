"""Errors that a client is told of, as OpenAI's error objects."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is not answered as it asks.

    Args:
        message: What is wrong, and what to do.
        param: The field that it is about.
        status: HTTP's.
        code: A word for programs.
        retry_after: Seconds after which to try again; 0: never.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code, self.retry_after = param, status, code, retry_after

    def content(self) -> dict[str, Any]:
        """Return the object that a client gets."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        found = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
