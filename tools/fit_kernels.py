"""Fit the kernel laws to published timings, and say how well they hold on rows left out.

    python tools/fit_kernels.py --wheel aiconfigurator_core-0.12.0-*.whl    # what ships
    python tools/fit_kernels.py --slim kernels_slim.parquet --out DIR       # a quick look

Writes one coefficients file for each accelerator, the generic efficiencies, and (with the
wheel) docs/reference/kernel-accuracy.md. Prints one JSON line.

A row is left out by the hash of its shape, never by chance: one group of shapes in five
(all rows of one weight, one head layout, one expert layout), and of the others one shape
in eight; of collectives, which have no groups, one in three. The first says how a model
nobody measured fares, the second how well a measured one is interpolated. Neither kind is
in any fit.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tierline.base.files import write_text
from tierline.catalog.formats import weight_format
from tierline.perf.kernels import (
    RESIDUAL_STEP,
    Law,
    Work,
    collective_work,
    decode_work,
    gemm_work,
    moe_work,
    prefill_work,
    read_law,
)

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "src/tierline/perf/data/kernels"
REPORT = ROOT / "docs/reference/kernel-accuracy.md"

# The accelerators with tables: our name, theirs, and the vLLM release that was timed.
GPUS = {
    "a100-80": ("a100_sxm", "vllm/0.14.0"),
    "l40s": ("l40s", "vllm/0.24.0"),
    "h100-sxm": ("h100_sxm", "vllm/0.24.0"),
    "h200": ("h200_sxm", "vllm/0.24.0"),
    "b200": ("b200_sxm", "vllm/0.24.0"),
    "b300": ("b300_sxm", "vllm/0.24.0"),
    "gb200": ("gb200", "vllm/0.24.0"),
    "gb300": ("gb300", "vllm/0.24.0"),
    "rtxpro6000se": ("rtx_pro_6000_server", "vllm/0.24.0"),
    "b60": ("b60", "vllm/0.26.0"),
}
FORMATS = {  # their name of a format, ours
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8-block",
    "nvfp4": "nvfp4",
    "int4_wo": "int4-g128",
    "int8_wo": "int8-g128",
    "sq": "int8",
    "w4a16_mxfp4": "mxfp4",
}
# vLLM's block-FP8 GEMM was timed one launch at a time (55 us at any size on an H100, 150 us
# on a B200), which is Python, not the kernel. The same DeepGEMM kernel timed in a graph
# stands in; where SGLang has no table, TensorRT-LLM's.
BLOCK_ENGINE = {"l40s": "trtllm/1.3.0rc20", "rtxpro6000se": "trtllm/1.3.0rc20"}
BLOCK_DEFAULT = "sglang/0.5.14"
WEIGHT_ONLY_ENGINE = {"a100-80": "trtllm/1.0.0"}
NCCL = {  # library and version of the collectives' table
    "a100-80": "nccl/2.27.3",
    "l40s": "nccl/2.27.3",
    "b60": "oneccl/2021.17.2",
}
NCCL_DEFAULT = "nccl/2.29.2"
NCCL_OPS = {
    "all_reduce": "nccl-all-reduce",
    "all_gather": "nccl-all-gather",
    "alltoall": "nccl-all-to-all",
}
CUSTOM_VERSION = {"l40s": "vllm/0.22.0"}  # where the release above has no all-reduce table
# vLLM 0.24's per-tensor FP8 experts took five times those of BF16 on Hopper; the release
# before did not, and neither does TensorRT-LLM.
EXPERT_ENGINE = {("h100-sxm", "fp8"): "trtllm/1.3.0rc20", ("h200", "fp8"): "vllm/0.19.0"}
ROUTING = "power_law_1.01"  # the routing the expert tables are read at
HEAD_DIMS = (64, 128, 192, 256)

TILES = (1, 2, 8, 16, 17, 32, 33, 64, 65, 128, 129, 192, 193, 256, 257, 384, 512, 513)
KNOTS: dict[str, tuple[tuple[float, ...], ...]] = {
    "gemm": (
        # Both sides of a tile's edge: 65 rows cost what 128 do.
        (*TILES, 768, 1024, 1025, 1536, 2048, 3072, 4096, 8192, 16384),
        (32, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 65536),
        (32, 128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 65536),
    ),
    "decode": (
        (2, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072),
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192),
        (1, 2, 4, 8, 16, 48),
    ),
    "prefill": (
        (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
        (1, 2, 4, 8, 16, 48),
    ),
    "moe": (
        (0.004, 0.03, 0.125, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096),
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
        (2**17, 2**19, 2**20, 2**21, 2**22, 2**23, 2**24, 2**26),
    ),
    "comm": (tuple(2.0**power for power in range(8, 31)), (2, 4, 8), (1,)),
}
SMOOTHNESS = 0.1  # weight of a bend between knots against one row's log error
OUTLIER = 0.03  # log error beyond which a row pulls with constant force: a median, not a mean
MAX_MEASURED_TOKENS = 8192  # the gates' range of m


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one law: what was run, how long it took, and which are left out."""

    work: Work
    seconds: np.ndarray
    names: np.ndarray  # the shape of each row, as text
    groups: np.ndarray  # the group it is left out with, as text
    table: str  # which table they are from

    def take(self, mask: np.ndarray) -> "Rows":
        """The rows where `mask` holds."""
        part = {f.name: getattr(self.work, f.name) for f in fields(Work)}
        work = Work(
            flops=np.broadcast_to(part["flops"], mask.shape)[mask],
            bytes_moved=part["bytes_moved"][mask],
            at=tuple(np.broadcast_to(axis, mask.shape)[mask] for axis in part["at"]),
        )
        return Rows(
            work=work,
            seconds=self.seconds[mask],
            names=self.names[mask],
            groups=self.groups[mask],
            table=self.table,
        )


