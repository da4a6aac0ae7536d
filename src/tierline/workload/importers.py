"""The formats traces come in: how each is recognised, and how one row of it becomes a Request.

`trace` opens the file, counts and reports; this module knows the formats. Nearly all of them
are one table of rows under different column names, so a format is a `Columns` value and there
are two row parsers, one for CSV lines and one for JSON objects. A parser raises `ValueError`
with the reason for a row that is broken, and returns None for a row that is well formed but
is no request to size for (a failed one).
"""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import Any

from tierline.base.errors import TraceError
from tierline.base.names import nearest, reject_unknown_keys
from tierline.workload.request import Request

BLOCK_TOKENS = 512  # what one prefix block spans when the file does not say

Parse = Callable[[Any], Request | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column, or dotted JSON path, holds what; None where the format has no such fact.

    `arrival_unit` is 's', 'ms', 'us' or 'ns'; empty means: told from the first value, which
    may also be an ISO date. Only such values are on the calendar and rebased to the first row.
    """

    arrival: str | None = None
    input: str = "input_tokens"
    output: str = "output_tokens"
    blocks: str | None = None
    session: str | None = None
    tenant: str | None = None
    priority: str | None = None
    model: str | None = None
    deadline: str | None = None
    arrival_unit: str = ""
    failed_output_zero: bool = False  # no output means a failed request, not a broken row


FORMATS = {
    "tierline": Columns(
        arrival="arrival_ns",
        blocks="prefix_blocks",
        session="session",
        tenant="tenant",
        priority="priority",
        model="model",
        deadline="deadline_ns",
        arrival_unit="ns",
    ),
    "csv": Columns(arrival="t_s", arrival_unit="s"),
    "lengths": Columns(),
    "azure": Columns(arrival="TIMESTAMP", input="ContextTokens", output="GeneratedTokens"),
    "burstgpt": Columns(
        arrival="Timestamp",
        input="Request tokens",
        output="Response tokens",
        tenant="Model",
        arrival_unit="s",
        failed_output_zero=True,
    ),
    "mooncake": Columns(
        arrival="timestamp",
        input="input_length",
        output="output_length",
        blocks="hash_ids",
        arrival_unit="ms",
    ),
    "aiperf": Columns(
        arrival="metadata.request_start_ns",
        input="metrics.input_sequence_length.value",
        output="metrics.output_sequence_length.value",
        session="metadata.conversation_id",
    ),
    "vllm": Columns(arrival="start_s", arrival_unit="s", failed_output_zero=True),
    "guidellm": Columns(arrival="start_s", arrival_unit="s", failed_output_zero=True),
    "servegen": Columns(arrival="t_s", arrival_unit="s", tenant="client"),
    "log": Columns(),  # a request log; its columns come from the caller's mapping
}
DOCUMENTS = ("vllm", "guidellm")  # one JSON value in the file, not lines

REQUIRED = ("arrival", "input", "output")
OPTIONAL = ("session", "tenant", "priority", "model", "deadline")
_TOKENS_MAX = 10**9
_INT64_MAX = 2**63 - 1
_UNIT_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_CALENDAR_FROM_S = 10**8  # a larger number of seconds is an epoch time, not time since the start


def mapped_columns(mapping: Mapping[str, str]) -> Columns:
    """Columns of a request log from the caller's own names.

    >>> mapped_columns({"arrival": "ts", "input": "prompt_tokens"}).output
    'output_tokens'
    """
    known = [f.name for f in fields(Columns) if f.name != "failed_output_zero"]
    reject_unknown_keys("trace mapping", mapping, known, error=TraceError)
    unit = mapping.get("arrival_unit", "")
    if unit and unit not in _UNIT_NS:
        raise TraceError(
            f"trace mapping: unknown arrival_unit {unit!r}", hint="use s, ms, us or ns"
        )
    return replace(Columns(), **mapping)  # type: ignore[arg-type]  # every mapped field is a str


def detect(first_line: str) -> str | None:
    """The name of the format whose file begins with this line, or None."""
    if first_line.lstrip().startswith("{"):
        return _detect_json(first_line)
    names = set(_fields_of(first_line))
    if {"workload", "client", "rate_rps"} <= names:
        return "servegen"
    for name in ("azure", "burstgpt", "csv", "lengths"):
        columns = FORMATS[name]
        if {columns.input, columns.output, columns.arrival or columns.input} <= names:
            return name
    return None


def _detect_json(first_line: str) -> str | None:
    try:
        record = json.loads(first_line)
    except ValueError:
        return "document"  # one JSON value over many lines: see `open_document`
    if "tierline_trace" in record:
        return "tierline"
    if {"timestamp", "input_length", "output_length"} <= set(record):
        return "mooncake"
    if {"metadata", "metrics"} <= set(record):
        return "aiperf"
    if "input_lens" in record or "benchmarks" in record:
        return "document"
    return None


def open_document(value: Any, *, where: str) -> tuple[str, Columns, list[dict[str, Any]]]:
    """The format, columns and records of a benchmark result that is one JSON value.

    Start times there are readings of a clock of no known zero, so they are rebased.
    """
    if isinstance(value, dict) and isinstance(value.get("input_lens"), list):
        name, records = "vllm", _vllm_records(value)
    elif isinstance(value, dict) and isinstance(value.get("benchmarks"), list):
        name, records = "guidellm", _guidellm_records(value)
    else:
        given = ", ".join(list(value)[:8]) if isinstance(value, dict) else type(value).__name__
        aiperf = isinstance(value, dict) and "input_sequence_length" in value
        raise TraceError(
            f"{where} is a JSON document without requests in it ({given})",
            hint="it holds AIPerf's summary; give profile_export.jsonl, the requests"
            if aiperf
            else "results of vLLM (saved with --save-detailed) and GuideLLM are read",
        )
    starts = [r["start_s"] for r in records if isinstance(r["start_s"], (int, float))]
    if len(starts) < len(records) or not starts:
        return name, replace(FORMATS[name], arrival=None), records
    for record in records:
        record["start_s"] -= min(starts)
    return name, FORMATS[name], sorted(records, key=lambda r: r["start_s"])


def _vllm_records(value: dict[str, Any]) -> list[dict[str, Any]]:
    inputs, outputs = value["input_lens"], value.get("output_lens") or []
    starts = value.get("start_times") or [None] * len(inputs)
    return [
        {"input_tokens": i, "output_tokens": o, "start_s": start}
        for i, o, start in zip_longest(inputs, outputs, starts)
    ]


def _guidellm_records(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Successful requests of every benchmark of the file; names differ between its versions."""
    done: list[dict[str, Any]] = []
    for benchmark in value["benchmarks"]:
        requests = benchmark.get("requests") if isinstance(benchmark, dict) else None
        done += (requests.get("successful") if isinstance(requests, dict) else requests) or []
    return [
        {
            "input_tokens": r.get("prompt_tokens"),
            "output_tokens": r.get("output_tokens"),
            "start_s": r.get("request_start_time", r.get("start_time")),
        }
        for r in done
        if isinstance(r, dict)
    ]


def aiperf_parser() -> Parse:
    """AIPerf's records; warm-up, cancelled and failed requests are no demand."""
    parse_record = json_parser(FORMATS["aiperf"])

    def parse(line: str) -> Request | None:
        record = json.loads(line)
        about = record["metadata"]
        phase = about.get("benchmark_phase", about.get("credit_phase"))
        if record.get("error") or about.get("was_cancelled") or phase == "warmup":
            return None
        if "request_start_ns" not in about and "timestamp_ns" in about:
            about["request_start_ns"] = about["timestamp_ns"]  # as older versions call it
        return parse_record(record)

    return parse


def csv_parser(header: str, columns: Columns, *, where: str) -> Parse:
    """A parser of the lines under `header`; raises `TraceError` when a column is not there."""
    names = _fields_of(header)

    def place(name: str) -> int:
        if name not in names:
            near = nearest(name, names, count=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise TraceError(
                f"{where}: no column {name!r}", hint=f"{meant}columns: {', '.join(names)}"
            )
        return names.index(name)

    at = {
        f: place(name) for f in (*REQUIRED, *OPTIONAL) if (name := getattr(columns, f)) is not None
    }
    build = _builder(columns)

    def parse(line: str) -> Request | None:
        cells = line.split(",") if '"' not in line else _fields_of(line)
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} fields, the header has {len(names)}")
        return build({f: cells[i].strip() for f, i in at.items()})

    return parse


def _fields_of(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line]), [])]


