"""Refusals in OpenAI's shape: what was wrong, which parameter, and what to do instead.

INV-SRV-7  no text of a prompt is in a refusal or a metric
"""

import math
from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import ValidationError

from tierline.base.errors import (
    CapacityError,
    DependencyError,
    DoesNotFitError,
    OverloadedError,
    TierlineError,
)

TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    429: "rate_limit_error",
}
UNKNOWN = "extra_forbidden"  # pydantic's name for a field that nobody knows
MESSAGES_MAX = 3  # of what is wrong with one body


class ApiError(Exception):
    """An answer that is a refusal. Its message and hint never hold text of a prompt."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str | None = None,  # noqa: A002
        param: str | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.type = type or TYPES.get(status) or _type(status)
        self.hint = hint
        self.headers = dict(headers or {})

    @property
    def error(self) -> dict[str, Any]:
        """The value under `error` of a body."""
        told = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return told | ({"hint": self.hint} if self.hint else {})

    def body(self) -> bytes:
        """The response's JSON."""
        return orjson.dumps({"error": self.error})


def _type(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def told(error: TierlineError) -> ApiError:
    """What a caller is told of an error from below."""
    if isinstance(error, OverloadedError):
        return overloaded(str(error), retry_after_s=error.retry_after_ns / 1e9)
    if isinstance(error, DoesNotFitError):
        return ApiError(400, str(error), code="does_not_fit", hint=error.hint)
    if isinstance(error, (DependencyError, CapacityError)):
        return ApiError(503, str(error), code="unavailable", hint=error.hint)
    return ApiError(400, str(error), code="invalid_value", hint=error.hint)


def overloaded(message: str, *, retry_after_s: float) -> ApiError:
    """429, with the whole seconds after which another try makes sense."""
    seconds = max(1, math.ceil(retry_after_s))
    return ApiError(
        429,
        message,
        code="overloaded",
        hint=f"try again in {seconds} s",
        headers={"Retry-After": str(seconds), "retry-after-ms": str(round(retry_after_s * 1000))},
    )


def unsupported(name: str, why: str) -> ApiError:
    """400 for a parameter that is known and has no effect here."""
    return ApiError(
        400,
        f"{name} is not supported: {why}",
        code="unsupported_parameter",
        param=name,
        hint=f"leave out {name}",
    )


def malformed(error: ValidationError) -> ApiError:
    """400 for a body that is not of its shape; values are never repeated, they may be prompts."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = found[0]
    if first["type"] == UNKNOWN:
        unknown = [_place(e["loc"]) for e in found if e["type"] == UNKNOWN]
        return ApiError(
            400,
            f"unknown parameter: {', '.join(unknown[:MESSAGES_MAX])}",
            code="unknown_parameter",
            param=unknown[0],
            hint="see /openapi.json for what this server knows",
        )
    said = [_sentence(e["loc"], e["msg"]) for e in found[:MESSAGES_MAX]]
    more = f" (and {len(found) - MESSAGES_MAX} more)" if len(found) > MESSAGES_MAX else ""
    broken = first["type"] == "json_invalid"
    return ApiError(
        400,
        "; ".join(said) + more,
        code="invalid_json" if broken else "invalid_value",
        param=None if broken else _place(first["loc"]) or None,
    )


def _sentence(place: tuple[int | str, ...], message: str) -> str:
    where, said = _place(place), message[:1].lower() + message[1:]
    said = said.removeprefix("value error, ")
    return f"{where}: {said}" if where else said


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages.0.role`, without the names of a union's branches."""
    parts = [str(part) for part in loc if isinstance(part, int) or _names_a_field(part)]
    return ".".join(part[:64] for part in parts)[:256]


def _names_a_field(part: str) -> bool:
    """Branches are named after a type: `str`, `list[str]`, `ToolChosen`; fields begin small."""
    return part.isidentifier() and part[0].islower() and part not in ("str", "int", "float", "bool")
