"""Predicted against measured, live: do the laws that schedule and plan say what happens here?

The Plan page asks with the steps that the recorder kept (`step_fit`) and with past lives
(`class_fits`).  A step is priced by the line that the scheduler itself uses; a class is predicted
by serving its recorded requests again in a simulation.  Ratios are measured over predicted, so
1.2 is a fifth slower than predicted.

Invariants
    INV-SRV-63  a ratio compares one measured step with the price of that very step
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tierline.perf.line import StepLine
from tierline.perf.step import StepCost
from tierline.server.life import Life, StepSample
from tierline.server.replay import replay, side_of, traffic_of
from tierline.server.running import Running
from tierline.sim.instance import Instance
from tierline.sim.measure import Spread

STEPS_MAX = 500  # the latest, of those that were recorded
STEPS_LEAST = 20  # fewer say nothing
NEAR = 1.25  # a factor within which a prediction is called good
SPREAD_WIDE = 2.0  # p90 over p10 from which something disturbs the steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Measured over predicted, of some steps."""

    steps: int
    p10: float
    p50: float
    p90: float
    measured_s: float  # all of them together
    predicted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """How far steps lie from what was predicted of them, and what it probably is."""

    all: Ratio | None  # None: nothing was computed yet
    decode: Ratio | None  # steps without prompt tokens
    mixed: Ratio | None  # steps with them
    between_share: float  # of the busy time, between two steps
    sentence: str
    reason: str  # "" when nothing is off


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFit:
    """One class as it fared and as the same requests fare in a simulation. Seconds."""

    name: str
    requests: int
    ttft_p50: tuple[float | None, float | None]  # measured, predicted
    ttft_p99: tuple[float | None, float | None]
    tpot_p50: tuple[float | None, float | None]
    tpot_p99: tuple[float | None, float | None]
    e2e_p50: tuple[float | None, float | None]


def price_ps(line: StepLine, sample: StepSample) -> int:
    """What the law says that this step takes (INV-SRV-63)."""
    chunks = [(before, tokens) for _, tokens, before in sample.chunks]
    return line.line(sample.decodes, sample.context_tokens, chunks)[0]


def step_fit(samples: Sequence[StepSample], running: Running) -> StepFit:
    """The latest steps beside their prices."""
    line = running.instance.line()
    recent = [s for s in samples if s.decodes or s.chunks][-STEPS_MAX:]
    timed = [(s.end_ps - s.start_ps, price_ps(line, s)) for s in recent]
    kinds = [bool(s.chunks) for s in recent]
    everyone = _ratio(timed)
    decode = _ratio([t for t, mixed in zip(timed, kinds, strict=True) if not mixed])
    mixed = _ratio([t for t, mixed in zip(timed, kinds, strict=True) if mixed])
    between = _between_share(recent)
    return StepFit(
        all=everyone,
        decode=decode,
        mixed=mixed,
        between_share=between,
        sentence=_sentence(everyone),
        reason=_reason(running, everyone, decode, mixed, between),
    )


def scale_of(samples: Sequence[StepSample], running: Running) -> float:
    """By what the law is multiplied to take as long as these steps did, all together.

    For replays of what was served during them; 1 while too few were seen.  Long steps weigh more,
    because it is they that requests wait for.
    """
    computed = [s for s in samples if s.decodes or s.chunks]
    if len(computed) < STEPS_LEAST:
        return 1.0
    line = running.instance.line()
    measured_ps = sum(s.end_ps - s.start_ps for s in computed)
    return measured_ps / sum(price_ps(line, s) for s in computed)


def _ratio(timed: Sequence[tuple[int, int]]) -> Ratio | None:
    if not timed:
        return None
    ratios = sorted(measured / predicted for measured, predicted in timed)

    def at(share: float) -> float:
        return ratios[min(int(share * len(ratios)), len(ratios) - 1)]

    return Ratio(
        steps=len(timed),
        p10=at(0.1),
        p50=at(0.5),
        p90=at(0.9),
        measured_s=sum(m for m, _ in timed) / 1e12,
        predicted_s=sum(p for _, p in timed) / 1e12,
    )


