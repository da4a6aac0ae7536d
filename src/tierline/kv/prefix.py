"""What is cached, and where: runs of blocks with an equal prefix, and their copies by tier.

A chain names the blocks of a prompt: `chain[i]` stands for block i, everything before it,
and the salt (model revision, tenant, adapter@digest).  So equal names mean equal prefixes
under one salt, and comparing the *last* names of two runs compares the runs whole.  Chains
that agree share runs: a run is an edge of a radix tree, however many blocks it has, and
matching 100,000 tokens costs a look-up per run.

A run may have a copy in several tiers.  The device forgets in favour of the tier below
(write-back): a lower tier that holds only copies of what the device holds is worth nothing.
Only runs that no sequence holds, and under which nothing hangs in that tier, may be
forgotten; the placement says which of them first.

Everything here is a decision.  Bytes travel as `Transfer`s, which whoever drives the
scheduler takes from `outbox` and reports as landed or cancelled.

Invariants
    INV-KV-21  residency and counters agree: blocks by tier, evictable blocks, free pages
    INV-KV-22  blocks in a tier never exceed its capacity
    INV-KV-23  device runs hang from device runs; a run without a copy has no children
    INV-KV-24  nothing is forgotten that a sequence holds
    INV-KV-25  no chain matches a run of another salt
"""

from bisect import bisect_right
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from typing import Any, Protocol

from tierline.kv.pages import Pages
from tierline.kv.placement import Lru, Placement
from tierline.kv.placement import Run as Cached
from tierline.kv.transfer import BACKGROUND, DEMAND, DEVICE, DRAM, REMOTE, Transfer

MOVED_AT_ONCE = 64  # what goes together, or is not worth cutting: this fraction of a tier


class Holder(Protocol):
    """What the index knows of a sequence that computes and holds runs."""

    id: int
    chain: Any
    run: Any
    owned_run: Any
    published_blocks: int
    pages: int


class Names(Protocol):
    """Who binds block ids, when an executor holds real memory (`kv.names.BlockNames`)."""

    def adopt(self, sequence_id: int, runs: "Iterable[Run]") -> None:
        """A sequence starts with the blocks of these runs."""
        ...

    def resume(self, sequence_id: int, tokens: int) -> bool:
        """Room for tokens that come back from elsewhere; the scheduler has made it."""
        ...

    def fork(self, parent_id: int, child_id: int) -> object:
        """A second sequence with the same tokens; None if there is no room."""
        ...

    def slide(self, sequence_id: int) -> None:
        """A chunk is accounted: give back what windows have passed."""
        ...

    def release(self, sequence_id: int) -> None:
        """A sequence gives back whatever it has, if anything."""
        ...

    def publish(self, sequence_id: int, run: "Run", first_block: int, blocks: int) -> None:
        """The run holds these blocks of the sequence, too."""
        ...

    def split(self, head: "Run", tail: "Run", blocks: int) -> None:
        """The first `blocks` of what was one run are `head`'s."""
        ...

    def forget(self, run: "Run") -> None:
        """The run gives its device blocks back."""
        ...

    def trim(self, run: "Run", blocks: int) -> None:
        """The run gives its last device blocks back."""
        ...

    def leave(self, run: "Run") -> None:
        """Its device blocks are being written back: no longer the run's, and not free yet."""
        ...

    def stay(self, run: "Run") -> None:
        """What was leaving is the run's again."""
        ...

    def left(self, run: "Run") -> None:
        """Its leaving blocks are free."""
        ...

    def take(self, run: "Run", blocks: int) -> None:
        """Device blocks for a run that is being loaded."""
        ...

    def resize(self, pages: int) -> None:
        """So many device pages may be in use from now on; the scheduler has made room."""
        ...


class Run:
    """Consecutive blocks of one chain that are cached together."""

    __slots__ = (
        "arriving",
        "birth",
        "blocks",
        "chain",
        "children",
        "children_in",
        "hits",
        "holds",
        "leaving",
        "mask",
        "parent",
        "start",
        "used_ps",
    )

    def __init__(
        self,
        chain: Any,
        *,
        start: int,
        blocks: int,
        parent: "Run | None",
        mask: int,
        used_ps: int,
        birth: int,
    ) -> None:
        self.chain = chain
        self.start = start  # depth of its first block
        self.blocks = blocks
        self.parent = parent
        self.mask = mask  # bit t: a copy in tier t
        self.used_ps = used_ps
        self.birth = birth  # order of making: the last tie-break, and its name
        self.children = 0
        self.children_in = [0, 0, 0, 0]  # children with a copy in that tier
        self.holds = 0  # sequences at it, and children that are held
        self.hits = 0
        self.arriving: Transfer | None = None  # a device copy is on its way
        self.leaving: Transfer | None = None  # its device pages are being written back

    def __repr__(self) -> str:
        return f"Run({self.birth}: {self.start}+{self.blocks}, mask {self.mask:b})"


