"""How true the step law is, on published measurements: `docs/reference/accuracy.md`.

    python tools/accuracy.py            # measures and writes the page
    python tools/accuracy.py --check    # measures and compares with the committed page

Deterministic, about four minutes on one core. What a row is, how it is predicted and how
errors are summed up is `tierline.planner.accuracy`, which `tierline accuracy` runs on any
file; this script adds the constants that did not see the rows they are asked about.
"""

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fit_rates import (
    START,
    Fit,
    data_folder,
    fit_rows,
    fold_of,
    generic_outcomes,
    held_out,
    published,
)
from tierline.base.files import write_text
from tierline.perf.step import load_rates
from tierline.planner.accuracy import (
    Outcome,
    few_shot,
    grouped,
    outcome,
    rank_of,
    spearman,
)
from tierline.planner.load import at_concurrency
from tierline.planner.measured import Row, architecture_of
from tierline.planner.measured_files import Run, read_measured
from tierline.planner.measured_runs import (
    RunOutcome,
    calibrate_and_predict,
    tpot_mean_s,
    ttft_mean_s,
)
from tierline.planner.recipes import Launch

PAGE = Path(__file__).resolve().parents[1] / "docs/reference/accuracy.md"
TOLERANCE = 0.5  # of a printed figure: rounding differs between processors
QUIET_CLIENTS = 4
DRAWS = 5
RUNS = "measured_vllm_per_request.jsonl.gz"
WORST = 10
CLEAR = 1.1  # costs nearer than this are a tie to a buyer
RANK_ASKED = 0.9
RANKED_MIN = 3  # an order of two GPUs says little

HEAD = """\
# How true the numbers are

Written by `python tools/accuracy.py`; `--check` compares. `tierline accuracy FILE...` prints the
same figures for rows of your own. Errors are |predicted / measured - 1| in percent: median / p90 /
signed median (bias). Rows were measured by others: InferenceX runs (aggregated, closed loop,
2025-10 to 2026-04), TensorRT-LLM's published offline tables, and MLPerf Inference v4.1 (closed
division, retrieved from the public repository; not verified by MLCommons).

TPOT and TTFT come from replaying the benchmark's client (all clients start at once, ten prompts
each) against the step law, with the launch settings of the benchmark's published recipes
(`planner/recipes.py`). "Load model" is the planner's closed form for a steady state, which knows
nothing of that protocol.

A group is an architecture on an accelerator under an engine; checkpoints of one shape are one
architecture (DeepSeek-V3 and R1, Llama-3 and 3.3 70B). Held-out figures come from constants
refitted without the rows they are about; which group is in which of the five folds follows from
its name. Four things make them a little optimistic: priors and their strengths were chosen on
these folds; priors of layer and host times are round numbers near those of an earlier study of
the same InferenceX rows; acceptance of drafts (0.7 under TensorRT-LLM, 0.5 under SGLang) and how
far the clients of the other origin are out of step were set by eye on rows like them; and the
rule about Qwen3-32B on GB200 was added after seeing its errors.
"""