def json_parser(columns: Columns) -> Parse:
    """A parser of JSON lines, or of objects already parsed."""
    paths = [
        (f, path, path.split("."))
        for f in (*REQUIRED, "blocks", *OPTIONAL)
        if (path := getattr(columns, f)) is not None
    ]
    build = _builder(columns)

    def parse(line: str | dict[str, Any]) -> Request | None:
        record = json.loads(line) if isinstance(line, str) else line
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        values: dict[str, Any] = {}
        for f, path, steps in paths:
            value: Any = record
            for step in steps:
                value = value.get(step) if isinstance(value, dict) else None
            if value is None and f in REQUIRED:
                raise ValueError(f"no {path!r}")
            if value is not None:
                values[f] = value
        return build(values)

    return parse


def _builder(columns: Columns) -> Callable[[dict[str, Any]], Request | None]:
    """From the named values of a row to a Request; remembers the unit and origin of time."""
    read_time: Callable[[Any], int] | None = None

    def build(values: dict[str, Any]) -> Request | None:
        nonlocal read_time
        input_tokens = _tokens(values["input"], "input")
        if columns.failed_output_zero and str(values["output"]) == "0":
            return None
        output_tokens = _tokens(values["output"], "output")
        arrival_ns = 0
        if "arrival" in values:
            if read_time is None:
                read_time = _time_reader(values["arrival"], columns.arrival_unit)
            arrival_ns = read_time(values["arrival"])
        deadline = values.get("deadline")
        return Request(
            arrival_ns=arrival_ns,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            prefix_blocks=_block_ids(values["blocks"]) if "blocks" in values else (),
            session=str(values.get("session", "")),
            tenant=str(values.get("tenant", "")),
            priority=int(values.get("priority", 0)),
            model=str(values.get("model", "")),
            deadline_ns=int(deadline) if deadline else None,
        )

    return build


