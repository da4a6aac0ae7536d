"""What `calibrate` times: pieces of work of a known size, done by the code that serves.

A `Probe` is a function to be timed.  Memory, products, attention, copies and the disk are
timed alone; steps are those of real networks with random weights, each written as a checkpoint
and opened by `open_engine`, so that whatever kernels and types serve a model here are timed.
Weights repeat one block of random numbers: how long a product takes does not depend on them,
and a network is made in a second.
"""

import functools
import json
import math
import mmap
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tierline.base.errors import DependencyError
from tierline.catalog.model import ModelSpec
from tierline.catalog.models import model_from_config
from tierline.engine import machine, native_attention
from tierline.engine.arena import Arena, Geometry, geometry
from tierline.engine.attention import Version, gathered
from tierline.engine.batch import Batch
from tierline.engine.build import STORED, EngineOptions, open_engine
from tierline.engine.checkpoint import open_checkpoint
from tierline.engine.decoder import Attention
from tierline.engine.engine import Engine
from tierline.engine.models import decoder_of
from tierline.engine.native import _BLOCK_BYTES as BLOCK_BYTES
from tierline.engine.native import GGUF_TYPES, Kernels, Stored
from tierline.engine.network import Linear, weight_shapes
from tierline.engine.sampling import SamplingParams

# The law's formats for what products are timed with; blocks of GGUF go by the nearest in size.
FORMATS = {"bf16": "bf16", "fp32": "fp32", "Q8_0": "int8-g128", "Q4_1": "int4-g32"}
BLOCK_TOKENS = 16
RANDOM_ELEMENTS = 1 << 20  # that weights repeat
OUTPUT_TOKENS = 1024  # that a decoding sequence may still make
Config = Mapping[str, Any]


def _nothing() -> None:
    """What comes before a probe that needs no preparation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step as the law sees it: who decodes, who computes a prompt, on which network."""

    model: ModelSpec
    weights: str = "bf16"  # the law's format
    decodes: int = 0
    context_tokens: int = 0  # cached by each decoding sequence
    prompt_tokens: int = 0
    past_tokens: int = 0  # cached before the prompt tokens
    whole: bool = False  # with scheduling and sampling, not the network alone
    compared: bool = False  # kept from the fit, to compare with

    @property
    def pairs(self) -> float:
        """Query-key pairs among prompt tokens."""
        return self.prompt_tokens * (self.past_tokens + self.prompt_tokens / 2)

    def __str__(self) -> str:
        parts = []
        if self.decodes:
            parts.append(f"decode {self.decodes} x {self.context_tokens:,} cached")
        if self.prompt_tokens:
            after = f" after {self.past_tokens:,}" if self.past_tokens else ""
            parts.append(f"prompt of {self.prompt_tokens:,}{after}")
        return f"{self.model.name}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Something to time: `run`, after `before`, which is not timed."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = _nothing
    work: float = 0.0  # what one run moves or computes, in `unit`
    unit: str = "B"  # or FLOP
    step: Step | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much work a probe does: more than caches hold, and milliseconds of it."""

    read_bytes: int
    streamed: tuple[int, int]  # outputs and inputs of a matrix that no cache holds
    streamed_rows: tuple[int, ...]
    computed: tuple[int, int]  # of one whose products are bound by computing
    computed_rows: tuple[int, ...]
    attention: Config  # a network of which one layer's attention is timed
    sequences: int
    cached_tokens: int  # of each
    chunk_tokens: int
    networks: Mapping[str, Config]  # the law is fitted to their steps
    steps: tuple[tuple[int, int, int, int], ...]  # decodes, cached, prompt, past
    host: Config  # so small that its steps are the engine's own work
    compared: Config  # the network that the law must predict
    compared_decodes: tuple[int, ...]
    compared_prompts: tuple[int, ...]
    disk_bytes: int


def llama(
    *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> Config:
    """The `config.json` of a Llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


