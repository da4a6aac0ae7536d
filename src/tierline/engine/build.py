"""From a checkpoint to an engine that is ready: what fits, which kernels, how much cache.

`open_engine` reads top to bottom: open and check the files, choose types, load the weights
once, give the rest of the memory to the cache, and put the scheduler in front.  Everything
that was chosen is in `Engine.facts`, so that whoever serves can print it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from tierline.base.errors import DoesNotFitError, InputError, SpecError
from tierline.base.names import lookup
from tierline.catalog.formats import weight_format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import supports
from tierline.catalog.models import model_from_config
from tierline.engine import native, native_attention
from tierline.engine.arena import Arena, Geometry, geometry
from tierline.engine.attention import Version, gathered
from tierline.engine.batch import Tables
from tierline.engine.checkpoint import Checkpoint, open_checkpoint
from tierline.engine.clock import SystemClock
from tierline.engine.conversation import Chat
from tierline.engine.decoder import Decoder
from tierline.engine.engine import Clock, Engine, Facts
from tierline.engine.executor import Executor, Network
from tierline.engine.machine import guess, measured, memory_available_bytes
from tierline.engine.models import decoder_of
from tierline.engine.native_step import NativeNetwork
from tierline.engine.native_step import supports as native_supports
from tierline.engine.network import Network as TorchNetwork
from tierline.engine.network import weight_shapes
from tierline.engine.tokenizer import Tokenizer, load_tokenizer
from tierline.kv.names import BlockNames
from tierline.perf.line import StepLine
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.assembly import assemble
from tierline.scheduling.policy import Policy
from tierline.scheduling.profiles import POLICIES
from tierline.scheduling.scheduler import Limits, Scheduler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The law's formats for blocks that native kernels keep as they are: the nearest in size.
STORED = {"Q8_0": "int8-g128", "Q4_1": "int4-g32", "Q4_0": "int4-g32"}
CPU_KV_BYTES = 4_000_000_000  # unless asked: DRAM has other users
CPU_KV_SHARE, DEVICE_KV_SHARE = 0.5, 0.9  # of what the weights leave free
# A prompt chunk of 512 tokens keeps a CPU busy for a good part of a second; a GPU for 10 ms.
CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS = 512, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What may be asked of an engine; None leaves the choice to it."""

    dtype: str = "auto"  # of weights, activations and cache: fp32, bf16, fp16
    device: str = "auto"  # cpu, cuda, cuda:1
    kernels: str = "auto"  # native, or torch
    kernels_folder: Path | None = None  # where native kernels are kept once built; None: torch
    building: Callable[[], None] | None = None  # called before they are built, for some seconds
    kv_bytes: int | None = None
    positions_max: int | None = None  # of prompt and answer together
    sequences_max: int = 64
    batch_tokens: int | None = None
    block_tokens: int = 16
    policy: str = "tierline"
    prefix_cache: bool = True
    seed: int = 0
    machine: GpuSpec | None = None  # its rates; None: as `tierline calibrate` left them, or a guess

    def __post_init__(self) -> None:
        for name in ("dtype", "device", "kernels", "policy"):
            _require(name, getattr(self, name), str, "a name")
        for name in ("sequences_max", "block_tokens", "seed"):
            _require(name, getattr(self, name), int, "a whole number")
        for name in ("kv_bytes", "positions_max", "batch_tokens"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), int, "a whole number")
        _require("prefix_cache", self.prefix_cache, bool, "true or false")
        for name in ("sequences_max", "block_tokens", "kv_bytes", "positions_max", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}", hint="it is at least 1")
        if self.block_tokens % 16:
            raise InputError(
                f"block_tokens is {self.block_tokens}", hint="kernels need a multiple of 16"
            )


def _require(name: str, value: object, kind: type, wanted: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}", hint=f"give {wanted}")


