"""What would have been: the recorded traffic served again with one thing changed.

The Plan page's form becomes a `Change` (`change_of`), and `what_if` simulates twice: this machine
as it is, and as it would be.  Beside both stands what was measured, so that a reader sees how far
the simulation may be believed before reading what it says.

Simulating takes the processor, so a server never does it in its own process: `ask` starts another
Python that reads the question from its standard input, at low priority, and ends it when it takes
too long.  That process loads neither torch nor a web server.

Invariants
    INV-SRV-64  a change of nothing gives two equal sides
"""

import asyncio
import contextlib
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tierline.base.errors import DependencyError, InputError, TierlineError
from tierline.base.names import lookup, reject_unknown_keys
from tierline.base.units import format_bytes, format_seconds, parse_bytes, significant
from tierline.catalog.formats import weight_format
from tierline.catalog.gpus import load_gpu, supports
from tierline.kv.transfer import DRAM, NVME, REMOTE
from tierline.perf.step import SEQUENCES_MAX, TOKENS_MAX, Layout, StepCost
from tierline.scheduling.profiles import POLICIES
from tierline.server.prediction import scaled
from tierline.server.replay import Fared, Side, Traffic, replay, side_of
from tierline.server.running import Running
from tierline.sim.instance import Instance, build_instance
from tierline.sim.measure import Spread

