"""A log is one line of JSON an event, whatever was sent, and holds no prompt unless asked for."""

import asyncio
import io
import json
import logging
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.errors import InputError, RequestError
from tierline.telemetry.logs import FIELDS, JsonFormatter, configure, log_prompt, set_level

SECRET = "the launch code is 0000"
NAMES = ("", "tierline", "tierline.server", "tierline.prompts", "uvicorn", "uvicorn.error")
NAMES += ("uvicorn.access", "asyncio", "somebody")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(x.level, x.propagate, x.handlers[:]) for x in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert text.isascii()
    return [json.loads(line) for line in text.splitlines()]


# Lines


def test_a_line_says_when_what_and_who() -> None:
    stream = io.StringIO()
    configure(stream)
    fields = {"request_id": "chatcmpl-1", "ttft_s": 0.1234567, "preemptions": 0, "error": ""}
    logging.getLogger("tierline.requests").info("request ended", extra={"fields": fields})
    (line,) = lines_of(stream)
    ts = line.pop("ts")

    assert ts.endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "tierline.requests",
        "message": "request ended",
        "request_id": "chatcmpl-1",
        "ttft_s": 0.123457,
        "preemptions": 0,
    }


@given(st.text(), st.text(), st.one_of(st.text(), st.floats(), st.integers(), st.binary()))
def test_no_text_begins_a_line_of_its_own(message: str, name: str, value: object) -> None:
    record = logging.LogRecord(f"tierline.{name}", logging.INFO, "", 0, "%s", (message,), None)
    record.fields = {"model": value, name: value}
    line = JsonFormatter().format(record)
    read = json.loads(line)

    assert line.isascii()
    assert line.isprintable()
    assert read["message"] == message[:2000]
    assert set(read) <= {"ts", "level", "logger", "message", *FIELDS}


def test_the_standard_formatter_would_let_it() -> None:
    """Control."""
    record = logging.LogRecord("a", logging.INFO, "", 0, "no\nlevel=error all is lost", None, None)

    assert "\n" in logging.Formatter().format(record)
    assert "\n" not in JsonFormatter().format(record)


@pytest.fixture
def uvicorns() -> Iterator[logging.Logger]:
    """Uvicorn's logger as it is before a server of the same process made it quieter."""
    logger = logging.getLogger("uvicorn.error")
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


def test_uvicorn_and_other_libraries_write_to_the_same_stream(uvicorns: logging.Logger) -> None:
    stream = io.StringIO()
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(io.StringIO()))
    configure(stream)
    uvicorns.info("Started server process [%d]", 7)
    logging.getLogger("somebody").info("not heard")
    logging.getLogger("somebody").warning("heard")

    assert [line["message"] for line in lines_of(stream)] == ["Started server process [7]", "heard"]


def test_an_access_line_leaves_the_query_out() -> None:
    stream = io.StringIO()
    configure(stream, level="debug")
    arguments = ("127.0.0.1:5", "GET", f"/v1/models?key={SECRET}", "1.1", 200)
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', *arguments)
    (line,) = lines_of(stream)

    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/models", 200)
    assert SECRET not in stream.getvalue()


def test_the_level_changes_while_it_runs() -> None:
    stream = io.StringIO()
    configure(stream)
    log = logging.getLogger("tierline.server")
    log.debug("one")
    set_level("debug")
    log.debug("two")
    set_level("error")
    log.warning("three")

    assert [line["message"] for line in lines_of(stream)] == ["two"]


def test_an_unknown_level_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="loud") as error:
        configure(io.StringIO(), level="loud")

    assert "warning" in error.value.hint


def test_configuring_again_moves_the_lines() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(first)
    configure(second)
    logging.getLogger("tierline").info("once")

    assert (len(lines_of(first)), len(lines_of(second))) == (0, 1)


def test_a_stream_that_is_gone_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    configure(stream)
    stream.close()
    logging.getLogger("tierline").info("lost")

    assert capsys.readouterr().err == ""


