"""A prefix index driven as a scheduler drives it, without one: prompts come, stay, and go."""

from collections.abc import Sequence as Seq
from typing import Any

from tierline.base.clock import PS_PER_S
from tierline.kv.pages import Pages
from tierline.kv.placement import Placement
from tierline.kv.prefix import PrefixIndex
from tierline.kv.transfer import BACKGROUND, DEMAND, DEVICE, Transfer


class Prompt:
    """What the index knows of a sequence."""

    def __init__(self, number: int, chain: Seq[int]) -> None:
        self.id = number
        self.chain: Any = chain
        self.run: Any = None
        self.owned_run: Any = None
        self.published_blocks = 0
        self.pages = 0
        self.waits = 0


class Cache:
    """An index whose prompts compute blocks; a second passes with whatever happens."""

    def __init__(
        self,
        pages: int,
        *,
        capacities: Seq[int] = (),
        placement: Placement | None = None,
        penalties_s: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        self.pages = Pages(pages)
        self.index = PrefixIndex(
            self.pages,
            block_tokens=1,
            block_bytes=1,
            capacities=capacities,
            placement=placement,
            penalties_s=penalties_s,
        )
        self.now_ps = 0
        self.made = 0
        self.here: list[Prompt] = []
        self.flying: list[Transfer] = []

    def room(self, blocks: int) -> bool:
        """Make room on the device as the scheduler does: forget what is not written back."""
        short = blocks - self.pages.free
        if short > self.index.evictable_blocks:
            return False
        if short > 0:
            self.index.evict(DEVICE, short, write_back=not self.index.below[DEVICE])
        self.take_off()
        return True

    def come(self, chain: Seq[int], *, load: bool = True) -> Prompt | None:
        """A prompt is let in with what is cached of it, or refused; it computes nothing yet."""
        index = self.index
        self.now_ps += PS_PER_S
        found, device, loose, fetch = index.peek(chain, len(chain))
        if not load:
            found, fetch = device, 0
        free = self.pages.free + index.evictable_blocks - loose
        if fetch + len(chain) - found > free:
            return None
        self.made += 1
        prompt = Prompt(self.made, chain)
        index.placement.missed(chain, found, len(chain))
        if found:
            path, prompt.published_blocks = index.match(chain, found, self.now_ps)
            prompt.run = path[-1]
            index.hold(prompt.run)
            assert self.room(fetch + len(chain) - found)
            prompt.waits = index.fetch(path, prompt, (DEMAND, prompt.id))
            self.take_off()
        self.here.append(prompt)
        return prompt

    def compute(self, prompt: Prompt, blocks: int) -> bool:
        """It computes some more blocks, if there is room for them."""
        upto = min(prompt.published_blocks + blocks, len(prompt.chain))
        grown = upto - prompt.published_blocks
        if prompt.waits or not grown or not self.room(grown):
            return False
        self.now_ps += PS_PER_S
        self.pages.free -= grown
        prompt.pages += grown
        self.index.publish(prompt, upto, self.now_ps)
        return True

    def go(self, prompt: Prompt) -> None:
        """It has ended."""
        self.here.remove(prompt)
        self.pages.free += prompt.pages
        prompt.pages = 0
        if prompt.run is not None:
            self.index.release(prompt.run)
            prompt.run = None

    def serve(self, chain: Seq[int]) -> int:
        """A whole prompt at once; returns how many of its blocks were cached."""
        prompt = self.come(chain)
        assert prompt is not None
        self.land_all()
        cached = prompt.published_blocks
        while self.compute(prompt, len(chain)):
            pass
        self.go(prompt)
        if self.index.below[DEVICE]:  # keep room, as the scheduler does
            self.index.evict(DEVICE, max(len(chain) - self.pages.free, 0))
            self.take_off()
            self.land_all()
        return cached

    def take_off(self) -> None:
        """What was decided to move is on its way."""
        self.flying += self.index.outbox
        self.index.outbox = []

    def land(self, transfer: Transfer, *, lost: bool = False) -> None:
        """A transfer ends."""
        self.flying.remove(transfer)
        transfer.state = "cancelled" if lost else "done"
        for prompt in transfer.waiters:
            prompt.waits -= 1
            if lost and prompt in self.here:
                self.go(prompt)
        if lost:
            self.index.lost(transfer)
        else:
            self.index.landed(transfer)
        self.take_off()

    def land_all(self) -> None:
        """Everything that moves arrives, the urgent first."""
        while self.flying:
            self.land(min(self.flying, key=lambda t: (t.urgency, t.serial)))

    def check(self) -> None:
        """The invariants of the index, and that pages add up."""
        index = self.index
        index.check()
        arriving = sum(run.blocks for run in index.runs() if run.arriving is not None)
        held = sum(prompt.pages for prompt in self.here)
        parts = self.pages.free + held + arriving + index.device_blocks + index.leaving_blocks
        assert parts == self.pages.total
        assert all(t.urgency[0] in (DEMAND, BACKGROUND) for t in self.flying)