SECONDS_MAX = 60.0
LOAD_MAX = 100.0
SAME = 0.02  # a relative difference below this is called none
NICENESS = 10
_WHOLE = ("sequences_max", "batch_tokens", "chunk_tokens")
_BYTES = ("device_kv_bytes", "dram_bytes", "nvme_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What would be different; None leaves it as it is."""

    policy: str | None = None
    gpu: str | None = None  # of the catalogue, or measured
    load: float = 1.0  # as many times the requests a second
    device_kv_bytes: int | None = None
    dram_bytes: int | None = None
    nvme_bytes: int | None = None
    sequences_max: int | None = None
    batch_tokens: int | None = None  # of one step
    chunk_tokens: int | None = None  # of one prompt in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The answer: a sentence, both sides, what was measured, and what to know."""

    change: str  # in words
    sentence: str
    believe: str  # how far the simulation of what is lies from what was measured
    before: Side  # simulated as it is
    after: Side  # simulated with the change
    measured: Side
    requests: int
    left_out: tuple[str, ...]
    caveats: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return asdict(self)


def change_of(form: Mapping[str, str]) -> Change:
    """A change from the fields of a form; an empty field changes nothing.

    Sizes are bytes as people write them ('8GB').  Raises `InputError` that names the field.
    """
    reject_unknown_keys("what-if", form, [field.name for field in fields(Change)])
    given: dict[str, Any] = {name: text.strip() for name, text in form.items() if text.strip()}
    for name in _WHOLE:
        if name in given:
            given[name] = _number(name, given[name], int)
    for name in _BYTES:
        if name in given:
            given[name] = parse_bytes(given[name], what=name)
    if "load" in given:
        given["load"] = _number("load", given["load"], float)
    change = Change(**given)
    _require(change)
    return change


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{name} {text!r} is not {what}", hint=f"write {what}") from None


def _require(change: Change) -> None:
    if not 1 / LOAD_MAX <= change.load <= LOAD_MAX:
        raise InputError(
            f"load {change.load:g} is not between {1 / LOAD_MAX:g} and {LOAD_MAX:g}",
            hint="2 means twice as many requests a second",
        )
    for name, least in (*((name, 1) for name in _WHOLE), *((name, 0) for name in _BYTES)):
        value = getattr(change, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}", hint=f"it is at least {least}")
    if (change.sequences_max or 0) > SEQUENCES_MAX:
        raise InputError(
            f"sequences_max is {change.sequences_max:,}", hint=f"at most {SEQUENCES_MAX:,}"
        )
    if (change.batch_tokens or 0) > TOKENS_MAX // 2:
        raise InputError(
            f"batch_tokens is {change.batch_tokens:,}", hint=f"at most {TOKENS_MAX // 2:,}"
        )
    if change.policy is not None:
        lookup("policy", change.policy, POLICIES)
    if change.gpu is not None:
        load_gpu(change.gpu)


# --- the answer -----------------------------------------------------------------------------


def what_if(traffic: Traffic, running: Running, change: Change, *, scale: float = 1.0) -> WhatIf:
    """The traffic on this machine as it is, and as it would be.

    With `scale` (`prediction.scale_of`) this machine's steps are priced as they were
    measured; another machine's are priced by the law.  A pure function that takes seconds: a
    server calls `ask`.  Raises `InputError` and `DoesNotFitError` for a change that cannot be.
    """
    _require(change)
    here = scaled(running.instance, scale)
    there = changed(here, change, unscaled=running.instance)
    before = side_of(replay(traffic, here, policy=running.policy))
    after = side_of(
        replay(traffic, there, policy=change.policy or running.policy, load=change.load)
    )
    measured = side_of(traffic.measured)
    words = words_of(change, running)
    return WhatIf(
        change=words,
        sentence=_sentence(words, before, after, len(traffic.measured.requests)),
        believe=_believe(measured, before),
        before=before,
        after=after,
        measured=measured,
        requests=len(traffic.measured.requests),
        left_out=traffic.left_out,
        caveats=_caveats(change, running, after),
    )


def changed(instance: Instance, change: Change, *, unscaled: Instance | None = None) -> Instance:
    """The instance with the change; on another accelerator it is `unscaled` that moves there.

    Raises `InputError` where that accelerator cannot compute the weights as they are, and
    `DoesNotFitError` where there is no room.
    """
    limits = instance.limits
    batch = change.batch_tokens or limits.batch_tokens
    chunk = change.chunk_tokens or (batch if change.batch_tokens else limits.chunk_tokens)
    limits = replace(
        limits,
        batch_tokens=batch,
        chunk_tokens=min(chunk, batch),
        sequences_max=change.sequences_max or limits.sequences_max,
    )
    if change.gpu is not None:
        return _on_gpu(replace(unscaled or instance, limits=limits), change)
    layout, gpu = instance.layout, instance.cost.gpu
    pages = instance.pages_total
    if change.device_kv_bytes is not None:
        pages = change.device_kv_bytes // layout.page_bytes
        least = layout.pages_per_block + layout.state_pages
        if pages < least:
            raise InputError(
                f"device_kv_bytes is {format_bytes(change.device_kv_bytes)}",
                hint=f"one block of the cache takes {format_bytes(least * layout.page_bytes)}",
            )
    sizes = (change.dram_bytes or 0, change.nvme_bytes or 0)
    return replace(
        instance,
        limits=limits,
        pages_total=pages,
        tier_blocks=(sizes[0] // instance.block_bytes, sizes[1] // instance.block_bytes, 0),
        tier_specs={DRAM: gpu.host, NVME: gpu.nvme, REMOTE: gpu.network},
    )


def _on_gpu(instance: Instance, change: Change) -> Instance:
    """The served model on one accelerator of another kind."""
    assert change.gpu is not None
    gpu, weights = load_gpu(change.gpu), instance.cost.layout.weights
    reason = supports(gpu, weight_format(weights))
    if reason is not None:
        raise InputError(
            f"the weights are served in {weights}, and {reason}", hint="choose another gpu"
        )
    built = build_instance(
        StepCost(instance.cost.model, gpu, Layout(weights=weights, kv=instance.cost.layout.kv)),
        name=gpu.name,
        block_tokens=instance.layout.block_tokens,
        limits=instance.limits,
        device_bytes=change.device_kv_bytes,
        tier_bytes={DRAM: change.dram_bytes or 0, NVME: change.nvme_bytes or 0},
    )
    return replace(built, prefix_cache=instance.prefix_cache)


# --- words ----------------------------------------------------------------------------------


def words_of(change: Change, running: Running) -> str:
    """The change in words: 'chunk 512 -> 256, load x 2'."""
    limits, gpu = running.limits, running.instance.cost.gpu
    device = running.rooms[0].bytes
    said = [
        f"{name} {old} -> {new}"
        for name, old, new in (
            ("policy", running.policy, change.policy),
            ("gpu", gpu.name, change.gpu),
            ("sequences", limits.sequences_max, change.sequences_max),
            ("tokens a step", limits.batch_tokens, change.batch_tokens),
            ("chunk", limits.chunk_tokens, change.chunk_tokens),
        )
        if new is not None and new != old
    ]
    if change.device_kv_bytes is not None:
        said.append(f"device KV {format_bytes(device)} -> {format_bytes(change.device_kv_bytes)}")
    said += [
        f"{name} 0 -> {format_bytes(size)}"
        for name, size in (("DRAM", change.dram_bytes), ("NVMe", change.nvme_bytes))
        if size
    ]
    if change.load != 1:
        said.append(f"load x {change.load:g}")
    return ", ".join(said) or "no change"


def _sentence(words: str, before: Side, after: Side, requests: int) -> str:
    """What the change does, the most felt first."""
    parts = [
        part
        for part in (
            _moved("TTFT p99", before.all.ttft, after.all.ttft, "p99_s"),
            _moved("TTFT p50", before.all.ttft, after.all.ttft, "p50_s"),
            _moved("ITL p99", before.all.itl, after.all.itl, "p99_s"),
            _moved("ITL p50", before.all.itl, after.all.itl, "p50_s"),
            _rate(before.all, after.all),
            _share("good requests", before.all.good_share, after.all.good_share),
            _share(
                "prompt tokens found cached",
                before.hit_share + before.hit_below,
                after.hit_share + after.hit_below,
            ),
            _count("preemptions", before.preemptions, after.preemptions),
        )
        if part
    ]
    lost = after.all.requests - after.all.finished
    if lost:
        parts.append(f"{lost:,} requests do not fit any more")
    told = ", ".join(parts) or "nothing that a user would feel changes"
    return f"{words}: {told} (simulated, {requests:,} requests)"


def _moved(name: str, before: Spread, after: Spread, which: str) -> str:
    old, new = getattr(before, which), getattr(after, which)
    if old is None or new is None or abs(new - old) <= SAME * max(old, new):
        return ""
    return f"{name} {format_seconds(old)} -> {format_seconds(new)}"


def _rate(before: Fared, after: Fared) -> str:
    old, new = before.goodput_rps, after.goodput_rps
    if abs(new - old) <= SAME * max(old, new):
        return ""
    return f"goodput {significant(old)} -> {significant(new)}/s"


def _share(name: str, old: float, new: float) -> str:
    return f"{name} {old:.1%} -> {new:.1%}" if abs(new - old) > SAME / 2 else ""


def _count(name: str, old: int, new: int) -> str:
    return f"{name} {old:,} -> {new:,}" if old != new else ""


def _believe(measured: Side, before: Side) -> str:
    """How far the simulation of what is lies from what was measured."""
    ratios = []
    for name, which in (("TTFT", "ttft"), ("TPOT", "tpot"), ("end to end", "e2e")):
        ours, theirs = getattr(measured.all, which).p50_s, getattr(before.all, which).p50_s
        if ours and theirs:
            ratios.append(f"{name} {ours / theirs:.2f} x")
    if not ratios:
        return "Too little was recorded to compare the simulation with."
    return f"Of what the simulation says of these requests as they were, they took: median \
{', '.join(ratios)}."


def _caveats(change: Change, running: Running, after: Side) -> tuple[str, ...]:
    said = []
    if change.load != 1:
        said.append(
            "Requests come as recorded, only closer or further apart: clients that wait for an"
            " answer before they ask again would adapt."
        )
    if change.gpu is not None:
        evidence = running.instance.cost.evidence
        if change.gpu != running.instance.cost.gpu.name:
            said.append(
                "The other machine is priced by the law alone, and this one as it was measured"
                f" (its law: {evidence.kind})."
            )
    elif running.guessed and not change.gpu:
        said.append("Nobody has measured this machine: `tierline calibrate` makes this surer.")
    lower = (change.dram_bytes or 0) + (change.nvme_bytes or 0)
    if lower and not after.hit_below:
        said.append(
            "Nothing was found in the lower tier: the device holds all that comes again, or a"
            " block is computed sooner than it is loaded."
        )
    if lower and running.device == "cpu" and change.dram_bytes:
        said.append("On a CPU the device's memory is DRAM already: this tier is the same memory.")
    return tuple(said)


# --- in another process ---------------------------------------------------------------------


async def ask(
    traffic: Traffic,
    running: Running,
    change: Change,
    *,
    scale: float = 1.0,
    seconds_max: float = SECONDS_MAX,
) -> WhatIf:
    """`what_if` in a process of its own, at low priority.

    Raises what that raises, and `InputError` when it takes longer than `seconds_max`.
    """
    question = pickle.dumps((traffic, running, change, scale))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from tierline.server.whatif import answer; answer()",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, complaint = await asyncio.wait_for(process.communicate(question), seconds_max)
    except TimeoutError:
        raise InputError(
            f"simulating {len(traffic.requests):,} requests twice takes more than"
            f" {seconds_max:g} s",
            hint="ask for fewer of them",
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise DependencyError(f"the simulation ended with status {process.returncode}: {last}")
    answered = pickle.loads(said)
    if isinstance(answered, InputError):
        raise answered
    assert isinstance(answered, WhatIf)
    return answered


def answer() -> None:
    """What the other process does: one question from standard input, one answer to standard
    output, the error of a change that cannot be in its place."""
    os.nice(NICENESS)
    traffic, running, change, scale = pickle.load(sys.stdin.buffer)
    try:
        told: Any = what_if(traffic, running, change, scale=scale)
    except TierlineError as error:  # some carry more than a pickle brings back
        told = InputError(str(error), hint=error.hint)
    sys.stdout.buffer.write(pickle.dumps(told))