def open_engine(
    path: str | Path, options: EngineOptions | None = None, *, clock: Clock | None = None
) -> Engine:
    """An engine for the checkpoint at `path`.

    Where native kernels serve, torch is told to use one thread from now on.

    Raises `SpecError` for a checkpoint that is damaged, unknown or not what its config says,
    and `DoesNotFitError` when weights or cache do not fit; both before weights are loaded.
    """
    options = options or EngineOptions()
    checkpoint = open_checkpoint(path)
    decoder = decoder_of(checkpoint.config)
    names = decoder.weight_names
    checkpoint.require({names(ours): shape for ours, shape in weight_shapes(decoder).items()})
    device, dtype = device_named(options.device), _dtype(options.dtype, checkpoint)
    checkpoint.require_fits(memory_available_bytes(device), dtype=dtype)
    tokenizer = _tokenizer(checkpoint, decoder)
    network, kernels, weight_bytes = _network(
        decoder, checkpoint, options, dtype=dtype, device=device
    )
    checkpoint.release()
    cut = geometry(decoder, block_tokens=options.block_tokens, element_bytes=dtype.itemsize)
    positions = min(options.positions_max or decoder.positions_max, decoder.positions_max)
    kv_bytes = _kv_bytes(options, cut, device, positions)
    pages = kv_bytes // cut.layout.page_bytes
    arena = Arena(decoder, cut, pages=pages, dtype=dtype, device=device)
    weights = _weights(network, checkpoint, decoder, dtype)
    cost = _cost(checkpoint, options.machine or measured(device) or guess(device), weights)
    scheduler = _scheduler(cost, cut, options, pages=pages, on_cpu=device.type == "cpu")
    tables = Tables(cut, sequences_max=options.sequences_max, tokens_max=positions)
    assert isinstance(scheduler.names, BlockNames)
    return Engine(
        Executor(network, arena, scheduler.names, tables, hidden=decoder.hidden),
        scheduler,
        clock=clock or SystemClock(),
        vocabulary=decoder.vocabulary,
        positions_max=positions,
        revision=checkpoint.revision,
        tokenizer=tokenizer,
        eos_ids=tokenizer.eos_ids if tokenizer else frozenset(),
        chat=Chat.of(checkpoint, tokenizer) if tokenizer else None,
        prefix_cache=options.prefix_cache,
        seed=options.seed,
        facts=Facts(
            model=checkpoint.name,
            architecture=decoder.architecture,
            dtype=next(name for name, kind in DTYPES.items() if kind == dtype),
            device=str(device),
            kernels=kernels,
            weight_bytes=weight_bytes,
            kv_bytes=pages * cut.layout.page_bytes,
            kv_tokens=pages // cut.layout.pages_per_block * options.block_tokens,
            positions_max=positions,
            limits=scheduler.limits,
            policy=scheduler.policy.name,
        ),
    )


