"""Fits the shared constants of the step law to published measurements: `rates.toml`.

    python tools/fit_rates.py            # rewrites src/tierline/perf/data/rates.toml

A constant is a prior from kernel timings times three factors (shared, generation, GPU),
each shrunk towards 1, so that a GPU with few rows leans on its generation. Every stack
(group, version, precision, drafts) has a speed factor of its own and one for TTFT, shrunk too:
an odd stack (eager mode, a build that queues) then moves its own factors and not the constants.
Predictions use none of them.

What is fitted to: TPOT of closed-loop rows, TTFT of those with little queueing, and
offline throughput. The load model settles each row (how many decode, how many prompt
tokens ride along); for that state the law gives the step times, whose logarithm is nearly
linear in the logarithms of the constants. A few Gauss-Newton rounds with a robust loss
do the rest.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tierline.base.files import write_text
from tierline.catalog.gpu import GpuSpec
from tierline.perf.evidence import Evidence
from tierline.perf.step import EngineProfile, Rates, load_engine
from tierline.planner.accuracy import Outcome, outcome
from tierline.planner.client_replay import replay
from tierline.planner.load import OperatingPoint, at_concurrency
from tierline.planner.measured import Row
from tierline.planner.measured_files import Reading, read_measured

ROUNDS = 2
STACK_SD = {"tpot": 0.15, "ttft": 0.06, "throughput": 0.15}
NOISE = {"tpot": 0.10, "ttft": 0.35, "throughput": 0.20}
QUIET_CLIENTS = 16  # TTFT above this is queueing, not constants
STEP = 0.02  # of a logarithm, for derivatives
MOST_EFFICIENT = 0.97

# Kernel timings say these; `tools/fit_kernels.py` repeats them. Layer, step and host times
# have no kernel to say them: they start at round numbers and are free to move.
GENERIC: dict[str, float] = {
    "memory": 0.80,
    "cache": 0.80,
    "dense.bf16": 0.75,
    "dense.fp8": 0.52,
    "dense.fp4": 0.45,
    "dense.int8": 0.60,
    "expert.bf16": 0.45,
    "expert.fp8": 0.50,
    "expert.fp8-block": 0.34,
    "expert.fp4": 0.38,
    "expert.int8": 0.38,
    "expert.int4-g128": 0.25,
    "expert.mxfp4": 0.40,
    "attention": 0.60,
    "layer_dense_us": 30.0,
    "layer_moe_us": 75.0,
    "layer_fused_us": 40.0,
    "layer_mla_us": 80.0,
    "collective": 1.2,
    "step_ms": 0.3,
    "sequence_us": 12.0,
    "prefill_ms": 4.0,
    "layer_sparse_us": 40.0,
    "prefill_layer_us": 200.0,
    "prefill_mla_us": 800.0,
}
KERNELS: dict[str, dict[str, float]] = {
    "ampere": {
        "memory": 0.78,
        "cache": 0.70,
        "dense.bf16": 0.84,
        "dense.int8": 0.82,
        "expert.bf16": 0.41,
        "attention": 0.56,
    },
    "ada": {
        "memory": 0.85,
        "cache": 0.84,
        "dense.bf16": 0.62,
        "dense.fp8": 0.50,
        "expert.bf16": 0.59,
        "expert.fp8": 0.55,
        "expert.fp8-block": 0.44,
        "expert.int4-g128": 0.47,
        "attention": 0.51,
    },
    "hopper": {
        "memory": 0.82,
        "cache": 0.80,
        "dense.bf16": 0.80,
        "dense.fp8": 0.55,
        "expert.bf16": 0.68,
        "expert.fp8": 0.75,
        "expert.fp8-block": 0.36,
        "expert.int4-g128": 0.28,
        "expert.mxfp4": 0.65,
        "attention": 0.66,
    },
    "blackwell": {
        "memory": 0.77,
        "cache": 0.85,
        "dense.bf16": 0.72,
        "dense.fp8": 0.52,
        "dense.fp4": 0.44,
        "expert.bf16": 0.41,
        "expert.fp8": 0.38,
        "expert.fp8-block": 0.24,
        "expert.fp4": 0.38,
        "expert.int4-g128": 0.12,
        "expert.mxfp4": 0.60,  # as nvfp4's: the tables' 0.1 is an unpacking kernel, no longer used
        "attention": 0.55,
    },
    "blackwell ultra": {
        "memory": 0.76,
        "cache": 0.85,
        "dense.bf16": 0.77,
        "dense.fp8": 0.54,
        "dense.fp4": 0.31,
        "expert.bf16": 0.42,
        "expert.fp8": 0.38,
        "expert.fp8-block": 0.26,
        "expert.fp4": 0.27,
        "expert.int4-g128": 0.13,
        "expert.mxfp4": 0.60,  # as nvfp4's: the tables' 0.1 is an unpacking kernel, no longer used
        "attention": 0.65,
    },
}
# Spread (of the logarithm) that the shared, generation and GPU factor may take. Chosen among
# four scales on the group split; twice as wide fits known stacks better and new ones worse.
SPREAD: dict[str, tuple[float, float, float]] = {
    "memory": (0.015, 0.015, 0.01),
    "cache": (0.03, 0.025, 0.015),
    "dense": (0.05, 0.05, 0.04),
    "expert": (0.12, 0.12, 0.05),
    "attention": (0.10, 0.05, 0.025),
    "layer_dense_us": (0.2, 0.12, 0.05),
    "layer_moe_us": (0.2, 0.12, 0.05),
    "layer_mla_us": (0.2, 0.12, 0.05),
    "collective": (0.15, 0.10, 0.20),
    "step_ms": (0.3, 0.0, 0.0),
    "sequence_us": (0.3, 0.0, 0.0),
    "prefill_ms": (0.3, 0.0, 0.0),
    "layer_fused_us": (0.3, 0.12, 0.05),
    "layer_sparse_us": (0.5, 0.0, 0.0),
    "prefill_layer_us": (0.5, 0.0, 0.0),
    "prefill_mla_us": (0.5, 0.0, 0.0),
    "host_s": (0.8, 0.0, 0.0),
    "wait_steps": (0.2, 0.0, 0.0),
}
ENGINES: dict[str, tuple[float, float]] = {  # host_s, wait_steps to start from
    "vllm": (0.02, 2.0),
    "sglang": (0.10, 2.0),
    "trtllm": (0.03, 2.0),
}
OUTPUT = Path(__file__).resolve().parents[1] / "src/tierline/perf/data/rates.toml"
FILES = {
    "inferencex": "measured_inferencex.csv.gz",
    "trtllm": "measured_trtllm_perf_overview.csv",
    "mlperf": "measured_mlperf_v41.csv",
}
FOLDS = 5
BAND_ROWS_MIN = 30  # fewer rows of a GPU say nothing about its own band
FULL = Evidence(kind="fitted", source="being fitted")


@dataclass(frozen=True, slots=True)
class Fit:
    """Logarithms of all factors by (constant, level), and of the stacks' own factors."""

    factors: Mapping[tuple[str, str], float]
    stacks: Mapping[str, float]

    def constant(self, name: str, gpu: GpuSpec | None, generation: str = "") -> float:
        """A constant for a GPU; for a generation or for anything when none is given."""
        generation = gpu.generation.casefold() if gpu else generation
        value = KERNELS.get(generation, {}).get(name, GENERIC[name])
        levels = ["all", generation, gpu.name if gpu else ""]
        value *= math.exp(sum(self.factors.get((name, level), 0.0) for level in levels))
        return min(value, MOST_EFFICIENT) if _is_share(name) else value

    def flat(self, row: Row) -> dict[str, float]:
        """Constants of a row's GPU."""
        return {name: self.constant(name, row.gpu) for name in GENERIC}

    def rates(self, row: Row) -> Rates:
        """The law's constants for a row."""
        return as_rates(self.flat(row))

    def engine(self, name: str) -> EngineProfile:
        """The engine's profile with the fitted host times."""
        host_s, wait_steps = ENGINES[name]
        return replace(
            load_engine(name),
            host_s=host_s * math.exp(self.factors.get(("host_s", name), 0.0)),
            wait_steps=wait_steps * math.exp(self.factors.get(("wait_steps", name), 0.0)),
        )


