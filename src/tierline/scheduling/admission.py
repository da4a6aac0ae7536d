"""Accept, queue or refuse: what a newcomer is told, from when its first token would come.

Whoever stands in front of a scheduler (`sim` now, the gateway later) asks before `add` and
reports first tokens.  The prediction adds up what goes before the newcomer in the policy's
order, its own prompt without what is cached, and bytes that must come up from a lower tier,
at the prompt rate that the present streams leave.  What that cannot know (later arrivals that
overtake, prefix hits of those that wait, waiting for memory) is learned: how much longer than
predicted the first tokens of each band took of late.

A refusal names the time after which it would not be repeated if nobody else came: what goes
before the newcomer is worked off by then.  Where even an empty instance would be too slow,
that is never.

Invariants
    INV-SCHED-9  an answer changes no state of the scheduler, and its cost does not grow with
                 the number of those that wait
"""

from dataclasses import dataclass

from tierline.base.clock import FOREVER_PS
from tierline.kv.transfer import DRAM
from tierline.scheduling.scheduler import Scheduler
from tierline.scheduling.sequence import ON_TIME, Sequence
from tierline.scheduling.step import Step

PERMILLE = 1000
LEARNED_FROM = 16  # first tokens: each new one moves what is learned by this part


@dataclass(frozen=True, slots=True)
class Accept:
    """It starts at once."""

    ttft_ps: int


@dataclass(frozen=True, slots=True)
class Queue:
    """Others go first, and its first token would still come by its deadline."""

    ttft_ps: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Its first token would come too late."""

    ttft_ps: int
    retry_after_ps: int  # FOREVER_PS: it cannot be on time here


Answer = Accept | Queue | Refuse


class Admission:
    """What one scheduler would do for newcomers, and how right it was."""

    __slots__ = ("_predicted", "_scheduler", "_slowness")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._slowness = [PERMILLE] * 3  # by band: actual over predicted waiting
        self._predicted: dict[int, tuple[int, int, int]] = {}  # id -> (band, ahead, own work)

    def answer(
        self,
        s: Sequence,
        now_ps: int,
        *,
        cached_tokens: int | None = None,
        step: Step | None = None,
        done: int = 0,
    ) -> Answer:
        """What `s` is told if it comes now.

        `done` repeats of the `step` under way have been done and not accounted for; whoever
        knows what they have cached since says `cached_tokens`.
        """
        ahead_ps, own_ps = self._ahead_and_own(
            s, now_ps, cached_tokens, step if done else None, done
        )
        band = max(s.band, ON_TIME)
        self._predicted[s.id] = (band, ahead_ps, own_ps)
        wait_ps = ahead_ps * self._slowness[band] // PERMILLE
        ttft_ps = wait_ps + own_ps
        late_ps = now_ps + ttft_ps - s.due_ps
        if late_ps <= 0:
            return Queue(ttft_ps) if ahead_ps else Accept(ttft_ps)
        return Refuse(ttft_ps, late_ps if late_ps <= wait_ps else FOREVER_PS)

    def first_token(self, s: Sequence, now_ps: int) -> None:
        """`s` was let in, and this is its first token: learn from how long that took."""
        band, ahead_ps, own_ps = self._predicted.pop(s.id, (0, 0, 0))
        if ahead_ps <= 0:
            return
        slowness = self._slowness[band]
        waited_ps = max(now_ps - s.arrival_ps - own_ps, 0)
        found = min(max(waited_ps * PERMILLE // ahead_ps, slowness // 4), slowness * 4)
        self._slowness[band] = max(slowness + (found - slowness) // LEARNED_FROM, PERMILLE // 10)

    def forget(self, s: Sequence) -> None:
        """`s` was refused, cancelled or lost."""
        self._predicted.pop(s.id, None)

    def _ahead_and_own(
        self, s: Sequence, now_ps: int, cached: int | None, step: Step | None, done: int
    ) -> tuple[int, int]:
        """Picoseconds of prompt work before `s`, and of its own."""
        scheduler, line = self._scheduler, self._scheduler.line
        scheduler.place(s)
        decodes, context = len(scheduler.decoding), scheduler.context_tokens
        computed: dict[int, int] = {}
        if step is not None:
            context += step.decodes * done
            computed = {other.id: tokens * done for other, tokens in step.chunks}
        chunk, between_ps = scheduler.rhythm(context)
        rate = line.prefill_rate(chunk=chunk, decodes=decodes, context_tokens=context)
        tokens, prompts = scheduler.work_before(s, computed)
        ahead_ps = 0
        if tokens > 0:  # a step is full whoever fills it; only what is looked back at adds up
            mean = -(-tokens // prompts)
            ahead_ps = rate(max(mean, chunk), 0) * tokens // max(mean, chunk)
            ahead_ps += between_ps * tokens // chunk
        resident, load_ps = self._resident(s, now_ps)
        cached = resident if cached is None else max(cached, resident)
        own = max(s.prompt_tokens - cached, 1)
        own_ps = rate(own, cached) + between_ps * (own // chunk) + load_ps
        under_way_ps, _ = line.line(decodes, context, [(0, chunk)] if ahead_ps else ())
        return ahead_ps, own_ps + under_way_ps // 2

    def _resident(self, s: Sequence, now_ps: int) -> tuple[int, int]:
        """(prompt tokens that need no computing, picoseconds until they are on the device)."""
        scheduler = self._scheduler
        index, block = scheduler.index, scheduler.layout.block_tokens
        limit = (s.prompt_tokens - 1) // block
        if s.chain is None or not limit:
            return 0, 0
        found, device, _, fetch = index.peek(s.chain, limit)
        if found == device or scheduler.reload_ps is None:
            return device * block, 0
        return found * block, scheduler.reload_ps(DRAM, fetch * index.block_bytes, now_ps)
