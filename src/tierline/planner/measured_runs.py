"""Runs measured request by request, simulated: what prices say of them before and after one.

`accuracy` asks for every run of a file. Steps are priced by timed kernels where the
accelerator and the model have them (`perf.kernel_cost`), else by the fitted law. The first run
calibrates: two scalars are searched for that make the simulation of that run agree with each
of its requests, and the other runs on the same accelerator and engine are predicted with them.
With kernels these are the time between two kernels and the time that a layer of a step with
prompts takes more, with the law they are factors of products and of the cache. Scalars are
shrunk towards none, because one run of one model cannot tell apart what it does not vary;
the answer is the most probable pair on a fixed grid, so it never depends on where a search
began.

A data-parallel run is simulated as one instance with the slots and budgets of all ranks,
which step together. Arrivals and first tokens of such runs are stamped inside the engine, so
nothing is added for the time outside of it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tierline.base.clock import PS_PER_S
from tierline.base.errors import InputError, SpecError
from tierline.perf.kernel_cost import KernelCost
from tierline.perf.line import LAW, Calibration, Cost
from tierline.perf.step import StepCost
from tierline.planner.measured import Row
from tierline.planner.measured_files import MeasuredRequest, Run
from tierline.planner.recipes import Launch
from tierline.scheduling.scheduler import Limits
from tierline.sim.api import simulate
from tierline.sim.instance import Instance, build_instance
from tierline.workload.request import Request

PROFILES = {"vllm": "vllm-v1", "sglang": "sglang", "trtllm": "trtllm-no-evict"}
NOISE = 0.05  # of one run's gaps and of its mean TTFT, beyond what scalars explain
REACH = 25  # grid points each way
# The engine reads arrivals between two steps, when it has scheduled the next one already. A
# part of a step drawn at random and the wait for its end are one step on average.
AHEAD_STEPS = 1.0


@dataclass(frozen=True, slots=True)
class Scalar:
    """One of the two that are searched for: its name in `Calibration`, grid and prior width."""

    name: str
    step: float
    width: float
    factor: bool  # step and width are of its logarithm, else it is a time from zero up

    def at(self, point: int) -> float:
        """Its value at a point of the grid."""
        return math.exp(self.step * point) if self.factor else self.step * point

    def allows(self, point: int) -> bool:
        """Whether the grid has that point."""
        return abs(point) <= REACH and (self.factor or point >= 0)

    def surprise(self, point: int) -> float:
        """Minus twice the log of its prior probability."""
        return (self.step * point / self.width) ** 2


SCALARS: Mapping[str, tuple[Scalar, Scalar]] = {
    # A few microseconds pass between kernels; 250 is what the law's fit found for a layer.
    "kernels": (
        Scalar("kernel_s", 0.5e-6, 5e-6, False),
        Scalar("prompt_layer_s", 25e-6, 250e-6, False),
    ),
    # Products are priced by rates that hundreds of stacks agree on; reading the cache depends
    # on the attention kernel that a build chose.
    "law": (Scalar("layers", 0.02, 0.05, True), Scalar("cache", 0.02, 0.20, True)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """A run as simulated; times are means over its requests, in seconds."""

    run: Run
    priced_by: str  # a key of `SCALARS`
    calibration: Calibration
    ttft_s: float
    tpot_s: float
    tpot_spread: float  # root mean square of the requests' log TPOT error

    @property
    def ttft(self) -> float:
        """Predicted over measured mean TTFT."""
        return self.ttft_s / ttft_mean_s(self.run)

    @property
    def tpot(self) -> float:
        """Predicted over measured mean TPOT."""
        return self.tpot_s / tpot_mean_s(self.run)


def ttft_mean_s(run: Run) -> float:
    """Measured mean time to first token."""
    return statistics.fmean(r.first_s - r.arrival_s for r in run.requests)


def tpot_mean_s(run: Run) -> float:
    """Measured mean time between two tokens of a request."""
    return statistics.fmean(tpot_of(r) for r in run.requests)


def tpot_of(request: MeasuredRequest) -> float:
    """Mean seconds between two tokens of one request."""
    return (request.last_s - request.first_s) / max(request.output_tokens - 1, 1)


def row_of(run: Run) -> Row:
    """The run in one row: its means."""
    return Row(
        source="requests",
        where=run.where,
        model=run.model,
        gpu=run.gpu,
        engine=run.engine,
        version=run.version,
        layout=run.layout,
        input_tokens=round(statistics.fmean(r.input_tokens for r in run.requests)),
        output_tokens=round(statistics.fmean(r.output_tokens for r in run.requests)),
        uniform=False,
        clients=0,
        launch=Launch(batch_tokens=run.batch_tokens),
        ttft_s=ttft_mean_s(run),
        tpot_s=tpot_mean_s(run),
    )


def cost_of(run: Run) -> tuple[str, Cost]:
    """The closest way to price the run's steps, and its name in `SCALARS`."""
    try:
        return "kernels", KernelCost(run.model, run.gpu, run.layout)
    except SpecError:
        return "law", StepCost(run.model, run.gpu, run.layout)


