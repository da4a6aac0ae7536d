"""How long one kernel takes on one accelerator: the laws fitted to measured timings.

The step law and the calibration call this; `tools/fit_kernels.py` writes the coefficients
it reads. Each law has the same two parts. A roofline with a soft corner,

    t = ((flops / F)^p + (bytes / B)^p)^(1/p) + overhead

carries the scaling, and keeps it beyond the measured range. A grid of log-residuals over
three coordinates of the shape, interpolated linearly, carries what a roofline cannot know:
tiles, waves, the kernel's own choice of algorithm. Both are fitted to rows of one engine's
table, and the band is what rows outside the fit made of it.

An accelerator or a format without a table gets the roofline alone, at efficiencies that
are the median over the accelerators that have one. That is `datasheet` evidence, with the
band those accelerators show under it.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, overload

from tierline.base.errors import SpecError
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS, kv_format, weight_format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import math_flops_per_s, supports
from tierline.perf.evidence import Evidence

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]
    Number = float | Array

OUTPUT_BYTES = 2.0  # activations between kernels are bf16
RESIDUAL_STEP = 0.01  # one unit of a stored residual, in natural log
GATED_MATRICES = 3  # gate, up and down of one expert
MOE_PASSES = 3.0  # times an expert's activations cross memory: gather, activate, scatter and add
COLLECTIVES = ("all-reduce", "nccl-all-reduce", "nccl-all-gather", "nccl-all-to-all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a kernel has to do, and where its shape lies on the axes of its law."""

    flops: "Number"
    bytes_moved: "Number"
    at: "tuple[Number, Number, Number]"


def gemm_work(m: "Number", n: float, k: float, *, fmt: str) -> Work:
    """`m` rows through a weight of `n` by `k`: axes m, n, k."""
    form = weight_format(fmt)
    weight, out = form.bytes_per_element, OUTPUT_BYTES
    act = OUTPUT_BYTES if form.math == "bf16" else weight
    return Work(
        flops=2.0 * m * n * k,
        bytes_moved=n * k * weight + m * k * act + m * n * out,
        at=(m, n, k),
    )


def decode_work(
    *, batch: "Number", kv: "Number", heads: int, kv_heads: int, head_dim: int, kv_fmt: str
) -> Work:
    """One new token for each of `batch` sequences of `kv` tokens.

    Axes: tokens of KV, independent KV streams (batch times KV heads), queries a stream.
    """
    stream = 2.0 * head_dim * kv_format(kv_fmt).bytes_per_element
    return Work(
        flops=4.0 * batch * heads * head_dim * kv,
        bytes_moved=batch * (kv_heads * kv * stream + 2.0 * heads * head_dim * OUTPUT_BYTES),
        at=(kv, batch * kv_heads, heads / kv_heads),
    )


def prefill_work(
    *,
    new: "Number",
    prior: "Number",
    batch: "Number",
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_fmt: str,
) -> Work:
    """Causal attention of `new` tokens over themselves and `prior` cached ones.

    Axes: new tokens, query heads in flight (batch times heads), queries a KV head. The
    tables have no row with prior tokens: the roofline alone says what those add.
    """
    stream = 2.0 * head_dim * kv_format(kv_fmt).bytes_per_element
    pairs = new * (prior + new / 2.0)
    queries = 2.0 * new * heads * head_dim * OUTPUT_BYTES
    return Work(
        flops=4.0 * batch * heads * head_dim * pairs,
        bytes_moved=batch * (kv_heads * (new + prior) * stream + queries),
        at=(new, batch * heads, heads / kv_heads),
    )


def touched_experts(tokens: "Number", *, topk: int, experts: int) -> "Number":
    """How many experts at least one of `tokens` picks, when every pick is as likely."""
    return experts * (1.0 - (1.0 - topk / experts) ** tokens)


