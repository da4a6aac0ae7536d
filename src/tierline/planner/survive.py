"""Which fleet survives a replay: bounds discard, a short replay screens, the full one decides.

`plan.make_plan` calls `survive` with what the closed form found.  Replays cost a second or
two where the closed form costs a millisecond, so a candidate is asked only what matters: can
it keep the promises with so few instances that it costs less than the best so far?  One
replay usually says no.  The winner's own number is bisected.

    INV-PLAN-5  the fleet that is recommended keeps every promise in the replay that decides,
                and one instance less was seen to break one (or the bisection's grain)
    INV-PLAN-6  no candidate that is shown as cheaper than the recommended one keeps them
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tierline.base.errors import InfeasibleError
from tierline.base.progress import progress_bar
from tierline.catalog.formats import kv_format
from tierline.catalog.tier import TierSpec
from tierline.kv.groups import cache_layout
from tierline.planner.candidates import (
    Load,
    Search,
    evaluate,
    over_tiers,
    rank,
    tier_bytes,
    with_instances,
)
from tierline.planner.finding import (
    Candidate,
    Checked,
    Question,
    Rejected,
    Replay,
    Survival,
    Worth,
)
from tierline.planner.replay import OURS, PLAIN, replay
from tierline.planner.traffic import (
    BLOCK_TOKENS_KV,
    DECIDED_REQUESTS_MAX,
    SCREENED_REQUESTS,
    Stretch,
    Traffic,
)
from tierline.workload.profile import Profile
from tierline.workload.slo import ServiceLevel

SCREENED_RATIO = 2.0  # times the best cost, by the closed form: dearer ones are not replayed
RIVALS = 3  # that are decided by the full replay as well, beside all that seem cheaper
HOPELESS = 6  # that are decided although nobody passed the screening
LIMIT_FACTOR = 3  # times the closed form's instances, beyond which nothing is tried
GROWTH = 1.4  # of the instances tried, while a promise breaks
GRAIN = 32  # a fleet is found to one in so many instances
TTFT_WORTH_A_TIER = 0.95
PART = 4  # the smaller size of a tier that is tried: a quarter of it
CHUNK_PARTS = (1, 2, 4, 8)
CHUNK_MIN = 256

Sized = tuple[tuple[TierSpec, int], ...]
StretchOf = Callable[[int], Stretch]


@dataclass(slots=True)
class Judge:
    """Replays candidates, each at most once in the same way."""

    question: Question
    load: Load
    traffic: Traffic
    levels: tuple[ServiceLevel, ...]
    counted: Callable[[int], None] | None = None
    replays: int = 0
    _known: dict[tuple[object, ...], Replay] = field(default_factory=dict)

    def at(
        self,
        candidate: Candidate,
        instances: int,
        stretch_of: StretchOf,
        *,
        policy: str = OURS,
        slowdown: float | None = None,
    ) -> Replay:
        """What becomes of the promises with so many instances."""
        tiers = candidate.lower_tiers
        slowdown = candidate.evidence.high if slowdown is None else slowdown
        key = (
            *(candidate.gpu.name, candidate.layout, candidate.instance.chunk_tokens),
            *(
                instances,
                stretch_of.__name__,
                policy,
                slowdown,
                tuple((t.name, t.bytes_per_instance) for t in tiers),
            ),
        )
        if key not in self._known:
            stretch = stretch_of(instances)
            self.replays += 1
            self._known[key] = replay(
                candidate,
                stretch,
                instances=instances,
                replicas=self.traffic.slice_of(instances),
                levels=self.levels,
                policy=policy,
                lower_tiers=tiers,
                slowdown=slowdown,
                block_tokens=self.traffic.block_tokens,
            )
            if self.counted is not None:
                self.counted(len(stretch.requests))
        return self._known[key]

    def seen(self, candidate: Candidate, instances: int) -> list[Replay]:
        """All replays of so many of these instances, over whatever tiers."""
        return [
            r
            for (gpu, layout, *_), r in self._known.items()
            if (gpu, layout, r.instances) == (candidate.gpu.name, candidate.layout, instances)
        ]

    def fewest(
        self,
        candidate: Candidate,
        start: int,
        stretch_of: StretchOf,
        *,
        limit: int,
        broken: int = 0,
        policy: str = OURS,
    ) -> Replay | None:
        """The replay of the smallest fleet that keeps the promises, at most `limit` instances.

        Tried from `start` on: upwards while a promise breaks, else down by bisection. So many
        as `broken` are known to be too few.
        """

        def tried(instances: int) -> Replay:
            return self.at(candidate, instances, stretch_of, policy=policy)

        low, high = broken, max(min(start, limit), broken + 1)
        while not tried(high).kept:
            if high >= limit:
                return None
            low, high = high, min(max(high + 1, math.ceil(high * GROWTH)), limit)
        while high - low > max(high // GRAIN, 1):
            middle = (low + high) // 2 if low else high - max(high // 4, 1)
            if tried(middle).kept:
                high = middle
            else:
                low = middle
        return tried(high)


@dataclass(slots=True)
class _Entry:
    """A candidate while it is judged: what it is thought to take."""

    candidate: Candidate
    instances: int  # the closed form's, or what replays say by now
    tried: int = 0  # the most instances that broke a promise
    why: str = ""
    found: bool = False
    policy: str = OURS

    @property
    def cost(self) -> tuple[float, float]:
        return cost_of(self.candidate, self.instances)


def cost_of(candidate: Candidate, instances: int) -> tuple[float, float]:
    """What is compared: dollars a year, unpriced last; then GPUs."""
    edge = candidate.pessimistic
    usd = math.inf if edge.usd_per_year is None else edge.usd_per_year / edge.instances * instances
    return (usd, instances * candidate.layout.gpus)


def most_under(candidate: Candidate, cost: tuple[float, float]) -> int:
    """The most instances that cost less than this; 0 when a single one does not."""
    usd, gpus = cost
    one_usd, one_gpus = cost_of(candidate, 1)
    if math.isinf(one_usd):
        return 0 if not math.isinf(usd) else max(math.ceil(gpus / one_gpus) - 1, 0)
    if math.isinf(usd):
        return 1 << 20
    return max(math.ceil(usd / one_usd * (1 - 1e-9)) - 1, 0)


def survive(
    question: Question,
    load: Load,
    found: Search,
    profile: Profile,
    traffic: Traffic,
    *,
    progress: bool = False,
) -> tuple[Search, Candidate, Load, Survival]:
    """The search corrected by replays, its winner, the corrected load, and how it came about.

    Raises `InfeasibleError` when no candidate keeps the promises in a replay.
    """
    total = 40 * SCREENED_REQUESTS + 20 * min(len(traffic.requests), DECIDED_REQUESTS_MAX)
    with progress_bar(total, what="replaying", show=progress) as counted:
        judge = Judge(question, load, traffic, judged_levels(question, profile), counted)
        entries = _distinct(found)
        _screen(judge, entries)
        winner = _decide(judge, entries)
        tiers, policies, chosen, deciding = _tune(judge, winner)
        best, corrected = with_instances(question, chosen, load, deciding.instances)
        n = deciding.instances
        survival = Survival(
            closed_form_instances=winner.candidate.pessimistic.instances,
            deciding=deciding,
            everyday=judge.at(best, n, traffic.everyday, policy=deciding.policy, slowdown=1.0),
            smaller=_one_less(judge, best, deciding),
            checked=_checked(entries),
            tiers=tiers,
            policies=policies,
            replays=judge.replays,
            notes=_notes(traffic, deciding),
        )
    return _corrected(question, load, found, entries, best), best, corrected, survival


def judged_levels(question: Question, profile: Profile) -> tuple[ServiceLevel, ...]:
    """Each class by its own promise; every request by all where classes cannot be told apart."""
    if knows_classes(question, profile):
        return question.levels
    if len(question.levels) == 1:
        return question.levels
    targets = tuple(t for level in question.levels for t in level.targets)
    return (ServiceLevel(name="every class", targets=targets),)


def knows_classes(question: Question, profile: Profile) -> bool:
    """Whether the workload's priorities tell which request belongs to which class."""
    ranks = sorted({level.priority for level in question.levels}, reverse=True)
    seen = {next((r for r in ranks if r <= p), ranks[-1]) for p in profile.priorities}
    return len(seen) > 1


