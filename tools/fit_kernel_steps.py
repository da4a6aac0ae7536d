"""Fit what whole steps need beside the kernel laws: `perf/data/kernel_steps.toml`.

    python tools/fit_kernel_steps.py --table kernels_llmservingsim.csv.gz

The table holds layers of three models timed inside vLLM on two accelerators: element-wise
passes, the sampler, routed experts by tokens and touched experts, and attention over a grid
of (prompt tokens, cached before, decodes, cached each). Products are not fitted here: they
have laws of their own, from another database. What is fitted is written with the median and
p90 of its relative errors; timings themselves are not shipped. Prints one JSON line.
"""

import argparse
import csv
import gzip
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from tierline.base.files import write_text
from tierline.catalog.model import ModelSpec
from tierline.planner.measured_names import model_named

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "src/tierline/perf/data/kernel_steps.toml"
GPUS = {"RTXPRO6000": "rtxpro6000se", "RTX4090": "rtx4090"}
SOURCE = "LLMServingSim @ 5daddb2, layers timed in vLLM (MIT)"
HEAD = """\
# What a whole step needs beside the kernel laws in kernels/. Written by
# tools/fit_kernel_steps.py; `errors` are p50 and p90 of the relative error of every fit.

"""
BYTES = 2  # everything in the table is bf16
# Where fits are made: the range that serving sees.
DECODES, CACHED, CHUNKS, BEFORE = (8, 256), (256, 4096), (128, 2048), 2048
MIXED_DECODES, MIXED_CACHED = (16, 128), 2048
EXPERTS_RESIDENT_BYTES = 160e6  # weights below this were in the L2 cache between two timings

Layers = dict[tuple[str, int, str], list[tuple[float, ...]]]  # (model, tp, layer): a, b, c, d, us
Array = Any


def read(path: Path) -> dict[str, Layers]:
    """Rows by accelerator; experts keep their tokens, which are the layer's name, as `b`."""
    found: dict[str, Layers] = defaultdict(lambda: defaultdict(list))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            experts = row["table"] == "moe"
            name = "moe" if experts else row["layer"]
            b = row["layer"] if experts else row["b"]
            cells = (row["a"], b, row["c"], row["d"], row["time_us"])
            key = (row["model"], int(row["tp"]), name)
            found[row["hw"]][key].append(tuple(float(cell or 0) for cell in cells))
    return found


def least(parts: Iterable[Array], measured: Array) -> tuple[Array, Array]:
    """Coefficients that are not negative, of least relative squares; and relative errors."""
    columns = np.stack(list(parts), 1)
    kept = np.ones(columns.shape[1], bool)
    while True:
        scaled = columns[:, kept] / measured[:, None]
        found, *_ = np.linalg.lstsq(scaled, np.ones(len(measured)), rcond=None)
        if (found >= 0).all():
            break
        kept[np.flatnonzero(kept)[found < 0]] = False
    full = np.zeros(columns.shape[1])
    full[kept] = found
    return full, columns @ full / measured - 1


def best(
    predict: Callable[..., Array], measured: Array, **grid: Iterable[float]
) -> tuple[dict[str, float], Array]:
    """The grid's point of least mean absolute log error, and its relative errors."""
    names = list(grid)

    def error(values: tuple[float, ...]) -> float:
        ratio = predict(**dict(zip(names, values, strict=True))) / measured
        return float(np.abs(np.log(ratio)).mean())

    point = dict(zip(names, min(itertools.product(*grid.values()), key=error), strict=True))
    return point, predict(**point) / measured - 1


def _spread(errors: Array) -> list[float]:
    return [round(float(np.quantile(np.abs(errors), q)), 3) for q in (0.5, 0.9)]


# --- attention --------------------------------------------------------------------------------


def _shapes(layers: Layers) -> Iterable[tuple[Array, int, int, int]]:
    """Timings of attention with query heads, KV heads and head size of one rank."""
    for (name, tp, layer), rows in sorted(layers.items()):
        if layer == "attention":
            group = model_named(name).attention[0]
            heads = group.query_heads // tp, group.kv_heads_per_rank(tp)
            yield np.array(rows), *heads, group.head_dim


def fit_decode(layers: Layers) -> tuple[dict[str, float], Array]:
    """Two lines over the bytes of the cache: what a small one takes, and a large one."""
    moved, measured = [], []
    for rows, _, kv, size in _shapes(layers):
        new, _, decodes, cached, us = rows.T
        keep = (new == 0) & (decodes >= DECODES[0]) & (decodes <= DECODES[1])
        keep &= (cached >= CACHED[0]) & (cached <= CACHED[1])
        moved.append((decodes * cached * kv * 2 * size * BYTES)[keep])
        measured.append(us[keep])
    x, y = np.concatenate(moved), np.concatenate(measured)

    def predict(start: float, small: float, ramp: float, large: float) -> Array:
        return np.minimum(start + x / small / 1e3, ramp + x / large / 1e3)

    top = float(np.max(x / y) / 1e3)
    point, errors = best(
        predict,
        y,
        start=np.arange(6.0, 17.0, 1.0),
        small=top * np.arange(0.55, 0.92, 0.02),
        ramp=np.arange(20.0, 76.0, 4.0),
        large=top * np.arange(0.94, 1.05, 0.01),
    )
    return {
        "decode_start_us": point["start"],
        "decode_small_gb_per_s": point["small"],
        "decode_ramp_us": point["ramp"],
        "decode_gb_per_s": point["large"],
    }, errors


