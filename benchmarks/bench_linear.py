"""Do the native products leave anything of this machine unused?

Question   how near does one row come to the memory's bandwidth, and how do 16 to 1,024 rows
           compare with torch's own products?
Budget     one row at 0.9 of the bandwidth a plain sum of 512 MB reaches in the same run; 256
           rows and more at 0.9 of oneDNN with prepacked weights.
Baseline   `torch.nn.functional.linear`; oneDNN with prepacked weights
           (`mkldnn._linear_pointwise`, private to torch).
Method     the matrices of Qwen2.5-0.5B in bf16, four layers and the head; every round measures
           each contender once, after a pause in which idle threads stop spinning; the best of 7
           rounds, because other work on the machine only ever adds time.  GGUF types: the same
           with SmolLM2-135M's shapes beside its bf16.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from torch.nn.functional import linear

from tierline.engine import native
from tierline.engine.native import Missing, Stored

ROUNDS = 7
PAUSE_S = 0.02
ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)
LAYERS = 4
QWEN = ((1152, 896), (896, 896), (9728, 896), (896, 4864))  # qkv, o, gate and up, down
QWEN_HEAD = (151936, 896)
SMOLLM = ((960, 576), (576, 576), (3072, 576), (576, 1536))
SMOLLM_LAYERS = 30
SMOLLM_HEAD = (49152, 576)
PROBE_BYTES = 512 << 20

Product = Callable[[torch.Tensor], object]


def interleaved_s(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Best seconds of each, one after another in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(ROUNDS + 1):
        for name, work in works.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            work()
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def passes(products: list[Product], xs: list[torch.Tensor]) -> Callable[[], object]:
    """All products on their inputs."""
    return lambda: [product(x) for product, x in zip(products, xs, strict=True)]


def inputs(shapes: list[tuple[int, int]], rows: int) -> list[torch.Tensor]:
    by_k = {k: torch.randn(rows, k).bfloat16() for _, k in shapes}
    return [by_k[k] for _, k in shapes]


def prepacked(weight: torch.Tensor) -> Product:
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight, 256)
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")


def qwen(kernels: native.Kernels, probe: Callable[[], object]) -> dict[str, float]:
    """Bandwidth of one row and rates of many."""
    shapes = [*QWEN * LAYERS, QWEN_HEAD]
    weights = [(torch.randn(n, k) * 0.05).bfloat16() for n, k in shapes]
    contenders: dict[str, list[Product]] = {
        "native": [kernels.pack([w]) for w in weights],
        "torch": [lambda x, w=w: linear(x, w) for w in weights],  # type: ignore[misc]
        "prepacked": [prepacked(w) for w in weights],
    }
    figures: dict[str, float] = {}
    for rows in ROWS:
        count = len(shapes) if rows <= 16 else len(shapes) - 1  # a prompt needs no head
        elements = sum(n * k for n, k in shapes[:count])
        xs = inputs(shapes[:count], rows)
        works = {name: passes(products[:count], xs) for name, products in contenders.items()}
        if rows == 1:
            works["probe"] = probe
        seconds = interleaved_s(works)
        if rows == 1:
            figures["probe_gb_per_s"] = PROBE_BYTES / seconds["probe"] / 1e9
            figures["native_1_row_gb_per_s"] = elements * 2 / seconds["native"] / 1e9
            figures["native_1_row_share_of_probe"] = (
                figures["native_1_row_gb_per_s"] / figures["probe_gb_per_s"]
            )
        for name in contenders:
            figures[f"{name}_{rows}_gflop_per_s"] = 2 * rows * elements / seconds[name] / 1e9
        figures[f"native_{rows}_vs_prepacked"] = seconds["prepacked"] / seconds["native"]
        figures[f"native_{rows}_vs_torch"] = seconds["torch"] / seconds["native"]
    return figures


def smollm(kernels: native.Kernels) -> dict[str, float]:
    """GGUF's own types beside bf16 of the same matrices."""
    shapes = [*SMOLLM * SMOLLM_LAYERS, SMOLLM_HEAD]

    def stored(kind: str, n: int, k: int) -> Stored:
        block = torch.from_numpy(
            gguf.quants.quantize(
                torch.randn(64, k).numpy(), getattr(gguf.GGMLQuantizationType, kind)
            )
        )
        return Stored(kind, block.repeat(n // 64, 1))

    contenders: dict[str, list[Product]] = {
        "bf16": [kernels.pack([(torch.randn(n, k) * 0.05).bfloat16()]) for n, k in shapes]
    }
    for kind in ("Q4_1", "Q4_0", "Q8_0"):
        contenders[kind] = [kernels.pack([stored(kind, n, k)]) for n, k in shapes[:-1]]
        contenders[kind].append(kernels.pack([stored("Q8_0", *SMOLLM_HEAD)]))
    figures: dict[str, float] = {}
    for rows in (1, 4, 16, 1024):
        count = len(shapes) if rows <= 16 else len(shapes) - 1
        xs = inputs(shapes[:count], rows)
        seconds = interleaved_s({n: passes(p[:count], xs) for n, p in contenders.items()})
        for kind in contenders:
            figures[f"{kind}_{rows}_rows_ms"] = seconds[kind] * 1e3
            figures[f"{kind}_{rows}_rows_vs_bf16"] = seconds["bf16"] / seconds[kind]
    return figures


def main() -> None:
    """One JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tierline/kernels")
    arguments = parser.parse_args()
    kernels = native.load(arguments.folder)
    if isinstance(kernels, Missing):
        raise SystemExit(kernels.reason)
    kernels.set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    memory = torch.ones(PROBE_BYTES // 4)
    figures = qwen(kernels, memory.sum) | smollm(kernels)
    print(
        json.dumps(
            {
                "benchmark": "linear",
                "isa": kernels.isa,
                "threads": arguments.threads,
                "load_average": round(os.getloadavg()[0], 1),
                **{name: float(f"{value:.3g}") for name, value in figures.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