def moe_work(
    tokens: "Number",
    *,
    hidden: int,
    inter: int,
    topk: int,
    experts: int,
    fmt: str,
    tp: int = 1,
    ep: int = 1,
) -> Work:
    """The experts of the busiest rank, for `tokens` routed over all ranks of the expert group.

    Three costs add up: the weights of the touched experts, the math, and the activations,
    which a gather, the activation and a scatter move several times. Their sum is why the
    achieved share of peak math grows with the tokens an expert gets; written as one, it
    carries from 8 large experts to 512 small ones without a further parameter.

    Axes: tokens an expert, ranks of the expert group (the tables' routing is skewed, so the
    busiest rank is hotter the more there are), elements of one expert's matrix on a rank.
    """
    form = weight_format(fmt)
    matrix = hidden * inter / tp
    pairs = tokens * topk / ep
    weights = touched_experts(tokens, topk=topk, experts=experts) / ep * GATED_MATRICES * matrix
    activations = pairs * (2.0 * hidden + GATED_MATRICES * inter / tp) * OUTPUT_BYTES
    return Work(
        flops=2.0 * GATED_MATRICES * matrix * pairs,
        bytes_moved=weights * form.bytes_per_element + MOE_PASSES * activations,
        at=(tokens * topk / experts, ep, matrix),
    )


