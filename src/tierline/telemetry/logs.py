"""Logs as JSON, one line an event, which hold no text of a prompt or an answer.

`tierline serve` calls `configure` once; modules log with the standard library as ever and pass
what they know as `extra={"fields": {...}}`, named as in FIELDS.  Everything of the process goes
to the one stream: ours, uvicorn's, and other libraries' warnings.

Text of a prompt gets into logs by other ways than somebody writing it there, and each is shut:
a field that FIELDS lacks is named and left out; of an exception, the message is shown when it is
one of ours or the operating system's, else only its type, because libraries quote what they were
given; asyncio's remarks are cut before the arguments of the callback that failed.  Lines are
ASCII, with everything else escaped, so that no name sent by a client begins a line of its own.

    INV-SRV-24  Without `log_prompts` no line holds text of a prompt or an answer, and each event
                is one line of JSON, whatever was sent.

A line that cannot be written (a full disk, a closed pipe) is lost, and the server goes on.
A line takes 20 us.
"""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from math import isfinite
from types import TracebackType
from typing import TextIO

from tierline.base.errors import TierlineError
from tierline.base.names import lookup

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# Beside ts, level, logger and message, which every line has.
FIELDS = {
    "request_id": "of the response, such as chatcmpl-...",
    "trace_id": "of the OpenTelemetry trace",
    "endpoint": "chat, completions, responses, embeddings",
    "model": "as served",
    "tenant": "whose key it was",
    "key_id": "which key; never the key",
    "class": "class of service",
    "outcome": "how the request ended",
    "error": "what went wrong, or its type",
    "why": "the reason, in our words: no text of a client's",
    "hint": "what to change",
    "status": "of the HTTP answer",
    "method": "of the HTTP request",
    "path": "of the HTTP request, without its query",
    "client": "address and port",
    "prompt_tokens": "tokens of the prompt",
    "cached_tokens": "of those, found in the cache",
    "output_tokens": "tokens generated",
    "queue_s": "seconds until the prompt was begun",
    "ttft_s": "seconds until the first token",
    "tpot_s": "mean seconds between tokens",
    "e2e_s": "seconds until the end",
    "preemptions": "how often it gave its memory back",
    "address": "where the server listens",
    "version": "of tierline",
    "signal": "that was received",
    "requests": "a number of requests",
    "records": "a number of records",
    "seconds": "a duration",
    "bytes": "a size",
    "exception": "the type of an exception, with its module",
    "exception_text": "its message, when it is ours or the operating system's",
    "stack": "where it was raised, innermost last: file:line function",
    "fields_left_out": "names that are not in this table",
    "text": "of a prompt; only from tierline.prompts",
}
PROMPTS = "tierline.prompts"
_prompts = logging.getLogger(PROMPTS)
_QUIET = logging.CRITICAL + 1
_TEXT_MAX = 2_000  # characters of one value
_FRAMES_MAX = 20


def configure(stream: TextIO, *, level: str = "info", log_prompts: bool = False) -> None:
    """Send every logger's lines to `stream`, and only there.

    `log_prompts`: `log_prompt` writes, too, whatever the level is.  Raises InputError for a level
    that is not in LEVELS.
    """
    lines = _Lines(stream)
    lines.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [lines]
    root.setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()  # they propagate to the root instead
        logging.getLogger(name).propagate = True
    _prompts.setLevel(logging.INFO if log_prompts else _QUIET)
    set_level(level)


def set_level(level: str) -> None:
    """Change what is logged from now on; whether prompts are is not changed.

    uvicorn's line for each request comes at debug: ours says more.
    """
    number = lookup("log level", level, LEVELS)
    logging.getLogger("tierline").setLevel(number)
    logging.getLogger("uvicorn").setLevel(max(number, logging.INFO))
    access = logging.INFO if number == logging.DEBUG else logging.WARNING
    logging.getLogger("uvicorn.access").setLevel(access)


def log_prompt(request_id: str, text: str) -> None:
    """Write a prompt down, if the operator asked for that."""
    if logs_prompts():
        fields = {"request_id": request_id, "text": text}
        _prompts.info("prompt", extra={"fields": fields})


def logs_prompts() -> bool:
    """Whether the operator asked for that."""
    return _prompts.level == logging.INFO


class JsonFormatter(logging.Formatter):
    """A record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        for name, value in _fields(record).items():
            if value is not None and value != "":
                line[name] = _plain(value)
        if record.exc_info and record.exc_info[1] is not None:
            line |= _exception(record.exc_info[1])
        return json.dumps(line, separators=(",", ":"))


class _Lines(logging.StreamHandler[TextIO]):
    """Lines to a stream; what cannot be written is lost."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        """Nothing: the library would print the record with its arguments."""


def _message(record: logging.LogRecord) -> str:
    if record.name == "uvicorn.access":
        return "request"
    message = record.getMessage()
    if record.name == "asyncio":  # "Exception in callback f('the first words of a...')"
        message = message.partition("\n")[0].partition("(")[0].partition("<")[0]
    return message[:_TEXT_MAX]


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    """What the caller passed and FIELDS has, and the names of the rest."""
    if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, _, status = record.args
        path = str(path).partition("?")[0]  # a query may hold anything
        return {"client": client, "method": method, "path": path, "status": status}
    given = getattr(record, "fields", {})
    known = {
        k: v for k, v in given.items() if k in FIELDS and (k != "text" or record.name == PROMPTS)
    }
    if len(known) < len(given):
        known["fields_left_out"] = ", ".join(sorted(k for k in given if k not in known))
    return known


def _plain(value: object) -> object:
    """A value as JSON has it: a number, a truth or a text that is not too long."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 6) if isfinite(value) else str(value)
    return str(value)[:_TEXT_MAX]


def _exception(error: BaseException) -> dict[str, object]:
    kind = type(error)
    said: dict[str, object] = {"exception": f"{kind.__module__}.{kind.__qualname__}"}
    if isinstance(error, TierlineError | AssertionError | OSError):
        said["exception_text"] = str(error)[:_TEXT_MAX]
    said["stack"] = _stack(error.__traceback__)
    return said


def _stack(traceback: TracebackType | None) -> list[str]:
    """The innermost frames, without the text of their lines."""
    frames = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append(f"{code.co_filename}:{traceback.tb_lineno} {code.co_qualname}")
        traceback = traceback.tb_next
    return frames[-_FRAMES_MAX:]
