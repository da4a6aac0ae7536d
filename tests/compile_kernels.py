"""Compiles the Triton kernels for GPUs that need not be here, and says what they take of one.

    python tests/compile_kernels.py few|all 90

One line of JSON for each kernel, for one compute capability.  `test_attention_cuda` runs it in a
process of its own, because under Triton's interpreter nothing can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tierline.engine import attention_triton as kernels
from tierline.engine.attention import AnyAttention
from tierline.engine.attention_cuda import constants_of, merge_constants_of, tiling
from tierline.engine.decoder import Attention, LatentAttention, Rope

ROPE = Rope(inverse_frequencies=())
BYTES = {"bf16": 2, "fp32": 4}
OPTIONS = ("num_warps", "num_stages")
FLOATS, INTEGERS = (
    ("sums", "marks"),
    ("tiles", "starts", "lengths", "table", "sequences", "positions"),
)
UNALIGNED = ("scale", "table_row", "part", "splits")
Compiled = tuple[str, Any, str, dict[str, int]]  # name, function, type, constants


def grouped(group: int, dim: int, window: int | None = None) -> Attention:
    return Attention(
        heads=2 * group,
        kv_heads=2,
        head_dim=dim,
        rope=ROPE,
        scale=1.0,
        window_tokens=window,
    )


LATENT = LatentAttention(
    heads=16,
    nope_dim=128,
    rope_dim=64,
    v_head_dim=128,
    kv_rank=512,
    q_rank=None,
    rope=ROPE,
    scale=1.0,
)
FEW: list[AnyAttention] = [grouped(7, 64)]
ALL: list[AnyAttention] = [
    *FEW,
    grouped(4, 128, 4096),
    grouped(5, 80),
    grouped(3, 96),
    grouped(2, 256, 512),
    LATENT,
]


def kernels_of(attention: AnyAttention, dtype: str) -> Iterator[Compiled]:
    """Write; decodes, decodes that share, and chunks; merge."""
    latent = isinstance(attention, LatentAttention)
    key_dim = attention.kv_elements_per_token // (1 if latent else 2 * attention.kv_heads)
    name = f"{dtype} {attention.heads // attention.kv_heads}x{key_dim}"
    paged = {"parts": 2, "block_tokens": 16}
    elements = attention.kv_heads * key_dim
    width = triton.next_power_of_2(elements)
    written = {"elements": elements, "width": width, "latent": int(latent)}
    yield f"write {name}", kernels.write, dtype, paged | written
    for what, single, split in (("decode", 1, 0), ("shared", 1, 1), ("chunk", 0, 0)):
        shape = tiling(
            group=attention.heads // attention.kv_heads,
            key_dim=key_dim,
            value_dim=attention.value_dim,
            element_bytes=BYTES[dtype],
            single=bool(single),
        )
        constants = paged | constants_of(attention, key_dim, shape) | {"split": split}
        yield f"{what} {name}", kernels.attend, dtype, constants
    yield f"merge {name}", kernels.merge, dtype, merge_constants_of(attention.value_dim, 64)


def taken(
    name: str, kernel: Any, dtype: str, constants: dict[str, int], arch: int
) -> dict[str, Any]:
    """Bytes of shared memory, registers of a thread, and bytes that did not fit into those."""
    options = {k: constants.pop(k) for k in OPTIONS if k in constants}
    names: list[str] = kernel.arg_names
    signature = {n: "constexpr" if n in constants else _type(n, dtype) for n in names}
    aligned = [n for n in names if n not in constants and n not in UNALIGNED]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    binary = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": True}
    )
    registers, spilled = _resources(binary.asm["cubin"])
    return {
        "kernel": name,
        "compute_capability": arch,
        "shared_bytes": binary.metadata.shared,
        "registers": registers,
        "spilled_bytes": spilled,
    }


def _type(name: str, dtype: str) -> str:
    if name in FLOATS:
        return "*fp32"
    if name in INTEGERS:
        return "*i32"
    if name in ("q", "k", "v", "cache", "out"):
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    shapes = {"few": FEW, "all": ALL}[sys.argv[1]]
    types = ["bf16"] if sys.argv[1] == "few" else list(BYTES)
    for attention in shapes:
        for dtype in types:
            for kernel in kernels_of(attention, dtype):
                line = json.dumps(taken(*kernel, int(sys.argv[2])))
                sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
