"""Errors of the OpenAI-compatible API, in its shape: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from prism_runtime.engine.types import Rejected


class ApiError(Exception):
    """An answer other than 200. `message` reaches the client and must not repeat the request's text."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, rejected: Rejected) -> "ApiError":
        return cls(400, str(rejected), param=rejected.parameter, code="invalid_value")


def unavailable(message: str, code: str, retry_after_s: int) -> ApiError:
    return ApiError(503, message, kind="service_unavailable", code=code, retry_after_s=retry_after_s)


def failed(message: str, code: str = "engine_error") -> ApiError:
    return ApiError(500, message, kind="server_error", code=code)
