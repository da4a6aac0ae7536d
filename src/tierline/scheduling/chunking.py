"""How many prompt tokens a step may carry, so that no stream that runs breaks its promise.

The scheduler asks once a step and says who begins and who ends to decode.  There are two
kinds of promise.  An ITL target bounds every gap: a step that carries prompt tokens lasts no
longer.  A TPOT target bounds the mean, so that each token has an instant at which it is due,
and a stream that is ahead has slack to spend.  Computing prompt tokens has a price per step
whatever their number, so many small chunks waste what few large ones do not: slack is saved up
by steps without prompt tokens until a chunk that is worth it fits.

Nobody is looked at when a token is produced: the token of tick t is due at `offset + t x TPOT`,
and an offset is fixed when a stream begins.  The least offset of each target binds.

Invariants
    INV-SCHED-8  a step with prompt tokens lasts no longer than the tightest ITL target, nor
                 beyond the instant at which a token is due, unless even `chunk_tokens_min`
                 do, or steps without any would hardly be shorter
"""

from functools import partial
from heapq import heappop, heappush

from tierline.base.clock import FOREVER_PS
from tierline.perf.line import StepLine
from tierline.scheduling.sequence import Sequence

NEVER = FOREVER_PS, FOREVER_PS
SAVED_STEPS = 3
BEHIND_MAX = 2  # a stream that is further behind than so many tokens binds no more
WORTH_SAVING = (
    4,
    5,
)  # of the target: from there on steps without prompt tokens save too little


