"""How true the predictions are, on measurements that anyone may bring: `tierline accuracy`.

`report` reads files, predicts every row with the shipped constants, and sums up. A row that
cannot be predicted counts against coverage and is named. Rows whose labels a rule doubts are
in the figures; `without_doubted` beside them leaves them out. `tools/accuracy.py` writes the
page in docs/reference with the same functions, and with constants that did not see the rows.

A closed-loop row is predicted by replaying the benchmark's client against the step law
(`client_replay`); an offline row by the state in which the KV cache is full (`load`).
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tierline.base.errors import TierlineError
from tierline.base.files import content_hash
from tierline.base.progress import with_progress
from tierline.perf.stack_factor import stack_factor
from tierline.perf.step import EngineProfile, Rates, fitted_groups, load_rates
from tierline.planner.client_replay import replay
from tierline.planner.measured import Row
from tierline.planner.measured_files import Problem, Reading, Run, read_measured

PROBLEMS_SHOWN = 20
CALIBRATION_POINTS = 3
RANKED_MIN = 3  # an order of two says little
SLICES: Mapping[str, Callable[[Row], str]] = {
    "model": lambda row: row.model.name,
    "gpu": lambda row: row.gpu.name,
    "engine": lambda row: row.engine.name,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Predicted over measured; NaN where nothing was measured."""

    row: Row
    tpot: float = math.nan
    ttft: float = math.nan
    throughput: float = math.nan

    @property
    def time_ratio(self) -> float:
        """True over predicted step time, the quantity of an evidence band."""
        return 1 / self.tpot if math.isnan(self.throughput) else self.throughput


def outcome(row: Row, rates: Rates, engine: EngineProfile) -> Outcome | None:
    """A row as the law sees it, or None where the law knows no such state."""
    instance = row.instance(rates, engine)
    if row.output_tokens_per_s is None and row.tpot_s is None and row.clients:
        return Outcome(row, ttft=_first_token_s(row, rates, engine) / (row.ttft_s or math.nan))
    if row.output_tokens_per_s is None:
        ttft_s, tpot_s = replay(row, instance)
        return Outcome(
            row,
            tpot=tpot_s / (row.tpot_s or math.nan),
            ttft=ttft_s / (row.ttft_s or math.nan),
        )
    point = row.offline_point(rates, engine)
    if point is None:
        return None
    return Outcome(row, throughput=point.rate_rps * row.output_tokens / row.output_tokens_per_s)


def _first_token_s(row: Row, rates: Rates, engine: EngineProfile) -> float:
    """Seconds to the first tokens of a static batch: its prompts, in steps of the budget."""
    if row.source != "trtllm":
        return replay(row, row.instance(rates, engine))[0]
    cost = row.instance(rates, engine).cost
    prompts, budget = row.clients, row.launch.batch_tokens
    tokens = prompts * row.input_tokens
    steps = math.ceil(tokens / budget)
    pairs = prompts * row.input_tokens**2 / 2
    return steps * cost.step_s(0, 0, math.ceil(tokens / steps), pairs / steps)


# --- figures ------------------------------------------------------------------------------


def error_figures(name: str, ratios: Iterable[float]) -> dict[str, float | None]:
    """Median, p90 and bias of predicted over measured, as shares; None without rows."""
    errors = [ratio - 1 for ratio in ratios if not math.isnan(ratio)]
    sizes = sorted(abs(e) for e in errors)
    return {
        f"{name}_median": statistics.median(sizes) if sizes else None,
        f"{name}_p90": sizes[math.ceil(0.9 * len(sizes)) - 1] if sizes else None,
        f"{name}_bias": statistics.median(errors) if errors else None,
    }


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank.

    >>> spearman([1, 2, 3, 4], [10, 20, 20, 90]).__round__(3)
    0.949
    """
    return statistics.correlation(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [statistics.fmean(places[value]) for value in values]


def rank_of(outcomes: Iterable[Outcome]) -> float | None:
    """Spearman's rank correlation of predicted and measured throughput, of three rows or more."""
    known = [o for o in outcomes if not math.isnan(o.throughput)]
    measured = [o.row.output_tokens_per_s or 0.0 for o in known]
    predicted = [o.throughput * m for o, m in zip(known, measured, strict=True)]
    if len(known) < RANKED_MIN or len(set(measured)) == 1 or len(set(predicted)) == 1:
        return None
    return spearman(predicted, measured)