START = Fit({}, {})


def _is_share(name: str) -> bool:
    return not name.endswith(("_us", "_ms", "_s", "_steps")) and name != "collective"


def as_rates(flat: Mapping[str, float]) -> Rates:
    """`Rates` from constants by dotted name."""
    nested: dict[str, Any] = defaultdict(dict)
    for name, value in flat.items():
        kind, dot, key = name.partition(".")
        if dot:
            nested[kind][key] = value
        else:
            nested[name] = value
    return Rates(**nested, evidence=FULL)


# --- what a row says about the constants ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settled:
    """A row in its settled state: per observation, a weight for each of three steps."""

    row: Row
    point: OperatingPoint
    steps: tuple[tuple[float, float, float, float], ...]  # arguments of `formula_s`
    tpot: tuple[float, ...]  # weights of the steps in the mean gap
    ttft: tuple[float, ...]
    ttft_s: float  # as the replayed client sees them
    tpot_s: float


def settle(row: Row, fit: Fit) -> Settled | None:
    """The state in which the load model sees `row`."""
    engine = fit.engine(row.engine.name)
    rates, demand = fit.rates(row), row.demand
    instance = row.instance(rates, engine)
    if row.source == "inferencex":
        point = at_concurrency(instance, demand, row.clients)
        ttft_s, tpot_s = replay(row, instance)
    else:
        point = row.offline_point(rates, engine)
        ttft_s = tpot_s = math.nan
    if point is None:
        return None
    running = max(math.ceil(point.running), 1)
    decode = (running, running * demand.context_mean, 0, 0.0)
    beside = decode[:2] if engine.mixes_prefill else (0, 0.0)
    tokens = point.mixed_tokens
    mixed = (*beside, tokens, tokens * demand.input_mean / 2)
    chunks = math.ceil(demand.input_mean / row.launch.batch_tokens)
    own_tokens = demand.input_mean / chunks
    own = (*beside, own_tokens, own_tokens * demand.input_mean / 2)
    apart = 1.0 if not engine.mixes_prefill else 1.0 - point.mixed_share
    waiting = point.ttft_mean_s - engine.host_s
    waiting -= point.step_s * (1 + engine.wait_steps) / 2
    own_s = instance.cost.step_s(*beside, math.ceil(own_tokens), own[3])
    return Settled(
        row=row,
        point=point,
        steps=(decode, mixed, own),
        tpot=(apart, point.mixed_share, 0.0),
        ttft=(0.0, 0.0, max(waiting / own_s, 0.0)),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One observation, linear in the factors: log(measured/predicted), and its slopes."""

    row: Row
    kind: str
    residual: float
    slopes: Mapping[str, float]  # d log(prediction) / d log(constant)


def lines(rows: Iterable[Row], fit: Fit) -> list[Line]:
    """All observations of `rows` around `fit` (stack factors left out of the prediction)."""
    by_cost: dict[Any, list[Settled]] = defaultdict(list)
    for row in rows:
        state = settle(row, fit)
        if state is not None:
            by_cost[(row.model.name, row.gpu.name, row.layout, row.launch.fused_experts)].append(
                state
            )
    return [line for states in by_cost.values() for line in _lines_of_cost(states, fit)]


def _lines_of_cost(states: Sequence[Settled], fit: Fit) -> list[Line]:
    row = states[0].row
    flat = fit.flat(row)
    names = [name for name in flat if _matters(name, row)]
    steps = np.array([s.steps for s in states], float).reshape(-1, 4).T

    def seconds(constants: Mapping[str, float]) -> Any:
        cost = row.cost(as_rates(constants))
        return cost.formula_s(*steps).reshape(-1, 3)

    base = seconds(flat)
    moved = {n: seconds(flat | {n: flat[n] * math.exp(STEP)}) for n in names}
    out = []
    for i, state in enumerate(states):
        out += _observations(state, fit, base[i], {n: m[i] for n, m in moved.items()})
    return out


def _observations(state: Settled, fit: Fit, base: Any, moved: Mapping[str, Any]) -> Iterable[Line]:
    row, point = state.row, state.point
    gap = np.dot(state.tpot, base)
    gaps = {n: np.dot(state.tpot, m) / gap for n, m in moved.items()}
    slopes = {n: math.log(ratio) / STEP for n, ratio in gaps.items()}
    if row.tpot_s is not None:
        yield Line(row, "tpot", math.log(row.tpot_s / state.tpot_s), slopes)
    if row.output_tokens_per_s is not None:
        rate = point.rate_rps * row.output_tokens
        ratio = math.log(rate / row.output_tokens_per_s)
        yield Line(row, "throughput", ratio, slopes)
    if row.ttft_s is not None and row.clients <= QUIET_CLIENTS:
        yield _first_token(state, fit, base, moved, gaps)


def _first_token(
    state: Settled, fit: Fit, base: Any, moved: Mapping[str, Any], gaps: Mapping[str, float]
) -> Line:
    row, engine = state.row, fit.engine(state.row.engine.name)
    wait_s = state.point.step_s / 2
    own_s = float(np.dot(state.ttft, base))
    total = engine.host_s + wait_s * (1 + engine.wait_steps) + own_s
    slopes = {}
    for name, steps_s in moved.items():
        grown = float(np.dot(state.ttft, steps_s)) - own_s
        grown += wait_s * (1 + engine.wait_steps) * (gaps[name] - 1)
        slopes[name] = grown / total / STEP
    slopes["host_s"] = engine.host_s / total
    slopes["wait_steps"] = wait_s * engine.wait_steps / total
    assert row.ttft_s is not None
    return Line(row, "ttft", math.log(row.ttft_s / state.ttft_s), slopes)


def _matters(name: str, row: Row) -> bool:
    kind, _, key = name.partition(".")
    if kind == "expert":
        fmt = row.layout.weights
        own = fmt if f"expert.{fmt}" in GENERIC else None
        return row.model.is_moe and key == (own or {"nvfp4": "fp4"}.get(fmt, fmt))
    if name == "collective":
        return row.layout.gpus > 1
    return True


# --- the fit ----------------------------------------------------------------------------------


def fit_lines(observed: Sequence[Line], around: Fit) -> Fit:
    """The factors that explain `observed`, which were linearised around `around`."""
    columns: dict[tuple[str, str], int] = {}
    spreads: list[float] = []

    def column(name: str, level: str, spread: float) -> int:
        if (name, level) not in columns:
            columns[name, level] = len(spreads)
            spreads.append(spread)
        return columns[name, level]

    entries: list[tuple[int, int, float]] = []
    for i, line in enumerate(observed):
        for name, slope in line.slopes.items():
            if abs(slope) < 1e-4:
                continue
            for level, spread in _levels(name, line.row):
                entries.append((i, column(name, level, spread), slope))
        stack = f"{line.row.stack} | ttft" if line.kind == "ttft" else line.row.stack
        entries.append((i, column("stack", stack, STACK_SD[line.kind]), 1.0))
    matrix = np.zeros((len(observed), len(spreads)))
    for i, j, slope in entries:
        matrix[i, j] += slope
    start = np.array([around.factors.get(key, around.stacks.get(key[1], 0.0)) for key in columns])
    # Residuals exclude stack factors, so the target is written for total factors.
    start_shared = np.array(
        [0.0 if key[0] == "stack" else v for key, v in zip(columns, start, strict=True)]
    )
    target = np.array([line.residual for line in observed]) + matrix @ start_shared
    noise = np.array([NOISE[line.kind] for line in observed])
    weights = 1 / noise**2 * _repeat_weights(observed)
    theta = _robust_ridge(matrix, target, noise, weights, np.array(spreads))
    values = {key: float(theta[j]) for key, j in columns.items()}
    return Fit(
        {k: v for k, v in values.items() if k[0] != "stack"},
        {k[1]: v for k, v in values.items() if k[0] == "stack"},
    )


def _levels(name: str, row: Row) -> list[tuple[str, float]]:
    if name in ("host_s", "wait_steps"):
        return [(row.engine.name, SPREAD[name][0])]
    spreads = SPREAD[name.partition(".")[0]]
    levels = ("all", row.gpu.generation.casefold(), row.gpu.name)
    return [(level, s) for level, s in zip(levels, spreads, strict=True) if s]


def _repeat_weights(observed: Sequence[Line]) -> Any:
    """Repeats of a configuration, and rows of one big stack, count less each."""
    counts: dict[str, int] = defaultdict(int)
    for line in observed:
        counts[line.row.config + line.kind] += 1
    return np.array([1 / counts[line.row.config + line.kind] for line in observed])


def _robust_ridge(matrix: Any, target: Any, noise: Any, weights: Any, spreads: Any) -> Any:
    """Least squares with a soft-L1 loss, every unknown shrunk to 0 by its spread."""
    theta = np.zeros(matrix.shape[1])
    for _ in range(12):
        residual = target - matrix @ theta
        robust = weights / np.sqrt(1 + (residual / noise) ** 2)
        normal = (matrix.T * robust) @ matrix + np.diag(1 / spreads**2)
        theta = np.linalg.solve(normal, matrix.T @ (robust * target))
    return theta


def fit_rows(rows: Sequence[Row], *, rounds: int = ROUNDS) -> tuple[Fit, list[Line]]:
    """The constants that explain `rows`, and all observations around them."""
    fit = START
    for _ in range(rounds):
        fit = fit_lines(lines(rows, fit), fit)
    return fit, lines(rows, fit)


def data_folder() -> Path:
    """Where the published measurements lie; `TIERLINE_DATA` overrides it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("TIERLINE_DATA", beside))


