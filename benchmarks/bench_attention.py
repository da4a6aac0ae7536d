"""Does native paged attention cost what reading its keys and values costs, and no more?

Question   one layer of attention over a paged bf16 cache: 16 sequences of 1,024 tokens that
           decode, one such sequence, and a prompt chunk of 1,024 tokens.
Budget     a decode at 16 x 1,024 within 2 x the time that its bytes take at the bandwidth
           probed beside it.
Baseline   `gathered`: pages copied side by side, then torch's SDPA with grouped queries; and a
           sum over memory that no cache holds, as the bandwidth.
Method     14 query and 2 KV heads of 64 (Qwen2.5-0.5B) and 9 of 3 (SmolLM2-135M); the three take
           turns in one process, with the same number of threads; the fastest of 15 turns,
           because other work only ever adds.  Every layer has pages of its own, as in a
           network, so that decodes find none in a cache.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tierline.engine import native
from tierline.engine.arena import Arena, geometry
from tierline.engine.attention import Version, gathered
from tierline.engine.batch import Batch
from tierline.engine.decoder import Attention, Decoder, Dense, Layer, Rope
from tierline.engine.native_attention import version

TURNS = 15
LAYERS = 8
BLOCK_TOKENS = 32
SHAPES = {"qwen2.5-0.5b": (14, 2, 64), "smollm2-135m": (9, 3, 64)}
CASES = {"decode 16 x 1024": (16, 1), "decode 1 x 1024": (1, 1), "chunk of 1024": (1, 1024)}


def decoder_of(heads: int, kv_heads: int, dim: int) -> Decoder:
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        rope=Rope(inverse_frequencies=()),
        scale=dim**-0.5,
    )
    return Decoder(
        architecture="bench",
        hidden=heads * dim,
        vocabulary=16,
        positions_max=1024,
        layers=(Layer(attention=attention, ffn=Dense(intermediate=16)),) * LAYERS,
        norm_eps=1e-5,
        weight_names=str,
    )


def batch_of(sequences: int, rows: int) -> Batch:
    """Sequences of 1,024 tokens whose last `rows` come now."""
    blocks = 1024 // BLOCK_TOKENS
    starts = np.arange(sequences + 1, dtype=np.int32) * rows
    order = np.random.default_rng(0).permutation(sequences * blocks).astype(np.int32)
    return Batch(
        tokens=np.zeros(sequences * rows, dtype=np.int32),
        positions=np.tile(np.arange(1024 - rows, 1024, dtype=np.int32), sequences),
        starts=starts,
        lengths=np.full(sequences, 1024, dtype=np.int32),
        tables=(order.reshape(sequences, blocks),),
        wanted=starts[1:] - 1,
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    kernels: native.Kernels, shape: tuple[int, int, int], case: tuple[int, int]
) -> dict[str, float]:
    """Microseconds for one layer, and their ratios."""
    decoder, batch = decoder_of(*shape), batch_of(*case)
    heads, kv_heads, dim = shape
    cut = geometry(decoder, block_tokens=BLOCK_TOKENS, element_bytes=2)
    pages = case[0] * 1024 // BLOCK_TOKENS
    device = torch.device("cpu")
    arena = Arena(decoder, cut, pages=pages, dtype=torch.bfloat16, device=device)
    arena.data.zero_()
    rows = len(batch.tokens)
    q, k, v = (torch.randn(rows, n, dim).bfloat16() for n in (heads, kv_heads, kv_heads))
    memory = torch.ones(64 << 20)

    def layers(how: Version) -> Callable[[], None]:
        def run() -> None:
            for number, layer in enumerate(decoder.layers):
                how(q, k, v, batch, arena, number, layer.attention)

        return run

    works = {"native": layers(version(kernels)), "gathered": layers(gathered), "read": memory.sum}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(TURNS + 1):
        for name, work in works.items():
            taken = seconds(work)
            if turn:  # the first warms up
                times[name].append(taken)
    native_s, gathered_s = (min(times[n]) / LAYERS for n in ("native", "gathered"))
    bytes_per_s = memory.nbytes / min(times["read"])
    kv_bytes = case[0] * 1024 * 2 * kv_heads * dim * 2
    return {
        "native_us": native_s * 1e6,
        "gathered_us": gathered_s * 1e6,
        "read_us": kv_bytes / bytes_per_s * 1e6,
        "read_gb_per_s": bytes_per_s / 1e9,
        "native_over_read": native_s * bytes_per_s / kv_bytes,
        "gathered_over_native": gathered_s / native_s,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = native.load(Path(sys.argv[1] if len(sys.argv) > 1 else folder))
        if isinstance(kernels, native.Missing):
            raise SystemExit(kernels.reason)
        torch.set_num_threads(kernels.threads)
        found = {
            f"{name}, {title}": {
                key: round(value, 2) for key, value in measure(kernels, shape, case).items()
            }
            for name, shape in SHAPES.items()
            for title, case in CASES.items()
        }
    print(
        json.dumps(
            {
                "isa": kernels.isa,
                "threads": kernels.threads,
                "processor": platform.processor() or platform.machine(),
                "cases": found,
            }
        )
    )


if __name__ == "__main__":
    main()