def collective_work(op: str, bytes_moved: "Number", *, gpus: int) -> Work:
    """A message of `bytes_moved` among `gpus`: axes bytes, GPUs, and nothing.

    `bytes_moved` is the whole buffer of one GPU: the input of an all-reduce or all-to-all,
    the output of an all-gather. The law's rate is what one GPU sends.
    """
    rounds = 2.0 if op.endswith("all-reduce") else 1.0
    wire = rounds * (gpus - 1) / gpus
    return Work(flops=0.0, bytes_moved=bytes_moved * wire, at=(bytes_moved, gpus, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A fitted kernel: its roofline, the grid of log-residuals on it, and its evidence."""

    flops_per_s: float
    bytes_per_s: float
    overhead_s: float
    sharpness: float  # p: 1 adds the two times, large takes the longer one
    axes: "tuple[Array, Array, Array]"  # natural logs of the knots
    residual: "Array"  # log(measured / roofline) at the knots
    evidence: Evidence

    def seconds(self, work: Work) -> "Number":
        """The time of `work`, a float or an array like it."""
        import numpy as np

        log_ratio = _interpolate(self.residual, self.axes, work.at)
        time = self.roofline_s(work) * np.exp(log_ratio)
        return time if np.ndim(time) else float(time)

    def roofline_s(self, work: Work) -> "Number":
        """The roofline without the residual."""
        p = self.sharpness
        math, memory = work.flops / self.flops_per_s, work.bytes_moved / self.bytes_per_s
        # Scaled by the larger term, so that no power of a tiny number underflows.
        larger = _maximum(math, memory)
        corner = (math / larger) ** p + (memory / larger) ** p
        return larger * corner ** (1.0 / p) + self.overhead_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The kernel laws of one accelerator. `load_kernels` makes it."""

    gpu: str
    laws: Mapping[str, Law]  # by key: op/format, with the head size for attention

    @overload
    def gemm_s(self, m: float, n: int, k: int, *, fmt: str) -> float: ...
    @overload
    def gemm_s(self, m: "Array", n: int, k: int, *, fmt: str) -> "Array": ...
    def gemm_s(self, m: "Number", n: int, k: int, *, fmt: str) -> "Number":
        """`m` rows (a number or an array) through a weight of `n` by `k` in format `fmt`."""
        return self._law("gemm", fmt).seconds(gemm_work(m, n, k, fmt=fmt))

    def decode_attention_s(
        self,
        *,
        batch: "Number",
        kv: "Number",
        heads: int,
        kv_heads: int,
        head_dim: int,
        kv_fmt: str = "bf16",
    ) -> "Number":
        """One layer's attention for one new token of each of `batch` sequences of `kv` tokens."""
        law = self._attention_law("decode", kv_fmt, head_dim)
        return law.seconds(
            decode_work(
                batch=batch,
                kv=kv,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                kv_fmt=kv_fmt,
            )
        )

    def prefill_attention_s(
        self,
        *,
        new: "Number",
        prior: "Number" = 0.0,
        batch: "Number" = 1.0,
        heads: int,
        kv_heads: int,
        head_dim: int,
        kv_fmt: str = "bf16",
    ) -> "Number":
        """One layer's causal attention of `new` tokens after `prior` cached ones, each sequence."""
        law = self._attention_law("prefill", kv_fmt, head_dim)
        return law.seconds(
            prefill_work(
                new=new,
                prior=prior,
                batch=batch,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                kv_fmt=kv_fmt,
            )
        )

    def moe_s(
        self,
        tokens: "Number",
        *,
        hidden: int,
        inter: int,
        topk: int,
        experts: int,
        fmt: str,
        tp: int = 1,
        ep: int = 1,
    ) -> "Number":
        """One layer's routed experts on one rank, for `tokens` over the whole expert group."""
        work = moe_work(
            tokens, hidden=hidden, inter=inter, topk=topk, experts=experts, fmt=fmt, tp=tp, ep=ep
        )
        return self._law("moe", fmt).seconds(work)

    def all_reduce_s(self, bytes_moved: "Number", *, gpus: int, op: str = "all-reduce") -> "Number":
        """A collective over `gpus` of one fast domain; `op` is one of `COLLECTIVES`."""
        if gpus == 1:
            return bytes_moved * 0.0
        return self._law("comm", op).seconds(collective_work(op, bytes_moved, gpus=gpus))

    def evidence(self, op: str, fmt: str, *, head_dim: int = 128) -> Evidence:
        """How well `op` (gemm, decode, prefill, moe, comm) is known in `fmt` on this accelerator.

        For `comm`, `fmt` is the collective.
        """
        if op in ("decode", "prefill"):
            return self._attention_law(op, fmt, head_dim).evidence
        return self._law(op, fmt).evidence

    def _law(self, op: str, fmt: str) -> Law:
        if f"{op}/{fmt}" not in self.laws:
            known = sorted(key.split("/")[1] for key in self.laws if key.startswith(f"{op}/"))
            raise SpecError(
                f"{self.gpu} has no {op} law for {fmt!r}", hint=f"it has: {', '.join(known)}"
            )
        return self.laws[f"{op}/{fmt}"]

    def _attention_law(self, op: str, kv_fmt: str, head_dim: int) -> Law:
        sizes = [
            int(key.rsplit("/", 1)[1]) for key in self.laws if key.startswith(f"{op}/{kv_fmt}/")
        ]
        if not sizes:
            raise SpecError(
                f"no {op} attention law for KV format {kv_fmt!r} on {self.gpu}",
                hint=f"KV formats: {', '.join(KV_FORMATS)}",
            )
        nearest = min(sizes, key=lambda size: (abs(size - head_dim), size))
        return self.laws[f"{op}/{kv_fmt}/{nearest}"]


def load_kernels(gpu: GpuSpec) -> Kernels:
    """The laws of `gpu`: fitted where a table exists, its datasheet at stated efficiencies else."""
    fitted = _shipped_laws(gpu.name)
    return Kernels(gpu=gpu.name, laws={**_datasheet_laws(gpu), **fitted})


@cache
def _shipped_laws(name: str) -> Mapping[str, Law]:
    """The fitted laws of that accelerator; none when no table of it was published."""
    shipped = _read(name)
    if shipped is None:
        return {}
    return {key: read_law(raw, source=shipped["source"]) for key, raw in shipped["laws"].items()}


@cache
def _read(name: str) -> Any:
    """The coefficients file of that name, or None when we ship none."""
    path = files("tierline.perf") / "data" / "kernels" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_law(raw: Mapping[str, Any], *, source: str) -> Law:
    """A law from its stored coefficients."""
    import numpy as np

    axes = tuple(np.log(np.asarray(knots, float)) for knots in raw["axes"])
    assert len(axes) == 3
    cells = np.frombuffer(base64.b64decode(raw["residual"]), np.int8).astype(np.float64)
    return Law(
        flops_per_s=raw["flops_per_s"],
        bytes_per_s=raw["bytes_per_s"],
        overhead_s=raw["overhead_s"],
        sharpness=raw["sharpness"],
        axes=axes,
        residual=cells.reshape([len(knots) for knots in axes]) * RESIDUAL_STEP,
        evidence=Evidence(
            kind="fitted", source=f"{source}, {raw['table']}", low=raw["low"], high=raw["high"]
        ),
    )


def _datasheet_laws(gpu: GpuSpec) -> dict[str, Law]:
    """A roofline for every op and format, at the efficiencies that other accelerators reach."""
    generic = _read("generic")
    assert generic is not None, "the generic efficiencies are part of the package"
    laws: dict[str, Law] = {}
    for fmt, form in WEIGHT_FORMATS.items():
        if supports(gpu, form) is not None:
            continue
        peak = math_flops_per_s(gpu, form)
        for op in ("gemm", "moe"):
            known = generic.get(f"{op}/{form.math}", generic[f"{op}/bf16"])
            laws[f"{op}/{fmt}"] = _datasheet(gpu, known, peak, gpu.memory_bytes_per_s)
    for fmt in KV_FORMATS:
        for op in ("decode", "prefill"):
            peak = gpu.flops_per_s["bf16"]
            laws[f"{op}/{fmt}/128"] = _datasheet(gpu, generic[op], peak, gpu.memory_bytes_per_s)
    link = gpu.scale_up.bytes_per_s or gpu.host.read_bytes_per_s
    for op in COLLECTIVES:
        laws[f"comm/{op}"] = _datasheet(gpu, generic["comm"], 1.0, link)
    return laws


def _datasheet(gpu: GpuSpec, generic: Mapping[str, float], flops: float, memory: float) -> Law:
    import numpy as np

    flat = np.zeros(1)
    return Law(
        flops_per_s=flops * generic["flops_fraction"],
        bytes_per_s=memory * generic["bytes_fraction"],
        overhead_s=generic["overhead_s"],
        sharpness=generic["sharpness"],
        axes=(flat, flat, flat),
        residual=np.zeros((1, 1, 1)),
        evidence=Evidence(
            kind="datasheet",
            source=f"{gpu.title}: {generic['flops_fraction']:.2f} of peak math, "
            f"{generic['bytes_fraction']:.2f} of peak bandwidth",
            low=generic["low"],
            high=generic["high"],
        ),
    )


def _maximum(a: "Number", b: "Number") -> "Number":
    import numpy as np

    return np.maximum(a, b)


def _interpolate(
    grid: "Array", axes: "tuple[Array, Array, Array]", at: "tuple[Number, Number, Number]"
) -> "Number":
    """Linear in the logs of the three coordinates; the edge value beyond the knots."""
    import numpy as np

    # An axis with a scalar coordinate is folded away first: three scalars and one array of
    # 16,384 token counts, the common case, costs one one-dimensional look-up.
    order = sorted(range(3), key=lambda axis: np.ndim(at[axis]))
    cells = np.transpose(grid, order)
    folded: Number = cells
    scalars = [axis for axis in order if np.ndim(at[axis]) == 0]
    for axis in scalars:
        low, share = _bracket(axes[axis], at[axis])
        high = min(int(low) + 1, len(axes[axis]) - 1)
        cells = cells[int(low)] * (1.0 - share) + cells[high] * share
        folded = cells
    rest = order[len(scalars) :]
    if not rest:
        return float(folded)
    return _corners(cells, [axes[axis] for axis in rest], [at[axis] for axis in rest])


def _corners(cells: "Array", axes: "list[Array]", at: "list[Number]") -> "Array":
    """Multilinear interpolation at arrays of coordinates, one pass for each corner."""
    import numpy as np

    brackets = [_bracket(knots, value) for knots, value in zip(axes, at, strict=True)]
    total = np.zeros(np.broadcast_shapes(*(np.shape(value) for value in at)))
    for corner in np.ndindex(*(2,) * len(axes)):
        index, weight = [], np.ones(())
        for side, knots, (low, share) in zip(corner, axes, brackets, strict=True):
            index.append(np.minimum(low + side, len(knots) - 1))
            weight = weight * (share if side else 1.0 - share)
        total = total + cells[tuple(index)] * weight
    return total


def _bracket(knots: "Array", value: "Number") -> "tuple[Any, Any]":
    """The knot at or below each value, and how far it is to the next one."""
    import numpy as np

    if len(knots) == 1:
        return np.zeros(np.shape(value), int), np.zeros(np.shape(value))
    x = np.clip(np.log(np.maximum(value, 1e-9)), knots[0], knots[-1])
    low = np.minimum(np.searchsorted(knots, x, side="right") - 1, len(knots) - 2)
    return low, (x - knots[low]) / (knots[low + 1] - knots[low])
