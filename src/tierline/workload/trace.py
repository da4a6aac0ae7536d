"""Reading and writing traces: one format of our own, importers for the others, nothing in silence.

The profile, the planner and the simulator read requests through `read_trace`. It streams, so
a trace may be larger than memory, and it counts whatever it did on the way: broken lines with
their numbers, failed requests left out, arrivals out of order. The count is a result (`report`)
and not a log line, because a plan has to print what it is based on.

Our own format is JSON lines: a header {"tierline_trace": 1, "block_tokens": 512}, then one
request a line. docs/reference/trace-format.md describes it.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from tierline.base.errors import DependencyError, TraceError
from tierline.base.names import lookup
from tierline.workload import importers, servegen
from tierline.workload.importers import BLOCK_TOKENS, FORMATS, Columns, Parse
from tierline.workload.request import Request

_BROKEN_SHOWN = 10
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(slots=True, kw_only=True)
class TraceReport:
    """What reading did. Complete once the reader has been iterated to the end."""

    path: str
    format: str
    rows: int = 0  # rows seen, whatever became of them
    requests: int = 0
    failed: int = 0  # well formed, but a request that the service did not answer
    broken: int = 0
    broken_lines: list[tuple[int, str]] = field(default_factory=list)  # the first few
    unsorted: int = 0  # arrivals before the one above them
    truncated: bool = False
    assumed: str = ""  # what the importer had to make up, in a sentence

    def sentences(self) -> list[str]:
        """What a person must know about this reading, one fact a sentence; empty when clean."""
        said = [self.assumed] if self.assumed else []
        if self.broken:
            first = "; ".join(f"line {n}: {why}" for n, why in self.broken_lines[:3])
            said.append(f"{self.broken} of {self.rows} rows are broken and were left out ({first})")
        if self.failed:
            said.append(f"{self.failed} failed or warm-up requests were left out")
        if self.unsorted:
            said.append(
                f"{self.unsorted} arrivals were out of order: rates are taken in order "
                "of time, reuse and sessions in order of the file"
            )
        if self.truncated:
            said.append(f"the file ends early; the {self.requests} requests before that are used")
        return said


class TraceReader:
    """Requests of one file, in file order, read anew at every iteration."""

    def __init__(
        self,
        path: Path,
        *,
        format: str,  # noqa: A002
        columns: Columns,
        first_line: str,
        records: list[dict[str, Any]] | None,
        selection: Mapping[str, str],
        broken_max: float,
        allow_truncated: bool,
    ) -> None:
        self.format = format
        self.block_tokens = BLOCK_TOKENS
        self.has_arrivals = columns.arrival is not None
        self.report = TraceReport(path=str(path), format=format)
        self._path = path
        self._columns = columns
        self._is_json = first_line.startswith("{")
        self._records = records
        self._selection = selection
        self._broken_max = broken_max
        self._allow_truncated = allow_truncated
        if format == "tierline":
            self.block_tokens = _header_block_tokens(first_line, path)

    def __iter__(self) -> Iterator[Request]:
        """Raises `TraceError` when the file cannot be used; see `read_trace`."""
        self.report = report = TraceReport(path=str(self._path), format=self.format)
        if self._records is not None:
            rows: Iterator[tuple[int, Any]] = enumerate(self._records, start=1)
        else:
            rows = _lines(self._path, report, allow_truncated=self._allow_truncated)
        if self.format == "servegen":
            report.assumed, rows = servegen.requests(rows, self._path, self._selection)
        yield from self._checked(rows, self._parser(rows))
        if report.rows == 0:
            raise TraceError(
                f"trace {report.path!r} has a header and no rows", hint="export requests into it"
            )
        self._check_broken()

    def _parser(self, lines: Iterator[tuple[int, str]]) -> Parse:
        if self.format == "servegen":
            return lambda request: request
        if self.format == "aiperf":
            return importers.aiperf_parser()
        if self._is_json or self._records is not None:
            if self.format == "tierline":
                next(lines)
            return importers.json_parser(self._columns)
        return importers.csv_parser(next(lines)[1], self._columns, where=f"trace {self._path}")

    def _checked(self, lines: Iterator[tuple[int, Any]], parse: Parse) -> Iterator[Request]:
        report = self.report
        last_ns = None
        for number, line in lines:
            report.rows += 1
            try:
                request = parse(line)
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                report.broken += 1
                if len(report.broken_lines) < _BROKEN_SHOWN:
                    report.broken_lines.append((number, _reason(error)))
                if self._broken_max == 0 or report.broken == 1000:
                    self._check_broken()
                continue
            if request is None:
                report.failed += 1
                continue
            report.requests += 1
            if last_ns is not None and request.arrival_ns < last_ns:
                report.unsorted += 1
            last_ns = request.arrival_ns
            yield request

    def _check_broken(self) -> None:
        report = self.report
        if report.broken <= self._broken_max * report.rows:
            return
        first = "; ".join(f"line {n}: {why}" for n, why in report.broken_lines[:3])
        raise TraceError(
            f"trace {report.path!r}: {report.broken} of {report.rows} rows are broken ({first})",
            hint="repair the lines or check the format; to leave them out allow a larger share "
            f"of broken rows than {self._broken_max:g}",
        )


def read_trace(
    path: Path | str,
    *,
    format: str | None = None,  # noqa: A002  # the word a caller expects
    mapping: Mapping[str, str] | None = None,
    on_error: Literal["skip", "fail"] = "skip",
    broken_max: float = 0.01,
    allow_truncated: bool = False,
) -> TraceReader:
    """A streaming reader of `path`; the format is told from the content unless named.

    `mapping` names the columns of a request log: {"arrival": "ts", "input": "prompt_tokens"}.
    Broken rows are left out and counted, up to the share `broken_max`; `on_error="fail"` stops
    at the first. For ServeGen's client rates `mapping` selects: workload, start_s, duration_s,
    seed. Raises `TraceError` for what cannot be read as a trace, also while iterating.
    """
    path = Path(path)
    if format is not None:
        lookup("trace format", format, FORMATS, error=TraceError)
    first_line = _first_line(path)
    name = format or importers.detect(first_line) or ""
    records, selection = None, {}
    if name == "servegen":
        columns, selection = FORMATS[name], dict(mapping or {})
    elif mapping:
        name, columns = "log", importers.mapped_columns(mapping)
    elif name == "document" or name in importers.DOCUMENTS:
        name, columns, records = importers.open_document(_json(path), where=f"trace {str(path)!r}")
    elif name not in FORMATS or (name == "log" and not mapping):
        raise TraceError(
            f"trace {str(path)!r} has no format that is known here; it begins {first_line[:80]!r}",
            hint="name its columns with a mapping (arrival, input, output), "
            f"or its format: {', '.join(sorted(FORMATS))}",
        )
    else:
        columns = FORMATS[name]
    return TraceReader(
        path,
        format=name,
        columns=columns,
        first_line=first_line,
        records=records,
        selection=selection,
        broken_max=0.0 if on_error == "fail" else broken_max,
        allow_truncated=allow_truncated,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, LookupError):
        return f"no {error.args[0]!r}" if error.args else "a part is missing"
    return str(error)


def load_trace(reader: Iterable[Request]) -> list[Request]:
    """All requests in order of arrival; requests that arrive together keep the file's order."""
    return sorted(reader, key=lambda r: r.arrival_ns)