SMOLLM2_135M = llama(
    hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152
)
# Of a prompt's rows the last layer's feed-forward sees one, so networks have many layers.
CPU_SIZES = Sizes(
    read_bytes=256 << 20,
    streamed=(8192, 4096),
    streamed_rows=(1, 16, 64),
    computed=(2048, 2048),
    computed_rows=(256, 1024),
    attention=llama(hidden=2048, intermediate=64, layers=1, heads=16, kv_heads=8, vocabulary=64),
    sequences=16,
    cached_tokens=1024,
    chunk_tokens=256,
    networks={
        "deep": llama(
            hidden=512, intermediate=1408, layers=24, heads=8, kv_heads=2, vocabulary=16384
        ),
        "wide": llama(
            hidden=1024, intermediate=2816, layers=12, heads=8, kv_heads=2, vocabulary=8192
        ),
    },
    steps=(
        *((1, 64, 0, 0), (4, 64, 0, 0), (16, 64, 0, 0), (16, 1024, 0, 0)),
        *((0, 0, 16, 0), (0, 0, 64, 0), (0, 0, 256, 0), (0, 0, 256, 1024), (8, 128, 128, 128)),
    ),
    host=llama(hidden=64, intermediate=128, layers=8, heads=2, kv_heads=1, vocabulary=32768),
    compared=SMOLLM2_135M,
    compared_decodes=(1, 16),
    compared_prompts=(128, 512),
    disk_bytes=64 << 20,
)
DEVICE_SIZES = Sizes(
    read_bytes=2 << 30,
    streamed=(16384, 8192),
    streamed_rows=(1, 16, 64),
    computed=(8192, 8192),
    computed_rows=(256, 1024),
    attention=llama(hidden=4096, intermediate=64, layers=1, heads=32, kv_heads=8, vocabulary=64),
    sequences=64,
    cached_tokens=2048,
    chunk_tokens=1024,
    networks={
        "deep": llama(
            hidden=2048, intermediate=5632, layers=24, heads=32, kv_heads=8, vocabulary=32768
        ),
        "wide": llama(
            hidden=6144, intermediate=16384, layers=4, heads=48, kv_heads=8, vocabulary=32768
        ),
    },
    steps=(
        *((1, 64, 0, 0), (16, 64, 0, 0), (64, 64, 0, 0), (32, 2048, 0, 0)),
        *((0, 0, 64, 0), (0, 0, 512, 0), (0, 0, 2048, 0), (0, 0, 512, 2048), (16, 512, 512, 512)),
    ),
    host=llama(hidden=64, intermediate=128, layers=8, heads=2, kv_heads=1, vocabulary=32768),
    compared=SMOLLM2_135M,
    compared_decodes=(1, 16),
    compared_prompts=(128, 512),
    disk_bytes=256 << 20,
)


# --- memory and products --------------------------------------------------------------------


