"""The virtual executor: one instance that prices steps instead of computing them.

It asks the scheduler for a step, and for as many repeats of it as nothing outside can
disturb; it knows output lengths, so it bounds repeats by the next last token.  Whatever
happens meanwhile (an arrival, a landing, a fault) may *cut* the step: nothing was accounted
yet, so the repeats that began before the event are completed and the rest never happened.

A replica owns its links.  Transfers move while steps run; only what must leave the device
before a step ("swap-out") stalls it.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from typing import Any, Protocol

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.base.errors import DoesNotFitError
from tierline.kv.link import Link
from tierline.kv.transfer import DEMAND, DEVICE, Transfer
from tierline.perf.line import StepLine, steps_before
from tierline.scheduling.admission import Admission, Refuse
from tierline.scheduling.scheduler import Scheduler
from tierline.scheduling.sequence import Sequence
from tierline.scheduling.step import Step
from tierline.sim.record import ReplicaTotals, Steps

Event = tuple[int, int, int, int, Any]  # (time, rank, replica, serial or version, payload)
LINK_DONE, STEP_DONE, CONTROL = range(3)  # who goes first at one instant; arrivals come after


class Pools(Protocol):
    """Who computes prompts in one place and decodes in another (`sim.pools`)."""

    def begins(self, replica: "Replica", step: Step, now_ps: int) -> None:
        """A step with prompts begins there."""
        ...

    def hands_over(self, replica: "Replica", sequence: Sequence, now_ps: int) -> bool:
        """Whether a computed prompt is decoded elsewhere."""
        ...

    def handed_over(self, sequence: Sequence, now_ps: int) -> None:
        """It was computed here, and its cache leaves now."""
        ...

    def finished(self, sequence: Sequence) -> None:
        """It said all it had to say where its prompt was computed."""
        ...

    def sends(self, transfer: Transfer) -> None:
        """A handover starts to move."""
        ...

    def lost(self, transfer: Transfer) -> None:
        """What was handed over does not arrive."""
        ...

    def landed(self, replica: "Replica", transfer: Transfer, now_ps: int) -> None:
        """It has arrived there."""
        ...

    def expects(self, replica: "Replica", sequence: Sequence) -> bool:
        """Whether what it keeps of a computed prompt is still to be sent."""
        ...

    def died(self, replica: "Replica", now_ps: int) -> None:
        """A replica is gone, with what it kept for others and what was on its way there."""
        ...


class Watcher(Protocol):
    """Who wants to know about some requests (`sim.watch`)."""

    def stepped(
        self, replica: "Replica", step: Step, *, repeats: int, start_ps: int, now_ps: int
    ) -> None:
        """A step ended; called before it is accounted."""
        ...


class Home(Protocol):
    """What a replica needs of the fleet it lives in (`sim.fleet.Fleet`)."""

    now_ps: int
    repeats_max: int
    heap: list[Event]
    outputs: Seq[int]
    rng: random.Random
    steps: Steps | None
    pools: Pools | None

    @property
    def watch(self) -> Watcher | None:
        """Who is told of steps, if anybody."""
        ...

    def later(self, at_ps: int, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action(now_ps, *arguments)` at an instant."""
        ...

    def wake(self, replica: "Replica") -> None:
        """The replica should decide at the end of this instant."""
        ...

    def finished(self, replica: "Replica", s: Sequence, now_ps: int) -> None:
        """A request has its last token."""
        ...


class Speculation:
    """Drafts in a simulation: how many are verified at once, at what price and with what luck."""

    __slots__ = ("acceptance", "draft_ps", "rng")

    def __init__(self, *, acceptance: float, draft_ps: int, seed: int) -> None:
        self.acceptance = acceptance  # of one drafted token, given that those before it were
        self.draft_ps = draft_ps  # time to draft for one step
        self.rng = random.Random(seed)

    def accepted(self, most: int) -> int:
        """Verified drafts of one sequence in one step."""
        count = 0
        while count < most and self.rng.random() < self.acceptance:
            count += 1
        return count