class ChunkSizer:
    """What the streams that run allow."""

    __slots__ = (
        "_due",
        "_gaps",
        "_offsets",
        "_paces",
        "between_ps",
        "grain",
        "saving",
        "sized_for",
        "tokens_min",
        "whole_tokens",
    )

    def __init__(self, *, tokens_min: int, grain: int) -> None:
        self.tokens_min, self.grain = tokens_min, grain
        self.sized_for = -1  # cached tokens of the prompt that the last chunk was sized for
        self.saving = False  # the last answer was to wait for slack
        self.whole_tokens = 0  # a chunk in the long run, and the time between two of them
        self.between_ps = 0
        self._gaps: dict[int, int] = {}  # ITL target -> streams that have it
        self._paces: dict[int, int] = {}  # TPOT target -> streams that have it
        self._offsets: dict[int, int] = {}  # by stream with a TPOT target
        self._due: dict[int, list[tuple[int, int]]] = {}  # TPOT target -> heap of (offset, stream)

    @property
    def paces(self) -> bool:
        """Whether anybody who runs has a TPOT target."""
        return bool(self._offsets)

    @property
    def binds(self) -> bool:
        """Whether anybody who runs has a target."""
        return bool(self._gaps or self._offsets)

    def join(self, s: Sequence, tick: int) -> None:
        """`s` decodes from this tick on."""
        if s.itl_ps < FOREVER_PS:
            self._gaps[s.itl_ps] = self._gaps.get(s.itl_ps, 0) + 1
        if s.tpot_ps < FOREVER_PS:
            self._paces[s.tpot_ps] = self._paces.get(s.tpot_ps, 0) + 1
            offset = s.first_ps + s.tpot_ps * (s.generated_tokens - 1 - tick)
            self._offsets[s.id] = offset
            heappush(self._due.setdefault(s.tpot_ps, []), (offset, s.id))

    def leave(self, s: Sequence) -> None:
        """`s` decodes no more."""
        if s.itl_ps < FOREVER_PS:
            left = self._gaps[s.itl_ps] - 1
            if left:
                self._gaps[s.itl_ps] = left
            else:
                del self._gaps[s.itl_ps]
        if s.tpot_ps < FOREVER_PS:
            left = self._paces[s.tpot_ps] - 1
            if left:
                self._paces[s.tpot_ps] = left
            else:
                del self._paces[s.tpot_ps]
        self._offsets.pop(s.id, None)

    def size(
        self,
        line: StepLine,
        most: int,
        *,
        past_tokens: int,
        wanted_tokens: int,
        decodes: int,
        context_tokens: int,
        tick: int,
        now_ps: int,
    ) -> int:
        """Prompt tokens for this step, at most `most`, if `wanted_tokens` were to be had."""
        self.sized_for = past_tokens
        least = self.tokens_min if self.tokens_min < most else most
        due_ps, pace_ps = self._next_due(tick, now_ps) if self._due else NEVER
        if pace_ps == FOREVER_PS:
            if not self._gaps:
                return most
            fit = line.chunk_for(
                min(self._gaps),
                decodes=decodes,
                context_tokens=context_tokens,
                past_tokens=past_tokens,
                tokens_max=most,
                grain=self.grain,
            )
            self.whole_tokens = fit if fit > least else least
            return self.whole_tokens
        fits = partial(
            line.chunk_for,
            decodes=decodes,
            context_tokens=context_tokens,
            past_tokens=past_tokens,
            tokens_max=most,
            grain=self.grain,
        )
        gap_ps = min(self._gaps, default=FOREVER_PS)
        alone_ps, _ = line.line(decodes, context_tokens)
        saved_ps = max(pace_ps - alone_ps, 0)
        reach_ps = min(gap_ps, pace_ps + SAVED_STEPS * saved_ps)
        whole = self.whole_tokens = max(fits(reach_ps), least)
        worth_it = alone_ps * WORTH_SAVING[1] < pace_ps * WORTH_SAVING[0]
        if worth_it:
            over_ps = line.line(decodes, context_tokens, [(past_tokens, whole)])[0] - pace_ps
            self.between_ps = max(over_ps, 0) * alone_ps // saved_ps
        tokens = fits(min(due_ps - now_ps, reach_ps))
        if tokens >= min(whole, wanted_tokens):
            return tokens
        if worth_it:
            self.saving = True
            return 0
        return max(fits(min(pace_ps, gap_ps)), least)

    def rhythm(
        self, line: StepLine, most: int, *, decodes: int, context_tokens: int
    ) -> tuple[int, int]:
        """(prompt tokens of a step in the long run, picoseconds between two such steps)."""
        fits = partial(
            line.chunk_for,
            decodes=decodes,
            context_tokens=context_tokens,
            past_tokens=0,
            tokens_max=most,
            grain=self.grain,
        )
        least = min(self.tokens_min, most)
        gap_ps, pace_ps = (min(t, default=FOREVER_PS) for t in (self._gaps, self._paces))
        alone_ps, _ = line.line(decodes, context_tokens)
        saved_ps = pace_ps - alone_ps
        if pace_ps == FOREVER_PS or alone_ps * WORTH_SAVING[1] >= pace_ps * WORTH_SAVING[0]:
            return max(fits(min(gap_ps, pace_ps)), least), 0
        whole = max(fits(min(gap_ps, pace_ps + SAVED_STEPS * saved_ps)), least)
        over_ps = line.line(decodes, context_tokens, [(0, whole)])[0] - pace_ps
        return whole, max(over_ps, 0) * alone_ps // saved_ps

    def holds_for(self, alpha: int, beta: int, tokens: int, past_tokens: int) -> int:
        """For how many repeats of alpha, alpha + beta, ... picoseconds the size stays right."""
        if self._offsets or self.sized_for != past_tokens:
            return 1  # slack changes with every step; or it was sized for another prompt
        target = min(self._gaps)
        if alpha <= target:
            return (target - alpha) // beta + 1 if beta else FOREVER_PS
        return 1 if tokens > self.tokens_min else FOREVER_PS

    def _next_due(self, tick: int, now_ps: int) -> tuple[int, int]:
        """(instant at which the next token is due, target of that stream) that binds most."""
        tightest = NEVER
        for target, heap in list(self._due.items()):
            while heap:
                offset, i = heap[0]
                due_ps = offset + target * (tick + 1)
                if self._offsets.get(i) == offset:
                    if due_ps >= now_ps - BEHIND_MAX * target:
                        tightest = min(tightest, (due_ps, target))
                        break
                    del self._offsets[i]  # its promise is broken: nobody should wait for it
                heappop(heap)
            if not heap:
                del self._due[target]
        return tightest