def instance_of_run(run: Run, calibration: Calibration = LAW) -> Instance:
    """The instance that the run's settings describe; raises when its weights do not fit."""
    ranks = run.layout.dp
    instance = build_instance(
        cost_of(run)[1],
        name=run.name,
        block_tokens=run.block_tokens,
        limits=Limits(
            batch_tokens=run.batch_tokens * ranks,
            sequences_max=run.sequences_max * ranks,
            chunk_tokens=run.batch_tokens,  # a prompt is on one rank
        ),
    )
    return replace(instance, wait_steps=AHEAD_STEPS, calibration=calibration)


def simulated(run: Run, calibration: Calibration = LAW) -> RunOutcome:
    """The run's requests on its instance.

    Raises `InputError` when the instance could not have served one of them.
    """
    measured = sorted(run.requests, key=lambda r: r.arrival_s)
    columns = simulate(
        instance_of_run(run, calibration),
        [_request(r) for r in measured],
        levels=(),
        policy=PROFILES[run.engine.name],
        trace_block_tokens=run.block_tokens,
    ).requests
    if min(columns.finish_ps) < 0:
        raise InputError(f"run {run.name}: a request is longer than its instance can hold")
    ttft_ps = [f - a for f, a in zip(columns.first_ps, columns.arrival_ps, strict=True)]
    tpot_s = [
        (end - first) / PS_PER_S / max(r.output_tokens - 1, 1)
        for end, first, r in zip(columns.finish_ps, columns.first_ps, measured, strict=True)
    ]
    errors = [
        math.log(s / tpot_of(r)) ** 2
        for s, r in zip(tpot_s, measured, strict=True)
        if s > 0 and tpot_of(r) > 0
    ]
    return RunOutcome(
        run=run,
        priced_by=cost_of(run)[0],
        calibration=calibration,
        ttft_s=statistics.fmean(ttft_ps) / PS_PER_S,
        tpot_s=statistics.fmean(tpot_s),
        tpot_spread=math.sqrt(statistics.fmean(errors)) if errors else 0.0,
    )


def _request(measured: MeasuredRequest) -> Request:
    return Request(
        arrival_ns=round(measured.arrival_s * 1e9),
        input_tokens=measured.input_tokens,
        output_tokens=measured.output_tokens,
        prefix_blocks=measured.blocks,
    )


def calibrated(run: Run) -> Calibration:
    """The scalars that the requests of `run` support: steps downhill on the grid, from none."""
    first, second = SCALARS[cost_of(run)[0]]
    seen: dict[tuple[int, int], float] = {}

    def surprise(point: tuple[int, int]) -> float:
        if point not in seen:
            found = simulated(run, _scalars(point, run))
            apart = found.tpot_spread**2 + math.log(found.ttft) ** 2
            prior = first.surprise(point[0]) + second.surprise(point[1])
            seen[point] = apart / NOISE**2 + prior
        return seen[point]

    best = (0, 0)
    while True:
        near = [
            (best[0] + i, best[1] + j)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if first.allows(best[0] + i) and second.allows(best[1] + j)
        ]
        better = min(near, key=lambda point: (surprise(point), point))
        if surprise(better) >= surprise(best):
            return _scalars(best, run)
        best = better


def _scalars(point: tuple[int, int], run: Run) -> Calibration:
    scalars = SCALARS[cost_of(run)[0]]
    values = {scalar.name: scalar.at(at) for scalar, at in zip(scalars, point, strict=True)}
    return Calibration(**values, source=f"{len(run.requests)} requests of {run.name}")


def calibrate_and_predict(runs: Sequence[Run]) -> list[tuple[RunOutcome, RunOutcome | None]]:
    """Every run with nothing calibrated, and with the scalars of the file's first run.

    The first run is what the scalars were found on, and a run on another accelerator or
    engine, or priced in the other way, has nothing to do with them: there the second answer
    is None.
    """
    if not runs:
        return []
    first = runs[0]
    alike = [run for run in runs[1:] if _stack(run) == _stack(first)]
    scalars = calibrated(first) if alike else LAW
    return [
        (simulated(run), simulated(run, scalars) if run is first or run in alike else None)
        for run in runs
    ]


def _stack(run: Run) -> tuple[str, str, str]:
    return run.gpu.name, run.engine.name, cost_of(run)[0]