class Replica:
    """One instance in a fleet."""

    __slots__ = (
        "_alpha",
        "_beta",
        "_doomed",
        "_gap_ps",
        "_gaps",
        "_link_versions",
        "_paused",
        "_skipped",
        "_start_ps",
        "_stop_of",
        "_stops",
        "_version",
        "_worst",
        "accepting",
        "admission",
        "alive",
        "decodes_only",
        "fleet",
        "host_ps",
        "line",
        "line_at",
        "links",
        "model",
        "number",
        "prompt_tokens_queued",
        "repeats",
        "requests_outstanding",
        "scheduler",
        "sequences",
        "speculation",
        "speed_permille",
        "step",
        "tokens_committed",
        "totals",
        "twin",
        "up_since_ps",
        "wait_steps",
    )

    def __init__(
        self,
        number: int,
        scheduler: Scheduler,
        line: StepLine,
        *,
        links: Mapping[tuple[int, int], Link],
        totals: ReplicaTotals,
        host_ps: int = 0,
        wait_steps: float = 0.0,
        speculation: Speculation | None = None,
    ) -> None:
        """`links` carry from tier to tier; `host_ps` is added to first tokens, and a request is
        seen after up to `wait_steps` steps: how other engines spend time outside a step."""
        self.number, self.scheduler, self.line = number, scheduler, line
        self.links, self.totals = dict(links), totals
        self.host_ps, self.wait_steps, self.speculation = host_ps, wait_steps, speculation
        self.fleet: Home
        self.twin: Callable[[int], Replica]  # another one like it, empty, by number
        self.line_at: Callable[[float], StepLine]  # its prices when every step takes longer
        self.model = 0  # that it serves, as an index into Run.models
        self.decodes_only = False  # it gets its work from prefill replicas, not from the router
        self.accepting = True
        self.alive = True
        self.up_since_ps = 0  # paid for since; -1: not paid for
        self.requests_outstanding = 0
        self.prompt_tokens_queued = 0
        self.tokens_committed = 0  # prompts and outputs of everybody here, to their end
        self.step: Step | None = None
        self.repeats = 0
        self._start_ps = self._alpha = self._beta = 0
        self._version = 0
        self._link_versions = dict.fromkeys(self.links, 0)
        self._stops: list[tuple[int, int]] = []  # (tick of the last token, sequence)
        self._stop_of: dict[int, int] = {}
        self._gaps: list[tuple[int, int]] = []  # (tick, gap), falling: worst gap since a tick
        self._gap_ps = 0  # time since the last tick in steps that advanced no decode
        self._paused: dict[int, int] = {}  # preempted after tokens: instant of the last one
        self._worst: dict[int, int] = {}  # their longest gap so far
        self._skipped: dict[int, int] = {}  # stood still before these joined, since the last tick
        self._doomed = 0  # transfers to come that will not arrive
        self.sequences: dict[int, Sequence] = {}  # everybody who is here
        self.admission = Admission(scheduler) if scheduler.policy.refuses else None
        chunk = scheduler.limits.chunk_tokens
        # Prompt tokens a second, in thousandths of a reference of 10,000 tokens a second.
        self.speed_permille = max(chunk * PS_PER_S // (10 * line.line(0, 0, [(0, chunk)])[0]), 1)

    # --- what routers ask -------------------------------------------------------------------

    def cached_tokens(self, sequence: Sequence) -> int:
        """Tokens of the prompt's prefix that are in this replica's KV, whatever the tier."""
        if sequence.chain is None:
            return 0
        scheduler = self.scheduler
        limit = sequence.prompt_tokens // scheduler.layout.block_tokens
        found = scheduler.index.found(sequence.chain, limit)
        step = self.step
        if step is not None and self.repeats > 1 and step.chunks:
            found = self._published_meanwhile(sequence, found, limit, step)
        return found * scheduler.layout.block_tokens

    def _published_meanwhile(self, sequence: Sequence, found: int, limit: int, step: Step) -> int:
        """Repeats under way have published blocks that the index does not know yet.

        Without this a router would see another cache with repeats than without.
        """
        owner, tokens = step.chunks[0]
        chain = owner.chain
        if chain is None or owner.published_blocks != found:
            return found
        begun = steps_before(
            self._alpha, self._beta, self.fleet.now_ps - self._start_ps, self.repeats
        )
        done = begun - 1  # the last one begun has not ended
        upto = min(owner.cached_tokens + done * tokens, owner.prompt_tokens)
        upto = min(upto // self.scheduler.layout.block_tokens, limit)
        while found < upto and chain[found] == sequence.chain[found]:
            found += 1
        return found

    def has_adapter(self, name: str) -> bool:
        """Whether the adapter is on the device, or on its way there."""
        adapters = self.scheduler.adapters
        return not name or adapters is None or adapters.near(name)

    def predicted_ttft_ps(self, sequence: Sequence) -> int:
        """Time to a first token if it came here now: work queued before it, and its own."""
        scheduler = self.scheduler
        rate = self.line.prefill_rate(
            chunk=max(scheduler.limits.chunk_tokens // 2, 1),
            decodes=len(scheduler.decoding),
            context_tokens=scheduler.context_tokens,
        )
        cached = self.cached_tokens(sequence)
        own = rate(max(sequence.prompt_tokens - cached, 1), cached)
        return own + (rate(self.prompt_tokens_queued, 0) if self.prompt_tokens_queued else 0)

    def could_hold(self, sequence: Sequence) -> bool:
        """Whether it would fit if nobody else were here."""
        try:
            self.scheduler.require_fit(sequence)
        except DoesNotFitError:
            return False
        return True

    def refuses(self, sequence: Sequence, now_ps: int) -> bool:
        """Whether a request is turned away because its first token would come too late."""
        if self.admission is None:
            return False
        answer = self.admission.answer(
            sequence,
            now_ps,
            cached_tokens=self.cached_tokens(sequence),
            step=self.step,
            done=self._ended(now_ps) if self.step is not None else 0,
        )
        if isinstance(answer, Refuse):
            self.admission.forget(sequence)
            return True
        return False

    # --- what happens to it -----------------------------------------------------------------

    def arrive(self, sequence: Sequence, now_ps: int) -> None:
        """A request was routed here."""
        self.requests_outstanding += 1
        self.prompt_tokens_queued += sequence.prompt_tokens
        self.tokens_committed += sequence.prompt_tokens + sequence.output_max_tokens
        self.sequences[sequence.id] = sequence
        if self.wait_steps and self.step is not None:
            gap = self._alpha + (self._begun(now_ps) - 1) * self._beta
            delay = int(self.fleet.rng.random() * self.wait_steps * gap)
            self.fleet.later(now_ps + delay, self._noticed, sequence)
        else:
            self._noticed(now_ps, sequence)

    def _noticed(self, now_ps: int, sequence: Sequence) -> None:
        if self.sequences.get(sequence.id) is not sequence:
            return  # the replica has died since
        if self.scheduler.add(sequence):
            self.cut(now_ps)
        elif self.step is None:
            self.fleet.wake(self)

    def cut(self, now_ps: int) -> None:
        """Something happened: repeats that would begin now or later are not done."""
        if self.step is None:
            self.fleet.wake(self)
        elif self.repeats > 1:
            begun = self._begun(now_ps)
            if begun < self.repeats:
                self._plan(begun)

    def _begun(self, now_ps: int) -> int:
        return steps_before(self._alpha, self._beta, now_ps - self._start_ps, self.repeats)

    def _ended(self, now_ps: int) -> int:
        """Repeats of the step under way that have ended, which nobody has accounted yet."""
        done = self._begun(now_ps)
        ends_ps = self._start_ps + done * self._alpha + self._beta * (done * (done - 1) // 2)
        return done if ends_ps <= now_ps else done - 1

    def pages_held(self, now_ps: int) -> int:
        """Pages that running sequences hold, to the repeat that ended last."""
        pages, index = self.scheduler.pages, self.scheduler.index
        held = pages.total - pages.free - index.evictable_blocks * index.pages_per_block
        if self.step is not None:
            held += self.scheduler.pages_taken(self.step, self._ended(now_ps))
        return held

    def set_line(self, line: StepLine, now_ps: int) -> None:
        """From the next step on, other prices: the accelerator became slower, or well again."""
        self.cut(now_ps)
        self.line = self.scheduler.line = line

    # --- what goes wrong --------------------------------------------------------------------

    def die(self, now_ps: int) -> list[Sequence]:
        """The machine is gone with all it held; returns who was here, by number.

        In its place stands another, empty, and down until `rise`.
        """
        self._break_off(now_ps)
        self.settle(now_ps)
        here = [self.sequences[i] for i in sorted(self.sequences)]
        empty = self.twin(self.number)
        empty.scheduler.note = self.scheduler.note
        if empty.scheduler.reload_ps is not None:
            empty.scheduler.reload_ps = self.reload_ps
        self.scheduler, self.line, self.links = empty.scheduler, empty.line, empty.links
        self.admission = empty.admission
        for way in self._link_versions:
            self._link_versions[way] += 1
        self.sequences, self._stop_of, self._paused, self._worst = {}, {}, {}, {}
        self._skipped = {}
        self._stops, self._gaps, self._gap_ps, self._doomed = [], [], 0, 0
        self.requests_outstanding = self.prompt_tokens_queued = self.tokens_committed = 0
        self.alive = self.accepting = False
        self.up_since_ps = -1
        return here

    def _break_off(self, now_ps: int) -> None:
        """The repeats that have ended are written down, the one under way is lost."""
        step = self.step
        self.step = None
        self._version += 1
        if step is None:
            return
        done = self._ended(now_ps)
        if done and self.fleet.steps is not None:
            self._write_down(step, done, now_ps)
        self._start_ps = min(self._start_ps, now_ps)
        self._count(step, done, now_ps)

    def rise(self, now_ps: int) -> None:
        """It is up and serves."""
        self.alive = self.accepting = True
        if self.up_since_ps < 0:
            self.up_since_ps = now_ps

    def settle(self, now_ps: int) -> None:
        """Enter what its scheduler has counted, and the time it was paid for, in its totals."""
        totals, scheduler = self.totals, self.scheduler
        totals.preemptions += scheduler.preemptions
        for tier, owner in enumerate(scheduler.index.tiers):
            totals.evicted_blocks[tier] += owner.evicted_blocks
        if self.up_since_ps >= 0:
            totals.up_ps += now_ps - self.up_since_ps
            self.up_since_ps = now_ps

    def links_of(self, tier: int) -> list[tuple[int, int]]:
        """The ways to a tier from what is nearer the device, and back."""
        return [way for way in self.links if max(way) == tier]

    def set_rate(self, tier: int, factor: float, now_ps: int) -> None:
        """From now on the ways to a tier carry `factor` of their rate."""
        for way in self.links_of(tier):
            self.links[way].set_rate(factor, now_ps)
            self._expect(way, now_ps)

    def under_way(self, tier: int) -> list[Transfer]:
        """What moves or waits to move from or to a tier."""
        transfers = [t for link in dict.fromkeys(self.links.values()) for t in link.transfers]
        return [t for t in transfers if tier in (t.source, t.target)]

    def lose(self, transfer: Transfer, now_ps: int) -> None:
        """What is under way does not arrive."""
        if transfer.state not in ("queued", "moving"):
            return
        way = (transfer.source, transfer.target)
        self.links[way].cancel(transfer, now_ps)
        self._expect(way, now_ps)
        self.scheduler.lost(transfer, now_ps)
        if transfer.kind == "handover" and self.fleet.pools is not None:
            self.fleet.pools.lost(transfer)
        self.cut(now_ps)

    def lose_next(self, now_ps: int) -> None:
        """What comes up to the device now, or next, does not arrive."""
        moving = [t for t in self.under_way(DEVICE) if t.target == DEVICE and t.state == "moving"]
        if moving:
            self.lose(moving[0], now_ps)
        else:
            self._doomed += 1

    # --- steps ------------------------------------------------------------------------------

    def ask(self, now_ps: int) -> None:
        """Begin the next step, if there is anything to do."""
        scheduler = self.scheduler
        most = self.fleet.repeats_max
        if most > 1:  # nobody stops before this tick
            stops, stop_of = self._stops, self._stop_of
            while stops and stop_of.get(stops[0][1]) != stops[0][0]:
                heappop(stops)
            if stops and stops[0][0] - scheduler.tick < most:
                most = stops[0][0] - scheduler.tick
        step = scheduler.next_step(now_ps, most)
        if step.preempted:
            self._pause(step.preempted, now_ps)
        stall_ps = 0
        if step.transfers or step.hastened:
            stall_ps = self._carry(step.transfers, now_ps)
            self._hasten(step, now_ps)
        chunks = step.chunks
        if not step.decodes and not chunks:
            self.step = None
            return
        if chunks and self.fleet.pools is not None:
            self.fleet.pools.begins(self, step, now_ps)
        prompts = [(s.cached_tokens, tokens) for s, tokens in chunks] if chunks else ()
        line = self.line
        if step.draft_tokens or step.padding:
            alpha, beta = line.line(
                step.decodes,
                step.context_tokens,
                prompts,
                draft_tokens=step.draft_tokens,
                padding=step.padding,
            )
            if self.speculation is not None:
                alpha += self.speculation.draft_ps
        else:
            alpha, beta = line.line(step.decodes, step.context_tokens, prompts)
        repeats = step.repeats
        if repeats > 1 and line.bends:
            repeats = min(repeats, line.linear_steps(step.decodes, step.context_tokens, prompts))
        self.step, self._start_ps, self._alpha, self._beta = step, now_ps + stall_ps, alpha, beta
        if stall_ps or self._gap_ps:
            self._stand_still(stall_ps)
        self.repeats = repeats
        end_ps = now_ps + stall_ps + alpha if repeats == 1 else self._end_of(repeats)
        self._version += 1
        heappush(self.fleet.heap, (end_ps, STEP_DONE, self.number, self._version, None))

    def _plan(self, repeats: int) -> None:
        """The step under way is done so often, and then ends."""
        self.repeats = repeats
        self._version += 1
        event = (self._end_of(repeats), STEP_DONE, self.number, self._version, None)
        heappush(self.fleet.heap, event)

    def _end_of(self, repeats: int) -> int:
        grown = self._beta * (repeats * (repeats - 1) // 2)
        return self._start_ps + repeats * self._alpha + grown

    def step_done(self, version: int, now_ps: int) -> bool:
        """The step under way has ended, unless it was cut since; whether it has."""
        step = self.step
        if version != self._version or step is None:
            return False
        repeats, scheduler, stop_of = self.repeats, self.scheduler, self._stop_of
        finished: list[Sequence] = []
        accepted: dict[int, int] | None = None
        tick = step.tick
        if step.decodes:
            tick += repeats
            self._note_gap(tick, repeats)
            if step.draft_tokens:
                accepted = self._verify(step, tick)
            stops, decoding = self._stops, step.decoding
            while stops and stops[0][0] <= tick:
                at, i = heappop(stops)
                if stop_of.get(i) == at:
                    del stop_of[i]
                    finished.append(decoding[i])
        else:
            self._stand_still(now_ps - self._start_ps)
        fleet = self.fleet
        outputs, pools = fleet.outputs, fleet.pools
        handed: list[Sequence] = []
        for s, tokens in step.chunks:
            if s.cached_tokens + tokens * repeats == s.target_tokens:
                if s.generated_tokens + 1 >= outputs[s.id]:
                    finished.append(s)
                    if pools is not None:
                        pools.finished(s)
                elif pools is not None and pools.hands_over(self, s, now_ps):
                    handed.append(s)
        if fleet.steps is not None:
            self._write_down(step, repeats, now_ps)
        if fleet.watch is not None:
            fleet.watch.stepped(self, step, repeats=repeats, start_ps=self._start_ps, now_ps=now_ps)
        self.step = None
        for s in scheduler.complete(step, repeats, finished, now_ps, accepted, handed):
            self._entered(s, outputs[s.id] - s.generated_tokens, tick, now_ps)
        self._count(step, repeats, now_ps)
        for s in handed:
            self._leave(s)
            assert pools is not None
            pools.handed_over(s, now_ps)
        for s in finished:
            self._leave(s)
            fleet.finished(self, s, now_ps)
        return True

    def _entered(self, s: Sequence, left: int, tick: int, now_ps: int) -> None:
        """A prompt is computed: its stream goes on until its last token."""
        if s.id in self._paused:
            gap = now_ps - self._paused.pop(s.id)
            self._worst[s.id] = max(self._worst.get(s.id, 0), gap)
        else:
            self.prompt_tokens_queued -= s.prompt_tokens
            if self.admission is not None:
                self.admission.first_token(s, now_ps)
        if left > 0 and s.id in self.scheduler.decoding:
            self._stop_of[s.id] = tick + left
            heappush(self._stops, (tick + left, s.id))
            if self._gap_ps:
                self._skipped[s.id] = self._gap_ps

    def _count(self, step: Step, repeats: int, now_ps: int) -> None:
        totals = self.totals
        totals.events += 1
        totals.steps += repeats
        totals.busy_ps += now_ps - self._start_ps
        for _, tokens in step.chunks:
            totals.prefill_tokens += repeats * tokens
        totals.decode_tokens += repeats * step.decodes

    def _note_gap(self, tick: int, repeats: int) -> None:
        """Keep, for every tick, the longest gap since: a stack that only falls."""
        if self._gap_ps:
            self._push_gap(tick - repeats + 1, self._gap_ps + self._alpha)
            self._gap_ps = 0
        self._push_gap(tick, self._alpha + (repeats - 1) * self._beta)

    def _push_gap(self, tick: int, gap_ps: int) -> None:
        gaps = self._gaps
        while gaps and gaps[-1][1] <= gap_ps:
            gaps.pop()
        gaps.append((tick, gap_ps))

    def _stand_still(self, for_ps: int) -> None:
        """Time passes and no stream gets a token; it counts while there are streams."""
        self._gap_ps = self._gap_ps + for_ps if self.scheduler.decoding else 0

    def longest_gap_ps(self, s: Sequence) -> int:
        """The longest time between two tokens of `s`."""
        return max(self._since_joining(s), self._worst.pop(s.id, 0))

    def _since_joining(self, s: Sequence) -> int:
        """The longest gap since `s` joined; what stood still before that is not of its first."""
        gaps, before_ps = self._gaps, self._skipped.pop(s.id, 0)
        at = bisect_left(gaps, (s.joined_tick + 1,))
        longest = gaps[at][1] if at < len(gaps) else 0
        if not before_ps:
            return longest
        at = bisect_left(gaps, (s.joined_tick + 2,))
        return max(longest - before_ps, gaps[at][1] if at < len(gaps) else 0)

    def _pause(self, preempted: list[Sequence], now_ps: int) -> None:
        for s in preempted:
            self._stop_of.pop(s.id, None)
            if s.first_ps >= 0:
                self._paused.setdefault(s.id, now_ps)
                self._worst[s.id] = max(self._worst.get(s.id, 0), self._since_joining(s))

    def _verify(self, step: Step, tick: int) -> dict[int, int]:
        """Drafts that turn out right; nobody gets more than it has left to say."""
        assert self.speculation is not None
        accepted: dict[int, int] = {}
        for i in step.decoding:
            left = self._stop_of[i] - tick
            count = self.speculation.accepted(min(step.draft_tokens, left))
            if count:
                accepted[i] = count
                self._stop_of[i] -= count
                heappush(self._stops, (self._stop_of[i], i))
        return accepted

    def _leave(self, s: Sequence) -> None:
        self.requests_outstanding -= 1
        self.tokens_committed -= s.prompt_tokens + s.output_max_tokens
        self.sequences.pop(s.id, None)

    def _write_down(self, step: Step, repeats: int, now_ps: int) -> None:
        steps, scheduler = self.fleet.steps, self.scheduler
        assert steps is not None
        steps.start_ps.append(self._start_ps)
        steps.end_ps.append(now_ps)
        steps.replica.append(self.number)
        steps.repeats.append(repeats)
        steps.decodes.append(step.decodes)
        steps.prefill_tokens.append(step.prefill_tokens)
        steps.context_tokens.append(step.context_tokens)
        steps.waiting.append(scheduler.queue.waiting)
        steps.preempted.append(len(step.preempted))
        steps.pages_used.append(scheduler.pages.total - scheduler.pages.free)
        for column, tier in zip(steps.stored_blocks, scheduler.index.tiers[1:], strict=True):
            column.append(tier.stored_blocks)

    # --- moving -----------------------------------------------------------------------------

    def reload_ps(self, tier: int, size_bytes: int, now_ps: int) -> int:
        """How long bytes of a tier would take to the device, at the link's present load."""
        link = self.links[(tier, DEVICE)]
        link.catch_up(now_ps)
        return link.backlog_ps((DEMAND, FOREVER_PS)) + link.duration_ps(size_bytes)

    def _carry(self, transfers: list[Transfer], now_ps: int) -> int:
        """Start transfers; returns for how long the step must wait for them."""
        stall_ps = 0
        moved = self.totals.moved_bytes
        for transfer in transfers:
            moved[transfer.kind] = moved.get(transfer.kind, 0) + transfer.bytes
            if transfer.kind == "load":
                tokens = transfer.blocks * self.scheduler.layout.block_tokens
                self.totals.loaded_tokens[transfer.source] += tokens
            if transfer.kind == "handover" and self.fleet.pools is not None:
                self.fleet.pools.sends(transfer)
            link = self.links[(transfer.source, transfer.target)]
            if transfer.kind == "swap-out":
                stall_ps += link.duration_ps(transfer.bytes)
                transfer.state = "done"
                continue
            link.submit(transfer, now_ps)
            self._expect((transfer.source, transfer.target), now_ps)
            if self._doomed and transfer.target == DEVICE:
                self._doomed -= 1
                self.fleet.later(now_ps, self._doom, transfer)
        return stall_ps

    def first_token(self, s: Sequence, now_ps: int) -> None:
        """Its prompt was computed elsewhere and is here now."""
        s.first_ps = now_ps
        self.prompt_tokens_queued -= s.prompt_tokens
        self._paused[s.id] = now_ps
        if self.scheduler.note is not None:
            self.scheduler.note(now_ps, s, "first token", "the last layer of its cache arrived")

    def _doom(self, now_ps: int, transfer: Transfer) -> None:
        if transfer in self.under_way(DEVICE):
            self.lose(transfer, now_ps)

    def _hasten(self, step: Step, now_ps: int) -> None:
        for transfer, urgency in step.hastened:
            if transfer.state in ("queued", "moving"):
                way = (transfer.source, transfer.target)
                self.links[way].hasten(transfer, urgency, now_ps)
                self._expect(way, now_ps)

    def _expect(self, way: tuple[int, int], now_ps: int) -> None:
        """An event when the link's next transfer ends."""
        version = self._link_versions[way] = self._link_versions[way] + 1
        end_ps = self.links[way].next_done_ps()
        if end_ps < FOREVER_PS:
            heappush(self.fleet.heap, (max(end_ps, now_ps), LINK_DONE, self.number, version, way))

    def link_done(self, way: tuple[int, int], version: int, now_ps: int) -> None:
        """A transfer may have landed."""
        if version != self._link_versions.get(way):
            return
        for transfer in self.links[way].advance(now_ps):
            self._landed(transfer, now_ps)
        self._expect(way, now_ps)
        moves = self.scheduler.outgoing()
        if moves:  # decided by the landing: starts now, not with the next step
            self._carry(moves, now_ps)

    def _landed(self, transfer: Transfer, now_ps: int) -> None:
        if transfer.kind == "handover" and self.fleet.pools is not None:
            self.fleet.pools.landed(self, transfer, now_ps)
        if self.scheduler.landed(transfer):
            self.cut(now_ps)
        elif self.step is None:
            self.fleet.wake(self)
