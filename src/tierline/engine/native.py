"""Native CPU kernels: built at first use when a compiler is there, and loaded with ctypes.

`network` asks `load` once.  The answer is either `Kernels`, or `Missing` with a reason that can
be shown; the pure-torch path then serves.  The sources in `kernels/` are C++17 without any
header of torch or Python, so that building takes seconds and one build serves every version
of both.  A build is named by what went into it, written beside and renamed: two processes may
build at once, and a new compiler or source never meets an old library.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("kernels")
# In order of preference: what /proc/cpuinfo must list, and what the compiler is told.
ISAS: dict[str, tuple[str, ...]] = {
    "avx512bf16": (
        *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi"),
        *("avx512_bf16", "avx2", "fma", "f16c"),
    ),
    "avx2": ("avx2", "fma", "f16c"),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GGUF_TYPES = {"Q8_0": 3, "Q4_0": 4, "Q4_1": 5}
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}  # of 32 weights
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno")
_BUILD_SECONDS_MAX = 300


@dataclass(frozen=True, slots=True)
class Missing:
    """There are no kernels, and why."""

    reason: str


class _Matrix(ctypes.Structure):
    """`Matrix` of types.h."""

    _fields_ = (
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


_LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int, "z": ctypes.c_size_t, "-": None}
_SIGNATURES = {  # of a function: its result, then its arguments
    "tl_threads": "i",
    "tl_set_threads": "-i",
    "tl_alloc": "pz",
    "tl_free": "-p",
    "tl_packed_bytes": "ziii",
    "tl_pack": "-piiiipzii",
    "tl_unpack_row": "-pip",
    "tl_linear": "-ppiipii",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Weights as a GGUF file stores them: rows of blocks, not dequantised."""

    kind: str  # one of GGUF_TYPES
    blocks: torch.Tensor  # uint8 [n, bytes of one row]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        n, row_bytes = self.blocks.shape
        return n, row_bytes // _BLOCK_BYTES[self.kind] * 32