def published(folder: Path) -> dict[str, Reading]:
    """The published measurements by source."""
    return {source: read_measured(folder / name) for source, name in FILES.items()}


def clean_rows(folder: Path) -> list[Row]:
    """What the shipped constants are fitted to: every row that no rule doubts."""
    found = published(folder)
    closed = [row for row in found["inferencex"].rows if not row.doubt]
    return closed + [row for row in found["trtllm"].rows if row.output_tokens_per_s]


# --- what the fit is worth on rows it has not seen --------------------------------------------


def held_out(
    rows: Sequence[Row], observed: Sequence[Line], around: Fit, part: Callable[[Row], Any]
) -> list[Outcome]:
    """Every row as predicted by constants that saw no row of its `part`.

    Refits start from the linearisation around the full fit; the priors pull back to the
    kernels, and only observations outside the part count.
    """
    parts: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        parts[part(row)].append(row)
    results = []
    for key, unseen in parts.items():
        if key is None:  # rows that are always in the fit
            continue
        fit = fit_lines([line for line in observed if part(line.row) != key], around)
        found = (outcome(r, fit.rates(r), fit.engine(r.engine.name)) for r in unseen)
        results += [o for o in found if o is not None]
    return results


def fold_of(name: str, folds: int = FOLDS) -> int:
    """The frozen fold of a name: its hash, so that new rows move nothing else."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % folds


def band(outcomes: Iterable[Outcome]) -> tuple[float, float]:
    """p10 and p90 of true over predicted step time."""
    ratios = [o.time_ratio for o in outcomes]
    low, high = np.percentile(ratios, [10, 90])
    return round(float(low), 2), round(float(high), 2)


def generic_outcomes(rows: Iterable[Row], fit: Fit) -> list[Outcome]:
    """Rows predicted by the generic entry: what a GPU that nobody measured would get."""
    rates = as_rates({name: fit.constant(name, None) for name in GENERIC})
    found = (outcome(row, rates, fit.engine(row.engine.name)) for row in rows)
    return [o for o in found if o is not None]


def datasheet_band(rows: Sequence[Row], fit: Fit) -> tuple[float, float]:
    """The generic entry on all rows, and on the vendor that no constant was fitted to."""
    low, high = band(generic_outcomes(rows, fit))
    mlperf = published(data_folder())["mlperf"].rows
    foreign = [r for r in mlperf if r.gpu.vendor == "AMD"]
    foreign_low, foreign_high = band(generic_outcomes(foreign, fit))
    return min(low, foreign_low), max(high, foreign_high)


# --- the file -----------------------------------------------------------------------------------

HEAD = """\
# What accelerators reach of their datasheets, and what a step costs beside the math.
# Written by `tools/fit_rates.py` from published end-to-end measurements, anchored on kernel
# timings. An entry overrides its generation's, which overrides [generic].
#
# A band is p10 and p90 of (true / our) step time: of groups (model x GPU x engine) that the
# fit had not seen for a GPU that was fitted, of GPUs that it had not seen for a generation,
# and of the generic entry on all rows and on MLPerf's AMD results.
"""

ENGINE_NOTES = {
    "vllm": ("true", 8192, "vLLM v1, 2025-10 to 2026-04: prompt chunks beside decodes"),
    "sglang": ("false", 16384, "SGLang, 2025-10 to 2026-04: prompts alone, polled"),
    "trtllm": ("true", 8192, "TensorRT-LLM, 2025-10 to 2026-04: in-flight batching"),
}


def rates_file(rows: Sequence[Row], fit: Fit, observed: Sequence[Line]) -> str:
    """The text of `rates.toml`."""
    by_group = held_out(rows, observed, fit, lambda row: fold_of(row.group))
    by_gpu = held_out(rows, observed, fit, lambda row: row.gpu.name)
    bands = {
        "fitted": ("fitted", band(by_group)),
        "kernels": ("fitted", band(by_gpu)),
        "datasheet": ("datasheet", datasheet_band(rows, fit)),
    }
    text = [HEAD]
    text += _entry("generic", fit, None, "", "datasheet", "generic efficiencies over the datasheet")
    for generation in KERNELS:
        source = f"{generation.title()}: kernel timings and the generation's measured stacks"
        text += _entry(f'rates."{generation}"', fit, None, generation, "kernels", source)
    gpus = {row.gpu.name: row.gpu for row in rows}
    for name, gpu in sorted(gpus.items()):
        own = [o for o in by_group if o.row.gpu.name == name]
        bands[name] = ("fitted", band(own)) if len(own) >= BAND_ROWS_MIN else bands["fitted"]
        source = f"{gpu.title}: {len(own):,} published measurements, shrunk to its generation"
        text += _entry(f"rates.{name}", fit, gpu, "", name, source)
    for name, (kind, (low, high)) in bands.items():
        text.append(f'[band.{name}]\nkind = "{kind}"\nlow = {low}\nhigh = {high}\n')
    for name, (mixes, budget, source) in ENGINE_NOTES.items():
        engine = fit.engine(name)
        text.append(
            f"[engine.{name}]\nhost_s = {_digits(engine.host_s)}\n"
            f"wait_steps = {_digits(engine.wait_steps)}\nmixes_prefill = {mixes}\n"
            f'batch_tokens = {budget}\nsource = "{source}"\n'
        )
    groups = ",\n".join(f'  "{group}"' for group in sorted({row.group for row in rows}))
    text.append(f"[fitted]\ngroups = [\n{groups},\n]\n")
    return "\n".join(text)


def _entry(
    title: str, fit: Fit, gpu: GpuSpec | None, generation: str, band_name: str, source: str
) -> list[str]:
    flat = {name: fit.constant(name, gpu, generation) for name in GENERIC}
    out = [f"[{title}]", f'band = "{band_name}"', f'source = "{source}"']
    for kind in dict.fromkeys(name.partition(".")[0] for name in flat):
        if kind in flat:
            out.append(f"{kind} = {_digits(flat[kind])}")
            continue
        parts = {n.partition(".")[2]: v for n, v in flat.items() if n.startswith(f"{kind}.")}
        inside = ", ".join(f"{key} = {_digits(value)}" for key, value in parts.items())
        out.append(f"{kind} = {{ {inside} }}")
    return ["\n".join(out) + "\n"]


def _digits(value: float) -> str:
    """Three digits: more would claim what the data cannot say."""
    return f"{float(f'{value:.3g}')}"


def main() -> None:
    """Fits, says what the fit is worth, and writes the file."""
    rows = clean_rows(data_folder())
    fit, observed = fit_rows(rows)
    write_text(OUTPUT, rates_file(rows, fit, observed))
    print(f"{OUTPUT.name}: {len(observed):,} observations of {len(rows):,} rows")


if __name__ == "__main__":
    main()