def loosest(question: Question) -> tuple[ServiceLevel, ...]:
    """What every request is owed, whatever its class: the loosest limit of each promise."""
    names = [{(t.metric, t.percentile) for t in level.targets} for level in question.levels]
    shared = sorted(set.intersection(*names))
    targets = [
        max(
            (t for lv in question.levels for t in lv.targets if (t.metric, t.percentile) == name),
            key=lambda t: t.limit_ns,
        )
        for name in shared
    ]
    return (ServiceLevel(name="every request", targets=tuple(targets)),)


# --- screening and deciding -----------------------------------------------------------------


def _distinct(found: Search) -> list[_Entry]:
    """What may be recommended, cheapest first by the closed form, each way of cutting once."""
    entries: dict[tuple[object, ...], _Entry] = {}
    for c in found.candidates:
        if not c.needs_quality_test:
            entries.setdefault((c.gpu.name, c.layout), _Entry(c, c.pessimistic.instances))
    return list(entries.values())


def _screen(judge: Judge, entries: list[_Entry]) -> None:
    """The busiest stretch: who could cost less than the best so far."""
    best: tuple[float, float] | None = None
    for entry in entries:
        if best is not None and entry.cost[0] > best[0] * SCREENED_RATIO:
            continue
        if _improves(judge, entry, best, judge.traffic.screening):
            best = entry.cost