def finished(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run`, until the device has done it."""
    if device.type != "cuda":
        return run

    def waited() -> None:
        run()
        torch.cuda.synchronize(device)

    return waited


def memory_probes(sizes: Sizes, device: torch.device) -> list[Probe]:
    """Reading memory with every thread and with one, and copying it where the host tier is."""
    elements = sizes.read_bytes // 4
    data = torch.ones(elements, device=device)
    size = float(sizes.read_bytes)
    if device.type == "cpu":
        copied = torch.ones(elements)
        return [
            Probe(name="read", run=_threaded(data.sum, machine.cores()), work=size),
            Probe(name="read, one thread", run=_threaded(data.sum, 1), work=size),
            Probe(
                name="copy",
                run=_threaded(lambda: copied.copy_(data), machine.cores()),
                work=size,
            ),
        ]
    host = torch.ones(elements // 4).pin_memory()
    part = data[: elements // 4]
    return [
        Probe(name="read", run=finished(data.sum, device), work=size),
        Probe(name="copy", run=finished(lambda: part.copy_(host), device), work=size / 4),
        Probe(name="copy back", run=finished(lambda: host.copy_(part), device), work=size / 4),
    ]


def _threaded(run: Callable[[], object], threads: int) -> Callable[[], object]:
    """`run` on so many of torch's threads; an engine may have set another number."""

    def counted() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run()
        finally:
            torch.set_num_threads(before)

    return counted


def product_probes(sizes: Sizes, device: torch.device, kernels: Kernels | None) -> list[Probe]:
    """Products with the weights of one matrix, of few rows and of many, for every type of
    weights that is served as it is stored: `FORMATS`, of which GGUF's need native kernels."""
    probes = []
    for kind in FORMATS:
        if kind in GGUF_TYPES and kernels is None:
            continue
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        for (n, k), rows_of in (
            (sizes.streamed, sizes.streamed_rows),
            (sizes.computed, sizes.computed_rows),
        ):
            product = _product(kind, (n, k), device, kernels)
            for rows in rows_of:
                x = repeated((rows, k), dtype).to(device)
                probes.append(
                    Probe(
                        name=f"{kind} x {rows}",
                        run=finished(_bound(product, x), device),
                        work=2.0 * rows * n * k,
                        unit="FLOP",
                    )
                )
    return probes


def _product(
    kind: str, shape: tuple[int, int], device: torch.device, kernels: Kernels | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Products with one matrix; blocks of GGUF are all zero, which takes as long as any."""
    if kind in GGUF_TYPES:
        assert kernels is not None
        n, k = shape
        blocks = torch.zeros((n, k // 32 * BLOCK_BYTES[kind]), dtype=torch.uint8)
        return kernels.pack([Stored(kind, blocks)])
    weight = repeated(shape, torch.float32 if kind == "fp32" else torch.bfloat16).to(device)
    return kernels.pack([weight]) if kernels else Linear(weight, None)


def _bound(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    return lambda: function(x)


def repeated(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of small random numbers, the same ones over and over."""
    count, block = math.prod(shape), _random(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(*shape)


@functools.cache
def _random(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(RANDOM_ELEMENTS, generator=generator) * 0.02).to(dtype)


# --- attention ------------------------------------------------------------------------------


def attention_probes(sizes: Sizes, device: torch.device, kernels: Kernels | None) -> list[Probe]:
    """One layer's attention over cached tokens: many sequences that decode, and one chunk."""
    decoder = decoder_of(sizes.attention)
    shape = decoder.layers[0].attention
    assert isinstance(shape, Attention)
    cut = geometry(decoder, block_tokens=BLOCK_TOKENS, element_bytes=2)
    pages = sizes.sequences * (-(-(sizes.cached_tokens + 1) // BLOCK_TOKENS))
    arena = Arena(decoder, cut, pages=pages, dtype=torch.bfloat16, device=device)
    arena.data.zero_()
    version: Version = native_attention.version(kernels) if kernels else gathered
    past = sizes.cached_tokens - sizes.chunk_tokens
    batches = {
        "attention, decode": batch_of(
            cut, decodes=sizes.sequences, cached=sizes.cached_tokens, prompt=0, past=0
        ),
        "attention, prompt": batch_of(
            cut, decodes=0, cached=0, prompt=sizes.chunk_tokens, past=past
        ),
    }
    cached_bytes = 2.0 * sizes.sequences * sizes.cached_tokens * shape.kv_elements_per_token
    pairs = sizes.chunk_tokens * (past + sizes.chunk_tokens / 2)
    works = ((cached_bytes, "B"), (pairs * 4.0 * shape.heads * shape.head_dim, "FLOP"))
    probes = []
    for (name, batch), (work, unit) in zip(batches.items(), works, strict=True):
        rows = len(batch.tokens)
        q, k, v = (
            repeated((rows, heads, shape.head_dim), torch.bfloat16).to(device)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        run = _attending(version, (q, k, v), batch, arena, shape)
        probes.append(Probe(name=name, run=finished(run, device), work=work, unit=unit))
    return probes


def _attending(
    version: Version,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    batch: Batch,
    arena: Arena,
    shape: Attention,
) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            version(*qkv, batch, arena, 0, shape)

    return run


# --- steps ----------------------------------------------------------------------------------


def batch_of(cut: Geometry, *, decodes: int, cached: int, prompt: int, past: int) -> Batch:
    """A step of `decodes` sequences with `cached` tokens each, and one prompt chunk."""
    counts = [1] * decodes + [prompt] * (prompt > 0)
    before = [cached] * decodes + [past] * (prompt > 0)
    lengths = [b + c for b, c in zip(before, counts, strict=True)]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    blocks = [-(-length // BLOCK_TOKENS) for length in lengths]
    tables = []
    for group in cut.layout.groups:
        width = group.pages_per_block
        table = np.zeros((len(counts), max(blocks) * width), dtype=np.int32)
        first = 0
        for row, count in enumerate(blocks):
            table[row, : count * width] = np.arange(first, first + count * width)
            first += count * width
        tables.append(table)
    positions = [np.arange(b, b + c) for b, c in zip(before, counts, strict=True)]
    return Batch(
        tokens=np.arange(sum(counts), dtype=np.int32) % 64,
        positions=np.concatenate(positions).astype(np.int32),
        starts=starts,
        lengths=np.array(lengths, dtype=np.int32),
        tables=tuple(tables),
        wanted=starts[1:] - 1,
    )


def write_random(config: Config, folder: Path) -> Path:
    """A checkpoint of random weights in `folder`; raises `DependencyError` for a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    decoder = decoder_of(config)
    weights = {
        decoder.weight_names(name): repeated(shape, torch.bfloat16)
        for name, shape in weight_shapes(decoder).items()
    }
    try:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise DependencyError(
            f"cannot write a checkpoint of {sum(w.nbytes for w in weights.values()) / 1e6:.0f} MB"
            f" in {str(folder)!r}: {error}",
            hint="give --scratch a folder on a disk with room",
        ) from None
    return folder


def open_probed(
    path: Path, *, device: torch.device, kernels_folder: Path | None, cached_tokens: int
) -> tuple[Engine, Step]:
    """An engine with room for `cached_tokens`, and a step without tokens: its model and weights
    as the law sees them."""
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    model = model_from_config(config, name=path.stem, source=str(path))
    decoder = decoder_of(config)
    cut = geometry(decoder, block_tokens=BLOCK_TOKENS, element_bytes=2)
    block_bytes = cut.layout.pages_per_block * cut.layout.page_bytes
    options = EngineOptions(
        device=str(device),
        kernels_folder=kernels_folder,
        kv_bytes=(-(-cached_tokens // BLOCK_TOKENS) + 64) * block_bytes,
        policy="fcfs",
        prefix_cache=False,
    )
    engine = open_engine(path, options)
    kept = checkpoint.compact(decoder.weight_names("layers.0.down"))
    compact = kept is not None and "native step" in engine.facts.kernels
    return engine, Step(model=model, weights=STORED[kept[0]] if kept and compact else "bf16")


def network_probes(
    engine: Engine, empty: Step, steps: Sequence[tuple[int, int, int, int]]
) -> list[Probe]:
    """Steps of the network alone, on whatever lies in the cache."""
    executor = engine.executor
    arena = executor.arena
    arena.data.zero_()
    probes = []
    for decodes, cached, prompt, past in steps:
        batch = batch_of(arena.geometry, decodes=decodes, cached=cached, prompt=prompt, past=past)
        step = replace(
            empty,
            decodes=decodes,
            context_tokens=cached,
            prompt_tokens=prompt,
            past_tokens=past,
        )
        run = finished(_computing(engine, batch), arena.data.device)
        probes.append(Probe(name=str(step), run=run, step=step))
    return probes


def _computing(engine: Engine, batch: Batch) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            engine.executor.network.logits(batch, engine.executor.arena)

    return run


class EngineSteps:
    """Whole steps of one engine: scheduled, computed, sampled, turned to text."""

    def __init__(self, engine: Engine, empty: Step, *, cached_tokens: int) -> None:
        self.engine, self.cached_tokens = engine, cached_tokens
        self._empty = replace(empty, whole=True)
        self._random = random.Random(0)
        self._added: list[int] = []
        self._running: list[int] = []

    def probes(
        self, decodes: Sequence[int], prompts: Sequence[int], *, compared: bool
    ) -> list[Probe]:
        """Steps with so many decoding sequences, and with a prompt of so many tokens."""
        empty = replace(self._empty, compared=compared)
        found = []
        for count in decodes:
            step = replace(empty, decodes=count, context_tokens=self.cached_tokens)
            found.append(self._probe(step, self._decode(count)))
        found += [
            self._probe(replace(empty, prompt_tokens=tokens), self._prompt(tokens))
            for tokens in prompts
        ]
        return found

    def _probe(self, step: Step, before: Callable[[], object]) -> Probe:
        return Probe(name=f"{step}, whole", run=self._step, before=before, step=step)

    def _step(self) -> None:
        deltas = self.engine.step()
        assert deltas, "the scheduler cut a prompt that was meant to be one step"

    def _decode(self, count: int) -> Callable[[], None]:
        def before() -> None:
            if len(self._running) != count or self.engine.idle:
                self._clear()
                self._running = [self._add(self.cached_tokens) for _ in range(count)]
                waiting = set(self._running)
                while waiting:
                    waiting -= {delta.request_id for delta in self.engine.step()}

        return before

    def _prompt(self, tokens: int) -> Callable[[], None]:
        def before() -> None:
            self._clear()
            self._add(tokens)

        return before

    def _add(self, tokens: int) -> int:
        prompt = self._random.choices(range(self.engine.vocabulary), k=tokens)
        room = self.engine.positions_max - tokens
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=min(OUTPUT_TOKENS, room)
        )
        added = self.engine.add(prompt, params)
        self._added.append(added)
        return added

    def _clear(self) -> None:
        for request_id in self._added:
            self.engine.cancel(request_id)
        self._added, self._running = [], []


# --- disk -----------------------------------------------------------------------------------


class Disk:
    """One file that is written to the disk and read from it, past the page cache if it can be."""

    def __init__(self, path: Path, size: int) -> None:
        assert size % mmap.PAGESIZE == 0
        self.path, self._buffer = path, mmap.mmap(-1, size)
        self._buffer.write(random.Random(0).randbytes(1 << 16) * (size >> 16))
        self._direct = getattr(os, "O_DIRECT", 0)
        self.how = ""  # how it is read

    def probes(self) -> list[Probe]:
        """Writing until it is on the disk, reading it all, and reading one page of it."""
        size = float(len(self._buffer))
        page = Probe(name="disk, one page", run=lambda: self.read(1), before=self.forget)
        return [
            Probe(name="disk, write", run=self.write, work=size),
            Probe(name="disk, read", run=self.read, before=self.forget, work=size),
            page,
        ]

    def write(self) -> None:
        """The whole file, flushed."""
        with self.path.open("wb") as file:
            file.write(self._buffer)
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Ask the kernel to drop what it keeps of the file."""
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, pages: int | None = None) -> None:
        """The whole file, or a number of pages of it."""
        size = len(self._buffer) if pages is None else pages * mmap.PAGESIZE
        if self._direct:
            with suppress(OSError):
                self._read(size, self._direct)
                self.how = "past the page cache (O_DIRECT)"
                return
            self._direct = 0
        self._read(size, 0)
        advised = hasattr(os, "posix_fadvise")
        self.how = "page cache dropped" if advised else "page cache not dropped"

    def _read(self, size: int, flags: int) -> None:
        handle = os.open(self.path, os.O_RDONLY | flags)
        try:
            view = memoryview(self._buffer)[:size]
            done = 0
            while done < size:
                count = os.preadv(handle, [view[done:]], done)
                assert count > 0, "the file is shorter than it was written"
                done += count
        finally:
            os.close(handle)