def fit_mixed(layers: Layers) -> tuple[dict[str, float], Array]:
    """What decodes take in a launch that also serves a prompt: that launch less the prompt."""
    parts: list[list[Array]] = [[], [], []]
    measured = []
    for rows, query, _, size in _shapes(layers):
        alone = {(a, b): us for a, b, c, _, us in rows if c == 0}
        keep = [
            (a, c, d, us - alone[a, b])
            for a, b, c, d, us in rows
            if (a, b) in alone
            and CHUNKS[0] <= a <= CHUNKS[1]
            and b <= BEFORE
            and MIXED_DECODES[0] <= c <= MIXED_DECODES[1]
            and CACHED[0] <= d <= MIXED_CACHED
            and us > 1.2 * alone[a, b]
        ]
        new, decodes, cached, us = np.array(keep).T
        parts[0].append(decodes * query)
        parts[1].append(decodes * query * new)
        parts[2].append(decodes * query * cached * 2 * size * BYTES)
        measured.append(us)
    (head, block, byte), errors = least(map(np.concatenate, parts), np.concatenate(measured))
    return {
        "unpacked_gb_per_s": 1e-3 / byte,
        "unpacked_head_ns": head * 1e3,
        "unpacked_block_ns": block * 1e3,
    }, errors


# --- the rest ---------------------------------------------------------------------------------


def fit_passes(layers: Layers) -> tuple[dict[str, float], Array]:
    """Norms, rotary and activation: a start, bytes, and those that the L2 cache has no room for."""
    moved, measured = [], []
    for (name, tp, layer), rows in sorted(layers.items()):
        model = model_named(name)
        elements = _elements(model, tp).get(layer)
        if elements is not None:
            table = np.array(rows)
            keep = table[:, 0] <= CHUNKS[1]
            moved.append(table[keep, 0] * elements * BYTES)
            measured.append(table[keep, 4])
    x, y = np.concatenate(moved), np.concatenate(measured)

    def predict(start: float, rate: float, resident: float, beyond: float) -> Array:
        return start + x / rate / 1e3 + np.maximum(x / 1e6 - resident, 0.0) / beyond * 1e3

    point, errors = best(
        predict,
        y,
        start=np.arange(1.6, 3.3, 0.2),
        rate=np.arange(2000.0, 8001.0, 500.0),
        resident=np.arange(20.0, 101.0, 10.0),
        beyond=np.arange(800.0, 2801.0, 200.0),
    )
    return {
        "pass_us": point["start"],
        "pass_gb_per_s": point["rate"],
        "pass_resident_mb": point["resident"],
        "pass_beyond_gb_per_s": point["beyond"],
    }, errors


def _elements(model: ModelSpec, tp: int) -> Mapping[str, float]:
    """Elements that a pass moves for one token."""
    group, ffn = model.attention[0], model.ffn[0]
    heads = (group.query_heads // tp + group.kv_heads_per_rank(tp)) * group.head_dim
    found = {"layernorm": 4.0 * model.hidden, "rotary_emb": 2.0 * heads}
    if ffn.dense_params_per_layer:
        found["act_fn"] = ffn.dense_params_per_layer / model.hidden / tp
    return found


def fit_sampler(layers: Layers) -> tuple[dict[str, float], Array]:
    """A start, and the logits of every sequence."""
    elements, measured = [], []
    for (name, _, layer), rows in sorted(layers.items()):
        if layer == "sampler":
            table = np.array(rows)
            elements.append(table[:, 0] * model_named(name).vocabulary)
            measured.append(table[:, 4])
    x, y = np.concatenate(elements), np.concatenate(measured)
    (start, each), errors = least([np.ones(len(x)), x], y)
    return {"sampler_us": start, "sampler_ns_per_element": each * 1e3}, errors


def fit_experts(layers: Layers) -> tuple[dict[str, float], Array] | None:
    """Reading touched experts against computing: a soft roofline and a start."""
    rows = [
        (name, row) for (name, _, layer), part in layers.items() for row in part if layer == "moe"
    ]
    if not rows:
        return None
    group = model_named(rows[0][0]).ffn[0]
    table = np.array([row for _, row in rows])
    touched, tokens, us = table[:, 0], table[:, 1], table[:, 4]
    read = touched * group.params_per_expert * BYTES
    flops = tokens * group.experts_active * 2 * group.params_per_expert
    keep = read > EXPERTS_RESIDENT_BYTES
    read, flops, us = read[keep], flops[keep], us[keep]

    def predict(start: float, rate: float, math: float, p: float) -> Array:
        return start + ((read / rate / 1e3) ** p + (flops / math / 1e6) ** p) ** (1 / p)

    point, errors = best(
        predict,
        us,
        start=np.arange(0.0, 51.0, 5.0),
        rate=np.arange(1300.0, 1650.0, 15.0),
        math=np.arange(200.0, 451.0, 25.0),  # the peak is 468
        p=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0),
    )
    return {
        "expert_us": point["start"],
        "expert_gb_per_s": point["rate"],
        "expert_tflops": point["math"],
        "expert_sharpness": point["p"],
    }, errors


FITS = {
    "decode": fit_decode,
    "mixed": fit_mixed,
    "passes": fit_passes,
    "sampler": fit_sampler,
    "experts": fit_experts,
}


def fit(layers: Layers) -> dict[str, Any]:
    """All facts of one accelerator."""
    facts: dict[str, float] = {}
    errors: dict[str, list[float]] = {}
    for name, fitted in FITS.items():
        if (found := fitted(layers)) is not None:
            facts |= found[0]
            errors[name] = _spread(found[1])
    rounded = {key: float(f"{value:.4g}") for key, value in facts.items()}
    return {"source": SOURCE, **rounded, "errors": errors}


def main() -> int:
    """Fits and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    found = {GPUS[name]: fit(layers) for name, layers in sorted(read(arguments.table).items())}
    write_text(arguments.out, HEAD + tomli_w.dumps(found))
    print(json.dumps({gpu: facts["errors"] for gpu, facts in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