def _improves(
    judge: Judge, entry: _Entry, best: tuple[float, float] | None, stretch_of: StretchOf
) -> bool:
    """Whether the candidate keeps the promises for less than `best`; notes what was seen.

    Under our policy, or else first come first served: which is better depends on the promises.
    More instances than expected are tried only after both failed with as many.
    """
    candidate = entry.candidate
    limit = LIMIT_FACTOR * candidate.pessimistic.instances + 2
    cap = limit if best is None else min(most_under(candidate, best), limit)
    if cap < 1:
        return False
    start = min(entry.instances, cap)
    for most in dict.fromkeys((start, cap)):
        for policy in (entry.policy, PLAIN if entry.policy == OURS else OURS):
            kept = judge.fewest(candidate, start, stretch_of, limit=most, policy=policy)
            if kept is not None:
                entry.instances, entry.policy, entry.found = kept.instances, policy, True
                return True
    broken = judge.at(candidate, cap, stretch_of, policy=entry.policy)
    entry.tried, entry.why, entry.found = cap, broken.broken, False
    entry.instances = max(entry.instances, cap + 1)
    return False


def _decide(judge: Judge, entries: list[_Entry]) -> _Entry:
    """The full trace: first who seems cheapest, then whoever might be cheaper still."""
    waiting = sorted(entries, key=lambda e: (e.cost, not e.found, rank(e.candidate)))
    best: _Entry | None = None
    rivals = 0
    for number, entry in enumerate(waiting):
        if best is None and number >= HOPELESS and not entry.found:
            break  # nobody passed the screening either
        seems_cheaper = best is None or entry.cost < best.cost
        if not seems_cheaper:
            rivals += 1
            if rivals > RIVALS:
                break
        if _improves(judge, entry, best.cost if best else None, judge.traffic.decision):
            best = entry
    if best is None:
        raise _nothing_survives(judge, waiting)
    return best


def _nothing_survives(judge: Judge, entries: list[_Entry]) -> InfeasibleError:
    nearest = entries[0]
    return InfeasibleError(
        f"the closed form says that {nearest.candidate.name} keeps the promises, but a replay "
        f"of {judge.traffic.name} breaks them even with {nearest.tried} instances: "
        f"{nearest.why}",
        hint="relax the limit that breaks, or plan without the replay (--quick) and test a fleet",
    )


# --- tiers and policies ---------------------------------------------------------------------


def _tune(
    judge: Judge, winner: _Entry
) -> tuple[tuple[Worth, ...], tuple[Worth, ...], Candidate, Replay]:
    """What tiers and the policy are worth, and the best of them."""
    tiers, candidate, kept = _best_tiers(judge, winner)
    rival = PLAIN if winner.policy == OURS else OURS
    other, other_kept = _under(rival, judge, candidate, kept)
    chosen = (candidate, kept)
    if other_kept is not None and other_kept.instances < kept.instances:
        chosen = (other, other_kept)
    rows = ((winner.policy, candidate, kept), (rival, other, other_kept))
    policies = tuple(
        _worth(policy, c, r, policy=policy, chosen=r is chosen[1])
        for policy, c, r in sorted(rows, key=lambda row: row[0] != OURS)
    )
    return tiers, policies, *chosen


