"""Native products are what a float64 product says, row for row the same in any company.

Every type of weights, every instruction set this machine has, sizes that divide nothing.
"""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch

from tierline.engine import native
from tierline.engine.native import GGUF_TYPES, ISAS, Kernels, Missing, Packed, Stored

ROWS = (*range(1, 18), 64, 100, 257)
SHAPES = ((1, 32), (33, 32), (64, 160), (97, 1056), (200, 320))  # outputs, inputs
ODD_SHAPES = ((1, 1), (33, 7), (65, 301), (96, 1000))
KINDS = ("float32", "bfloat16", *GGUF_TYPES)
# Any order of fp32 sums of k products errs by less than k x 2^-24 of the sum of magnitudes;
# a random walk stays far below.
TOLERANCE = 2e-6


def weights(kind: str, n: int, k: int) -> tuple[torch.Tensor | Stored, torch.Tensor]:
    """Random weights and their values as float32."""
    values = torch.randn(n, k)
    if kind in GGUF_TYPES:
        stored_as = gguf.GGMLQuantizationType[kind]
        blocks = gguf.quants.quantize(values.numpy(), stored_as)
        exact = torch.from_numpy(gguf.quants.dequantize(blocks, stored_as))
        return Stored(kind, torch.from_numpy(blocks)), exact
    values = values.to(getattr(torch, kind))
    return values, values.float().clone()