def main() -> int:
    """Measures, then writes or compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed page")
    check = parser.parse_args().check
    text = page(data_folder())
    if not check:
        write_text(PAGE, text)
        return 0
    differences = differing_lines(PAGE.read_text(encoding="utf-8"), text)
    print("\n".join(differences) or "accuracy.md holds")
    return 1 if differences else 0


def differing_lines(committed: str, measured: str) -> list[str]:
    """Lines whose words differ, or whose figures differ by more than the tolerance."""
    number = re.compile(r"-?\d+(?:\.\d+)?")
    old, new = committed.splitlines(), measured.splitlines()
    if len(old) != len(new):
        return [f"{len(old)} lines are committed and {len(new)} were measured"]
    found = []
    for before, after in zip(old, new, strict=True):
        figures = zip(number.findall(before), number.findall(after), strict=False)
        same = number.sub("#", before) == number.sub("#", after)
        if not same or any(abs(float(a) - float(b)) > TOLERANCE for a, b in figures):
            found.append(f"- {before}\n+ {after}")
    return found


GROUP = "unseen group (architecture x GPU x engine)"
SPLITS: Mapping[str, Callable[[Row], Any]] = {
    GROUP: lambda row: fold_of(row.group),
    "unseen GPU": lambda row: row.gpu.name,
    "unseen architecture": lambda row: architecture_of(row.model),
    "unseen configuration (30 %)": lambda row: 0 if fold_of(row.config, 10) < 3 else None,
}


def page(folder: Path) -> str:
    """The whole page."""
    found = published(folder)
    closed, offline = found["inferencex"].rows, found["trtllm"].rows
    clean = [row for row in closed if not row.doubt]
    clean += [row for row in offline if row.output_tokens_per_s]
    fit, observed = fit_rows(clean)
    held = {name: held_out(clean, observed, fit, part) for name, part in SPLITS.items()}
    rows = closed + offline + found["mlperf"].rows
    shipped = [o for row in rows if (o := _shipped(row)) is not None]
    parts = [
        HEAD,
        _gates(held, shipped, found["inferencex"].count),
        _splits(held, shipped, generic_outcomes(clean, fit), _priors(clean)),
        _few_shot(held),
        _slices(held[GROUP]),
        _quiet(held[GROUP]),
        _recipes(closed, shipped),
        _load_model(closed),
        _offline(held, shipped, {name: reading.count for name, reading in found.items()}),
        _cost_order(shipped),
        _worst(held[GROUP]),
        _excluded(closed, shipped),
        _runs(read_measured(folder / RUNS).runs),
        _stacks(fit),
    ]
    return "\n".join(parts)


def _shipped(row: Row) -> Outcome | None:
    return outcome(row, load_rates(row.gpu), row.engine)


def _priors(rows: Iterable[Row]) -> list[Outcome]:
    found = (outcome(r, START.rates(r), START.engine(r.engine.name)) for r in rows)
    return [o for o in found if o is not None]


# --- figures ------------------------------------------------------------------------------------


def errors(ratios: Iterable[float]) -> str:
    """Median, p90 and bias in percent, of predicted over measured."""
    values = np.array([r for r in ratios if not math.isnan(r)]) - 1
    if not len(values):
        return "-"
    size = np.abs(values)
    return (
        f"{100 * np.median(size):.1f} / {100 * np.quantile(size, 0.9):.0f} / "
        f"{100 * np.median(values):+.1f}"
    )


def _median(ratios: Iterable[float]) -> float:
    values = np.array([r for r in ratios if not math.isnan(r)]) - 1
    return float(100 * np.median(np.abs(values)))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


# --- sections -----------------------------------------------------------------------------------


def _gates(held: Mapping[str, list[Outcome]], shipped: Sequence[Outcome], asked: int) -> str:
    group, closed = held[GROUP], _closed(shipped)
    three = few_shots(group, points=3)
    offline = [o for o in shipped if o.row.source == "trtllm"]
    order = _cost_ranks(shipped)
    low = [f"{m} {found[0]:.2f}" for m, found in sorted(order.items()) if found[0] < RANK_ASKED]
    medians = {
        "TPOT, unseen group, median": ("<= 12 %", group, "tpot", "19.9 % *"),
        "TTFT, unseen group, median": ("<= 28 %", group, "ttft", "50.6 % *"),
        "TPOT, unseen group and 3 points of the stack": ("<= 7 %", three, "tpot", "-"),
        "TTFT, unseen group and 3 points of the stack": ("<= 20 %", three, "ttft", "-"),
        "offline throughput, unseen group, median": ("<= 24 %", group, "throughput", "-"),
    }
    rows = [
        ("coverage of aggregated rows", ">= 95 %", f"{100 * len(closed) / asked:.1f} %", "66 %")
    ]
    rows += [
        (what, ask, f"{_median(getattr(o, kind) for o in found):.1f} %", peer)
        for what, (ask, found, kind, peer) in medians.items()
    ]
    rows.append(("offline throughput, rank", ">= 0.95", f"{rank_of(offline) or 0:.2f}", "-"))
    rows.append(
        (
            f"models with GPUs by cost per token in order, rank (not: {', '.join(low)})",
            f">= {RANK_ASKED}",
            f"{len(order) - len(low)} of {len(order)}",
            "-",
        )
    )
    note = (
        f"\n{len(closed):,} of {asked:,} aggregated rows are predicted. \\* The leading peer on 439"
        " of a sample of 664 of these rows (its own kernel database, not held out); the other"
        " figures are ours.\n"
    )
    return "## Asked and met\n\n" + _table(("what", "asked", "here", "peer"), rows) + note


def _closed(outcomes: Iterable[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if o.row.source == "inferencex"]


def _splits(
    held: Mapping[str, list[Outcome]],
    shipped: Sequence[Outcome],
    generic: Sequence[Outcome],
    priors: Sequence[Outcome],
) -> str:
    fitted = [o for o in shipped if o.row.source != "mlperf" and not o.row.doubt]
    fitted = [o for o in fitted if o.row.tpot_s or o.row.output_tokens_per_s]
    named = {
        **held,
        "all rows, shipped constants (seen)": fitted,
        "generic entry, all rows (seen)": generic,
        "priors alone, no fit": priors,
    }
    rows = []
    for name, outcomes in named.items():
        ratios = [o.time_ratio for o in outcomes]
        low, high = np.percentile(ratios, [10, 90])
        closed = _closed(outcomes)
        rows.append(
            (
                name,
                f"{len(closed):,} + {len(outcomes) - len(closed):,}",
                errors(o.tpot for o in closed),
                errors(o.ttft for o in closed),
                errors(o.throughput for o in outcomes),
                f"{low:.2f}-{high:.2f}",
            )
        )
    head = ("constants saw", "rows", "TPOT", "TTFT", "offline throughput", "true / ours, p10-p90")
    return "## Splits\n\n" + _table(head, rows)


def few_shots(outcomes: Sequence[Outcome], *, points: int) -> list[Outcome]:
    """Five choices of the measured points, one after the other."""
    return [o for draw in range(DRAWS) for o in few_shot(outcomes, points=points, draw=draw)]


def _few_shot(held: Mapping[str, list[Outcome]]) -> str:
    rows = []
    for name in list(SPLITS)[:3]:
        for points in (0, 1, 3, 5):
            rest = few_shots(held[name], points=points) if points else _closed(held[name])
            rows.append((name, points, errors(o.tpot for o in rest), errors(o.ttft for o in rest)))
    return (
        "## A few measured points of a new stack\n\nThe law's constants saw nothing of it; then"
        " some configurations of the stack (group, version, precision) are measured, and the rest"
        " is predicted with the stack's own factors for TPOT and for TTFT: the median log ratio of"
        f" the points times n / (n + 0.7). {DRAWS} choices of points by their names' hashes.\n\n"
        + _table(("constants saw", "points", "TPOT", "TTFT"), rows)
    )


def _recipes(rows: Sequence[Row], shipped: Sequence[Outcome]) -> str:
    """What knowing the launch settings is worth: the same constants with engine defaults."""
    plain = []
    for row in rows:
        launch = Launch(
            batch_tokens=row.engine.batch_tokens, fused_experts=row.launch.fused_experts
        )
        if row.doubt or (found := _shipped(replace(row, launch=launch))) is None:
            continue
        plain.append(found)
    known = [o for o in _closed(shipped) if not o.row.doubt]
    drafts = [o for o in known if o.row.launch.draft_tokens]
    without = [o for o in plain if o.row.where in {d.row.where for d in drafts}]
    named = {
        "published recipes": known,
        "engine defaults": plain,
        "recipes, rows with drafts": drafts,
        "engine defaults, rows with drafts": without,
    }
    table = [
        (name, len(part), errors(o.tpot for o in part), errors(o.ttft for o in part))
        for name, part in named.items()
    ]
    return (
        "## What launch settings are worth\n\nShipped constants, with the settings that the"
        " benchmark's scripts name and with every engine's defaults in their place.\n\n"
        + _table(("settings", "n", "TPOT", "TTFT"), table)
    )


def _slices(outcomes: Sequence[Outcome]) -> str:
    text = ["## By model, GPU and engine (unseen group)\n"]
    closed = _closed(outcomes)
    keys: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.model.name,
        "GPU": lambda row: row.gpu.name,
        "engine": lambda row: row.engine.name,
        "weights": lambda row: row.layout.weights,
    }
    for name, key in keys.items():
        rows = [
            (value, len(part), errors(o.tpot for o in part), errors(o.ttft for o in part))
            for value, part in sorted(grouped(closed, key).items())
        ]
        text.append(_table((name, "n", "TPOT", "TTFT"), rows))
    return "\n".join(text)


def _quiet(outcomes: Sequence[Outcome]) -> str:
    quiet = [o for o in outcomes if 0 < o.row.clients <= QUIET_CLIENTS and o.row.tpot_s]
    return (
        f"## Few clients\n\nAt most {QUIET_CLIENTS} clients, {len(quiet)} rows: decoding"
        f" with next to no queue. TPOT {errors(o.tpot for o in quiet)}, TTFT"
        f" {errors(o.ttft for o in quiet)}.\n"
    )


def _load_model(rows: Sequence[Row]) -> str:
    found = []
    for row in rows:
        if row.doubt or row.tpot_s is None or row.ttft_s is None:
            continue
        point = at_concurrency(row.instance(), row.demand, row.clients)
        if point is not None:
            found.append(
                Outcome(row, tpot=point.step_s / row.tpot_s, ttft=point.ttft_mean_s / row.ttft_s)
            )
    parts = grouped(found, lambda row: row.engine.name)
    table = [
        (k, len(v), errors(o.tpot for o in v), errors(o.ttft for o in v)) for k, v in parts.items()
    ]
    table.append(("all", len(found), errors(o.tpot for o in found), errors(o.ttft for o in found)))
    return (
        "## Load model instead of the replayed client\n\n"
        "Shipped constants, steady state. TTFT comes out lower because the benchmark sends in"
        " bursts: all clients start together and answers of like length end together.\n\n"
        + _table(("engine", "n", "TPOT", "TTFT"), table)
    )


def _offline(
    held: Mapping[str, list[Outcome]],
    shipped: Sequence[Outcome],
    counts: Mapping[str, int],
) -> str:
    trtllm = [o for o in held[GROUP] if o.row.source == "trtllm"]
    first = [o for o in shipped if o.row.source == "trtllm" and o.row.ttft_s]
    mlperf = [o for o in shipped if o.row.source == "mlperf"]
    rows = []
    for model, part in sorted(grouped(trtllm, lambda row: row.model.name).items()):
        rows.append((model, len(part), errors(o.throughput for o in part), _rank(part)))
    rows.append(("all", len(trtllm), errors(o.throughput for o in trtllm), _rank(trtllm)))
    by_gpu = [
        (name, len(part), errors(o.throughput for o in part), _rank(part))
        for name, part in sorted(grouped(trtllm, lambda row: row.gpu.name).items())
    ]
    by_mlperf = [
        (name, len(part), errors(o.throughput for o in part))
        for name, part in sorted(
            grouped(mlperf, lambda r: f"{r.model.name}, {r.gpu.name}, {r.scenario}").items()
        )
    ]
    return (
        "## Offline throughput\n\nTensorRT-LLM's tables "
        f"({len(trtllm)} of {counts['trtllm'] - len(first)} rows of throughput), unseen group; the"
        " batch is what the KV cache holds, at most 2,048. Rank is Spearman's over lengths, GPUs"
        f" and TP. {len(first)} rows of a static batch's first token, in no fit:"
        f" {errors(o.ttft for o in first)}.\n\n"
        + _table(("model", "n", "error", "rank"), rows)
        + "\n"
        + _table(("GPU", "n", "error", "rank"), by_gpu)
        + f"\nMLPerf v4.1 ({len(mlperf)} of {counts['mlperf']} rows; in no fit, shipped constants;"
        " MI300X runs on the generic entry):\n\n"
        + _table(("model, GPU, scenario", "n", "error"), by_mlperf)
    )


def _rank(outcomes: Sequence[Outcome]) -> str:
    found = rank_of(outcomes)
    return "-" if found is None else f"{found:.2f}"


def _cost_order(shipped: Sequence[Outcome]) -> str:
    rows = [
        (model, f"{rank:.2f}", f"{mean:.2f}", cases, f"{clear:.0f} %", f"{regret:.1f} %")
        for model, (rank, mean, cases, clear, regret) in sorted(_cost_ranks(shipped).items())
    ]
    return (
        "## The order of GPUs by cost per token\n\nFor every shape of prompt and answer of"
        " TensorRT-LLM's tables: each GPU in its best measured and its best predicted layout,"
        " catalogue prices. Rank is Spearman's over all pairs of GPU and shape of a model. Within a"
        " shape is its mean over shapes with at least three GPUs (three to five, often near ties,"
        " so one swap costs 0.5). Clear pairs are those whose measured costs differ by over 10 %,"
        " and the share in the right order. Regret is how much more the GPU that the law puts"
        " first costs than the truly cheapest one, on average.\n\n"
        + _table(("model", "rank", "within a shape", "shapes", "clear pairs", "regret"), rows)
    )


def _cost_ranks(shipped: Sequence[Outcome]) -> dict[str, tuple[float, float, int, float, float]]:
    """By model: rank, mean rank of a shape, shapes, percent of clear pairs in order, regret."""
    shapes: dict[Any, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for o in shipped:
        row, price = o.row, o.row.gpu.price.typical_usd
        if row.source != "trtllm" or row.clients or price is None or not row.output_tokens_per_s:
            continue
        hourly = price * row.layout.gpus
        measured = hourly / row.output_tokens_per_s
        key = (row.model.name, row.version, row.input_tokens, row.output_tokens)
        shapes[key][row.gpu.name].append((measured, measured / o.throughput))
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pairs: dict[str, list[bool]] = defaultdict(list)
    every: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key, gpus in shapes.items():
        measured = [min(m for m, _ in costs) for costs in gpus.values()]
        predicted = [min(p for _, p in costs) for costs in gpus.values()]
        every[key[0]] += zip(measured, predicted, strict=True)
        if len(gpus) < RANKED_MIN:
            continue
        regret = measured[int(np.argmin(predicted))] / min(measured) - 1
        found[key[0]].append((spearman(measured, predicted), 100 * regret))
        for (a, b), (x, y) in zip(
            combinations(measured, 2), combinations(predicted, 2), strict=True
        ):
            if max(a, b) > CLEAR * min(a, b):
                pairs[key[0]].append((a < b) == (x < y))
    return {
        model: (
            spearman(*zip(*every[model], strict=True)),
            float(np.mean([rank for rank, _ in shapes_found])),
            len(shapes_found),
            100 * float(np.mean(pairs[model])),
            float(np.mean([regret for _, regret in shapes_found])),
        )
        for model, shapes_found in found.items()
    }


def _worst(outcomes: Sequence[Outcome]) -> str:
    closed = _closed(outcomes)
    groups = sorted(
        grouped(closed, lambda row: row.group).items(),
        key=lambda item: -_median(o.tpot for o in item[1]),
    )
    by_group = [
        (
            name.replace(" | ", ", "),
            len(part),
            errors(o.tpot for o in part),
            errors(o.ttft for o in part),
        )
        for name, part in groups[:WORST]
    ]
    text = f"## The {WORST} worst groups (unseen group, by TPOT)\n\n"
    text += _table(("group", "n", "TPOT", "TTFT"), by_group)
    for kind in ("tpot", "ttft"):
        ranked = sorted(closed, key=lambda o: (-abs(math.log(getattr(o, kind))), o.row.where))
        rows = [
            (
                o.row.stack.replace(" | ", ", "),
                o.row.layout,
                _load(o.row),
                f"{getattr(o, kind):.2f}",
            )
            for o in ranked[:WORST]
        ]
        text += f"\n## The {WORST} worst rows by {kind.upper()} (unseen group)\n\n"
        text += _table(("stack", "layout", "load", "predicted / measured"), rows)
    return text


def _load(row: Row) -> str:
    return f"{row.input_tokens} in, {row.output_tokens} out, {row.clients} clients"


def _excluded(rows: Sequence[Row], shipped: Sequence[Outcome]) -> str:
    closed = _closed(shipped)
    doubts = grouped([o for o in closed if o.row.doubt], lambda row: row.doubt)
    table = [
        (reason, len(part), errors(o.tpot for o in part), errors(o.ttft for o in part))
        for reason, part in sorted(doubts.items())
    ]
    table.append(
        (
            "all rows, these included",
            len(rows),
            errors(o.tpot for o in closed),
            errors(o.ttft for o in closed),
        )
    )
    return "## Left out of fits and of the figures above, by rule\n\n" + _table(
        ("rule", "n", "TPOT", "TTFT"), table
    )


def _runs(runs: Sequence[Run]) -> str:
    forth, back = calibrate_and_predict(runs), calibrate_and_predict(runs[::-1])[::-1]
    rows = []
    for (alone, by_first), (_, by_second) in zip(forth, back, strict=True):
        run = alone.run
        rows.append(
            (
                f"{run.model.name}, {run.gpu.name}, {run.engine.name} {run.version}, {run.layout}",
                f"{len(run.requests):,}",
                f"{1e3 * ttft_mean_s(run):,.0f} / {1e3 * tpot_mean_s(run):.1f} ms",
                _signed(alone),
                _signed(by_first) + (" (its own)" if run is runs[0] else ""),
                _signed(by_second) + ("" if run is runs[0] else " (its own)"),
            )
        )
    scalars = [found.calibration for found in (forth[0][1], back[0][1]) if found is not None]
    head = ("run", "requests", "measured", "uncalibrated", "scalars of the first", "of the second")
    told = " and ".join(
        f"{1e6 * s.kernel_s:.1f} us a kernel with {1e6 * s.prompt_layer_s:.0f} us a layer"
        for s in scalars
    )
    return (
        "## Runs measured request by request\n\nOpen loop, with arrivals, lengths and prompt"
        " blocks of every request, replayed by the simulator under vLLM's policy; mean TTFT / mean"
        " TPOT and their errors. Asked: 6 % and 5 % on the run that scalars were not found on."
        " Steps are the kernels of that accelerator, timed by others, one after the other"
        " (`perf/kernel_cost.py`). Two scalars are found on one run: the time between two kernels,"
        " and what a layer of a step with prompts takes more, as prompts are not launched as one"
        " graph. The other run, which is another model in another layout, is predicted with them."
        f" The two runs find {told}. Requests wait seconds for a slot, so an error of the gaps"
        " comes back two to five times as large in TTFT. How messages of data-parallel ranks"
        " are counted was settled with both runs in sight: half of what a prompt on one rank adds"
        " is worth 10 % of the second TTFT.\n\n" + _table(head, rows)
    )


def _signed(found: RunOutcome | None) -> str:
    return (
        "-" if found is None else f"{100 * found.ttft - 100:+.1f} / {100 * found.tpot - 100:+.1f} %"
    )


def _stacks(fit: Fit) -> str:
    stacks = [v for name, v in fit.stacks.items() if not name.endswith("| ttft")]
    spread = np.percentile(stacks, [10, 90])
    return (
        f"## Stacks\n\n{len(stacks)} stacks (group, version, precision, drafts) have a speed"
        " factor in the fit, and one for TTFT, so that odd ones do not bend shared constants;"
        " predictions use none."
        f" p10-p90 of the factors: {math.exp(spread[0]):.2f}-{math.exp(spread[1]):.2f}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