# What is not in them


def library_quotes() -> None:
    class Body(pydantic.BaseModel):
        temperature: float

    Body.model_validate({"temperature": SECRET})


def looking_up_quotes() -> None:
    {}[SECRET]


def chained_quotes() -> None:
    try:
        int(SECRET)
    except ValueError as error:
        raise RuntimeError(f"could not read {SECRET}") from error


@pytest.mark.parametrize("fails", [library_quotes, looking_up_quotes, chained_quotes])
def test_what_a_library_quotes_is_not_logged(fails: Callable[[], None]) -> None:
    stream, naive = io.StringIO(), io.StringIO()
    configure(stream)
    log = logging.getLogger("tierline.server")
    log.addHandler(other := logging.StreamHandler(naive))  # control: the standard formatter
    try:
        fails()
    except Exception:
        log.exception("request failed")
    log.removeHandler(other)
    (line,) = lines_of(stream)

    assert SECRET not in stream.getvalue()
    assert SECRET in naive.getvalue()
    assert "exception_text" not in line
    assert any(fails.__name__ in frame for frame in line["stack"])


def test_our_own_errors_say_what_is_wrong() -> None:
    stream = io.StringIO()
    configure(stream)
    for error in (RequestError("max_tokens is -1"), FileNotFoundError(2, "No such file", "a.db")):
        logging.getLogger("tierline").error("failed", exc_info=error)

    assert [line["exception_text"] for line in lines_of(stream)] == [
        "max_tokens is -1",
        "[Errno 2] No such file: 'a.db'",
    ]


def test_a_callback_that_fails_does_not_quote_its_arguments() -> None:
    stream, naive = io.StringIO(), io.StringIO()
    configure(stream)
    logging.getLogger("asyncio").addHandler(logging.StreamHandler(naive))

    async def main() -> None:
        asyncio.get_running_loop().call_soon(int, SECRET)
        await asyncio.sleep(0)

    asyncio.run(main())
    (line,) = lines_of(stream)

    assert line["exception"] == "builtins.ValueError"
    assert line["message"] == "Exception in callback int"
    assert SECRET[:10] not in stream.getvalue()
    assert SECRET[:10] in naive.getvalue()


def test_a_field_that_is_in_no_table_is_named_and_left_out() -> None:
    stream = io.StringIO()
    configure(stream)
    fields = {"prompt": SECRET, "text": SECRET, "status": 200}
    logging.getLogger("tierline.server").info("hello", extra={"fields": fields})
    (line,) = lines_of(stream)

    assert SECRET not in stream.getvalue()
    assert (line["fields_left_out"], line["status"]) == ("prompt, text", 200)


@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize("level", ["debug", "info", "error"])
def test_prompts_are_logged_when_asked_for_and_only_then(asked_for: bool, level: str) -> None:
    stream = io.StringIO()
    configure(stream, log_prompts=asked_for)
    set_level(level)
    log_prompt("chatcmpl-1", SECRET)

    assert [line["text"] for line in lines_of(stream)] == [SECRET] * asked_for


def test_nothing_is_logged_before_anything_is_configured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_prompt("chatcmpl-1", SECRET)

    assert SECRET not in capsys.readouterr().err


if __name__ == "__main__":  # what a line costs; the figure is in the module's docstring
    configure(io.StringIO())
    logger = logging.getLogger("tierline.requests")
    numbers = dict.fromkeys(("prompt_tokens", "output_tokens", "ttft_s", "e2e_s"), 0.123)
    about = {"request_id": "chatcmpl-1", "model": "tiny", "outcome": "stop", **numbers}
    cost_s = timeit.repeat(
        lambda: logger.info("request ended", extra={"fields": about}), number=5000, repeat=5
    )
    print(f"{min(cost_s) / 5000 * 1e6:.1f} us")  # noqa: T201
