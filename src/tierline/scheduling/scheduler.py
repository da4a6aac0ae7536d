"""Which sequences advance by how many tokens: the one scheduler, for the engine and the simulator.

Nothing here knows whether tokens are real.  `next_step` decides, `complete` accounts,
`add`, `landed` and `cancel` tell it what the world did in between.

Two devices make it cheap enough to search with and rich enough to serve with:

The *tick*.  All decoding sequences advance together, so nobody's length is written down
while it decodes: it is the length at joining plus the ticks since.  How many pages a tick
takes is a count by tick modulo block size (`_growth`), kept when sequences join and leave.

The *horizon*.  `next_step` also says for how many repeats its decision holds.  A repeat must
be a fixed point: whatever this step changed after reading it (a preemption frees budget, an
admission moves credit, an eviction frees memory after somebody was refused) would make the
next decision differ, and then the answer is one.  A refusal changes nothing, so a refused
head may ask again at every single step.  Shorter than possible is always right.

Invariants
    INV-SCHED-4  k repeats of a step leave the state that k single steps leave
    INV-SCHED-5  pages: free + held + cached + on their way = total, after every call
    INV-SCHED-6  a refusal changes no state
    INV-SCHED-7  a sequence is in exactly one of waiting, loading, prefilling, decoding, done
    INV-ENG-42   a reset forgets what nobody holds, and nothing else
    INV-ENG-43   a resize leaves room for everybody who was accepted, or changes nothing
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate

from tierline.base.clock import FOREVER_PS
from tierline.base.errors import DoesNotFitError
from tierline.kv.groups import CacheLayout
from tierline.kv.pages import Pages
from tierline.kv.prefix import PrefixIndex, Run
from tierline.kv.transfer import DEMAND, DEVICE, DRAM, TIER_NAMES, Transfer
from tierline.perf.line import StepLine
from tierline.scheduling.adapters import Adapters
from tierline.scheduling.chunking import ChunkSizer
from tierline.scheduling.fairness import FairShare
from tierline.scheduling.lengths import LengthPredictor, kind_of
from tierline.scheduling.policy import PATIENT_PS, Policy, by_arrival, deadline_or_patience
from tierline.scheduling.queue import Entry, WaitingLine
from tierline.scheduling.sequence import (
    BACKGROUND,
    DECODE,
    DONE,
    LATE,
    LOADING,
    ON_TIME,
    OWED,
    PREFILL,
    WAITING,
    Sequence,
)
from tierline.scheduling.shedding import too_late
from tierline.scheduling.step import Step

ENDED_MAX = 10_000
EVICTED_AT_ONCE = 32  # a full cache forgets this fraction of the pool, so that horizons stay long
Reload = Callable[[int, int, int], int]  # (tier, bytes, now) -> picoseconds until they are here


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one instance does at once."""

    batch_tokens: int  # of one step, decodes included
    sequences_max: int  # decoding, prefilling and loading
    chunk_tokens: int  # of one prompt in one step
    chunk_tokens_min: int = 64  # adaptive chunks do not shrink below this
    chunk_grain: int = 32  # and are multiples of this
    draft_tokens: int = 0  # verified beside every decode


