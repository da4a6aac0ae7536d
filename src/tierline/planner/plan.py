"""Make a plan: thirteen steps, read from top to bottom, and a replay that has the last word.

`make_plan` is a function of the question, the profile and the requests; it reads no file and
no clock. The search comes first because every finding is about its winner, and is told in the
order of the method: demand, hardware, routing, memory, precision, parallelism, the curve, KV,
batching, the curve again, the fleet, its cost, and what would make us plan again.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from tierline.base.errors import InfeasibleError, InputError
from tierline.planner import extras, steps
from tierline.planner.candidates import Load, Search, pareto, search
from tierline.planner.deploy import deployment_of
from tierline.planner.finding import Candidate, Plan, Question
from tierline.planner.load import Demand
from tierline.planner.survive import knows_classes, loosest, survive
from tierline.planner.traffic import busy_rate, traffic_of
from tierline.workload.importers import BLOCK_TOKENS
from tierline.workload.profile import Lengths, Profile
from tierline.workload.request import Request

QUANTILES = 40  # equally likely lengths that stand for a distribution
AVERAGE_LOAD = 0.5  # of the peak, where nothing says more: fleets run at 30-60 %
BURSTINESS_MAX = 4.0  # gaps inside a busy minute; a trace's idle hours must not count as bursts


def make_plan(
    question: Question,
    profile: Profile,
    *,
    requests: Sequence[Request] = (),
    block_tokens: int = BLOCK_TOKENS,
    progress: bool = False,
) -> Plan:
    """The whole method. Raises `InfeasibleError` that names the bound when nothing holds.

    `requests` are those of the trace, in order of arrival and with prefix blocks of
    `block_tokens`; without them a replay draws its own from the profile.
    """
    replays = question.replay and question.measured is None
    if replays and knows_classes(question, profile):
        question = replace(question, bounds=loosest(question))
    load = fleet_load(question, profile)
    found = search(question, load, progress=progress)
    best, survival = choose(question, found), None
    if replays:
        traffic = traffic_of(
            profile,
            load,
            safety=question.safety,
            positions_max=question.model.positions_max,
            requests=requests,
            block_tokens=block_tokens,
        )
        found, best, load, survival = survive(
            question, load, found, profile, traffic, progress=progress
        )
    view = steps.View(
        question=question, profile=profile, load=load, found=found, best=best, survival=survival
    )
    findings = (
        steps.characterize_workload(view),
        steps.select_hardware(view),
        steps.decide_routing(view),
        steps.find_memory_floor(view),
        steps.choose_precision(view),
        steps.choose_parallelism(view),
        steps.draw_baseline_curve(view),
        steps.choose_kv_strategy(view),
        steps.choose_batching(view),
        steps.draw_final_curve(view),
        steps.size_fleet(view),
        steps.price_fleet(view),
        steps.set_triggers(view),
        *steps.survive_replay(view),
    )
    others = tuple(c for c in found.candidates if c is not best)
    return Plan(
        question=question,
        headline=steps.headline(view),
        caveats=steps.caveats(view),
        recommended=best,
        alternatives=others,
        pareto=tuple(pareto(found.candidates)),
        rejected=found.rejected,
        findings=findings,
        curve=extras.banded_curve(best),
        cost_by_load=extras.cost_by_load(best),
        sensitivities=extras.sensitivities(view),
        mixed_fleet=extras.mixed_fleet(view),
        profile=profile,
        demand_rps=load.rate_rps,
        deployment=deployment_of(view),
        survival=survival,
        facts=extras.facts(view),
    )


def fleet_load(question: Question, profile: Profile) -> Load:
    """What the fleet must carry: the busy minute, grown; the mean only prices it."""
    arrivals = profile.arrivals
    if question.peak_rps is not None:
        peak = question.peak_rps
        mean = peak * (arrivals.rate_rps / busy_rate(arrivals) if arrivals else 0.0)
    elif arrivals is not None:
        peak, mean = busy_rate(arrivals), arrivals.rate_rps
    else:
        raise InputError(
            f"{profile.source!r} carries no arrival times, so it has no rate",
            hint="add --rps, the rate of a busy minute",
        )
    if question.average_load is not None:
        mean = peak * question.average_load
    mean = mean or peak * AVERAGE_LOAD
    burstiness = arrivals.iat_cv**2 if arrivals is not None else 1.0
    limit = question.model.positions_max
    reuse, growth = profile.reuse, question.growth
    return Load(
        rate_rps=peak * growth,
        mean_rps=min(mean, peak) * growth,
        demand=Demand(
            input_tokens=bins(profile.input, limit),
            output_tokens=bins(profile.output, limit),
            arrival_cv2=min(max(burstiness, 1.0), BURSTINESS_MAX),
        ),
        hit_rate=(lambda tokens: reuse.hit_rate(tokens / growth)) if reuse else None,
        longest_tokens=min(math.ceil(profile.total.quantiles[-1]), limit),
    )


def bins(lengths: Lengths, limit: float, count: int = QUANTILES) -> tuple[float, ...]:
    """`count` equally likely lengths with the mean of the distribution, none above `limit`.

    Each is the mean of its share of the quantiles; the last one takes what is left of the
    distribution's mean, since a heavy tail sits between the last two quantiles.
    """
    steps = 10
    means = []
    for i in range(count):
        points = [(i + (j + 0.5) / steps) / count * 100 for j in range(steps)]
        means.append(sum(lengths.percentile(p) for p in points) / steps)
    rest = lengths.mean * count - sum(means[:-1])
    means[-1] = max(rest, means[-2])
    return tuple(min(max(mean, 1.0), limit) for mean in means)


def choose(question: Question, found: Search) -> Candidate:
    """The cheapest candidate that needs no quality test first; unpriced only if none is priced."""
    allowed = [c for c in found.candidates if not c.needs_quality_test]
    if allowed:
        return allowed[0]
    raise nothing_holds(question, found)


def nothing_holds(question: Question, found: Search) -> InfeasibleError:
    """The error for a question without an answer: which bound forbids it, and what would help."""
    model, gpus = question.model.name, ", ".join(g.name for g in question.gpus)
    if found.candidates:
        first = found.candidates[0]
        return InfeasibleError(
            f"every configuration of {model} that keeps the promises loses more quality than "
            f"{question.quality!r} allows: {first.name} ({first.needs_quality_test})",
            hint="test your tasks on that format, then plan with a lower --quality",
        )
    late = [r for r in found.rejected if r.over is not None]
    if late:
        nearest = min(late, key=lambda r: r.over or 0.0)
        return InfeasibleError(
            f"no configuration of {model} on {gpus} keeps "
            f"{'; '.join(map(str, question.levels))}. Nearest: {nearest.what}: {nearest.why}",
            hint=f"it would keep {nearest.within}; or add faster GPUs, or shorten the prompts"
            if nearest.within
            else "lower the rate of one instance: shorter prompts, or more and faster GPUs",
        )
    unfit = [r for r in found.rejected if r.missing_bytes is not None]
    if unfit:
        nearest = min(unfit, key=lambda r: r.missing_bytes or 0.0)
        return InfeasibleError(
            f"{model} fits on none of {gpus}. Nearest: {nearest.what}: {nearest.why}",
            hint="plan with larger GPUs, or allow a smaller format with --quality mild",
        )
    reasons = "; ".join(f"{r.what}: {r.why}" for r in found.rejected[:3])
    return InfeasibleError(
        f"no configuration of {model} on {gpus} is possible. {reasons}",
        hint="plan with other GPUs, or shorten the longest requests",
    )