def _between_share(samples: Sequence[StepSample]) -> float:
    """Of the time that sequences were served, the share in which no step was computed."""
    busy = between = 0
    for before, after in pairwise(samples):
        if after.number == before.number + 1 and (before.waiting or after.decodes):
            between += max(after.start_ps - before.end_ps, 0)
            busy += after.end_ps - before.end_ps
    return between / busy if busy else 0.0


def _sentence(ratio: Ratio | None) -> str:
    if ratio is None:
        return "No step was computed yet."
    steps = "step" if ratio.steps == 1 else "steps"
    return (
        f"Steps take {ratio.p50:.2f} x what was predicted (p10-p90 {ratio.p10:.2f}-{ratio.p90:.2f})"
        f" over the last {ratio.steps:,} {steps}."
    )


def _reason(
    running: Running,
    everyone: Ratio | None,
    decode: Ratio | None,
    mixed: Ratio | None,
    between: float,
) -> str:
    """The likeliest reason, the most telling first."""
    if everyone is None or everyone.steps < STEPS_LEAST:
        return ""
    off = not 1 / NEAR <= everyone.p50 <= NEAR
    if off and running.guessed:
        return (
            "Nobody has measured this machine, so its rates are a guess: run `tierline calibrate`"
            " while nothing else runs, and start the server again."
        )
    if everyone.p90 > SPREAD_WIDE * everyone.p10:
        return (
            "Equal steps take very different times: something else uses this machine's cores or"
            " memory."
        )
    if decode and mixed and min(decode.steps, mixed.steps) >= STEPS_LEAST:
        apart = mixed.p50 / decode.p50
        if not 1 / NEAR <= apart <= NEAR:
            slow = "with prompt tokens" if apart > 1 else "without prompt tokens"
            return (
                f"Steps {slow} are further off ({mixed.p50:.2f} x with them, {decode.p50:.2f} x"
                " without): the arithmetic and the memory of this machine changed differently"
                " since it was measured, or the weights are kept in another format than was priced."
            )
    if off:
        than = "slower" if everyone.p50 > 1 else "faster"
        return (
            f"The machine is {than} than when it was measured ({running.here.source}): its clock,"
            " its load or its kernels changed; `tierline calibrate` measures it again."
        )
    if between > 1 - 1 / NEAR:
        return (
            f"Steps take what they should, and {between:.0%} of the busy time passes between them:"
            " the engine waits for the process around it."
        )
    return ""


# --- classes --------------------------------------------------------------------------------


def class_fits(
    lives: Sequence[Life], running: Running, *, scale: float = 1.0
) -> tuple[ClassFit, ...]:
    """Every class as measured and as replayed, all together first.

    With `scale` (`scale_of`) steps are priced as they were measured: what is left of a
    difference is queueing and scheduling.  Takes as long as a simulation does: not for an event
    loop.  Raises `InputError` when no life can be replayed.
    """
    traffic = traffic_of(lives, running.levels, block_tokens=running.block_tokens)
    measured = side_of(traffic.measured)
    instance = scaled(running.instance, scale)
    predicted = side_of(replay(traffic, instance, policy=running.policy))
    theirs = {fared.name: fared for fared in (predicted.all, *predicted.levels)}
    fits = []
    for ours in (measured.all, *measured.levels):
        other = theirs[ours.name]
        fits.append(
            ClassFit(
                name=ours.name,
                requests=ours.requests,
                ttft_p50=_both(ours.ttft, other.ttft, "p50_s"),
                ttft_p99=_both(ours.ttft, other.ttft, "p99_s"),
                tpot_p50=_both(ours.tpot, other.tpot, "p50_s"),
                tpot_p99=_both(ours.tpot, other.tpot, "p99_s"),
                e2e_p50=_both(ours.e2e, other.e2e, "p50_s"),
            )
        )
    return tuple(fits)


def _both(ours: Spread, theirs: Spread, name: str) -> tuple[float | None, float | None]:
    return getattr(ours, name), getattr(theirs, name)


def scaled(instance: Instance, scale: float) -> Instance:
    """The same instance, every step `scale` times as long."""
    cost = instance.cost
    assert isinstance(cost, StepCost), "an engine's law is the step law"
    return replace(instance, cost=cost.scaled(scale))
