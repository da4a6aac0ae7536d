"""The requests of a run as a table on disk, a row each, and back.

`tierline sim` writes it, notebooks and `tierline explain` read it.  Times are whole
picoseconds, so that a table read back has the hash of the run that wrote it; the latencies in
seconds beside them are for people and are not read.  CSV needs nothing; parquet needs
pyarrow, which is an extra.

    INV-SIM-22  a run that is read back has the hash of the one that was written
"""

import csv
import gzip
import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tierline.base.clock import PS_PER_S
from tierline.base.errors import DependencyError, InputError
from tierline.base.files import packed, whole_file
from tierline.base.names import lookup
from tierline.sim.measure import LATENCIES, good_requests, latencies_ps
from tierline.sim.record import OUTCOMES, Requests, Run
from tierline.workload.slo import ServiceLevel

LABELS = {"class": "level", "tenant": "tenant", "model": "model", "outcome": "outcome"}
FACTS = tuple(name for name in Requests.__slots__ if name not in LABELS.values())
ROWS_AT_ONCE = 50_000
SUFFIXES = (".csv", ".csv.gz", ".parquet")


def write_requests(run: Run, path: Path) -> None:
    """Write the table; the end of the name says the format: .csv, .csv.gz or .parquet.

    A reader sees the old file or the whole new one. Raises `DependencyError` when the folder
    cannot be written, or for parquet without pyarrow.
    """
    suffix = _suffix(path)
    arrow, parquet = _arrow() if suffix == ".parquet" else (None, None)
    with whole_file(path) as file:
        if suffix == ".parquet":
            _write_parquet(run, file, arrow, parquet)
        else:
            _write_csv(run, packed(file) if suffix == ".csv.gz" else file)


def read_requests(path: Path | str) -> Run:
    """The run of a table: its requests, and classes by name without their promises."""
    path = Path(path)
    columns = _read_parquet(path) if _suffix(path) == ".parquet" else _read_csv(path)
    missing = [name for name in (*LABELS, *FACTS) if name not in columns]
    if missing:
        raise InputError(
            f"table {str(path)!r} has no column {missing[0]!r}",
            hint="give a table that `tierline sim` wrote",
        )
    count = len(columns["outcome"])
    requests = Requests(count)
    for name in FACTS:
        _fill(requests, name, _whole(columns[name], name, path))
    known = {name: _names(columns[name]) for name in LABELS}
    known["outcome"] = OUTCOMES
    for name, attribute in LABELS.items():
        index = {label: i for i, label in enumerate(known[name])}
        if name == "outcome":
            for label in sorted(set(columns[name]) - set(index)):
                lookup("outcome", label, index)
        _fill(requests, attribute, [index[label] for label in columns[name]])
    return Run(
        requests=requests,
        levels=tuple(ServiceLevel(name=name, targets=()) for name in known["class"]),
        tenants=known["tenant"],
        models=known["model"],
        end_ps=max((*requests.finish_ps, *requests.arrival_ps), default=0),
    )


def table(run: Run) -> Iterator[dict[str, list[Any]]]:
    """The columns by name, in the order in which they are written, some rows at a time."""
    requests, latencies, good = run.requests, latencies_ps(run.requests), good_requests(run)
    names = {
        "class": [level.name for level in run.levels],
        "tenant": run.tenants,
        "model": run.models,
        "outcome": OUTCOMES,
    }
    for first in range(0, max(len(requests), 1), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        columns: dict[str, list[Any]] = {"request": list(range(*rows.indices(len(requests))))}
        for name, attribute in LABELS.items():
            columns[name] = [names[name][i] for i in getattr(requests, attribute)[rows]]
        columns |= {name: getattr(requests, name)[rows].tolist() for name in FACTS}
        columns["good"] = good[rows].astype(int).tolist()
        for name in LATENCIES:
            values = latencies[name][rows].tolist()
            columns[f"{name}_s"] = [None if v < 0 else v / PS_PER_S for v in values]
        yield columns


# --- formats --------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    found = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if found is None:
        raise InputError(
            f"table {path.name!r}: unknown format", hint=f"end the name in {', '.join(SUFFIXES)}"
        )
    return found


def _write_csv(run: Run, file: IO[bytes]) -> None:
    with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        for i, columns in enumerate(table(run)):
            if i == 0:
                writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def _read_csv(path: Path) -> dict[str, list[str]]:
    open_text: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            head = next(rows, [])
            cells = list(zip(*rows, strict=True))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read table {str(path)!r}: {error}") from None
    except ValueError:
        raise InputError(
            f"table {str(path)!r} has rows of different lengths", hint="copy the file again"
        ) from None
    if cells and len(cells) != len(head):
        raise InputError(f"table {str(path)!r} has rows longer than its head")
    return dict(zip(head, map(list, cells or [()] * len(head)), strict=True))


def _write_parquet(run: Run, file: IO[bytes], arrow: Any, parquet: Any) -> None:
    kinds = dict.fromkeys(("request", *FACTS, "good"), arrow.int64())
    kinds |= dict.fromkeys(LABELS, arrow.string())
    schema: Any = None
    writer: Any = None
    for columns in table(run):
        if writer is None:
            schema = arrow.schema([(n, kinds.get(n, arrow.float64())) for n in columns])
            writer = parquet.ParquetWriter(file, schema)
        writer.write_table(arrow.table(columns, schema=schema))
    writer.close()


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    arrow, parquet = _arrow()
    try:
        found: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"cannot read table {str(path)!r}: {error}") from None
    return found


def _arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DependencyError(
            "parquet needs the package pyarrow",
            hint="pip install 'tierline[parquet]', or write requests.csv instead",
        ) from None


def _fill(requests: Requests, attribute: str, values: Iterable[int]) -> None:
    stored = getattr(requests, attribute)
    stored[:] = type(stored)(stored.typecode, values)


def _whole(cells: Sequence[Any], name: str, path: Path) -> list[int]:
    try:
        return [int(cell) for cell in cells]
    except ValueError as error:
        raise InputError(f"table {str(path)!r}, column {name!r}: {error}") from None


def _names(labels: Iterable[str]) -> tuple[str, ...]:
    """Each label once, in order of first appearance."""
    return tuple(dict.fromkeys(labels))