def _tokens(value: Any, what: str) -> int:
    try:
        tokens = int(value)
        if tokens != value and tokens != float(value):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{what} tokens {value!r} is not a whole number") from None
    if tokens <= 0:
        raise ValueError(f"{what} tokens {tokens} is not positive")
    if tokens > _TOKENS_MAX:
        raise ValueError(f"{what} tokens {tokens} is no length of a prompt or an answer")
    return tokens


def _block_ids(values: Any) -> tuple[int, ...]:
    """Block ids as given when they are numbers; text hashes as 63-bit numbers."""
    if not isinstance(values, list):
        raise ValueError("prefix blocks are not a list")
    if all(type(v) is int for v in values):
        return tuple(values) if max(values, default=0) <= _INT64_MAX else _folded(values)
    return tuple(
        int.from_bytes(hashlib.blake2b(str(v).encode(), digest_size=8).digest()) >> 1
        for v in values
    )


def _folded(values: list[int]) -> tuple[int, ...]:
    """Unsigned 64-bit hashes, brought into the range of signed ones."""
    return tuple(v & _INT64_MAX for v in values)


def _time_reader(first: Any, unit: str) -> Callable[[Any], int]:
    """How to read the times of this file, settled by its first value."""
    try:
        number = float(first)
    except ValueError:
        origin_ns = _iso_ns(first)
        return lambda value: _iso_ns(value) - origin_ns
    if unit:
        scale = _UNIT_NS[unit]
    else:
        scale = next((s for u, s in _UNIT_NS.items() if number / (10**9 / s) < 10**11), 1)
    origin_ns = _scaled_ns(first, scale)
    if origin_ns < _CALENDAR_FROM_S * 10**9:
        origin_ns = 0
    return lambda value: _scaled_ns(value, scale) - origin_ns


def _scaled_ns(value: Any, scale: int) -> int:
    try:
        scaled = value * scale if isinstance(value, int) else round(float(value) * scale)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"arrival {value!r} is not a time") from None
    if abs(scaled) > _INT64_MAX:
        raise ValueError(f"arrival {value!r} is not a time")
    return scaled


def _iso_ns(value: Any) -> int:
    try:
        instant = datetime.fromisoformat(value)
    except (ValueError, TypeError):
        raise ValueError(f"arrival {value!r} is not a time") from None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