def _json(path: Path) -> Any:
    report = TraceReport(path=str(path), format="")
    text = "\n".join(line for _, line in _lines(path, report, allow_truncated=False))
    try:
        return json.loads(text)
    except ValueError as error:
        raise TraceError(
            f"trace {str(path)!r} is neither JSON lines nor a JSON document: {error}",
            hint="give one JSON object a line, or the result file of a benchmark",
        ) from None


def _header_block_tokens(header: str, path: Path) -> int:
    try:
        record = json.loads(header)
        version, block_tokens = record.get("tierline_trace"), record["block_tokens"]
    except (ValueError, KeyError, AttributeError):
        version, block_tokens = None, 0
    if version != 1 or not isinstance(block_tokens, int) or block_tokens <= 0:
        raise TraceError(
            f"trace {str(path)!r} has no header of a tierline trace, version 1",
            hint='the first line is {"tierline_trace": 1, "block_tokens": 512}',
        )
    return block_tokens


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked when they are gzip by content, whatever the name says."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
        return cast("IO[bytes]", gzip.open(path, "rb")) if packed else path.open("rb")
    except OSError as error:
        raise TraceError(f"cannot read trace {str(path)!r}: {error.strerror}") from None


def _lines(path: Path, report: TraceReport, *, allow_truncated: bool) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    number = 0
    try:
        with open_bytes(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield number, line
    except UnicodeDecodeError:
        raise TraceError(
            f"trace {str(path)!r} is not text at line {number}", hint="give UTF-8 CSV or JSON lines"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        report.truncated = True
        if not allow_truncated:
            raise TraceError(
                f"trace {str(path)!r} is a damaged gzip file after line {number}, "
                f"{report.requests} requests: {error}",
                hint="copy the file again, or allow a truncated trace to use what is readable",
            ) from None


def _first_line(path: Path) -> str:
    report = TraceReport(path=str(path), format="")
    first = next(_lines(path, report, allow_truncated=False), None)
    if first is None:
        raise TraceError(f"trace {str(path)!r} is empty", hint="give a file with requests in it")
    if "\0" in first[1]:
        raise TraceError(f"trace {str(path)!r} is not text", hint="give UTF-8 CSV or JSON lines")
    return first[1]


def write_trace(
    path: Path, requests: Iterable[Request], *, block_tokens: int = BLOCK_TOKENS
) -> int:
    """Write our own format, gzip when the name ends in .gz; returns how many requests.

    Beside first and then renamed, as `base.files.write_text` does, but streamed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    header = {"tierline_trace": 1, "block_tokens": block_tokens}
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as raw, _packer(raw, path) as file:
            file.write(json.dumps(header).encode() + b"\n")
            for request in requests:
                count += 1
                file.write(json.dumps(_record(request)).encode() + b"\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        raise DependencyError(
            f"cannot write {str(path)!r}: {error.strerror}",
            hint="choose an output folder that you may write to",
        ) from None
    return count


def _packer(raw: IO[bytes], path: Path) -> AbstractContextManager[IO[bytes]]:
    if path.suffix != ".gz":
        return nullcontext(raw)
    # Without name and time in it, equal requests give equal bytes.
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0))


def _record(request: Request) -> dict[str, Any]:
    """The request without the facts that it does not state."""
    record: dict[str, Any] = {
        "arrival_ns": request.arrival_ns,
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
        "prefix_blocks": list(request.prefix_blocks),
        "session": request.session,
        "tenant": request.tenant,
        "priority": request.priority,
        "model": request.model,
        "deadline_ns": request.deadline_ns,
    }
    return {key: value for key, value in record.items() if value or key == "arrival_ns"}