def _best_tiers(judge: Judge, winner: _Entry) -> tuple[tuple[Worth, ...], Candidate, Replay]:
    """The winner over nothing, DRAM, and DRAM and NVMe; then with less of the last tier.

    More memory never needs more instances, so what is known of one bounds the next.
    """
    decision, most = judge.traffic.decision, winner.instances
    known = len(winner.candidate.lower_tiers)
    ladder = _ladder(judge, winner.candidate)
    seen: list[tuple[Candidate, Replay | None]] = []
    chosen: tuple[Candidate, Replay] | None = None
    for depth, candidate in enumerate(ladder):
        kept = judge.fewest(
            candidate,
            most,
            decision,
            limit=LIMIT_FACTOR * most + 2,
            broken=winner.instances - 1 if depth < known else 0,
            policy=winner.policy,
        )
        seen.append((candidate, kept))
        if kept is not None:
            most = kept.instances
            if chosen is None or _clearly_better(kept, chosen[1]):
                chosen = (candidate, kept)
    assert chosen is not None, "the winner was decided over one of these tiers"
    if chosen[0].lower_tiers:
        smaller = _with_less(judge, *chosen)
        seen.insert(seen.index(chosen), smaller)
        candidate, kept = smaller
        if kept is not None and not _clearly_better(chosen[1], kept):
            chosen = (candidate, kept)
    tiers = tuple(
        _worth(_tier_label(c), c, kept, policy=winner.policy, chosen=c is chosen[0])
        for c, kept in seen
    )
    return tiers, *chosen


def _ladder(judge: Judge, base: Candidate) -> list[Candidate]:
    """The candidate without tiers, with all of DRAM, and with all of NVMe beside it."""
    question, load = judge.question, judge.load
    bare = evaluate(question, base.instance.cost, load) if base.lower_tiers else base
    plain = replace(base if isinstance(bare, Rejected) else bare, lower_tiers=())
    layout = cache_layout(
        question.model, kv_format(base.layout.kv), tp=base.layout.tp, block_tokens=BLOCK_TOKENS_KV
    )
    if load.hit_rate is None or not layout.shares_prefixes:
        return [plain]
    ladder = [plain]
    sized: Sized = ()
    for spec in (base.gpu.host, base.gpu.nvme):
        if size := tier_bytes(base.layout, spec):
            sized = (*sized, (spec, size))
            tiered = over_tiers(question, plain, load, sized, hits_min=0.0)
            ladder += [tiered] if tiered is not None else []
    return ladder