class Scheduler:
    """Decides the steps of one instance."""

    __slots__ = (
        "_arrived",
        "_batch_evicted",
        "_block",
        "_block_pages",
        "_blocked",
        "_blocked_epoch",
        "_cut",
        "_draining",
        "_ended",
        "_fair",
        "_growth",
        "_growth_total",
        "_lengths",
        "_low_pages",
        "_most_tokens",
        "_now_ps",
        "_padding",
        "_pages_most",
        "_plain",
        "_promised_pages",
        "_room",
        "_saturating",
        "_short",
        "_sizer",
        "_tiered",
        "_unforeseen",
        "_windows",
        "adapters",
        "context_tokens",
        "decoding",
        "held_back",
        "index",
        "layout",
        "limits",
        "line",
        "loading",
        "names",
        "note",
        "pages",
        "policy",
        "preemptions",
        "prefilling",
        "queue",
        "reload_ps",
        "steps",
        "tick",
    )

    def __init__(
        self,
        *,
        pages: Pages,
        index: PrefixIndex,
        layout: CacheLayout,
        line: StepLine,
        policy: Policy,
        limits: Limits,
        reload_ps: Reload | None = None,
        tenant_weights: dict[str, int] | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """`reload_ps` prices bringing bytes up from a tier at the present load of its link.

        Without `tenant_weights` tenants are not told apart; one that is not listed weighs 1.
        """
        self.pages, self.index, self.layout = pages, index, layout
        self.names = index.names  # bound for executors that hold real memory
        self.line, self.policy, self.limits = line, policy, limits
        self.reload_ps = reload_ps
        self.adapters = adapters
        self.decoding: dict[int, Sequence] = {}
        self.prefilling: dict[int, Sequence] = {}
        self.loading: dict[int, Sequence] = {}
        self.held_back: dict[int, Sequence] = {}  # finished here, pages still being handed over
        self.queue = WaitingLine(policy)
        self.tick = self.steps = self.preemptions = 0
        self.context_tokens = 0  # cached, over all decoding sequences, at this tick
        self.note: Callable[[int, Sequence, str, str], None] | None = None  # for who wants to know
        self._block = layout.block_tokens
        self._block_pages = layout.pages_per_block
        self._windows = [
            (g.pages_per_block, g.blocks(1 << 40, self._block))
            for g in layout.groups
            if g.window_tokens is not None
        ]
        self._plain = not self._windows and not layout.state_pages
        self._growth = [0] * self._block  # pages that decoders take at tick modulo block
        self._growth_total = 0
        self._saturating: list[tuple[int, int, int]] = []  # (tick, sequence, pages) of windows
        self._sizer = ChunkSizer(tokens_min=limits.chunk_tokens_min, grain=limits.chunk_grain)
        self._pages_most = pages.total  # that were ever there
        self._tiered = index.last_tier != DEVICE
        self._measure_memory()
        self._fair: FairShare | None = None
        if policy.debt_max_tokens and tenant_weights is not None:
            self._fair = FairShare(tenant_weights, debt_max_tokens=policy.debt_max_tokens)
        self._blocked: Sequence | None = None  # cannot enter until somebody leaves
        self._blocked_epoch = 0
        self._cut: tuple[tuple[int, ...], tuple[int, int]] = ((), (0, 0))  # asked, answered
        self._arrived = False  # somebody came since the last shedding
        self._room = True  # the step has slots and budget to spare
        self._short = False  # a prompt under way could not grow
        self._promised_pages = 0  # that those who hold memory will hold at their ends
        self._most_tokens = 0  # that they could reach
        self._unforeseen: dict[int, Sequence] = {}  # of those, whom nobody has asked about yet
        self._lengths = LengthPredictor()
        # Answers that ended since somebody asked; long unasked, the oldest are let go.
        self._ended: deque[tuple[int, str, int, int]] = deque(maxlen=ENDED_MAX)
        self._now_ps = 0  # of the last call that said
        self._draining = False  # a gathered batch is being finished
        self._padding = 0

    # --- entering and leaving ---------------------------------------------------------------

    def add(self, sequence: Sequence) -> bool:
        """A request arrives. True: the step under way may be wrong now, stop repeating it.

        Raises `DoesNotFitError` for a request that could never run here.
        """
        self.require_fit(sequence)
        if self._windows and sequence.chain is not None:
            tokens = sequence.prompt_tokens + sequence.output_max_tokens
            if self._whole_pages(tokens) > self.pages.total:
                sequence.chain = None  # cached blocks keep all groups: it could fill the memory
        self.place(sequence)
        if self._fair is not None:
            self._fair.charge(sequence.tenant, sequence.prompt_tokens + sequence.output_max_tokens)
        first = self.queue.push(sequence)
        self._arrived = True
        if self.policy.sheds or self.policy.longest_prefix_first_below:
            return True  # both look at everybody who waits
        if self._room and self._blocked is None:
            return True
        # Behind everybody nothing can change; a new head asks for itself.  By arrival it can
        # only be before others when it comes back from a replica that died.
        return first and (self.policy.key is not by_arrival or self.queue.waiting > 1)

    def place(self, sequence: Sequence) -> None:
        """Give a request its place in the order, as of now."""
        policy = self.policy
        sequence.due_ps = deadline_or_patience(sequence.due_ps, sequence.arrival_ps)
        sequence.band, sequence.key = policy.band(sequence), policy.key(sequence)
        if self._fair is not None:
            sequence.debt_ps = self._debt_ps(sequence)
            sequence.key += sequence.debt_ps

    def work_before(self, s: Sequence, computed: dict[int, int]) -> tuple[int, int]:
        """(prompt tokens, prompts) that go before `s` if it came now.

        `computed` are prompt tokens, by sequence, that are not accounted for yet.
        """
        tokens, prompts = self.queue.before(s.band, s.key)
        for other in self.prefilling.values():
            if not self.policy.overtakes or (other.band, other.key) <= (s.band, s.key):
                tokens += other.target_tokens - other.cached_tokens - computed.get(other.id, 0)
                prompts += 1
        return tokens, prompts

    def rhythm(self, context_tokens: int) -> tuple[int, int]:
        """(prompt tokens of a step in the long run, picoseconds between two such steps)."""
        limits, decodes = self.limits, len(self.decoding)
        most = limits.batch_tokens
        if self.policy.mixes:
            most = max(most - decodes * (1 + limits.draft_tokens), limits.chunk_grain)
        if not (self.policy.adaptive_chunk and self._sizer.binds):
            return most, 0
        tokens, between_ps = self._sizer.rhythm(
            self.line, most, decodes=decodes, context_tokens=context_tokens
        )
        return max(tokens, limits.chunk_grain), between_ps

    def landed(self, transfer: Transfer) -> bool:
        """A transfer is done. True: the step under way should not be repeated further."""
        self.index.landed(transfer)
        if transfer.kind == "swap-in":
            self.index.unpark(transfer.blocks)
        if self.adapters is not None:
            self.adapters.ended(transfer)
        return self._woken(transfer)

    def lost(self, transfer: Transfer, now_ps: int) -> bool:
        """A transfer was given up: who waited for it goes back to the queue and recomputes."""
        self._now_ps = now_ps
        if self.adapters is not None:
            self.adapters.ended(transfer)
        for sequence in transfer.waiters:
            if sequence.state == WAITING:
                sequence.parked_tokens = 0  # what was to be parked is lost
            elif sequence.state == LOADING:
                self._stop_loading(sequence, transfer)
            elif sequence.id in self.held_back and transfer.target == DEVICE:
                self.released(sequence, now_ps)
        self.index.lost(transfer)
        if transfer.kind in ("swap-in", "swap-out"):
            self.index.unpark(transfer.blocks)
        return True

    def _stop_loading(self, s: Sequence, lost: Transfer) -> None:
        """What `s` waits for never comes: it gives its memory back, as if preempted."""
        run = s.run
        while run is not None:
            if run.arriving is not None and run.arriving is not lost:
                run.arriving.waiters = [w for w in run.arriving.waiters if w is not s]
            run = run.parent
        del self.loading[s.id]
        self._give_back(s)
        s.cached_tokens = s.parked_tokens = s.pending = 0
        s.preemptions += 1
        if s.band == OWED:
            s.band = self.policy.band(s)
        self.queue.push(s)

    def _unpark(self, sequence: Sequence) -> None:
        if sequence.parked_tokens and sequence.parked_tier == DRAM:
            self.index.unpark(-(-sequence.parked_tokens // self._block))
        sequence.parked_tokens = 0

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` go on from the first token of `parent`, sharing its prompt's blocks.

        Parallel samples and beams: to be called between steps, when the parent's prompt has
        just been computed.  The child shares full blocks and copies the last partial one.
        False when there is no room: then `add` it, and it finds the prompt in the cache.
        """
        assert parent.state == DECODE, parent
        assert parent.joined_tick == self.tick, "the parent has gone on"
        assert parent.chain is not None, "forks share what is published"
        pages = self._held_pages(parent.cached_tokens, parent.published_blocks)
        slots = self.limits.sequences_max - self.running
        if parent.duplicate_pages or slots <= 0 or pages + self._tick_pages() > self.pages.free:
            return False
        if self.names is not None and self.names.fork(parent.id, child.id) is None:
            return False
        child.run, child.published_blocks = parent.run, parent.published_blocks
        self.index.hold(child.run)
        self.pages.free -= pages
        child.pages = pages
        child.cached_tokens = child.hit_tokens = parent.cached_tokens
        child.target_tokens = parent.target_tokens
        child.generated_tokens = 1
        child.band, child.key = parent.band, parent.key
        child.admitted_ps, child.first_ps = parent.admitted_ps, parent.first_ps
        self._join(child)
        return True

    def cancel(self, sequence: Sequence) -> None:
        """Nobody wants the answer any more. To be called between steps."""
        if sequence.state == WAITING:
            self._unpark(sequence)
            self.queue.cancelled(sequence)
            if self._fair is not None and not sequence.preemptions:
                tokens = sequence.prompt_tokens + sequence.output_max_tokens
                self._fair.refund(sequence.tenant, tokens)
        elif sequence.state == DECODE:
            self._leave(sequence)
        elif sequence.state == PREFILL:
            del self.prefilling[sequence.id]
        elif sequence.state == LOADING:
            del self.loading[sequence.id]
        if sequence.state == LOADING and sequence.parked_tokens:
            self.held_back[sequence.id] = sequence  # bytes are on their way into its pages
        else:
            self._give_back(sequence)
        sequence.state = DONE

    def released(self, sequence: Sequence, now_ps: int) -> None:
        """What was handed over has arrived elsewhere: its pages are free."""
        self._now_ps = now_ps
        del self.held_back[sequence.id]
        self._give_back(sequence)
        self.index.epoch += 1  # who was refused may fit now

    @property
    def running(self) -> int:
        """Sequences that hold memory."""
        return len(self.decoding) + len(self.prefilling) + len(self.loading)

    @property
    def idle(self) -> bool:
        """Whether nobody is here."""
        return not (self.running or self.queue.waiting or self.held_back)

    def require_fit(self, sequence: Sequence) -> None:
        """Raise `DoesNotFitError` for a request that could never run here."""
        if sequence.adapter and self.adapters is not None:
            self.adapters.require(sequence.adapter)
        needed = self._most_pages(sequence)
        if needed > self.pages.total:
            page_bytes = self.layout.page_bytes
            raise DoesNotFitError(
                f"a prompt of {sequence.prompt_tokens} tokens and its output",
                needed_bytes=needed * page_bytes,
                available_bytes=self.pages.total * page_bytes,
                hint="shorten the prompt, or serve with more KV memory",
            )

    def _most_pages(self, s: Sequence) -> int:
        """Pages that suffice to bring `s` to its end when nobody else is here.

        What windows have passed is given back only after a chunk is computed.
        """
        tokens = s.prompt_tokens + s.output_max_tokens
        held = self._held_pages(tokens, 0)
        if not self._windows:
            return held
        chunk = min(self.limits.chunk_tokens, self.limits.batch_tokens)
        whole = self._whole_pages(tokens) + self.layout.state_pages
        return min(whole, held + -(-chunk // self._block) * self._block_pages)

    def _whole_pages(self, tokens: int) -> int:
        """Pages of all groups for so many tokens, as cached blocks keep them."""
        return -(-tokens // self._block) * self._block_pages

    # --- what an operator asks for, between steps ---------------------------------------------

    def reset_cache(self) -> int:
        """Forget every block that is cached on the device and that nobody holds; how many."""
        return self.index.evict(DEVICE, self.index.evictable_blocks, write_back=False)

    def resize(self, pages: int) -> None:
        """Have so many device pages from now on, at most those of the beginning.

        Cached blocks are forgotten for it, and nobody is preempted.  Raises `DoesNotFitError`,
        and changes nothing, when somebody who was accepted would not fit any more.
        """
        self._require_room(pages)
        self._reclaim(self.pages.total - pages)
        self.index.resize_device(pages)
        self._measure_memory()

    def _require_room(self, pages: int) -> None:
        page_bytes, most = self.layout.page_bytes, self._pages_most
        here = [*self.decoding.values(), *self.prefilling.values(), *self.loading.values()]
        longest = max((self._promised(s) for s in [*here, *self.queue.everybody()]), default=0)
        for what, needed, available, hint in (
            ("the cache", pages, most, "restart with more KV memory"),
            ("a block", self._block_pages + self.layout.state_pages, pages, "leave it more"),
            ("what is running", self.pages.total - self._obtainable(), pages, "wait for it to end"),
            ("the longest answer that was promised", longest, pages, "wait for it to end"),
        ):
            if needed > available:
                raise DoesNotFitError(
                    what,
                    needed_bytes=needed * page_bytes,
                    available_bytes=available * page_bytes,
                    hint=hint,
                )

    def _promised(self, s: Sequence) -> int:
        """Pages without which `s` might never come to its end."""
        if self._windows and s.chain is not None:
            return self._whole_pages(s.prompt_tokens + s.output_max_tokens)
        return self._most_pages(s)

    def _measure_memory(self) -> None:
        """What follows from how much memory there is."""
        self._batch_evicted = max(1, self.pages.total // EVICTED_AT_ONCE // self._block_pages)
        self._low_pages = self._batch_evicted * self._block_pages if self._tiered else 0

    def _debt_ps(self, sequence: Sequence) -> int:
        """What a tenant above its share falls back by: fixed now, so that heaps stay sorted.

        It is the time that a fair server would take to serve everybody who waits as much.
        """
        assert self._fair is not None
        tokens = self._fair.lag_tokens(sequence.tenant) - self.policy.debt_free_tokens
        if tokens <= 0:
            return 0
        prompt, chunk = sequence.prompt_tokens, self.limits.chunk_tokens
        token_ps = self.line.prefill_ps(prompt, chunk=chunk) // prompt
        return tokens * self._fair.tenants_waiting * token_ps

    def _woken(self, transfer: Transfer) -> bool:
        # Memory moved: a refused head may fit now, and a prompt that was short may grow.
        woke = self._blocked is not None or self._short
        for sequence in transfer.waiters:
            if sequence.state != LOADING:
                if sequence.id in self.held_back and transfer.target == DEVICE:
                    self.released(sequence, self._now_ps)
                continue
            sequence.pending -= 1
            if sequence.pending == 0:
                del self.loading[sequence.id]
                if sequence.parked_tokens:
                    sequence.cached_tokens = sequence.parked_tokens
                    sequence.parked_tokens = 0
                sequence.state = PREFILL
                self.prefilling[sequence.id] = sequence
                woke = True
        return woke

    # --- deciding ---------------------------------------------------------------------------

    def next_step(self, now_ps: int, repeats_max: int = FOREVER_PS) -> Step:
        """The next step; it is empty when there is nothing to compute."""
        self._now_ps = now_ps
        step = Step()
        step.preempted, step.chunks, step.padding = [], [], 0
        need = self._grow_running(step, now_ps)
        self._blocked = None
        if self.prefilling or self.queue.waiting:
            self._choose(step, need, now_ps)
        else:  # streams only: nothing to choose
            decodes = len(self.decoding)
            self._short = False
            self._room = decodes < self.limits.batch_tokens and self.running < (
                self.limits.sequences_max
            )
        return self._dressed(step, repeats_max)

    def _choose(self, step: Step, need: int, now_ps: int) -> None:
        """Prompt tokens of the step, and who is left out."""
        budget = self._budget(now_ps)
        if self.policy.sheds and self._arrived and self.queue.waiting and not step.preempted:
            self._shed(now_ps)
        need = self._fill(step, budget, need, now_ps)
        while self._short and not step.chunks and not self.decoding:
            # Prompts hold each other's memory; or one holds twice what was computed twice, and
            # finds it cached when it comes back.
            twice = [s for s in self.prefilling.values() if s.duplicate_pages]
            if len(self.prefilling) < 2 and not twice:
                break  # bytes on their way will make room
            victim = self.policy.victim(twice or self.prefilling.values())
            self._preempt(victim, step, now_ps, "prompts held each other's memory")
            need = self._fill(step, budget, 0, now_ps)

    def _dressed(self, step: Step, repeats_max: int) -> Step:
        """The step with everything an executor needs to know."""
        step.tick, step.decoding = self.tick, self.decoding
        step.decodes, step.context_tokens = len(self.decoding), self.context_tokens
        step.draft_tokens = self.limits.draft_tokens if step.decodes else 0
        if not self.policy.mixes and step.chunks:
            step.decodes = step.context_tokens = 0
        if self.policy.gathers:
            step.padding = self._padding if step.decodes else 0
            self._draining = bool(step.decodes)
        index = self.index
        step.transfers, step.hastened = self.outgoing(), index.hastened
        if step.hastened:
            index.hastened = []
        self.steps += 1
        step.number = self.steps
        alone = repeats_max == 1 or step.preempted or step.draft_tokens
        step.repeats = 1 if alone else self._horizon(step, repeats_max)
        return step

    def outgoing(self) -> list[Transfer]:
        """What was decided to move and has not been told yet: a landing may decide, too."""
        index, adapters = self.index, self.adapters
        transfers = index.outbox
        if transfers:
            index.outbox = []
        if adapters is not None and adapters.store.outbox:
            transfers = transfers + adapters.store.outbox
            adapters.store.outbox = []
        return transfers

    def _grow_running(self, step: Step, now_ps: int) -> int:
        """Pages that decoding sequences take in this step, after making room for them."""
        if self.limits.draft_tokens:
            need = self._tick_pages()
        else:
            need = self._growth[self.tick % self._block]
        if self._tiered:
            self._write_back(need)
        if need <= self.pages.free:
            return need
        self._reclaim(min(need, self._obtainable()))
        while (need := self._tick_pages()) > self.pages.free:
            running = list(self.decoding.values())
            if self.policy.mixes:  # else prompts are not among those that take turns
                running += self.prefilling.values()
            victim = self.policy.victim(running)
            self._preempt(victim, step, now_ps, f"{need - self.pages.free} pages short")
            self._reclaim(min(self._tick_pages(), self._obtainable()))
        return need

    def _tick_pages(self) -> int:
        if not self.limits.draft_tokens:
            return self._growth[self.tick % self._block]
        ticks = range(self.tick, self.tick + self.limits.draft_tokens + 1)
        return sum(self._growth[tick % self._block] for tick in ticks)

    def _budget(self, now_ps: int) -> int:
        """Prompt tokens of this step: what the batch has left, or what running streams allow."""
        limits, decodes, sizer = self.limits, len(self.decoding), self._sizer
        budget = limits.batch_tokens
        if self.policy.mixes:
            budget -= decodes * (1 + limits.draft_tokens)
        budget = max(budget, 0)
        sizer.saving, sizer.between_ps, sizer.whole_tokens = False, 0, budget
        if not self.policy.adaptive_chunk or not sizer.binds:
            return budget
        wanted = 0
        if sizer.paces:  # then it matters whether there is more to compute than fits at once
            wanted = sum(s.target_tokens - s.cached_tokens for s in self.prefilling.values())
            if (head := self.queue.head()) is not None:
                wanted += head[3].target_tokens
        return sizer.size(
            self.line,
            budget,
            past_tokens=self._first_begun().cached_tokens if self.prefilling else 0,
            wanted_tokens=wanted,
            decodes=decodes,
            context_tokens=self.context_tokens,
            tick=self.tick,
            now_ps=now_ps,
        )

    def _begun(self) -> list[Sequence]:
        """Prompts under way, in the order they are served."""
        begun = list(self.prefilling.values())
        if len(begun) > 1 and self.policy.overtakes:
            begun.sort(key=lambda s: (s.band, s.key, s.id))
        return begun

    def _first_begun(self) -> Sequence:
        """The prompt under way that is served first."""
        if len(self.prefilling) > 1:
            return self._begun()[0]
        return next(iter(self.prefilling.values()))

    def _fill(self, step: Step, budget: int, need: int, now_ps: int) -> int:
        """Prompt tokens for this step: prompts under way and the queue, merged in order."""
        policy, limits, queue = self.policy, self.limits, self.queue
        begun = self._begun()
        slots = limits.sequences_max - self.running
        gathering = not (self._draining and self.decoding)
        # Whoever gave way does not come back in the same step, unless nobody is left in it.
        opened = gathering and not (step.preempted and self.running)
        at, short = 0, False
        if policy.longest_prefix_first_below and queue.waiting:
            self._reorder()
        while budget > 0:
            s = begun[at] if at < len(begun) else None
            head = queue.head() if opened and (s is None or policy.overtakes) else None
            if head is not None and step.preempted and head[0] > ON_TIME and self.running:
                opened = False  # whoever just gave way does not come back at once
                continue
            if head is not None and (s is None or head[:3] < (s.band, s.key, s.id)):
                most = self._owed_tokens(budget) if head[0] == OWED else budget
                tokens = self._admit(head, most, need, now_ps) if slots > 0 else None
                if tokens is None:
                    victim = self._who_gives_way(head[0], begun[at:])
                    if victim is None:
                        self._refuse(head[3], slots, now_ps)
                        opened = False
                        continue
                    need -= self._give_way(victim, begun, step, now_ps, head[3])
                    slots += 1
                    continue
                slots -= 1
                self._charge(head)
                s = head[3]
                if not tokens:
                    continue
                grown = self._chunk_pages(s, tokens)
            elif s is not None:
                most = self._owed_tokens(budget) if s.band == OWED else budget
                tokens = min(s.target_tokens - s.cached_tokens, most, limits.chunk_tokens)
                grown = self._chunk_pages(s, tokens)
                if grown > self.pages.free - need:
                    if grown > self._obtainable() - need:
                        if policy.prompts_preempt:
                            victim = policy.victim([*self.decoding.values(), *begun[at:]])
                        else:
                            victim = self._who_gives_way(s.band, begun[at + 1 :])
                        if victim is None:
                            short = True
                            break
                        need -= self._give_way(victim, begun, step, now_ps, s)
                        slots += 1
                        continue
                    self._reclaim(need + grown)
                at += 1
            else:
                break
            need += grown
            budget -= tokens
            step.chunks.append((s, tokens))
        self._short = short
        self._room = budget > 0 and slots > 0 and not short
        return need

    def _refuse(self, head: Sequence, slots: int, now_ps: int) -> None:
        self._blocked, self._blocked_epoch = head, self.index.epoch
        if self.note is not None:
            why = "no slot" if slots <= 0 else f"{self.pages.free} pages free"
            self.note(now_ps, head, "blocked", why)

    def _reorder(self) -> None:
        """SGLang's order: the longest cached prefix first, while the queue is short."""
        queue = self.queue
        if queue.waiting > self.policy.longest_prefix_first_below:
            return
        order: dict[int, tuple[int, int]] = {}
        for s in queue.everybody():
            found = self.index.peek(s.chain, self._shareable_blocks(s))[0] if s.chain else 0
            order[s.id] = (-found, s.arrival_ps)
        queue.reorder(order)

    def _shed(self, now_ps: int) -> None:
        """Whoever cannot be on time any more steps back."""
        self._arrived = False
        self.queue.ripen(now_ps + PATIENT_PS)
        begun = [s for s in self.prefilling.values() if s.band == ON_TIME and s.first_ps < 0]
        jobs = begun + [s for s in self.queue.on_time() if s.band == ON_TIME]
        late = too_late(
            jobs,
            self.line,
            now_ps=now_ps,
            chunk=max(self._sizer.whole_tokens, self.limits.chunk_grain),
            between_ps=self._sizer.between_ps,
            decodes=len(self.decoding),
            context_tokens=self.context_tokens,
        )
        if not late:
            return
        for s in late:
            s.band = LATE
            if self.note is not None:
                self.note(now_ps, s, "stepped back", "its deadline cannot be met any more")
        self.queue.step_back([s for s in late if s.state == WAITING])

    # --- admitting --------------------------------------------------------------------------

    def _admit(self, head: Entry, budget: int, need: int, now_ps: int) -> int | None:
        """Tokens of `head` for this step, 0 when it must load first, None when it does not fit.

        A refusal changes nothing.
        """
        s, adapters = head[3], self.adapters
        if not s.adapter or adapters is None:
            return self._admit_memory(head, budget, need, now_ps)
        if not adapters.room(s):
            return None
        tokens = self._admit_memory(head, budget, need, now_ps)
        if tokens is None or not adapters.take(s, self._urgency(s), now_ps):
            return tokens
        if s.state == PREFILL:
            del self.prefilling[s.id]
            s.pending = 0
            self._load(s, now_ps, f"adapter {s.adapter} comes to the device")
        s.pending += 1
        return 0

    def _admit_memory(self, head: Entry, budget: int, need: int, now_ps: int) -> int | None:
        """The same, as far as its cached tokens are concerned."""
        s = head[3]
        looks_ahead = self.policy.reserves_output or (
            # Who can be on time does not wait for what may come.
            self.policy.foresees and head[0] > ON_TIME and not self._room_for_all(s)
        )
        promise = self._promise(s, entering=True) if looks_ahead else 0
        if s.parked_tokens:
            if promise and not self._can_promise(promise):
                return None
            return self._admit_parked(s, need, now_ps)
        found = device = loose = fetch = 0
        if s.chain is not None and (limit := self._shareable_blocks(s)):
            found, device, loose, fetch = self.index.peek(s.chain, limit)
            if found > device:
                found, fetch = self._worth_having(s, found, device, fetch, now_ps)
        loose_pages = loose * self._block_pages
        if promise:
            promise += loose_pages + (fetch - found) * self._block_pages
            if not self._can_promise(promise):
                return None
        if found > device:
            if fetch * self._block_pages + need > self._obtainable() - loose_pages:
                return None
            return self._admit_loading(s, found, fetch, need, now_ps)
        cached = found * self._block
        tokens = min(s.target_tokens - cached, budget, self.limits.chunk_tokens)
        grown = self._pages_between(cached, cached + tokens)
        free = self.pages.free
        if grown + need > free and grown + need > self._obtainable() - loose_pages:
            return None
        if found:
            path = self._hold_path(s, found, now_ps)
            if self.names is not None:
                self.names.adopt(s.id, path)
        self._reclaim(need + grown)
        self._enter(s, cached, now_ps)
        s.state = PREFILL
        self.prefilling[s.id] = s
        return tokens

    def _admit_parked(self, s: Sequence, need: int, now_ps: int) -> int | None:
        """Bring what was parked back, as it was."""
        grown = self._held_pages(s.parked_tokens, 0)
        if grown + need > self._obtainable():
            return None
        self._reclaim(need + grown)
        self.pages.free -= grown
        s.pages = grown
        if self.names is not None:
            self.names.resume(s.id, s.parked_tokens)
        blocks = -(-s.parked_tokens // self._block)
        kind = "swap-in" if s.parked_tier == DRAM else "handover"
        transfer = self.index.parked_transfer(kind, blocks, self._urgency(s))
        transfer.waiters.append(s)
        s.pending = 1
        s.admitted_ps = max(s.admitted_ps, s.arrival_ps)
        self._load(s, now_ps, f"{s.parked_tokens} tokens come from {TIER_NAMES[s.parked_tier]}")
        return 0

    def _admit_loading(self, s: Sequence, found: int, fetch: int, need: int, now_ps: int) -> int:
        """Take room for what lies in lower tiers, and wait for it."""
        path = self._hold_path(s, found, now_ps)
        self._reclaim(need + fetch * self._block_pages)
        if not s.preemptions:
            s.loaded_tokens = fetch * self._block
        self._enter(s, found * self._block, now_ps)
        s.pending = self.index.fetch(path, s, self._urgency(s))
        if self.names is not None:
            self.names.adopt(s.id, path)
        self._load(s, now_ps, f"{fetch * self._block} cached tokens come up from a lower tier")
        return 0

    def _hold_path(self, s: Sequence, found: int, now_ps: int) -> list[Run]:
        """The cached runs of the first `found` blocks, which `s` holds from now on."""
        path, s.published_blocks = self.index.match(s.chain, found, now_ps)
        s.run = path[-1]
        self.index.hold(s.run)
        return path

    def _load(self, s: Sequence, now_ps: int, why: str) -> None:
        s.state = LOADING
        self.loading[s.id] = s
        if self.note is not None:
            self.note(now_ps, s, "loading", why)

    def _enter(self, s: Sequence, cached: int, now_ps: int) -> None:
        s.cached_tokens = cached
        if s.admitted_ps < 0:
            s.admitted_ps = now_ps
            s.hit_tokens = cached
            if s.chain is not None:
                limit = self._shareable_blocks(s)
                self.index.placement.missed(s.chain, cached // self._block, limit)
        if self.note is not None:
            self.note(now_ps, s, "admitted", f"{cached} of {s.target_tokens} tokens cached")

    def _worth_having(
        self, s: Sequence, found: int, device: int, fetch: int, now_ps: int
    ) -> tuple[int, int]:
        """(blocks to use, of them to fetch): the cut where reload + recompute takes least."""
        if self.reload_ps is None:
            return device, 0
        # Links drain while a refused head waits, so the choice stands until memory changes:
        # otherwise time alone would change a decision.
        asked = (s.id, self.index.epoch, found, device, fetch)
        if self._cut[0] != asked:
            self._cut = (asked, self._best_cut(s, found, device, fetch, now_ps))
        return self._cut[1]

    def _best_cut(
        self, s: Sequence, found: int, device: int, fetch: int, now_ps: int
    ) -> tuple[int, int]:
        assert self.reload_ps is not None
        rate = self.line.prefill_rate(
            chunk=self.limits.chunk_tokens,
            decodes=len(self.decoding),
            context_tokens=self.context_tokens,
        )

        def recompute_ps(depth: int) -> int:
            past = depth * self._block
            return rate(s.target_tokens - past, past)

        best, best_ps, best_fetch = device, recompute_ps(device), 0
        bytes_by_tier: dict[int, int] = {}
        depth = fetched = 0
        for reached, tier in self.index.residence(s.chain, found):
            blocks, depth = reached - depth, reached
            if tier != DEVICE:
                fetched += blocks
                bytes_by_tier[tier] = bytes_by_tier.get(tier, 0) + blocks * self.index.block_bytes
            if depth > device:
                waits = [self.reload_ps(t, b, now_ps) for t, b in bytes_by_tier.items()]
                total_ps = max(waits, default=0) + recompute_ps(depth)
                if total_ps < best_ps:
                    best, best_ps, best_fetch = depth, total_ps, fetched
        return best, min(best_fetch, fetch)

    def _charge(self, head: Entry) -> None:
        """The head enters: its class and its tenant pay, and its output is promised memory."""
        s = head[3]
        tokens = s.target_tokens + s.output_max_tokens - s.generated_tokens
        self.queue.take(head, tokens)
        if self.policy.foresees:
            self._unforeseen[s.id] = s  # until somebody asks how much all will hold
            self._most_tokens += s.prompt_tokens + s.output_max_tokens
        elif self.policy.reserves_output:
            s.promised_pages = self._promise(s)
            self._promised_pages += s.promised_pages
        if self._fair is not None and not s.preemptions:
            self._fair.serve(s.tenant, tokens)

    def _promise(self, s: Sequence, *, entering: bool = False) -> int:
        """Pages that `s` will come to hold, as far as admission looks ahead; 0: it does not."""
        policy, most = self.policy, s.output_max_tokens
        if policy.foresees:
            self._learn()
            kind = kind_of(f"{s.rank} {s.tenant}", s.prompt_tokens)
            done = min(s.generated_tokens, most - 1)
            left = self._lengths.expected_remaining(kind, generated=done, at_most=most)
            return self._held_pages(s.prompt_tokens + done + left, 0)
        if policy.reserves_output:
            share = policy.reserves_newcomer if entering else policy.reserves_output
            return self._held_pages(
                s.prompt_tokens + int(min(most, policy.reserves_max_tokens) * share), 0
            )
        return 0

    def _learn(self) -> None:
        """Tell the predictor of answers that have ended."""
        while self._ended:
            rank, tenant, prompt_tokens, tokens = self._ended.popleft()
            self._lengths.observe(kind_of(f"{rank} {tenant}", prompt_tokens), tokens)

    def _room_for_all(self, s: Sequence) -> bool:
        """Whether everybody fits even at the longest, with `s`: then nobody need be foreseen."""
        tokens = self._most_tokens + s.prompt_tokens + s.output_max_tokens
        blocks = tokens // self._block + self.running + 1
        return self._plain and blocks * self._block_pages <= self.pages.total

    def _can_promise(self, pages: int) -> bool:
        """Whether everybody could still grow as far as is foreseen, were one more let in."""
        if not self.running:
            return True
        for s in self._unforeseen.values():
            s.promised_pages = self._promise(s)
            self._promised_pages += s.promised_pages
        self._unforeseen.clear()
        return self._promised_pages + pages <= self.pages.total

    def _urgency(self, s: Sequence) -> tuple[int, int]:
        return (DEMAND, s.due_ps) if s.band <= ON_TIME else (DEMAND, FOREVER_PS)

    def _shareable_blocks(self, s: Sequence) -> int:
        """Full blocks of the prompt that may come from a cache; a token is left to compute."""
        return min((s.target_tokens - 1) // self._block, s.prompt_tokens // self._block)

    # --- memory -----------------------------------------------------------------------------

    def _held_pages(self, tokens: int, published: int) -> int:
        """Pages of a sequence's own, between steps, when `published` blocks are a run's."""
        written = -(-tokens // self._block)
        pages = (written - published) * self._block_pages
        if self._plain or not tokens:
            return pages
        for block_pages, kept in self._windows:
            pages -= max(written - published - kept, 0) * block_pages
        return pages + self.layout.state_pages

    def _own_pages(self, s: Sequence, tokens: int) -> int:
        """Pages that `s` holds alone at a length of `tokens`."""
        return self._held_pages(tokens, s.published_blocks) + s.duplicate_pages

    def _pages_between(self, before: int, after: int) -> int:
        """Pages taken while tokens `before` to `after` are computed."""
        block = self._block
        pages = (-(-after // block) - -(-before // block)) * self._block_pages
        return pages if before or self._plain else pages + self.layout.state_pages

    def _chunk_pages(self, s: Sequence, tokens: int) -> int:
        return self._pages_between(s.cached_tokens, s.cached_tokens + tokens)

    def _obtainable(self) -> int:
        """Pages that are free or could be."""
        return self.pages.free + self.index.evictable_blocks * self._block_pages

    def _reclaim(self, need: int) -> None:
        """Free pages by forgetting cached runs. The caller knows that they can be had.

        Without lower tiers this goes in batches, so that horizons stay long.  With them the
        batch was written back ahead (`_write_back`), and what is short now is dropped.
        """
        short = need - self.pages.free
        if short > 0:
            blocks = -(-short // self._block_pages)
            if self._tiered:
                self.index.evict(DEVICE, blocks, write_back=False)
            else:
                self.index.evict(DEVICE, max(blocks, self._batch_evicted))
            assert need <= self.pages.free, "what was counted as obtainable was not"

    def _write_back(self, need: int) -> None:
        """Keep a batch of pages free by writing cold runs back before they are needed."""
        index = self.index
        if not index.evictable_blocks:
            return
        leaving = index.leaving_blocks * self._block_pages
        short = need + self._low_pages - self.pages.free - leaving
        if short > 0:
            blocks = -(-short // self._block_pages)
            index.evict(DEVICE, max(blocks, self._batch_evicted))

    def _somebody_on_time(self) -> bool:
        """Whether a prompt that can be on time is under way or waits."""
        if any(s.band == ON_TIME for s in self.prefilling.values()):
            return True
        return next(self.queue.on_time(), None) is not None

    def _owed_tokens(self, budget: int) -> int:
        """What a prompt that is owed takes of a step beside those that can be on time."""
        if self.policy.owed_percent >= 100 or not self._somebody_on_time():
            return budget
        return min(max(budget * self.policy.owed_percent // 100, self.limits.chunk_grain), budget)

    def _who_gives_way(self, band: int, begun: list[Sequence]) -> Sequence | None:
        """Somebody of the background who leaves so that a prompt of this band can go on.

        `begun` are the prompts under way that are not in the step yet.
        """
        if not self.policy.gives_way or band > ON_TIME:
            return None
        willing = [s for s in [*self.decoding.values(), *begun] if s.band >= BACKGROUND]
        return self.policy.victim(willing) if willing else None

    def _give_way(
        self, victim: Sequence, begun: list[Sequence], step: Step, now_ps: int, to: Sequence
    ) -> int:
        """`victim` leaves; returns the pages that the coming tick would have taken for it."""
        pages = 0
        if victim.state == DECODE:
            pages = self._next_pages(victim)
        else:
            begun.remove(victim)
        self._preempt(victim, step, now_ps, f"gives way to {to.id}")
        return pages

    def _next_pages(self, s: Sequence) -> int:
        """Pages the coming tick would have taken for a decoding sequence."""
        length = s.cached_tokens + self.tick - s.joined_tick
        return self._growth_of(s, length) if length % self._block == 0 else 0

    def _preempt(self, s: Sequence, step: Step, now_ps: int, why: str) -> None:
        """`s` gives its memory back: it returns by recomputing, or by loading what was parked."""
        self.preemptions += 1
        s.preemptions += 1
        cached = 0
        if s.state == DECODE:
            self._leave(s)
            cached = s.cached_tokens
        else:
            del self.prefilling[s.id]
        s.target_tokens = s.prompt_tokens + s.generated_tokens
        if cached and self.policy.swaps and self._worth_parking(s, now_ps):
            blocks = -(-cached // self._block)
            transfer = self.index.park(blocks)
            if transfer is not None:
                transfer.waiters.append(s)
                s.parked_tokens, s.parked_tier = cached, DRAM
        self._give_back(s)
        s.cached_tokens = 0
        self._arrived = True  # shedding should know of it
        step.preempted.append(s)
        self.queue.push(s)
        if self.note is not None:
            how = "parked in DRAM" if s.parked_tokens else "to be recomputed"
            self.note(now_ps, s, "preempted", f"{why}; {cached} tokens {how}")

    def _worth_parking(self, s: Sequence, now_ps: int) -> bool:
        """Whether moving out and back is cheaper than computing again."""
        if self.reload_ps is None or (self._windows and s.chain is not None):
            return False  # what windows had passed would be missing when it is published again
        blocks = -(-s.cached_tokens // self._block)
        there_and_back = 2 * self.reload_ps(DRAM, blocks * self.index.block_bytes, now_ps)
        return there_and_back < self.line.prefill_ps(
            s.cached_tokens,
            chunk=self.limits.chunk_tokens,
            decodes=len(self.decoding),
            context_tokens=self.context_tokens,
        )

    def _give_back(self, s: Sequence) -> None:
        """All memory that `s` holds: its own pages, and its hold on shared runs."""
        if s.promised_pages or s.id in self._unforeseen:
            self._unforeseen.pop(s.id, None)
            self._promised_pages -= s.promised_pages
            if self.policy.foresees:
                self._most_tokens -= s.prompt_tokens + s.output_max_tokens
        s.promised_pages = 0
        self.pages.free += s.pages
        s.pages = s.duplicate_pages = 0
        if self.names is not None:
            self.names.release(s.id)
        if s.adapter and self.adapters is not None:
            self.adapters.leave(s)
        if s.run is not None:
            s.run.used_ps = self._now_ps  # in use until now
            self.index.release(s.run)
            s.run = s.owned_run = None
        s.published_blocks = 0

    # --- the horizon ------------------------------------------------------------------------

    def _horizon(self, step: Step, most: int) -> int:
        """Repeats for which nothing that is decided here can change."""
        blocked, waiting = self._blocked, self.queue.waiting
        if blocked is not None and self._blocked_epoch != self.index.epoch:
            return 1  # memory moved after the head was refused
        if (waiting or self._sizer.saving) and blocked is None and not step.chunks:
            return 1  # somebody was left out for a reason that may pass
        if waiting and self.policy.longest_prefix_first_below:
            return 1
        repeats = most
        if step.chunks:
            repeats = self._chunk_horizon(step, most)
            if repeats <= 1:
                return 1
        if self._saturating:
            repeats = min(repeats, self._saturating[0][0] - self.tick)
        return max(self._memory_horizon(step, repeats), 1)

    def _chunk_horizon(self, step: Step, most: int) -> int:
        """One prompt repeats whole chunks for as long as it stays first and they stay right."""
        if len(step.chunks) > 1 or (self.queue.waiting and self._room and self._blocked is None):
            return 1
        s, tokens = step.chunks[0]
        repeats = min(most, (s.target_tokens - s.cached_tokens) // tokens)
        if s.band == OWED and self.policy.owed_percent < 100:
            return 1  # how much it takes hangs on who else is here
        if repeats <= 1 or self._first_begun() is not s:
            return 1
        blocked = self._blocked
        if blocked is not None and _share_a_prefix(blocked, s):
            return 1  # what is published here may be what the refused head lacks
        if self.policy.overtakes and self.queue.waiting and blocked is None:
            head = self.queue.head()  # admitting may have changed whose turn it is
            if head is not None and head[:3] < (s.band, s.key, s.id):
                return 1
        if self.policy.adaptive_chunk and self._sizer.binds:
            past = s.cached_tokens
            alpha, beta = self.line.line(step.decodes, step.context_tokens, [(past, tokens)])
            return min(repeats, self._sizer.holds_for(alpha, beta, tokens, past))
        return repeats

    def _memory_horizon(self, step: Step, repeats: int) -> int:
        """The most repeats, up to `repeats`, whose growth fits in the free pages."""
        decodes, free, block = step.decodes, self._free_before_writing_back(), self._block
        tokens = step.chunks[0][1] if step.chunks else 0
        if not decodes and not tokens:
            return repeats
        if not decodes:
            free -= self._tick_pages()  # kept for streams that stand still meanwhile
        # A bound that never walks: whole cycles of what decoders take, the chunk as it grows.
        most = (repeats // block + 1) * self._growth_total if decodes else 0
        if most + (repeats * tokens // block + 1) * self._block_pages <= free:
            return repeats
        cached = step.chunks[0][0].cached_tokens if tokens else 0
        return self._staircase(repeats, decodes, tokens, cached, free)

    def _free_before_writing_back(self) -> int:
        """Pages that may be taken before `_write_back` or `_reclaim` has something to do."""
        free, index = self.pages.free, self.index
        if self._tiered and index.evictable_blocks:
            free = min(free, free + index.leaving_blocks * self._block_pages - self._low_pages)
        return free

    def _staircase(self, repeats: int, decodes: int, tokens: int, cached: int, free: int) -> int:
        """The same, exactly: growth is periodic in the tick, and the chunk's is a staircase."""
        block, weight = self._block, self._block_pages
        if tokens:
            repeats = min(repeats, (free // weight + 1) * block // tokens + 1)
        rise, total = [0], 0
        if decodes:
            total, at, span = self._growth_total, self.tick % block, min(repeats, block)
            cycle = self._growth[at : at + span]
            if len(cycle) < span:
                cycle += self._growth[: span - len(cycle)]
            rise = list(accumulate(cycle, initial=0))
        if not tokens:  # decoders only: whole cycles, then one bisection
            turns, rest = divmod(free, total) if total else (repeats, 0)
            return min(repeats, turns * block + bisect_right(rise, rest) - 1)
        held = -(-cached // block)
        low, high = 1, repeats
        while low < high:
            k = (low + high + 1) >> 1
            need = (-(-(cached + k * tokens) // block) - held) * weight
            if decodes:
                need += (k // block) * total + rise[k % block]
            if need <= free:
                low = k
            else:
                high = k - 1
        return low

    # --- accounting -------------------------------------------------------------------------

    def complete(
        self,
        step: Step,
        repeats: int,
        finished: Iterable[Sequence],
        now_ps: int,
        accepted: dict[int, int] | None = None,
        handed_over: Iterable[Sequence] = (),
    ) -> list[Sequence]:
        """`repeats` of the step were done and ended at `now_ps`.

        `finished` produced their last token; `accepted` are verified drafts by sequence;
        `handed_over` finished here, and keep their pages until `released`.  Returns the
        sequences that produced their first token of this stay.
        """
        self._now_ps = now_ps
        if step.decodes:
            self._advance(repeats)
        if accepted:
            self._accept(accepted)
        entered = []
        for s, tokens in step.chunks:
            if self._chunk_done(s, tokens * repeats, now_ps):
                entered.append(s)
        for s in handed_over:
            self._leave(s)
            self.held_back[s.id] = s
            self._finish(s, now_ps)
        for s in finished:
            if s.state == DECODE:
                self._leave(s)
            self._give_back(s)
            self._finish(s, now_ps)
        return entered

    def _finish(self, s: Sequence, now_ps: int) -> None:
        s.state, s.finish_ps = DONE, now_ps
        if self.policy.foresees and s.output_max_tokens > 1:  # of one at most nothing is learned
            self._ended.append((s.rank, s.tenant, s.prompt_tokens, s.generated_tokens))
        if self.policy.gathers:
            self._padding = self._padding + 1 if self.decoding else 0
        if self.note is not None:
            self.note(now_ps, s, "finished", f"{s.generated_tokens} tokens")

    def _advance(self, repeats: int) -> None:
        """Every decoding sequence grew by `repeats` tokens."""
        growth, block = self._growth, self._block
        at = self.tick % block
        if repeats == 1:
            self.pages.free -= growth[at]
        else:
            turns, part = divmod(repeats, block)
            grown = turns * self._growth_total
            if part:
                grown += sum(growth[at : at + part])
                if at + part > block:
                    grown += sum(growth[: at + part - block])
            self.pages.free -= grown
        self.context_tokens += len(self.decoding) * repeats
        self.tick += repeats
        while self._saturating and self._saturating[0][0] <= self.tick:
            _, i, pages = heappop(self._saturating)
            s = self.decoding.get(i)
            if s is not None:
                self._growth[(s.joined_tick - s.cached_tokens) % block] -= pages
                self._growth_total -= pages

    def pages_taken(self, step: Step, repeats: int) -> int:
        """Pages that so many repeats of the step under way have taken before it is accounted."""
        taken = 0
        if step.decodes:
            turns, part = divmod(repeats, self._block)
            start = self.tick % self._block
            cycle = self._growth[start:] + self._growth[:start]
            taken = turns * sum(cycle) + sum(cycle[:part])
        for s, tokens in step.chunks:
            cached, published = s.cached_tokens + tokens * repeats, s.published_blocks
            if s.chain is not None:
                published = max(published, min(cached, s.prompt_tokens) // self._block)
            shared = (published - s.published_blocks) * self._block_pages
            taken += self._held_pages(cached, published) + shared + s.duplicate_pages - s.pages
        return taken

    def _accept(self, accepted: dict[int, int]) -> None:
        """Verified drafts: some sequences grew by more than the tick."""
        for i, tokens in accepted.items():
            s = self.decoding.get(i)
            if s is not None and tokens:
                self._leave(s)
                before = s.pages
                s.cached_tokens += tokens
                s.generated_tokens += tokens
                s.pages = self._own_pages(s, s.cached_tokens)
                self.pages.free -= s.pages - before
                self._join(s)

    def _chunk_done(self, s: Sequence, tokens: int, now_ps: int) -> bool:
        """`tokens` prompt tokens of `s` were computed; whether that was the last of them."""
        before, s.cached_tokens = s.cached_tokens, s.cached_tokens + tokens
        grown = self._pages_between(before, s.cached_tokens)
        self.pages.free -= grown
        s.pages += grown
        if s.chain is not None:
            full = min(s.cached_tokens, s.prompt_tokens) // self._block
            if full > s.published_blocks:
                duplicates = self.index.publish(s, full, now_ps)
                s.duplicate_pages += duplicates * self._block_pages
        if self._windows:
            kept = self._own_pages(s, s.cached_tokens)
            self.pages.free += s.pages - kept
            s.pages = kept
            if self.names is not None:
                self.names.slide(s.id)
        if s.cached_tokens < s.target_tokens:
            return False
        del self.prefilling[s.id]
        s.generated_tokens += 1
        if s.first_ps < 0:
            s.first_ps = now_ps
            if self.note is not None:
                self.note(now_ps, s, "first token", f"after {s.prompt_tokens} prompt tokens")
        self._join(s)
        return True

    def _growth_of(self, s: Sequence, length: int) -> int:
        """Pages a decoding sequence of `length` takes with its next block."""
        pages = self._block_pages
        for block_pages, kept in self._windows:
            if length >= (s.published_blocks + kept) * self._block:
                pages -= block_pages
        return pages

    def _join(self, s: Sequence) -> None:
        """`s` decodes from the next tick on."""
        s.state, s.joined_tick = DECODE, self.tick
        self.decoding[s.id] = s
        self.context_tokens += s.cached_tokens
        pages = self._block_pages
        for block_pages, kept in self._windows:
            saturated = (s.published_blocks + kept) * self._block
            if s.cached_tokens >= saturated:
                pages -= block_pages
            else:
                tick = self.tick + saturated - s.cached_tokens
                heappush(self._saturating, (tick, s.id, block_pages))
        self._growth[(self.tick - s.cached_tokens) % self._block] += pages
        self._growth_total += pages
        self._sizer.join(s, self.tick)

    def _leave(self, s: Sequence) -> None:
        """`s` decodes no more: what ticks did to everybody is now written down for one."""
        ran = self.tick - s.joined_tick
        length = s.cached_tokens + ran
        growth = self._growth_of(s, length)
        self._growth[(s.joined_tick - s.cached_tokens) % self._block] -= growth
        self._growth_total -= growth
        if self._windows:
            self._saturating = sorted(e for e in self._saturating if e[1] != s.id)
        s.cached_tokens = length
        s.generated_tokens += ran
        s.pages = self._own_pages(s, length)
        self.context_tokens -= length
        del self.decoding[s.id]
        self._sizer.leave(s)

    # --- checking ---------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between calls: INV-SCHED-5 and -7, and those of the index."""
        held = sum(
            s.pages
            for group in (self.prefilling, self.loading, self.held_back)
            for s in group.values()
        )
        context = 0
        for s in self.decoding.values():
            length = s.cached_tokens + self.tick - s.joined_tick
            held += self._own_pages(s, length)
            context += length
        runs = self.index.device_blocks + self.index.leaving_blocks
        runs += sum(r.blocks for r in self.index.heads.values() if r.arriving is not None)
        total = self.pages.free + held + runs * self._block_pages
        assert total == self.pages.total, (total, self.pages.total, held, runs)
        assert self.pages.free >= 0
        assert self.context_tokens == context
        waiting = self.queue.everybody()
        parked = sum(
            -(-s.parked_tokens // self._block)
            for s in [*waiting, *self.loading.values(), *self.held_back.values()]
            if s.parked_tier == DRAM
        )
        self.index.check(parked)
        if self.adapters is not None:
            self.adapters.check()
        self.queue.check()
        ids = [s.id for s in waiting]
        ids += [*self.loading, *self.prefilling, *self.decoding]
        assert len(ids) == len(set(ids)), "INV-SCHED-7"


def _share_a_prefix(a: Sequence, b: Sequence) -> bool:
    return bool(a.chain and b.chain) and a.chain[0] == b.chain[0]