def left_out(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the rows left out: whole groups, and single shapes of the other groups."""
    by_group = {g: _digest(g) % 5 == 0 for g in set(rows.groups) if g}
    groups = np.array([by_group.get(g, False) for g in rows.groups], bool)
    every = 8 if by_group else 3  # collectives have few rows and no groups
    shapes = np.array([_digest(name) % every == 0 for name in rows.names], bool) & ~groups
    return groups, shapes


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- reading the tables --------------------------------------------------------------------

Columns = Mapping[str, np.ndarray]


def gemm_rows(columns: Columns, fmt: str, table: str) -> Rows:
    m, n, k = columns["m"], columns["n"], columns["k"]
    return _rows(
        gemm_work(m, n, k, fmt=fmt), columns, table, group=(n, k), rest=(m,), key=f"gemm/{fmt}"
    )


def decode_rows(columns: Columns, kv_fmt: str, head_dim: int, table: str) -> Rows:
    heads, kv_heads, kv = columns["heads"], columns["kv_heads"], columns["kv"]
    work = decode_work(
        batch=columns["batch"],
        kv=kv,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_fmt=kv_fmt,
    )
    rest = (columns["batch"], kv)
    return _rows(work, columns, table, group=(heads, kv_heads), rest=rest, key="decode")


def prefill_rows(columns: Columns, kv_fmt: str, head_dim: int, table: str) -> Rows:
    heads, kv_heads, new = columns["heads"], columns["kv_heads"], columns["new"]
    work = prefill_work(
        new=new,
        prior=0.0,
        batch=columns["batch"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_fmt=kv_fmt,
    )
    rest = (columns["batch"], new)
    return _rows(work, columns, table, group=(heads, kv_heads), rest=rest, key="prefill")


def moe_rows(columns: Columns, fmt: str, table: str) -> Rows:
    names = ("hidden", "inter", "topk", "experts", "tp", "ep")
    layout = {name: columns[name] for name in names}
    work = moe_work(columns["tokens"], fmt=fmt, **layout)
    return _rows(
        work,
        columns,
        table,
        group=tuple(layout.values()),
        rest=(columns["tokens"],),
        key=f"moe/{fmt}",
    )


def comm_rows(columns: Columns, op: str, table: str) -> Rows:
    size, gpus = columns["bytes"], columns["gpus"]
    return _rows(
        collective_work(op, size, gpus=gpus), columns, table, group=(), rest=(size, gpus), key=op
    )


def _rows(
    work: Work,
    columns: Columns,
    table: str,
    *,
    group: tuple[np.ndarray, ...],
    rest: tuple[np.ndarray, ...],
    key: str,
) -> Rows:
    seconds = columns["latency_ms"] * 1e-3
    text = ["x".join(str(int(v)) for v in values) for values in zip(*group, strict=True)]
    groups = [f"{key}:{t}" for t in text] if group else [""] * len(seconds)
    tail = ["x".join(str(int(v)) for v in values) for values in zip(*rest, strict=True)]
    names = [f"{g}:{t}" if g else f"{key}:{t}" for g, t in zip(groups, tail, strict=True)]
    return Rows(
        work=work, seconds=seconds, names=np.array(names), groups=np.array(groups), table=table
    )


class Wheel:
    """The tables inside the wheel: a file, or the folder it was unpacked to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive = zipfile.ZipFile(path) if path.is_file() else None

    def describe(self) -> dict[str, str]:
        """Name and version, and the hash of the wheel's list of its files, which pins them all."""
        record = next(name for name in self.names() if name.endswith(".dist-info/RECORD"))
        name, version = record.split("/")[0].removesuffix(".dist-info").split("-")
        return {
            "source": f"{name.replace('_', '-')} {version}",
            "record_sha256": hashlib.sha256(self.read(record)).hexdigest(),
        }

    def names(self) -> list[str]:
        if self.archive:
            return self.archive.namelist()
        return [str(p.relative_to(self.path)) for p in self.path.glob("*/RECORD")]

    def read(self, name: str) -> bytes:
        return self.archive.read(name) if self.archive else (self.path / name).read_bytes()

    def table(self, name: str) -> dict[str, np.ndarray] | None:
        """The columns of one table, or None when the wheel has no such table."""
        import pyarrow.parquet

        try:
            raw = self.read(f"aiconfigurator_core/systems/data/{name}")
        except (KeyError, FileNotFoundError):
            return None
        table = pyarrow.parquet.read_table(io.BytesIO(raw))
        return {c: np.asarray(table[c].to_numpy(zero_copy_only=False)) for c in table.column_names}


def wheel_rows(wheel: Wheel, gpu: str) -> Iterator[tuple[str, Rows]]:
    """Every law's key and rows that the wheel has for `gpu`."""
    folder, engine = GPUS[gpu]
    for key, column, fmt_engine in _gemm_tables(gpu, engine):
        table = wheel.table(f"{folder}/gemm/{fmt_engine}/gemm_perf.parquet")
        if table is not None:
            part = _where(table, table["gemm_dtype"] == column)
            yield f"gemm/{key}", gemm_rows(_floats(part, "m", "n", "k"), key, fmt_engine)
    yield from _attention_tables(wheel, folder, engine)
    yield from _moe_tables(wheel, gpu, folder, engine)
    yield from _comm_tables(wheel, gpu, folder, engine)


def _gemm_tables(gpu: str, engine: str) -> Iterator[tuple[str, str, str]]:
    for column in ("bfloat16", "fp8", "nvfp4"):
        yield FORMATS[column], column, engine
    yield "fp8-block", "fp8_block", BLOCK_ENGINE.get(gpu, BLOCK_DEFAULT)
    if gpu in WEIGHT_ONLY_ENGINE:
        for column in ("int4_wo", "int8_wo", "sq"):
            yield FORMATS[column], column, WEIGHT_ONLY_ENGINE[gpu]


def _attention_tables(wheel: Wheel, folder: str, engine: str) -> Iterator[tuple[str, Rows]]:
    for op, file, reader in (
        ("decode", "generation_attention_perf", decode_rows),
        ("prefill", "context_attention_perf", prefill_rows),
    ):
        table = wheel.table(f"{folder}/attention/{engine}/{file}.parquet")
        if table is None:
            continue
        full = table.get("window_size", np.zeros(len(table["latency"]))) == 0
        for column in ("bfloat16", "fp8"):
            for head_dim in HEAD_DIMS:
                mask = full & (table["kv_cache_dtype"] == column) & (table["head_dim"] == head_dim)
                part = _where(table, mask)
                columns = _floats(part, "batch_size", "num_heads", "num_key_value_heads")
                named = {
                    "batch": columns["batch_size"],
                    "heads": columns["num_heads"],
                    "kv_heads": columns["num_key_value_heads"],
                    "new": part["isl"].astype(float),
                    "kv": part["isl"].astype(float) + part["step"],
                    "latency_ms": columns["latency_ms"],
                }
                fmt = FORMATS[column]
                yield f"{op}/{fmt}/{head_dim}", reader(named, fmt, head_dim, engine)


def _moe_tables(wheel: Wheel, gpu: str, folder: str, default: str) -> Iterator[tuple[str, Rows]]:
    for column, fmt in FORMATS.items():
        engine = EXPERT_ENGINE.get((gpu, fmt), default)
        table = wheel.table(f"{folder}/moe/{engine}/moe_perf.parquet")
        if table is None:
            continue
        part = _where(table, (table["moe_dtype"] == column) & (table["distribution"] == ROUTING))
        named = {
            "tokens": part["num_tokens"],
            "hidden": part["hidden_size"],
            "inter": part["inter_size"],
            "topk": part["topk"],
            "experts": part["num_experts"],
            "tp": part["moe_tp_size"],
            "ep": part["moe_ep_size"],
            "latency_ms": part["latency"],
        }
        named = {name: values.astype(float) for name, values in named.items()}
        yield f"moe/{fmt}", moe_rows(named, fmt, f"{engine}, {ROUTING}")


def _comm_tables(wheel: Wheel, gpu: str, folder: str, engine: str) -> Iterator[tuple[str, Rows]]:
    release = CUSTOM_VERSION.get(gpu, engine)
    table = wheel.table(f"{folder}/comm/{release}/custom_allreduce_perf.parquet")
    if table is not None:
        in_graph = table["backend"] == "vllm_graph"
        part = _where(table, in_graph if in_graph.any() else ~in_graph)
        named = {
            "bytes": part["message_size"] * 2.0,
            "gpus": part["num_gpus"].astype(float),
            "latency_ms": part["latency"],
        }
        yield "comm/all-reduce", comm_rows(named, "all-reduce", release)
    library = NCCL.get(gpu, NCCL_DEFAULT)
    table = wheel.table(f"{folder}/comm/{library}/{library.split('/')[0]}_perf.parquet")
    if table is None:
        return
    for column, op in NCCL_OPS.items():
        part = _where(table, (table["op_name"] == column) & (table["nccl_dtype"] == "half"))
        named = {
            "bytes": part["message_size"] * 2.0,
            "gpus": part["num_gpus"].astype(float),
            "latency_ms": part["latency"],
        }
        yield f"comm/{op}", comm_rows(named, op, library)


def _where(table: Columns, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[mask] for name, values in table.items()}


def _floats(table: Columns, *names: str) -> dict[str, np.ndarray]:
    columns = {name: table[name].astype(float) for name in names}
    return columns | {"latency_ms": table["latency"].astype(float)}


def slim_rows(path: Path, gpu: str) -> Iterator[tuple[str, Rows]]:
    """Every law's key and rows that the published sample has for `gpu`."""
    import pyarrow.parquet

    raw = pyarrow.parquet.read_table(path, filters=[("system", "=", GPUS[gpu][0])])
    table = {c: np.asarray(raw[c].to_numpy(zero_copy_only=False)) for c in raw.column_names}
    p = [table[f"p{i}"].astype(float) for i in range(1, 7)]
    columns = {"latency_ms": table["latency_ms"], "m": p[0], "n": p[1], "k": p[2]}
    columns |= {"batch": p[0], "new": p[1], "kv": p[1] + p[2], "heads": p[3], "kv_heads": p[4]}
    engine = GPUS[gpu][1]
    for column in ("bfloat16", "fp8", "nvfp4"):
        mask = (table["op"] == "gemm") & (table["dtype"] == column)
        fmt = FORMATS[column]
        yield f"gemm/{fmt}", gemm_rows(_where(columns, mask), fmt, engine)
    readers: dict[str, tuple[str, Callable[..., Rows]]] = {
        "decode": ("gen_attn", decode_rows),
        "prefill": ("ctx_attn", prefill_rows),
    }
    for op, (theirs, reader) in readers.items():
        for column in ("bfloat16", "fp8"):
            mask = (table["op"] == theirs) & (table["dtype"] == f"bfloat16/kv_{column}")
            fmt = FORMATS[column]
            yield f"{op}/{fmt}/128", reader(_where(columns, mask), fmt, 128, engine)


# --- fitting -------------------------------------------------------------------------------


def fit_law(op: str, rows: Rows) -> dict[str, Any]:
    """The coefficients of one law, as they are stored."""
    # With more ranks the busiest one is slowed by the routing, which is the grid's to say.
    even = rows.take(np.asarray(rows.work.at[1]) == 1) if op == "moe" else rows
    roof = fit_roofline(even)
    axes = [_inside(knots, axis) for knots, axis in zip(KNOTS[op], rows.work.at, strict=True)]
    log_ratio = np.log(rows.seconds / _roofline(roof, rows.work))
    grid = fit_residual([np.log(axis) for axis in axes], rows.work.at, log_ratio)
    cells = np.clip(np.round(grid / RESIDUAL_STEP), -127, 127).astype(np.int8)
    names = ("flops_per_s", "bytes_per_s", "overhead_s", "sharpness")
    return {
        **{name: float(f"{value:.4g}") for name, value in zip(names, roof, strict=True)},
        "axes": [[int(v) if v == int(v) else v for v in axis] for axis in axes],
        "residual": base64.b64encode(cells.tobytes()).decode(),
        "table": rows.table,
    }


def fit_roofline(rows: Rows) -> np.ndarray:
    """F, B, overhead and p by least squares of the log error, far rows counting less."""
    from scipy.optimize import least_squares

    # A few thousand rows settle four numbers; every n-th one, so that a refit is the same.
    part = rows.take(np.arange(len(rows.seconds)) % max(1, len(rows.seconds) // 4000) == 0)
    flops = np.asarray(part.work.flops)
    fastest = np.percentile(flops / part.seconds, 99)
    rate = np.percentile(part.work.bytes_moved / part.seconds, 98)
    start = np.log([max(fastest, 1.0), rate, part.seconds.min(), 2.0])

    def miss(logs: np.ndarray) -> np.ndarray:
        return np.log(_roofline(np.exp(logs), part.work) / part.seconds)

    low, high = start - np.array([2, 2, 3, math.log(2)]), start + np.array([1, 1, 1, math.log(5)])
    found = least_squares(miss, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return np.exp(found.x)


def _roofline(roof: np.ndarray, work: Work) -> np.ndarray:
    flops, memory, overhead, p = roof
    return ((work.flops / flops) ** p + (work.bytes_moved / memory) ** p) ** (1 / p) + overhead


def fit_residual(axes: list[np.ndarray], at: tuple[Any, ...], log_ratio: np.ndarray) -> np.ndarray:
    """The log-residual at the knots: near the rows' median, and straight where there are none."""
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    shape = tuple(len(axis) for axis in axes)
    design = _design(axes, at, len(log_ratio))
    bend = _bends(axes)
    smooth = SMOOTHNESS * (bend.T @ bend) + 1e-3 * sparse.identity(math.prod(shape))
    weight = np.ones(len(log_ratio))
    for _ in range(4):
        normal = design.T @ sparse.diags(weight) @ design + smooth
        grid = spsolve(normal.tocsc(), design.T @ (weight * log_ratio))
        weight = 1.0 / np.maximum(1.0, np.abs(log_ratio - design @ grid) / OUTLIER)
    return np.asarray(grid).reshape(shape)


def _design(axes: list[np.ndarray], at: tuple[Any, ...], count: int) -> Any:
    """The matrix that interpolates knot values at the rows."""
    from scipy import sparse

    index, weight = np.zeros((count, 1), int), np.ones((count, 1))
    for axis, coordinate in zip(axes, at, strict=True):
        x = np.clip(np.log(np.broadcast_to(coordinate, (count,))), axis[0], axis[-1])
        if len(axis) == 1:
            continue
        low = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, len(axis) - 2)
        share = ((x - axis[low]) / (axis[low + 1] - axis[low]))[:, None]
        base = index * len(axis) + low[:, None]
        index = np.hstack([base, base + 1])
        weight = np.hstack([weight * (1 - share), weight * share])
    rows = np.repeat(np.arange(count), index.shape[1])
    size = (count, math.prod(len(axis) for axis in axes))
    return sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=size)


def _bends(axes: list[np.ndarray]) -> Any:
    """Second differences along each axis; over two knots, the first difference."""
    from scipy import sparse

    sizes = [len(axis) for axis in axes]
    blocks = []
    for which, axis in enumerate(axes):
        gaps = np.diff(axis)
        if len(gaps) == 0:
            continue
        bend = np.zeros((max(len(axis) - 2, 1), len(axis)))
        for i in range(len(axis) - 2):
            mean = (gaps[i] + gaps[i + 1]) / 2
            bend[i, i], bend[i, i + 2] = mean / gaps[i], mean / gaps[i + 1]
            bend[i, i + 1] = -bend[i, i] - bend[i, i + 2]
        if len(axis) == 2:
            bend[0] = [-0.3, 0.3]
        factors = [sparse.identity(size) for size in sizes]
        factors[which] = sparse.csr_matrix(bend)
        product = factors[0]
        for factor in factors[1:]:
            product = sparse.kron(product, factor)
        blocks.append(product)
    return sparse.vstack(blocks).tocsr()


def _inside(knots: tuple[float, ...], axis: Any) -> list[float]:
    """The knots that the rows reach, with the nearest one beyond each end."""
    low, high = float(np.min(axis)), float(np.max(axis))
    first = max((i for i, knot in enumerate(knots) if knot <= low), default=0)
    last = min((i for i, knot in enumerate(knots) if knot >= high), default=len(knots) - 1)
    return list(knots[first : last + 1])


# --- judging -------------------------------------------------------------------------------


def stored_law(raw: Mapping[str, Any]) -> Law:
    """The law as the planner will load it."""
    return read_law({"low": 1.0, "high": 1.0} | dict(raw), source="refit")


def judge(law: Law, rows: Rows) -> dict[str, Any]:
    """How the law does on these rows: errors of the prediction, and measured over predicted."""
    if not len(rows.seconds):
        return {"rows": 0}
    predicted = np.asarray(law.seconds(rows.work))
    error = predicted / rows.seconds - 1.0
    size = np.abs(error)
    worst = int(np.argmax(np.abs(np.log(predicted / rows.seconds))))
    return {
        "rows": len(error),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "bias": float(np.median(error)),
        "low": float(np.percentile(1.0 / (1.0 + error), 10)),
        "high": float(np.percentile(1.0 / (1.0 + error), 90)),
        "worst": f"{rows.names[worst]} measured {rows.seconds[worst] * 1e6:.1f} us, "
        f"predicted {predicted[worst] * 1e6:.1f}",
    }


def fit_gpu(tables: Iterator[tuple[str, Rows]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The stored laws of one accelerator, and a line of accuracy for each."""
    laws: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    for key, rows in tables:
        op = key.split("/")[0]
        groups, shapes = left_out(rows)
        train = rows.take(~groups & ~shapes)
        if len(train.seconds) < 8:
            continue
        raw = fit_law(op, train)
        law = stored_law(raw)
        gated = np.ones(len(rows.seconds), bool)
        if op == "gemm":
            gated = np.asarray(rows.work.at[0]) <= MAX_MEASURED_TOKENS
        out = judge(law, rows.take((groups | shapes) & gated))
        if not out["rows"]:
            continue
        laws[key] = raw | {"low": round(out["low"], 3), "high": round(out["high"], 3)}
        lines.append(
            {
                "key": key,
                "table": rows.table,
                "train": len(train.seconds),
                "out": out,
                "shapes": judge(law, rows.take(shapes & gated)),
                "groups": judge(law, rows.take(groups & gated)),
                "roofline": _roofline_median(law, rows.take((groups | shapes) & gated)),
            }
        )
    return laws, lines


def _roofline_median(law: Law, rows: Rows) -> float:
    return float(np.median(np.abs(law.roofline_s(rows.work) / rows.seconds - 1.0)))


# --- accelerators without a table ----------------------------------------------------------


def peaks(wheel: Wheel, gpu: str) -> dict[str, float]:
    """Peak rates of the datasheet, by math format, with `memory` and `link` in bytes."""
    import yaml

    text = wheel.read(f"aiconfigurator_core/systems/{GPUS[gpu][0]}.yaml")
    spec = yaml.safe_load(text)
    names = {"bf16": "bfloat16", "fp8": "fp8", "fp4": "fp4", "int8": "int8"}
    found = {ours: spec["gpu"].get(f"{theirs}_tc_flops") for ours, theirs in names.items()}
    rates = {name: float(value) for name, value in found.items() if value}
    return rates | {
        "memory": float(spec["gpu"]["mem_bw"]),
        "link": float(spec["node"]["intra_node_bw"]),
    }


def generic_key(key: str) -> str:
    """Which generic law a law informs: products by the math they run on, the rest by op."""
    op, fmt = key.split("/")[:2]
    return f"{op}/{weight_format(fmt).math}" if op in ("gemm", "moe") else op


def generic_sample(key: str, rows: Rows, peak: Mapping[str, float]) -> Rows:
    """Some rows of one law, with its work in seconds at the peak rates."""
    op = key.split("/")[0]
    rate = peak.get(generic_key(key).partition("/")[2] or "bf16", peak["bf16"])
    memory = peak["link"] if op == "comm" else peak["memory"]
    if op == "gemm":  # weights as models have them, not slivers of 32 columns
        m, n, k = rows.work.at
        rows = rows.take((m <= MAX_MEASURED_TOKENS) & (n >= 512) & (k >= 512))
    elif op == "moe":
        rows = rows.take(np.asarray(rows.work.at[1]) == 1)
    part = rows.take(np.arange(len(rows.seconds)) % max(1, len(rows.seconds) // 300) == 0)
    work = Work(
        flops=part.work.flops / rate, bytes_moved=part.work.bytes_moved / memory, at=part.work.at
    )
    return Rows(
        work=work, seconds=part.seconds, names=part.names, groups=part.groups, table=part.table
    )


def fit_generic(samples: Mapping[str, list[Rows]]) -> dict[str, dict[str, float]]:
    """One roofline for all accelerators together, in fractions of peak, and its band."""
    generic = {}
    for key, parts in sorted(samples.items()):
        rows = Rows(
            work=Work(
                flops=np.concatenate([p.work.flops for p in parts]),
                bytes_moved=np.concatenate([p.work.bytes_moved for p in parts]),
                at=tuple(np.concatenate([p.work.at[i] for p in parts]) for i in range(3)),
            ),
            seconds=np.concatenate([p.seconds for p in parts]),
            names=np.concatenate([p.names for p in parts]),
            groups=np.concatenate([p.groups for p in parts]),
            table="all",
        )
        roof = fit_roofline(rows)
        ratio = rows.seconds / _roofline(roof, rows.work)
        names = ("flops_fraction", "bytes_fraction", "overhead_s", "sharpness")
        generic[key] = {name: float(f"{v:.3g}") for name, v in zip(names, roof, strict=True)}
        generic[key] |= {
            "low": round(float(np.percentile(ratio, 10)), 3),
            "high": round(float(np.percentile(ratio, 90)), 3),
            "median_error": round(float(np.median(np.abs(1 / ratio - 1))), 3),
        }
    return generic


# --- writing -------------------------------------------------------------------------------

HEADER = """<!-- Generated by tools/fit_kernels.py. Do not edit. -->

# Kernel accuracy

What the fitted kernel laws (`tierline.perf.kernels`) make of rows that were in no fit.

Written by `python tools/fit_kernels.py --wheel PATH` from {source}
(sha256 of its RECORD:
`{record_sha256}`).

*Shapes* are single shapes left out of groups that were fitted; *groups* are whole weights,
head layouts or expert layouts of which no row was fitted, the case of a model nobody
measured. Errors are of the prediction against the measurement; *low* and *high* are the
10th and 90th percentile of measured over predicted on both kinds of rows, the band a plan
carries. *Roofline* is the median error of the same law without its residual. GEMM is
judged at m <= {most}. A law named `decode` or `prefill` ends in its head size.

"""

COLUMNS = (
    "| GPU | law | table | train | left out | median | p90 | bias | shapes | groups | roofline "
    "| low | high |\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
)


def report(
    source: Mapping[str, str], lines: Mapping[str, list[dict[str, Any]]], generic: Mapping[str, Any]
) -> str:
    """The accuracy page."""
    text = HEADER.format(**source, most=MAX_MEASURED_TOKENS) + COLUMNS
    for gpu, rows in lines.items():
        text += "".join(_report_line(gpu, row) for row in rows)
    text += (
        "\n## Worst row of each law\n\nMeasured against predicted, the largest ratio left out.\n\n"
    )
    for gpu, rows in lines.items():
        text += "".join(f"- {gpu} {row['key']}: `{row['out']['worst']}`\n" for row in rows)
    text += (
        "\n## Accelerators without a table\n\nOne roofline an op, in fractions of the datasheet's "
        "peaks, over all accelerators above.\n\n"
        "| op | of math | of bandwidth | overhead us | p | median error | low | high |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    for op, law in generic.items():
        text += (
            f"| {op} | {law['flops_fraction']:.2f} | {law['bytes_fraction']:.2f} "
            f"| {law['overhead_s'] * 1e6:.1f} | {law['sharpness']:.1f} "
            f"| {law['median_error']:.1%} | {law['low']:.2f} | {law['high']:.2f} |\n"
        )
    return text


def _report_line(gpu: str, row: Mapping[str, Any]) -> str:
    out = row["out"]
    parts = [f"{p['median']:.1%}" if p["rows"] else "-" for p in (row["shapes"], row["groups"])]
    return (
        f"| {gpu} | {row['key']} | {row['table']} | {row['train']} | {out['rows']} "
        f"| {out['median']:.1%} | {out['p90']:.1%} | {out['bias']:+.1%} | {parts[0]} | {parts[1]} "
        f"| {row['roofline']:.1%} | {out['low']:.2f} | {out['high']:.2f} |\n"
    )


def _stored(value: Any) -> str:
    """JSON with one law a line: small, and a refit shows which laws changed."""
    laws = value.get("laws", value)
    body = ",\n".join(
        f" {json.dumps(key)}: {json.dumps(laws[key], separators=(',', ':'))}"
        for key in sorted(laws)
    )
    if laws is value:
        return "{\n" + body + "\n}\n"
    head = {key: each for key, each in value.items() if key != "laws"}
    return json.dumps(head)[:-1] + ', "laws": {\n' + body + "\n}}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--wheel", type=Path, help="the wheel, or the folder it was unpacked to")
    where.add_argument("--slim", type=Path, help="the published sample, kernels_slim.parquet")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the coefficients")
    args = parser.parse_args()
    if args.slim and args.out == SHIPPED:
        parser.error("--slim is for a look: give --out another folder than what ships")
    started = time.perf_counter()
    wheel = Wheel(args.wheel) if args.wheel else None
    source = wheel.describe() if wheel else {"source": f"the sample {args.slim.name}"}

    lines: dict[str, list[dict[str, Any]]] = {}
    samples: dict[str, list[Rows]] = {}
    for gpu in GPUS:
        tables = list(wheel_rows(wheel, gpu) if wheel else slim_rows(args.slim, gpu))
        laws, rows = fit_gpu(iter(tables))
        if not laws:
            continue
        lines[gpu] = rows
        write_text(args.out / f"{gpu}.json", _stored({**source, "laws": laws}))
        for key, part in tables if wheel else ():
            if key in laws:
                sample = generic_sample(key, part, peaks(wheel, gpu))
                samples.setdefault(generic_key(key), []).append(sample)
    if wheel:
        generic = fit_generic(samples)
        write_text(args.out / "generic.json", _stored(generic))
        if args.out == SHIPPED:
            write_text(REPORT, report(source, lines, generic))
    print(json.dumps(_summary(lines) | {"seconds": round(time.perf_counter() - started, 1)}))
    return 0


def _summary(lines: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Left-out medians by law: the line a person or a script reads."""
    medians = {
        gpu: {row["key"]: round(row["out"]["median"], 4) for row in rows}
        for gpu, rows in lines.items()
    }
    return {"left_out_median_error": medians}


if __name__ == "__main__":
    sys.exit(main())