def _with_less(judge: Judge, candidate: Candidate, kept: Replay) -> tuple[Candidate, Replay | None]:
    """The candidate with a part of its last tier; with as many instances or a few more."""
    *above, last = candidate.lower_tiers
    smaller = replace(
        last, bytes_per_instance=last.bytes_per_instance // PART, tokens=last.tokens // PART
    )
    fewer = replace(candidate, lower_tiers=(*above, smaller))
    limit = kept.instances + max(kept.instances // 4, 1)
    return fewer, judge.fewest(
        fewer,
        kept.instances,
        judge.traffic.decision,
        limit=limit,
        broken=kept.instances - 1,
        policy=kept.policy,
    )


def _under(
    policy: str, judge: Judge, candidate: Candidate, beside: Replay
) -> tuple[Candidate, Replay | None]:
    """The smallest fleet of the same instance under another policy.

    First come first served does not adapt its chunks, so smaller ones are tried, too; the
    short replay picks.
    """
    limit = LIMIT_FACTOR * beside.instances + 2
    best: tuple[int, Candidate] | None = None
    for part in CHUNK_PARTS if policy == PLAIN else (1,):
        chunk = max(candidate.instance.chunk_tokens // part, CHUNK_MIN)
        sized = replace(candidate, instance=replace(candidate.instance, chunk_tokens=chunk))
        most = limit if best is None else best[0] - 1
        start = min(beside.instances, most)
        if most < 1:
            break
        kept = judge.fewest(sized, start, judge.traffic.screening, limit=most, policy=policy)
        if kept is not None:
            best = (kept.instances, sized)
    if best is None:
        return candidate, None
    start, sized = best
    return sized, judge.fewest(sized, start, judge.traffic.decision, limit=limit, policy=policy)


def _clearly_better(kept: Replay, beside: Replay) -> bool:
    """Fewer instances; or as many, and first tokens clearly sooner."""
    if kept.instances != beside.instances:
        return kept.instances < beside.instances
    ttft_s, other_s = kept.ttft_percentile_s(99), beside.ttft_percentile_s(99)
    return ttft_s is not None and other_s is not None and ttft_s < TTFT_WORTH_A_TIER * other_s


def _tier_label(candidate: Candidate) -> str:
    if not candidate.lower_tiers:
        return "device memory alone"
    return " + ".join(
        f"{t.label} {t.bytes_per_instance / 1e9:,.0f} GB" for t in candidate.lower_tiers
    )


def _worth(
    label: str, candidate: Candidate, kept: Replay | None, *, policy: str, chosen: bool
) -> Worth:
    usd = cost_of(candidate, kept.instances)[0] if kept is not None else math.inf
    return Worth(
        label=label,
        policy=policy,
        lower_tiers=candidate.lower_tiers,
        instances=kept.instances if kept else None,
        gpus=kept.instances * candidate.layout.gpus if kept else None,
        usd_per_year=None if math.isinf(usd) else usd,
        ttft_p99_s=kept.ttft_percentile_s(99) if kept else None,
        hit_share=kept.hit_share if kept else 0.0,
        chosen=chosen,
    )


# --- what is told ---------------------------------------------------------------------------


def _one_less(judge: Judge, best: Candidate, deciding: Replay) -> Replay | None:
    """What breaks with one instance less, perhaps with larger tiers; None if that was not seen."""
    return next(
        (
            r
            for r in judge.seen(best, deciding.instances - 1)
            if not r.kept and r.stretch == deciding.stretch and r.policy == deciding.policy
        ),
        None,
    )


def _checked(entries: list[_Entry]) -> tuple[Checked, ...]:
    return tuple(
        Checked(
            name=f"{e.candidate.gpu.name} {e.candidate.layout}",
            closed_form_instances=e.candidate.pessimistic.instances,
            instances=e.instances if e.found else None,
            tried_instances=e.tried,
            why=e.why,
        )
        for e in entries
        if e.found or e.tried
    )


def _notes(traffic: Traffic, deciding: Replay) -> tuple[str, ...]:
    notes = list(traffic.notes)
    replicas = traffic.slice_of(deciding.instances)
    if replicas < deciding.instances:
        notes.append(
            f"{replicas} of {deciding.instances} instances were replayed, with their share of "
            "the load: fewer instances share peaks less well, so this errs to the safe side"
        )
    cut = sum(r.input_tokens + r.output_tokens > traffic.positions_max for r in traffic.requests)
    if cut:
        notes.append(f"{cut:,} requests are longer than the model reads and were cut to it")
    return tuple(notes)


def _corrected(
    question: Question, load: Load, found: Search, entries: list[_Entry], best: Candidate
) -> Search:
    """All candidates with what replays said of them; none that seems cheaper than the best."""
    of = {(e.candidate.gpu.name, e.candidate.layout): e for e in entries}
    cost = cost_of(best, best.pessimistic.instances)
    kept: list[Candidate] = [best]
    rejected = list(found.rejected)
    for candidate in found.candidates:
        entry = of.get((candidate.gpu.name, candidate.layout))
        if entry is None:  # needs a quality test: never recommended, never replayed
            kept.append(candidate)
            continue
        if (candidate.gpu.name, candidate.layout) == (best.gpu.name, best.layout):
            continue
        shown = candidate
        if candidate is entry.candidate and entry.instances != candidate.pessimistic.instances:
            shown = with_instances(question, candidate, load, entry.instances)[0]
        if cost_of(shown, shown.pessimistic.instances) < cost:
            why = entry.why or "the same accelerator cut the same way, over other tiers, does not"
            rejected.append(Rejected(what=candidate.name, why=f"replay: {why}"))
            continue
        kept.append(shown)
    return replace(found, candidates=tuple(sorted(kept, key=rank)), rejected=tuple(rejected))