def expected(kernels: Kernels, kind: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """In float64, on the activations as the kernels see them."""
    if kernels.isa == "avx512bf16" and kind != "float32":
        x = x.bfloat16()
    return x.double() @ w.double().T


def error(
    kernels: Kernels, kind: str, x: torch.Tensor, w: torch.Tensor, found: torch.Tensor
) -> float:
    """Largest error as a share of the sum of the magnitudes of what was summed."""
    magnitudes = x.double().abs() @ w.double().abs().T + 1e-3
    return float(((found.double() - expected(kernels, kind, x, w)).abs() / magnitudes).max())


def cases() -> list[tuple[str, int, int]]:
    dense = [(kind, n, k) for kind in KINDS[:2] for n, k in (*ODD_SHAPES, *SHAPES[2:4])]
    return dense + [(kind, n, k) for kind in KINDS[2:] for n, k in SHAPES]


@pytest.mark.parametrize(("kind", "n", "k"), cases())
def test_a_product_is_right_and_the_same_in_any_company(
    kernels: Kernels, kind: str, n: int, k: int
) -> None:
    """INV-ENG-41: whatever the batch and the threads, a row has the same bits."""
    torch.manual_seed(n * k)
    source, values = weights(kind, n, k)
    packed = kernels.pack([source])
    x = torch.randn(max(ROWS), k)
    together = packed(x)

    assert error(kernels, kind, x, values, together) < TOLERANCE
    for rows in ROWS:
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            assert torch.equal(packed(x[:rows]), together[:rows]), (rows, threads)
            assert torch.equal(packed(x[-rows:]), together[-rows:]), (rows, threads)
    kernels.set_threads(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_weight_is_noticed(kernels: Kernels, kind: str) -> None:
    """Negative control of the test above: one weight of 10,000 that is off by one part in 50."""
    source, values = weights(kind, 100, 96)
    values[50, 50] = 1.0
    x = torch.randn(16, 96)
    found = kernels.pack([source])(x)

    assert error(kernels, kind, x, values, found) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_under_one_another_and_a_bias(kernels: Kernels, kind: str) -> None:
    parts = [weights(kind, n, 64) for n in (40, 3, 90)]
    bias = torch.randn(133)
    packed = kernels.pack([source for source, _ in parts], bias)
    x = torch.randn(9, 64)
    separate = [kernels.pack([source])(x) for source, _ in parts]

    assert (packed.n, packed.k) == (133, 64)
    assert torch.equal(packed(x), torch.cat(separate, dim=1) + bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_adding_to_what_is_there(kernels: Kernels, kind: str, rows: int) -> None:
    packed = kernels.pack([weights(kind, 77, 64)[0]], torch.randn(77))
    x, residual = torch.randn(rows, 64), torch.randn(rows, 77)
    out = residual.clone()
    packed.add_to(out, x)

    assert torch.equal(out, packed(x) + residual)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_read_back(kernels: Kernels, kind: str) -> None:
    source, values = weights(kind, 70, 64)
    packed = kernels.pack([source])
    read = torch.stack([packed.row(i) for i in range(70)])

    torch.testing.assert_close(read, values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_in_and_out(kernels: Kernels, kind: str) -> None:
    source, _ = weights(kind, 70, 64)
    packed = kernels.pack([source])
    x = torch.randn(5, 3, 64).bfloat16()

    assert torch.equal(packed(x), packed(x.float()).bfloat16())


def test_memory_mapped_rows_and_other_types_pack_alike(kernels: Kernels) -> None:
    """Rows further apart than they are long; float16 as float32; float32 rounded to bf16."""
    wide = torch.randn(40, 100)
    x = torch.randn(3, 60)
    rows = wide[:, :60]

    assert torch.equal(kernels.pack([rows])(x), kernels.pack([rows.clone()])(x))
    half = rows.half()
    assert torch.equal(kernels.pack([half])(x), kernels.pack([half.float()])(x))
    rounded = kernels.pack([rows], dtype=torch.bfloat16)
    assert torch.equal(rounded(x), kernels.pack([rows.bfloat16()])(x))


def test_packing_takes_the_bytes_of_the_type(kernels: Kernels) -> None:
    bits = {kind: kernels.pack([weights(kind, 64, 320)[0]]).bytes * 8 / 20480 for kind in KINDS}

    assert bits == {"float32": 32, "bfloat16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5}


# Threads


def test_a_child_process_has_its_own_threads(kernels: Kernels) -> None:
    """The parent's workers do not exist after fork(); without care the child would hang."""
    program = """
import os, sys, torch
from pathlib import Path
from tierline.engine import native
kernels = native.load(Path(sys.argv[1]), isa=sys.argv[2])
kernels.set_threads(2)
packed = kernels.pack([torch.ones(64, 64)])
x = torch.ones(2, 64)
packed(x)
child = os.fork()
if child == 0:
    os._exit(0 if bool((packed(x) == 64).all()) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    command += [str(kernels.path.parent), kernels.isa]

    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_several_python_threads_take_turns(kernels: Kernels) -> None:
    packed = kernels.pack([weights("float32", 128, 64)[0]])
    xs = [torch.randn(7, 64) for _ in range(16)]
    alone = [packed(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(packed, xs))

            assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


# What is in the way of kernels is a reason, never an exception


def test_the_best_instruction_set_is_taken() -> None:
    both = frozenset(ISAS["avx512bf16"])

    assert native.usable_isas(both) == ["avx512bf16", "avx2"]
    assert native.usable_isas(both - {"avx512_bf16"}) == ["avx2"]
    assert native.usable_isas(frozenset({"avx2"})) == []


def reason(loaded: Kernels | Missing) -> str:
    assert isinstance(loaded, Missing)
    return loaded.reason


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert "neither g++ nor clang++" in reason(native.load(tmp_path))


def test_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "cpu_flags", frozenset)

    assert "does not have avx512bf16 or avx2" in reason(native.load(tmp_path))


def broken_source(folder: Path) -> None:
    (folder / "threads.cpp").write_text("this is not C++\n")


def no_sources(folder: Path) -> None:
    for path in folder.glob("*.cpp"):
        path.unlink()
    (folder / "empty.cpp").write_text("")  # builds, and has nothing in it


@pytest.mark.parametrize(
    ("harm", "words"),
    [(broken_source, "could not build the kernels"), (no_sources, "built or loaded")],
)
def test_a_build_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    sources = tmp_path / "kernels"
    sources.mkdir()
    for name in ("threads.cpp", "threads.h"):
        shutil.copy(native.SOURCES / name, sources)
    harm(sources)
    monkeypatch.setattr(native, "SOURCES", sources)

    assert words in reason(native.load(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob(".build-*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert "could not be built" in reason(native.load(tmp_path / "file" / "cache"))


def test_a_second_load_builds_nothing(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_build", None)
    told: list[str] = []
    again = native.load(
        kernels.path.parent, isa=kernels.isa, building=lambda: told.append("building")
    )

    assert isinstance(again, Kernels)
    assert again.path == kernels.path
    assert told == []


def test_a_build_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_build", lambda *_: None)  # nothing comes of it
    told: list[str] = []
    found = native.load(tmp_path, building=lambda: told.append("building"))

    assert isinstance(found, Missing)
    assert told == ["building"] or "does not have" in found.reason or "compiler" in found.reason


def test_packed_weights_are_given_back(kernels: Kernels) -> None:
    freed: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(kernels.library, name)

        def tl_free(self, data: int) -> None:
            freed.append(data)
            kernels.library.tl_free(data)

    packed = Packed(Watched(), n=32, k=32, kind=0)  # type: ignore[arg-type]
    data = packed.matrix.data
    del packed

    assert freed == [data]


def test_structures_agree_on_their_size() -> None:
    """`Matrix` of types.h is three ints, padding and two pointers."""
    assert ctypes.sizeof(native._Matrix) == 32