def device_named(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one. Raises `InputError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    lookup("device", kind, {"cpu": 0, "cuda": 0}, error=InputError)
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} is not there", hint="use cpu, or install CUDA's torch")
    return torch.device(name)


def _dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    if name != "auto":
        return DTYPES[lookup("dtype", name, {n: n for n in DTYPES}, error=InputError)]
    stored = checkpoint.dtype
    # Blocks of integers were made from 16 bits, and float32 checkpoints are served in 16 too.
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _tokenizer(checkpoint: Checkpoint, decoder: Decoder) -> Tokenizer | None:
    """The checkpoint's tokenizer; None: it has none, and prompts come as token ids."""
    if checkpoint.path.is_dir() and not (checkpoint.path / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.vocabulary_size > decoder.vocabulary:
        raise SpecError(
            f"the tokenizer of {checkpoint.name!r} knows {tokenizer.vocabulary_size} tokens, "
            f"its network {decoder.vocabulary}",
            hint="they are not of the same model; take both from one checkpoint",
        )
    return tokenizer


def _network(
    decoder: Decoder,
    checkpoint: Checkpoint,
    options: EngineOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Network, str, int]:
    """The network with its weights, which kernels it runs on, and the weights' bytes."""
    names = decoder.weight_names

    def weights(ours: str) -> torch.Tensor:
        checkpoint.release()  # of what was read before: packed, it would count twice
        return checkpoint.tensor(names(ours))

    def compact(ours: str) -> tuple[str, torch.Tensor] | None:
        return checkpoint.compact(names(ours))

    loaded = _kernels(options, dtype=dtype, device=device)
    if isinstance(loaded, str):
        if options.kernels == "native":
            raise InputError(f"no native kernels: {loaded}", hint="leave out kernels='native'")
        attention, told = _attention(device)
        plain = TorchNetwork(decoder, weights, dtype=dtype, device=device, attention=attention)
        return plain, f"{told} ({loaded})", _plain_bytes(decoder, dtype)
    reason = native_supports(decoder, dtype)
    if reason is None:
        torch.set_num_threads(1)  # its idle workers would spin on the cores that the step needs
        network = NativeNetwork(
            decoder,
            weights,
            dtype=dtype,
            kernels=loaded,
            compact=compact if dtype is torch.bfloat16 else None,
        )
        return network, f"native step, {loaded.isa}", network.weight_bytes
    paged = all(
        native_attention.why_not(layer.attention, dtype) is None for layer in decoder.layers
    )
    attention = native_attention.version(loaded) if paged else gathered
    mixed = TorchNetwork(
        decoder, weights, dtype=dtype, device=device, attention=attention, kernels=loaded
    )
    told = f"native products, {loaded.isa}, in a torch step ({reason})"
    return mixed, told, _plain_bytes(decoder, dtype)


def _attention(device: torch.device) -> tuple[Version, str]:
    """What a network in torch attends with: kernels for the GPU, where they are installed."""
    if device.type == "cuda":
        try:
            from tierline.engine.attention_cuda import attend
        except ModuleNotFoundError:  # no triton: slower, and as right
            return gathered, "torch without triton"
        return attend, "torch and triton"
    return gathered, "torch"


def _plain_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    return sum(prod(shape) for shape in weight_shapes(decoder).values()) * dtype.itemsize


def _kernels(
    options: EngineOptions, *, dtype: torch.dtype, device: torch.device
) -> native.Kernels | str:
    """The native kernels, or why they do not serve here."""
    lookup("kernels", options.kernels, {"auto": 0, "native": 0, "torch": 0}, error=InputError)
    if options.kernels == "torch":
        return "asked for"
    if device.type != "cpu":
        return f"on {device.type}"
    if options.kernels_folder is None:
        return "no folder to build them in"
    if dtype is torch.float16:
        return "no native kernel computes in float16"
    loaded = native.load(options.kernels_folder, building=options.building)
    return loaded.reason if isinstance(loaded, native.Missing) else loaded


def _kv_bytes(options: EngineOptions, cut: Geometry, device: torch.device, positions: int) -> int:
    """Bytes for the cache: as asked, or what is free and could ever be used."""
    layout = cut.layout
    block_bytes = layout.pages_per_block * layout.page_bytes
    available = memory_available_bytes(device)
    if options.kv_bytes is None:
        on_cpu = device.type == "cpu"
        share = CPU_KV_SHARE if on_cpu else DEVICE_KV_SHARE
        most = (-(-positions // options.block_tokens) + 1) * block_bytes * options.sequences_max
        wanted = min(int(available * share), most)
        return max(min(wanted, CPU_KV_BYTES) if on_cpu else wanted, block_bytes)
    if options.kv_bytes > available:
        raise DoesNotFitError(
            "the KV cache",
            needed_bytes=options.kv_bytes,
            available_bytes=available,
            hint="give it fewer bytes",
        )
    if options.kv_bytes < block_bytes:
        raise DoesNotFitError(
            f"one KV block of {options.block_tokens} tokens",
            needed_bytes=block_bytes,
            available_bytes=options.kv_bytes,
            hint=f"give the cache at least {block_bytes} bytes",
        )
    return options.kv_bytes


def _weights(network: Network, checkpoint: Checkpoint, decoder: Decoder, dtype: torch.dtype) -> str:
    """The law's format of the weights as they lie in memory."""
    if dtype is torch.float32:
        return "fp32"
    kept = None
    if isinstance(network, NativeNetwork) and dtype is torch.bfloat16:
        kept = checkpoint.compact(decoder.weight_names("layers.0.down"))
    return STORED[kept[0]] if kept else "bf16"


def _cost(checkpoint: Checkpoint, machine: GpuSpec, weights: str) -> StepCost:
    """What steps of this model cost on that machine; a guess of one knows 16 bits only."""
    if supports(machine, weight_format(weights)) is not None:
        weights = "bf16"
    model = model_from_config(checkpoint.config, name=checkpoint.name, source=str(checkpoint.path))
    return StepCost(model, machine, Layout(weights=weights, kv="bf16"))


def _scheduler(
    cost: StepCost, cut: Geometry, options: EngineOptions, *, pages: int, on_cpu: bool
) -> Scheduler:
    """The same scheduler that simulations run, with names for its pages."""
    layout = cut.layout
    batch = options.batch_tokens or (CPU_BATCH_TOKENS if on_cpu else DEVICE_BATCH_TOKENS)
    limits = Limits(batch_tokens=batch, sequences_max=options.sequences_max, chunk_tokens=batch)
    policy: Policy = POLICIES[lookup("policy", options.policy, {n: n for n in POLICIES})]
    return assemble(
        layout=layout,
        pages_total=pages,
        line=StepLine(cost, tokens_max=max(batch, limits.chunk_grain) + options.sequences_max),
        policy=policy,
        limits=limits,
        block_bytes=layout.pages_per_block * layout.page_bytes,
        named=True,
    )