class Packed:
    """A weight matrix in the kernels' own layout; calling it is `torch.nn.functional.linear`."""

    __slots__ = ("_data", "_library", "bias", "bytes", "k", "matrix", "n")

    def __init__(self, library: ctypes.CDLL, *, n: int, k: int, kind: int) -> None:
        self._library, self.n, self.k = library, n, k
        self.bytes: int = library.tl_packed_bytes(kind, n, k)
        self._data: int | None = library.tl_alloc(self.bytes)
        if self._data is None:
            raise MemoryError(f"no memory for {self.bytes} bytes of weights")
        self.bias: torch.Tensor | None = None
        self.matrix = _Matrix(n, k, kind, self._data, None)

    def __del__(self) -> None:
        data = getattr(self, "_data", None)
        if data is not None:
            self._library.tl_free(data)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] in float32 or bfloat16; the result [..., n] has its type."""
        out = torch.empty((*x.shape[:-1], self.n), dtype=x.dtype)
        self._multiply(x, out, accumulate=False)
        return out

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product to `out` [..., n], float32: a residual connection."""
        assert out.dtype == torch.float32
        assert out.shape == (*x.shape[:-1], self.n)
        assert out.is_contiguous()
        self._multiply(x, out, accumulate=True)

    def _multiply(self, x: torch.Tensor, out: torch.Tensor, *, accumulate: bool) -> None:
        assert x.shape[-1] == self.k
        x = x.contiguous()
        self._library.tl_linear(
            ctypes.addressof(self.matrix),
            *(x.data_ptr(), TYPES[x.dtype], x.numel() // self.k),
            *(out.data_ptr(), TYPES[out.dtype], accumulate),
        )

    def row(self, number: int) -> torch.Tensor:
        """float32 [k]: one row of the weights read back, for an embedding that is the head."""
        assert 0 <= number < self.n
        out = torch.empty(self.k)
        self._library.tl_unpack_row(ctypes.addressof(self.matrix), number, out.data_ptr())
        return out


class Kernels:
    """The loaded library. `library` has every `tl_` function; other modules add signatures."""

    __slots__ = ("isa", "library", "path")

    def __init__(self, path: Path, isa: str) -> None:
        self.path, self.isa = path, isa
        self.library = ctypes.CDLL(str(path))
        for name, letters in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, *function.argtypes = (_LETTERS[letter] for letter in letters)

    @property
    def threads(self) -> int:
        """Threads of a parallel region, the caller among them."""
        return int(self.library.tl_threads())

    def set_threads(self, count: int) -> None:
        """Use `count` threads from the next call on; 0: one for each core."""
        self.library.tl_set_threads(count)

    def pack(
        self,
        weights: list[torch.Tensor | Stored],
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        """One matrix from the rows of several, [n_i, k] each, under one another.

        `dtype` is that of the packed weights; without it they keep their own (float16 is held
        as float32).  Stored weights stay as they are and must share one kind.
        """
        first = weights[0]
        kinds = {_kind(w) for w in weights}
        assert len(kinds) == 1, "matrices of several types under one another"
        (source,) = kinds
        wanted = dtype or (torch.bfloat16 if source == TYPES[torch.bfloat16] else torch.float32)
        kind = source if isinstance(first, Stored) else TYPES[wanted]
        n, k = sum(w.shape[0] for w in weights), int(first.shape[1])
        packed = Packed(self.library, n=n, k=k, kind=kind)
        row = 0
        for w in weights:
            data = w.blocks if isinstance(w, Stored) else w
            assert data.stride(1) == 1
            self.library.tl_pack(
                *(packed.matrix.data, kind, n, k, source, data.data_ptr()),
                *(data.stride(0) * data.element_size(), row, w.shape[0]),
            )
            row += w.shape[0]
        if bias is not None:
            packed.bias = bias.to(torch.float32).contiguous()
            packed.matrix.bias = packed.bias.data_ptr()
        return packed


def _kind(weights: torch.Tensor | Stored) -> int:
    return GGUF_TYPES[weights.kind] if isinstance(weights, Stored) else TYPES[weights.dtype]


def cpu_flags() -> frozenset[str]:
    """What this processor can do, in the words of /proc/cpuinfo; empty when it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def usable_isas(flags: frozenset[str]) -> list[str]:
    """Instruction sets of ours that a processor with these flags has, best first."""
    return [isa for isa, needed in ISAS.items() if flags.issuperset(needed)]


def load(
    folder: Path, *, isa: str | None = None, building: Callable[[], None] | None = None
) -> Kernels | Missing:
    """The kernels for this processor, built into `folder` when they are not there yet.

    `isa` asks for one of `ISAS` instead of the best; `building` is called before a build, which
    takes seconds.  Never raises: whatever is in the way
    (another processor, no compiler, a build that fails) is the reason in `Missing`.
    """
    usable = usable_isas(cpu_flags())
    if not usable or (isa is not None and isa not in usable):
        wanted = isa or " or ".join(ISAS)
        return Missing(f"this processor ({platform.machine()}) does not have {wanted}")
    isa = isa or usable[0]
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return Missing("no C++ compiler: neither g++ nor clang++ is on the path")
    try:
        return Kernels(_built(folder, isa, compiler, building), isa)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return Missing(f"{compiler} could not build the kernels: {' '.join(lines[:3])}")
    except (AttributeError, OSError, subprocess.TimeoutExpired) as error:
        return Missing(f"the kernels could not be built or loaded: {error}")


def _built(
    folder: Path, isa: str, compiler: str, building: Callable[[], None] | None = None
) -> Path:
    """The library for these sources, flags and compiler, built if it is missing."""
    flags = [*_FLAGS, *(f"-m{flag.replace('512_', '512')}" for flag in ISAS[isa])]
    version = _run([compiler, "--version"])
    digest = hashlib.sha256(repr((compiler, version, flags)).encode())
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    path = folder / f"tierline-{isa}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        if building is not None:
            building()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            _build([s for s in sources if s.suffix == ".cpp"], compiler, flags, Path(scratch), path)
    return path


def _build(sources: list[Path], compiler: str, flags: list[str], scratch: Path, path: Path) -> None:
    """Compile every source at the same time, link beside, rename."""
    objects = [scratch / f"{source.stem}.o" for source in sources]
    commands = [
        [compiler, *flags, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    linked = scratch / path.name
    _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(linked)])
    linked.replace(path)


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_BUILD_SECONDS_MAX
    )
    return done.stdout