def figures(outcomes: Sequence[Outcome], *, asked: int) -> dict[str, Any]:
    """Coverage of `asked` rows and all errors of those that were predicted."""
    return {
        "rows": asked,
        "predicted": len(outcomes),
        "coverage": len(outcomes) / asked if asked else None,
        **error_figures("tpot", (o.tpot for o in outcomes)),
        **error_figures("ttft", (o.ttft for o in outcomes)),
        **error_figures("throughput", (o.throughput for o in outcomes)),
        "spearman": rank_of(outcomes),
    }


def few_shot(outcomes: Iterable[Outcome], *, points: int, draw: int = 0) -> list[Outcome]:
    """The rows of each stack that `points` of its configurations, now measured, correct.

    Which configurations are the measured ones follows from their names and `draw`, so that
    no result can lean on a fortunate choice. Offline rows have no such factor and are left out.
    """
    corrected = []
    closed = [o for o in outcomes if o.row.clients and o.row.output_tokens_per_s is None]
    for part in grouped(closed, lambda row: row.stack).values():
        configs = sorted({o.row.config for o in part}, key=lambda c: content_hash([draw, c]))
        known = set(configs[:points])
        first = {o.row.config: o for o in part if o.row.config in known}.values()
        factor = stack_factor(
            tpot=[1 / o.tpot for o in first if not math.isnan(o.tpot)],
            ttft=[1 / o.ttft for o in first if not math.isnan(o.ttft)],
        )
        corrected += [
            replace(o, tpot=o.tpot * factor.tpot, ttft=o.ttft * factor.ttft)
            for o in part
            if o.row.config not in known
        ]
    return corrected


# --- the report ---------------------------------------------------------------------------


def report(paths: Sequence[Path], *, progress: bool = False) -> dict[str, Any]:
    """Coverage and errors of all rows of the files, in all and by model, GPU and engine."""
    readings = [read_measured(path) for path in paths]
    rows = [row for reading in readings for row in reading.rows]
    problems = [problem for reading in readings for problem in reading.problems]
    outcomes: list[Outcome] = []
    for row in with_progress(rows, what="predicting", show=progress):
        found = outcome(row, load_rates(row.gpu), row.engine)
        if found is not None:
            outcomes.append(found)
        else:
            problems.append(_unpredicted(row, "the law knows no state with that load"))
    runs = [_runs(reading.runs, outcomes, problems) for reading in readings]
    left_out = sum((reading.left_out for reading in readings), Counter[str]())
    asked = len(outcomes) + len(problems)
    return {
        **figures(outcomes, asked=asked),
        "without_doubted": _without_doubted(outcomes),
        "with_three_points": _with_points(outcomes),
        "by_evidence": _slices(outcomes, _evidence),
        **{
            f"by_{name}": _slices(outcomes, key, Counter(getattr(p, name) for p in problems))
            for name, key in SLICES.items()
        },
        "not_predicted": [{"where": p.where, "name": p.name, "reason": p.reason} for p in problems],
        "left_out": dict(left_out),
        "runs": [run for found in runs for run in found],
        "files": [_file(path, reading) for path, reading in zip(paths, readings, strict=True)],
    }


def _runs(
    runs: Sequence[Run], outcomes: list[Outcome], problems: list[Problem]
) -> list[dict[str, Any]]:
    """What simulations say of a file's runs; their outcomes are added to those of rows.

    A run that calibrated the others is predicted but is no evidence of accuracy.
    """
    if not runs:
        return []
    from tierline.planner.measured_runs import calibrate_and_predict, row_of, simulated

    possible = []
    for run in runs:
        try:
            simulated(run)
            possible.append(run)
        except TierlineError as error:
            problems.append(_unpredicted(row_of(run), str(error)))
    pairs = calibrate_and_predict(possible)
    fitted = pairs[0][0].run if any(after for _, after in pairs[1:]) else None
    told = []
    for law, after in pairs:
        use = after or law
        unseen = law.run is not fitted
        ratios = (use.tpot, use.ttft) if unseen else (math.nan, math.nan)
        outcomes.append(Outcome(row_of(law.run), *ratios))
        told.append(
            {
                "name": law.run.name,
                "requests": len(law.run.requests),
                "priced_by": law.priced_by,
                "uncalibrated": {"ttft": law.ttft - 1, "tpot": law.tpot - 1},
                "calibrated": after and {"ttft": after.ttft - 1, "tpot": after.tpot - 1},
                "calibrated_on": after.calibration.source if after else None,
                "fitted": not unseen,
            }
        )
    return told


def _unpredicted(row: Row, reason: str) -> Problem:
    return Problem(
        where=row.where,
        model=row.model.name,
        gpu=row.gpu.name,
        engine=row.engine.name,
        reason=reason,
    )


