"""ServeGen's client rates: a table of rates per client and window, from which arrivals are drawn.

`trace` calls this for a file with the columns workload, client, t_s, rate_rps, cv, pattern, p0
and p1. Such a file holds no request, so arrivals are drawn, with a seed, from the renewal
process each row names, and lengths from the quantiles in servegen_lengths.json beside it.
One file holds several workloads and weeks of them: the caller selects, and what is not
selected by name is said in the report.
"""

import csv
import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierline.base.errors import TraceError
from tierline.base.names import lookup, reject_unknown_keys
from tierline.base.rng import stream
from tierline.workload.request import Request

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_WINDOW_S = 600
_PERCENTS = (*range(100), 99.9, 100)
_COLUMNS = ("workload", "client", "t_s", "rate_rps", "cv", "pattern", "p0", "p1")
_DEFAULTS = {"workload": "", "start_s": "0", "duration_s": "3600", "seed": "0"}


def requests(
    lines: Iterator[tuple[int, str]], path: Path, selection: Mapping[str, str]
) -> tuple[str, Iterator[tuple[int, Request]]]:
    """What was drawn, in a sentence, and the numbered requests in order of arrival."""
    reject_unknown_keys("ServeGen selection", selection, _DEFAULTS, error=TraceError)
    chosen = _DEFAULTS | dict(selection)
    try:
        start_s, end_s = float(chosen["start_s"]), float(chosen["start_s"])
        end_s += float(chosen["duration_s"])
        seed = int(chosen["seed"])
    except ValueError as error:
        raise TraceError(
            f"ServeGen selection: {error}", hint="start_s, duration_s and seed are numbers"
        ) from None
    windows = _windows(lines, start_s, end_s)
    if not windows:
        raise TraceError(
            f"trace {str(path)!r} has no rates from {start_s:g} s to {end_s:g} s",
            hint="select another start_s and duration_s",
        )
    names = {name: name for name in windows}
    if not chosen["workload"] and len(names) > 1:
        raise TraceError(
            f"trace {str(path)!r} holds several workloads",
            hint=f"select one: workload={' | '.join(sorted(names))}",
        )
    name = chosen["workload"] or next(iter(names))
    lookup("ServeGen workload", name, names, error=TraceError)
    sentence = (
        f"arrivals were drawn with seed {seed} from the client rates of {name} from "
        f"{start_s:g} s to {end_s:g} s, and lengths from servegen_lengths.json"
    )
    return sentence, _draw(windows[name], _lengths(path, name), start_s, end_s, seed)


def _windows(
    lines: Iterator[tuple[int, str]], start_s: float, end_s: float
) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Workload -> window start -> client rows, of the windows that overlap the selection."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    next(lines)
    for number, line in lines:
        cells = next(csv.reader([line]))
        try:
            row: dict[str, Any] = dict(zip(_COLUMNS, cells, strict=True))
            for column in ("t_s", "rate_rps", "cv", "p0"):
                row[column] = float(row[column])
        except ValueError as error:
            raise TraceError(f"line {number} is no client rate: {error}") from None
        windows = found.setdefault(row["workload"], defaultdict(list))
        if start_s - _WINDOW_S < row["t_s"] < end_s and row["rate_rps"] > 0:
            windows[row["t_s"]].append(row)
    return {name: windows for name, windows in found.items() if windows}


def _lengths(path: Path, name: str) -> dict[str, "npt.NDArray[np.float64]"]:
    import numpy as np

    for beside in (path.with_name(f"servegen_lengths.json{end}") for end in ("", ".gz")):
        if beside.is_file():
            data = beside.read_bytes()
            facts = json.loads(gzip.decompress(data) if beside.suffix == ".gz" else data)
            break
    else:
        raise TraceError(
            f"trace {str(path)!r} has rates and no lengths",
            hint="put servegen_lengths.json (or .json.gz) beside it",
        )
    fields = lookup("ServeGen workload in servegen_lengths.json", name, facts, error=TraceError)
    given = {
        "input": [f for f in ("input_tokens", "text_tokens", "image_tokens") if f in fields],
        "output": ["output_tokens"],
    }
    # The parts of a mixed prompt are drawn at one rank: their joint law is not in the file.
    return {
        side: np.sum([_with_tail(fields[f]) for f in names], axis=0)
        for side, names in given.items()
    }


def _with_tail(field: Mapping[str, Any]) -> list[float]:
    """Lengths at the percents of `_PERCENTS`; without p99.9 the last step would be far too fat."""
    quantiles = field["quantiles"]
    return [*quantiles[:100], max(field["p999"], quantiles[99]), quantiles[100]]


def _draw(
    windows: Mapping[float, list[dict[str, Any]]],
    lengths: Mapping[str, "npt.NDArray[np.float64]"],
    start_s: float,
    end_s: float,
    seed: int,
) -> Iterator[tuple[int, Request]]:
    import numpy as np

    arrivals, sizes = stream(seed, "servegen arrivals"), stream(seed, "servegen lengths")
    number = 0
    for window_s in sorted(windows):
        drawn = [
            (window_s + t, row["client"])
            for row in windows[window_s]
            for t in _renewals(arrivals, row).tolist()
        ]
        for t, client in sorted(drawn):
            tokens = {
                side: max(1, round(float(np.interp(sizes.random() * 100, _PERCENTS, quantiles))))
                for side, quantiles in lengths.items()
            }
            if start_s <= t < end_s:
                number += 1
                yield (
                    number,
                    Request(
                        arrival_ns=round((t - start_s) * 1e9),
                        input_tokens=tokens["input"],
                        output_tokens=tokens["output"],
                        tenant=client,
                    ),
                )


def _renewals(rng: "np.random.Generator", row: Mapping[str, Any]) -> "npt.NDArray[np.float64]":
    """Arrival times in one window, with the row's rate and its Gamma or Weibull gaps.

    The stream is entered at a random point of its past: one that starts at the window's edge
    would put extra arrivals there when gaps vary much.
    """
    import numpy as np

    rate = row["rate_rps"]
    spans = 2 * _WINDOW_S * rate
    count = int(spans + 10 * max(1.0, row["cv"]) * math.sqrt(spans) + 50)
    if row["pattern"] == "Weibull":
        gaps = rng.weibull(row["p0"], count) / math.gamma(1 + 1 / row["p0"]) / rate
    else:
        shape = 1 / row["cv"] ** 2 if row["cv"] > 0 else 1e6
        gaps = rng.gamma(shape, 1 / (shape * rate), count)
    times = np.cumsum(gaps) - rng.uniform(0, _WINDOW_S)
    return times[(times >= 0) & (times < _WINDOW_S)]