Offer = tuple[int, int, int, Run]


class Tier:
    """Memory below the device, by count of blocks, and the order in which it forgets."""

    __slots__ = ("capacity_blocks", "evicted_blocks", "heaps", "stored_blocks")

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.stored_blocks = 0
        self.evicted_blocks = 0
        # By segment of the placement: (key, -depth, birth, run); entries may be stale.
        self.heaps: tuple[list[Offer], list[Offer]] = ([], [])


class PrefixIndex:
    """Runs of cached blocks, who holds them, and their copies in each tier."""

    __slots__ = (
        "_births",
        "_grains",
        "_offered",
        "_penalty_depth_s",
        "_penalty_s",
        "_reloads_s",
        "_transfers",
        "below",
        "block_bytes",
        "block_tokens",
        "device_blocks",
        "epoch",
        "evictable_blocks",
        "hastened",
        "heads",
        "last_tier",
        "leaving_blocks",
        "names",
        "outbox",
        "pages",
        "pages_per_block",
        "placement",
        "tiers",
    )

    def __init__(
        self,
        pages: Pages,
        *,
        block_tokens: int,
        pages_per_block: int = 1,
        block_bytes: int = 0,
        capacities: Seq[int] = (),
        placement: Placement | None = None,
        penalties_s: tuple[float, float] = (1.0, 0.0),
        reloads_s: Seq[float] = (0.0, 0.0, 0.0),
        names: Names | None = None,
    ) -> None:
        """`capacities` are blocks of DRAM, NVMe and remote memory, in that order.

        `penalties_s` prices the recompute of one block: at depth 0, and per block of depth;
        `reloads_s` bringing it up from each of those tiers.
        """
        self.pages = pages
        self.block_tokens = block_tokens
        self.pages_per_block = pages_per_block
        self.block_bytes = block_bytes
        self.placement = placement if placement is not None else Lru()
        self.names = names
        self.tiers = [Tier(0), *(Tier(blocks) for blocks in capacities)]
        while len(self.tiers) < 4:
            self.tiers.append(Tier(0))
        self._connect()
        self.heads: dict[int, Run] = {}  # by the name of a run's first block
        self.evictable_blocks = 0  # of the device, held by nobody
        self.device_blocks = 0  # in the index
        self.leaving_blocks = 0  # written back, pages not free yet
        self.epoch = 0  # counts what may change a refusal: evictions and landings
        self.outbox: list[Transfer] = []
        self.hastened: list[tuple[Transfer, tuple[int, int]]] = []  # on their way, now wanted
        self._penalty_s, self._penalty_depth_s = penalties_s
        self._reloads_s = (0.0, *reloads_s)
        self._births = 0
        self._transfers = 0

    def _connect(self) -> None:
        """Find, from what has any capacity, the last tier and the next one below each."""
        in_use = [t for t in range(1, 4) if self.tiers[t].capacity_blocks]
        self.last_tier = in_use[-1] if in_use else DEVICE
        self._offered = range(self.last_tier + 1)
        self.below = self._neighbours()
        self._grains = [self.capacity_blocks(tier) // MOVED_AT_ONCE for tier in range(4)]

    def _neighbours(self) -> list[int]:
        """0 where there is none below."""
        below = [0, 0, 0, 0]
        for tier in range(4):
            for lower in range(tier + 1, 4):
                if self.tiers[lower].capacity_blocks:
                    below[tier] = lower
                    break
        return below

    def penalty_s_per_block(self, run: Cached) -> float:
        """Seconds to compute one block of the run again, one in its middle."""
        return self._penalty_s + self._penalty_depth_s * (run.start + run.blocks / 2)

    def capacity_blocks(self, tier: int) -> int:
        """What a tier can hold."""
        if tier == DEVICE:
            return self.pages.total // self.pages_per_block
        return self.tiers[tier].capacity_blocks

    def runs(self) -> Iterable[Run]:
        """Every run, wherever its copies are."""
        return self.heads.values()

    # --- reading ----------------------------------------------------------------------------

    def peek(self, chain: Any, limit: int) -> tuple[int, int, int, int]:
        """(blocks found, of them on the device without a gap, of those held by nobody, blocks to
        fetch) among the first `limit`.  Changes nothing: whoever is refused leaves no trace."""
        found = device = loose = fetch = 0
        get = self.heads.get
        while found < limit:
            run = get(chain[found])
            if run is None:
                break
            whole = run.blocks
            equal = _equal_blocks(run, chain, found, min(whole, limit - found))
            if run.mask & 1 or run.leaving is not None:  # what is leaving would stay
                if device == found:  # not behind a run that is still on its way
                    device += equal
                if run.mask & 1 and not run.holds:
                    loose += equal
            elif run.arriving is None:
                fetch += equal
            found += equal
            if equal < whole:
                break
        return found, device, loose, fetch

    def found(self, chain: Any, limit: int) -> int:
        """Blocks found, in any tier, among the first `limit`: what a router asks."""
        found = 0
        get = self.heads.get
        while found < limit:
            run = get(chain[found])
            if run is None:
                break
            whole = run.blocks
            equal = _equal_blocks(run, chain, found, min(whole, limit - found))
            found += equal
            if equal < whole:
                break
        return found

    def residence(self, chain: Any, limit: int) -> list[tuple[int, int]]:
        """[(depth reached, tier to fetch from)] along the cached path; tier 0 needs no fetching."""
        depth, path = 0, []
        while depth < limit:
            run = self.heads.get(chain[depth])
            if run is None:
                break
            equal = _equal_blocks(run, chain, depth, min(run.blocks, limit - depth))
            depth += equal
            here = run.mask & 1 or run.arriving is not None or run.leaving is not None
            tier = DEVICE if here else _highest(run.mask)
            path.append((depth, tier))
            if equal < run.blocks:
                break
        return path

    # --- holding ----------------------------------------------------------------------------

    def match(self, chain: Any, limit: int, now_ps: int) -> tuple[list[Run], int]:
        """The cached path as runs, split so that it ends with the last equal block; and its
        length in blocks.  Counts as a use."""
        depth, path = 0, []
        while depth < limit:
            run = self.heads.get(chain[depth])
            if run is None:
                break
            whole = run.blocks
            equal = _equal_blocks(run, chain, depth, min(whole, limit - depth))
            if equal < whole:
                run = self._split(run, equal)
            path.append(run)
            depth += equal
            if equal < whole:
                break
        for run in path:
            if run.leaving is not None and not run.mask & 1:
                self._stay(run)
            self.placement.used(run)
            run.used_ps = now_ps
            run.hits += 1
        return path, depth

    def hold(self, run: Run | None) -> None:
        """A sequence stands at `run`: neither it nor what it hangs from may be forgotten."""
        while run is not None:
            run.holds += 1
            if run.holds > 1:
                return
            if run.mask & 1:
                self.evictable_blocks -= run.blocks
            run = run.parent

    def release(self, run: Run | None) -> None:
        """The opposite of `hold`."""
        while run is not None:
            run.holds -= 1
            if run.holds:
                return
            if run.mask & 1:
                self.evictable_blocks += run.blocks
            self._offer(run)
            run = run.parent

    def fetch(self, path: list[Run], waiter: Any, urgency: tuple[int, int]) -> int:
        """Bring what `path` lacks on the device; `waiter` waits for it.  Returns transfers.

        The caller has made room: pages of what is fetched are taken here.
        """
        by_tier: dict[int, Transfer] = {}
        waits = 0
        for run in path:
            if run.mask & 1:
                continue
            if run.arriving is None:
                tier = _highest(run.mask)
                transfer = by_tier.get(tier)
                if transfer is None:
                    transfer = by_tier[tier] = self._send("load", tier, DEVICE, urgency)
                self._load(run, transfer)
            arriving = run.arriving
            assert arriving is not None
            if waiter is not None and waiter not in arriving.waiters:
                arriving.waiters.append(waiter)
                waits += 1
                if urgency < arriving.urgency:
                    self.hastened.append((arriving, urgency))
        return waits

    def _load(self, run: Run, transfer: Transfer) -> None:
        transfer.runs.append(run)
        transfer.blocks += run.blocks
        transfer.bytes += run.blocks * self.block_bytes
        run.arriving = transfer
        self.pages.free -= run.blocks * self.pages_per_block
        if self.names is not None:
            self.names.take(run, run.blocks)

    # --- writing ----------------------------------------------------------------------------

    def publish(self, holder: Holder, upto: int, now_ps: int) -> int:
        """Blocks that `holder` has computed up to depth `upto` become runs others can share.

        Its private pages become the run's.  Where somebody else published the same blocks
        first, the duplicate stays private and the holder moves its hold along; returns how
        many blocks are such duplicates.
        """
        depth = first = holder.published_blocks
        pages = holder.pages
        while depth < upto:
            run = holder.run
            if run is not None and run.start + run.blocks > depth:
                depth = self._publish_inside(holder, run, depth, upto)
                continue
            other = self.heads.get(holder.chain[depth])
            if other is not None:
                self._move_hold(holder, other)
                continue
            depth = self._publish_new(holder, depth, upto, now_ps)
        holder.published_blocks = upto
        return upto - first - (pages - holder.pages) // self.pages_per_block

    def _publish_inside(self, holder: Holder, run: Run, depth: int, upto: int) -> int:
        """The holder stands at a run that reaches deeper than what it has published."""
        end = run.start + run.blocks
        equal = 0
        if run.start <= depth:
            equal = _equal_blocks(run, holder.chain, depth, min(end, upto) - depth)
        if not equal:
            if run.start >= depth:  # others cut it: what the holder uses ends above
                self._move_hold(holder, run.parent)
            else:
                self._move_hold(holder, self._split(run, depth - run.start))
            return depth
        if not run.mask & 1 and run.arriving is None:
            # Recomputed what survived only below: this run gets its device copy back.  Also
            # while its former one is leaving, so that it is all one when that has left.
            if depth + equal < end:
                run = self._split(run, depth + equal - run.start)
                self._move_hold(holder, run)
            assert depth == run.start, "stood inside a run that is not on the device"
            self._set(run, DEVICE)
            self._own(holder, run, depth, run.blocks)
        return depth + equal

    def _publish_new(self, holder: Holder, depth: int, upto: int, now_ps: int) -> int:
        """Nobody has the block at `depth`: extend the holder's own run, or begin one."""
        run, blocks = holder.run, upto - depth
        if run is not None and holder.owned_run is run and not run.children and run.mask == 1:
            run.blocks += blocks
            run.used_ps = now_ps
        else:
            run = self._begin(holder.chain, depth, blocks, run, now_ps)
            self._move_hold(holder, run)
            holder.owned_run = run
        self._own(holder, run, depth, blocks)
        return upto

    def _begin(self, chain: Any, start: int, blocks: int, parent: Run | None, now_ps: int) -> Run:
        self._births += 1
        run = Run(
            chain,
            start=start,
            blocks=blocks,
            parent=parent,
            mask=1,
            used_ps=now_ps,
            birth=self._births,
        )
        self.heads[chain[start]] = run
        if parent is not None:
            parent.children += 1
            parent.children_in[DEVICE] += 1
        self.evictable_blocks += blocks  # `hold` takes them off at once
        return run

    def _own(self, holder: Holder, run: Run, depth: int, blocks: int) -> None:
        """Pages of the holder's blocks [depth, depth + blocks) are the run's from now on."""
        self.device_blocks += blocks
        holder.pages -= blocks * self.pages_per_block
        if self.names is not None:
            self.names.publish(holder.id, run, depth, blocks)

    def _move_hold(self, holder: Holder, run: Run | None) -> None:
        self.hold(run)
        self.release(holder.run)
        holder.run = run

    def _split(self, run: Run, blocks: int) -> Run:
        """Cut `run` after `blocks`. It stays the tail, which its holders hold; the head is new."""
        assert 0 < blocks < run.blocks
        self._births += 1
        head = Run(
            run.chain,
            start=run.start,
            blocks=blocks,
            parent=run.parent,
            mask=run.mask,
            used_ps=run.used_ps,
            birth=self._births,
        )
        head.hits, head.arriving, head.leaving = run.hits, run.arriving, run.leaving
        head.children = 1
        head.holds = 1 if run.holds else 0
        head.children_in = [run.mask >> tier & 1 for tier in range(4)]
        for transfer in (run.arriving, run.leaving):
            if transfer is not None:
                transfer.runs.insert(transfer.runs.index(run), head)
        self.heads[run.chain[run.start]] = head
        run.start += blocks
        run.blocks -= blocks
        run.parent = head
        self.heads[run.chain[run.start]] = run
        if self.names is not None:
            self.names.split(head, run, blocks)
        return head

    # --- forgetting -------------------------------------------------------------------------

    def evict(self, tier: int, blocks: int, *, write_back: bool = True) -> int:
        """Forget up to `blocks` of a tier, least valuable first; returns how many.

        On the device, runs without a copy below are written back first where there is room:
        their pages become free when that has landed.  With `write_back` off they are dropped,
        and what hangs from them below only when nothing else is left.
        """
        done, aside = self._forget_in_order(tier, blocks, write_back=write_back)
        while aside and done < blocks and tier == DEVICE and not write_back:
            for _, _, _, run in aside:
                if not run.mask & 1 or run.holds or run.children_in[DEVICE]:
                    continue
                if done < blocks:
                    self._orphan(run)
                    done += self._forget(run, tier, write_back=False)
                else:
                    self._offer(run)
            more, aside = self._forget_in_order(tier, blocks - done, write_back=False)
            done += more
        for entry in aside:
            heappush(self.tiers[tier].heaps[self.placement.segment(self, entry[3], tier)], entry)
        if done:
            self.epoch += 1
        return done

    def _forget_in_order(
        self, tier: int, blocks: int, *, write_back: bool
    ) -> tuple[int, list[Offer]]:
        """Forget up to `blocks`; also what came up and cannot go, or should not yet."""
        bit, done = 1 << tier, 0
        heaps, key = self.tiers[tier].heaps, self.placement.key
        aside: list[Offer] = []
        while done < blocks:
            segment = self.placement.shrinks(self, tier) if heaps[1] else 0
            heap = heaps[segment] or heaps[1 - segment]
            if not heap:
                break
            entry = heappop(heap)
            value, run = entry[0], entry[3]
            if not run.mask & bit or run.holds or run.children_in[tier]:
                continue  # stale: offered again when it becomes true
            if run.leaving is not None and tier != DEVICE:
                continue  # its bytes are still coming; offered again when they have landed
            current = key(self, run, tier)
            if current > value:
                heappush(
                    heaps[self.placement.segment(self, run, tier)],
                    (current, -run.start, run.birth, run),
                )
                continue
            if run.mask == bit and run.children and not self.below[tier]:
                continue  # the last copy of what others hang from: offered when they are gone
            if run.blocks > blocks - done:  # only the tail goes, unless the rest is little
                if self._trim(run, tier, blocks - done):
                    heappush(heap, entry)
                    return blocks, aside
                if run.blocks - (blocks - done) > self._grains[tier]:
                    self._split(run, run.blocks - (blocks - done))
            forgotten = self._forget(run, tier, write_back=write_back)
            done += forgotten
            if not forgotten:
                aside.append(entry)
        return done, aside

    def _trim(self, run: Run, tier: int, blocks: int) -> bool:
        """Forget the last blocks of a run for good without making two of it; whether that was
        possible: nothing hangs from it, and no other copy has those blocks."""
        if tier != DEVICE or self.below[tier] or run.children:
            return False
        if self.names is not None:
            self.names.trim(run, blocks)
        self.placement.forgotten(self, run, tier, kept=run.blocks - blocks)
        run.blocks -= blocks
        self.pages.free += blocks * self.pages_per_block
        self.device_blocks -= blocks
        self.evictable_blocks -= blocks
        self.tiers[tier].evicted_blocks += blocks
        return True

    def _forget(self, run: Run, tier: int, *, write_back: bool) -> int:
        """Give up the copy of a run that nothing forbids to forget; returns blocks given up."""
        below, bit, blocks = self.below[tier], 1 << tier, run.blocks
        transfer = None
        if below and not run.mask & ~((bit << 1) - 1) and (write_back or tier != DEVICE):
            transfer = self._sink(run, tier, below)
        if run.mask == bit and run.children:
            return 0  # no room below: it must stay above what hangs from it
        if tier == DEVICE:
            self.evictable_blocks -= blocks
            self.device_blocks -= blocks
            if transfer is not None:
                run.leaving = transfer
                self.leaving_blocks += blocks
                if self.names is not None:
                    self.names.leave(run)
            else:
                self.pages.free += blocks * self.pages_per_block
                if self.names is not None:
                    self.names.forget(run)
        else:
            self.tiers[tier].stored_blocks -= blocks
        self.tiers[tier].evicted_blocks += blocks
        self.placement.forgotten(self, run, tier)
        self._clear(run, tier)
        return blocks

    def _sink(self, run: Run, tier: int, below: int) -> Transfer | None:
        """Keep what `tier` forgets in the tier below, if there is or can be room."""
        parent = run.parent
        if parent is not None and not parent.mask:
            return None
        if self._reloads_s[below] >= self.penalty_s_per_block(run) and not run.children:
            return None  # it would be computed again anyway
        run.holds += 1  # making room must not take the run itself
        room = self.make_room(below, run.blocks)
        run.holds -= 1
        if not room:
            return None
        self.tiers[below].stored_blocks += run.blocks
        self._set(run, below)
        transfer = self._joint("back" if tier == DEVICE else "demote", tier, below)
        transfer.runs.append(run)
        transfer.blocks += run.blocks
        transfer.bytes += run.blocks * self.block_bytes
        self._offer(run)
        return transfer

    def _joint(self, kind: str, source: int, target: int) -> Transfer:
        """What one step moves down travels together, as long as no page waits long for it."""
        for transfer in self.outbox:
            same = transfer.kind == kind and transfer.target == target
            if same and transfer.blocks < self._grains[DEVICE]:
                return transfer
        return self._send(kind, source, target, (BACKGROUND, 0))

    def make_room(self, tier: int, blocks: int) -> bool:
        """Whether `blocks` more fit in a tier, after forgetting what must go for them."""
        owner = self.tiers[tier]
        short = owner.stored_blocks + blocks - owner.capacity_blocks
        if short <= 0:
            return True
        return blocks <= owner.capacity_blocks and self.evict(tier, short) >= short

    def _orphan(self, run: Run) -> None:
        """Forget every run below `run`: without it they are out of reach. Rare, so it may walk."""
        for other in list(self.heads.values()):
            above = other.parent
            while above is not None and above is not run:
                above = above.parent
            if above is run:
                assert not other.holds, "held below what was forgotten"
                assert not other.mask & 1, "on the device below what was forgotten"
                self._let_go(other)
                for tier in range(1, 4):
                    if other.mask >> tier & 1:
                        self.tiers[tier].stored_blocks -= other.blocks
                        self.tiers[tier].evicted_blocks += other.blocks
                other.mask = 0
                del self.heads[other.chain[other.start]]
        run.children, run.children_in = 0, [0, 0, 0, 0]

    def _let_go(self, run: Run) -> None:
        """Its pages are free although bytes still move: what lands is of no use any more."""
        pages = run.blocks * self.pages_per_block
        if run.arriving is not None:
            run.arriving.runs.remove(run)
            self.pages.free += pages
            if self.names is not None:
                self.names.forget(run)
        if run.leaving is not None:
            run.leaving.runs.remove(run)
            self.pages.free += pages
            self.leaving_blocks -= run.blocks
            if self.names is not None:
                self.names.left(run)
        run.arriving = run.leaving = None

    def _offer(self, run: Run) -> None:
        """Put the run up for forgetting in every tier where nothing hangs from it."""
        if run.holds:
            return
        for tier in self._offered:
            if run.mask >> tier & 1 and not run.children_in[tier]:
                value = self.placement.key(self, run, tier)
                heap = self.tiers[tier].heaps[self.placement.segment(self, run, tier)]
                heappush(heap, (value, -run.start, run.birth, run))

    def _set(self, run: Run, tier: int) -> None:
        run.mask |= 1 << tier
        if run.parent is not None:
            run.parent.children_in[tier] += 1

    def _clear(self, run: Run, tier: int) -> None:
        run.mask &= ~(1 << tier)
        parent = run.parent
        if parent is not None:
            parent.children_in[tier] -= 1
        if not run.mask and run.arriving is None:
            self._remove(run)
        if parent is not None:
            parent.used_ps = max(parent.used_ps, run.used_ps)  # a path is as recent as its last use
            self._offer(parent)

    def _remove(self, run: Run) -> None:
        assert not run.children, "a run without a copy still has children"
        del self.heads[run.chain[run.start]]
        if run.parent is not None:
            run.parent.children -= 1

    # --- moving -----------------------------------------------------------------------------

    def _send(self, kind: str, source: int, target: int, urgency: tuple[int, int]) -> Transfer:
        self._transfers += 1
        transfer = Transfer(
            kind, source=source, target=target, urgency=urgency, serial=self._transfers
        )
        self.outbox.append(transfer)
        return transfer

    def park(self, blocks: int) -> Transfer | None:
        """Room in DRAM for a preempted sequence's private blocks, or None when there is none."""
        if not self.tiers[DRAM].capacity_blocks or not self.make_room(DRAM, blocks):
            return None
        self.tiers[DRAM].stored_blocks += blocks
        return self.parked_transfer("swap-out", blocks, (DEMAND, 0))

    def parked_transfer(self, kind: str, blocks: int, urgency: tuple[int, int]) -> Transfer:
        """Blocks of one sequence: 'swap-out' to DRAM, 'swap-in' back, 'handover' from elsewhere."""
        sources = {"swap-out": DEVICE, "swap-in": DRAM, "handover": REMOTE}
        source, target = sources[kind], DRAM if kind == "swap-out" else DEVICE
        transfer = self._send(kind, source, target, urgency)
        transfer.blocks = blocks
        transfer.bytes = blocks * self.block_bytes
        return transfer

    def unpark(self, blocks: int) -> None:
        """A parked sequence left DRAM."""
        self.tiers[DRAM].stored_blocks -= blocks
        self.epoch += 1

    def landed(self, transfer: Transfer) -> None:
        """The bytes of a transfer have arrived."""
        self.epoch += 1
        for run in list(transfer.runs):
            if transfer.kind == "back":
                self._left(run)
            elif transfer.target == DEVICE:
                parent = run.parent
                if parent is None or parent.mask & 1 or parent.arriving is not None:
                    self._arrived(run)
                else:  # what it hangs from went, or never came
                    self._came_for_nothing(run)

    def lost(self, transfer: Transfer) -> None:
        """A transfer was given up: what it carried is not where it was going.

        Who waited for it holds nothing any more.
        """
        self.epoch += 1
        for run in list(transfer.runs):
            if transfer.kind == "back":
                self._left(run)
            if transfer.target == DEVICE:
                if run.arriving is not transfer:
                    continue  # let go when what it hangs from was lost
                self._came_for_nothing(run)
            elif run.mask >> transfer.target & 1:
                self._drop_copy(run, transfer.target)

    def lose_tier(self, tier: int) -> None:
        """The memory of a tier is gone for good; nothing may be on its way from or to it."""
        stored = [run for run in self.heads.values() if run.mask >> tier & 1]
        for run in sorted(stored, key=lambda run: (-run.start, run.birth)):
            if run.mask >> tier & 1:  # not forgotten with what it hung from
                self._drop_copy(run, tier)
        self.resize(tier, 0)
        self._connect()

    def resize(self, tier: int, blocks: int) -> None:
        """A tier has more or less room from now on; it holds no more than that."""
        assert self.tiers[tier].stored_blocks <= blocks
        self.tiers[tier].capacity_blocks = blocks
        self.epoch += 1

    def resize_device(self, pages: int) -> None:
        """The device has more or fewer pages from now on; what is taken away must be free."""
        more = pages - self.pages.total
        assert self.pages.free + more >= 0, "only free pages can be taken away"
        self.pages.total += more
        self.pages.free += more
        if self.names is not None:
            self.names.resize(pages)
        self._grains[DEVICE] = self.capacity_blocks(DEVICE) // MOVED_AT_ONCE
        self.epoch += 1

    def _left(self, run: Run) -> None:
        run.leaving = None
        self.leaving_blocks -= run.blocks
        self.pages.free += run.blocks * self.pages_per_block
        if self.names is not None:
            self.names.left(run)
        self._offer(run)

    def _stay(self, run: Run) -> None:
        """Wanted while its device pages were being written back: they are the run's again."""
        transfer = run.leaving
        assert transfer is not None
        transfer.runs.remove(run)
        run.leaving = None
        self.leaving_blocks -= run.blocks
        if self.names is not None:
            self.names.stay(run)
        self._returned(run)

    def _arrived(self, run: Run) -> None:
        run.arriving = None
        self._returned(run)

    def _returned(self, run: Run) -> None:
        """The run has its device copy again."""
        self._set(run, DEVICE)
        self.device_blocks += run.blocks
        for tier in range(1, 4):  # one copy is enough: the device gives it back when it forgets
            if run.mask >> tier & 1 and not run.children_in[tier]:
                self.tiers[tier].stored_blocks -= run.blocks
                self._clear(run, tier)
        if not run.holds:
            self.evictable_blocks += run.blocks
            self._offer(run)

    def _came_for_nothing(self, run: Run) -> None:
        if run.holds:  # by one who has computed the same blocks: copied on the device
            self._arrived(run)
        else:
            self._drop_below(run)
            self._never_arrived(run)

    def _never_arrived(self, run: Run) -> None:
        run.arriving = None
        self.pages.free += run.blocks * self.pages_per_block
        if self.names is not None:
            self.names.forget(run)
        if run.mask:
            self._offer(run)
        else:
            self._orphan(run)
            self._remove(run)

    def _drop_below(self, run: Run) -> None:
        """Forget, on the device, what hangs from a run that did not come; nobody holds it."""
        below = []
        for other in self.heads.values():
            above = other.parent
            while above is not None and above is not run:
                above = above.parent
            if above is run and (other.mask & 1 or other.arriving is not None):
                below.append(other)
        for other in sorted(below, key=lambda other: -other.start):
            if self.heads.get(other.chain[other.start]) is not other:
                continue  # forgotten with what it hung from
            assert not other.holds, "held below what never came"
            if other.mask == 1 or not other.mask:
                self._orphan(other)
            if other.mask & 1:
                self.evictable_blocks -= other.blocks
                self.device_blocks -= other.blocks
                self.pages.free += other.blocks * self.pages_per_block
                if self.names is not None:
                    self.names.forget(other)
                self._clear(other, DEVICE)
            else:
                self._let_go(other)
                if not other.mask:
                    self._remove(other)

    def _drop_copy(self, run: Run, tier: int) -> None:
        if run.mask == 1 << tier and run.children:
            self._orphan(run)
        self.tiers[tier].stored_blocks -= run.blocks
        self.tiers[tier].evicted_blocks += run.blocks
        self._clear(run, tier)

    # --- checking ---------------------------------------------------------------------------

    def check(self, parked_blocks: int = 0) -> None:
        """Assert the invariants of this module; `parked_blocks` lie in DRAM beside the runs."""
        runs = list(self.heads.values())
        assert self.device_blocks == sum(r.blocks for r in runs if r.mask & 1)
        loose = sum(r.blocks for r in runs if r.mask & 1 and not r.holds)
        assert self.evictable_blocks == loose
        assert self.leaving_blocks == sum(r.blocks for r in runs if r.leaving is not None)
        for number in range(1, 4):
            tier = self.tiers[number]
            stored = sum(r.blocks for r in runs if r.mask >> number & 1)
            stored += parked_blocks if number == DRAM else 0
            assert tier.stored_blocks == stored, (number, tier.stored_blocks, stored)
            assert stored <= tier.capacity_blocks, "INV-KV-22"
        for run in runs:
            self._check_run(run)

    def _check_run(self, run: Run) -> None:
        assert self.heads[run.chain[run.start]] is run
        assert run.blocks > 0
        assert run.mask or run.arriving is not None
        parent = run.parent
        if parent is not None:
            assert parent.start + parent.blocks == run.start
            assert self.heads.get(parent.chain[parent.start]) is parent
            on_device = parent.mask & 1 or parent.arriving is not None
            assert not run.mask & 1 or on_device, "INV-KV-23"
            assert not run.holds or parent.holds, "INV-KV-24"


def _highest(mask: int) -> int:
    """The tier nearest the device that has a copy."""
    return (mask & -mask).bit_length() - 1


def _equal_blocks(run: Run, chain: Any, depth: int, most: int) -> int:
    """Blocks from `depth` on, at most `most`, that `run` and `chain` have in common.

    Names are chained, so equality at one depth implies it above: one look at the last
    block, and a bisection only where that differs.
    """
    own = run.chain
    if most <= 0 or chain[depth] != own[depth]:
        return 0
    if chain[depth + most - 1] == own[depth + most - 1]:
        return most
    return 1 + bisect_right(range(1, most), False, key=lambda i: chain[depth + i] != own[depth + i])