def _slices(
    outcomes: Iterable[Outcome], key: Callable[[Row], str], problems: Counter[str] | None = None
) -> dict[str, Any]:
    """Figures by what `key` says; rows that cannot be predicted count where their names say."""
    parts = grouped(outcomes, key)
    missing = Counter(problems or {})
    del missing[""]  # a row that does not name this
    return {
        name: figures(parts.get(name, []), asked=len(parts.get(name, [])) + missing[name])
        for name in sorted({*parts, *missing})
    }


def _evidence(row: Row) -> str:
    """Whether the shipped constants saw rows of this architecture, accelerator and engine."""
    return "fitted groups" if row.group in fitted_groups() else "unseen groups"


def grouped(outcomes: Iterable[Outcome], key: Callable[[Row], str]) -> dict[str, list[Outcome]]:
    """Outcomes by what `key` says of their rows."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for o in outcomes:
        groups[key(o.row)].append(o)
    return groups


def _without_doubted(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    sound = [o for o in outcomes if not o.row.doubt]
    rules = Counter(o.row.doubt for o in outcomes if o.row.doubt)
    return {**figures(sound, asked=len(sound)), "rules": dict(sorted(rules.items()))}


def _with_points(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The same for the rest of every stack once three of its configurations are measured."""
    rest = few_shot(outcomes, points=CALIBRATION_POINTS)
    return {"points": CALIBRATION_POINTS, **figures(rest, asked=len(rest))}


def _file(path: Path, reading: Reading) -> dict[str, Any]:
    return {
        "path": str(path),
        "format": reading.format,
        "rows": reading.count,
        "left_out": dict(reading.left_out),
    }


# --- text ---------------------------------------------------------------------------------


def render_text(found: Mapping[str, Any]) -> str:
    """The report for a person: percent, in all and by model, GPU and engine."""
    head = f"{'':<28}{'rows':>7}{'coverage':>10}  {'TPOT':<20}{'TTFT':<20}{'throughput':<20}rank"
    lines = ["errors of predicted over measured: median / p90 / bias, in percent", "", head]
    lines.append(_line("all", found))
    if found["without_doubted"]["rules"]:
        lines.append(_line("without doubted labels", found["without_doubted"]))
    if found["with_three_points"]["rows"]:
        lines.append(_line("with 3 points of each stack", found["with_three_points"]))
    for name in ("evidence", *SLICES):
        lines += ["", f"by {name}"]
        lines += [_line(f"  {key}", part) for key, part in found[f"by_{name}"].items()]
    for run in found["runs"]:
        lines.append(_run_line(run))
    for rule, count in found["without_doubted"]["rules"].items():
        lines.append(f"\n{count} rows doubted: {rule}")
    for reason, count in found["left_out"].items():
        lines.append(f"\n{count} rows left out: {reason}")
    problems = found["not_predicted"]
    if problems:
        lines += ["", f"{len(problems)} rows cannot be predicted and count against coverage:"]
        lines += [f"  {p['where']}: {p['name']}: {p['reason']}" for p in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"  and {len(problems) - PROBLEMS_SHOWN} more (--json lists all)")
    return "\n".join(lines)


def _run_line(run: Mapping[str, Any]) -> str:
    """Errors of a run's mean TTFT and TPOT, uncalibrated and with the first run's scalars."""

    def pair(errors: Mapping[str, float] | None) -> str:
        if errors is None:
            return "-"
        return f"TTFT {100 * errors['ttft']:+.1f} %, TPOT {100 * errors['tpot']:+.1f} %"

    after = "calibrated on itself" if run["fitted"] else "calibrated on the first run"
    return (
        f"\nrun {run['name']}, {run['requests']:,} requests, mean times by {run['priced_by']}:"
        f" uncalibrated {pair(run['uncalibrated'])}; {after} {pair(run['calibrated'])}"
    )


def _line(label: str, part: Mapping[str, Any]) -> str:
    coverage = "-" if part["coverage"] is None else f"{100 * part['coverage']:.1f} %"
    cells = "".join(f"{_cell(part, name):<20}" for name in ("tpot", "ttft", "throughput"))
    rank = "-" if part["spearman"] is None else f"{part['spearman']:.2f}"
    return f"{label:<28}{part['rows']:>7,}{coverage:>10}  {cells}{rank}"


def _cell(part: Mapping[str, Any], name: str) -> str:
    median = part[f"{name}_median"]
    if median is None:
        return "-"
    return (
        f"{100 * median:.1f} / {100 * part[f'{name}_p90']:.0f} / {100 * part[f'{name}_bias']:+.1f}"
    )
