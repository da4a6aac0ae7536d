"""What happens to chosen requests while a fleet runs, in words.

`simulate(watch=...)` makes one, and replicas tell it of their steps.  It listens to what
schedulers note of *everybody*, because the reason for a wait lies with others: who was
admitted first, who holds the memory that the head of the queue needs, whose prompt made a
step long.  It only listens; a watched run has the hash of an unwatched one (INV-SIM-26).
"""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.base.units import format_seconds
from tierline.scheduling.sequence import DECODE, PREFILL, WAITING, Sequence
from tierline.scheduling.step import Step
from tierline.sim.record import Moment

if TYPE_CHECKING:
    from tierline.sim.replica import Replica

BEHIND_MAX = 20_000  # moments after which nobody is told any more whom it is behind
HOLDERS_NAMED = CHUNKS_NAMED = 3
OVERTAKEN = "overtaken"  # its prompt is begun, and others are served
BANDS = {-1: "owed service by its class", 1: "background", 2: "too late to be on time"}


class Watch:
    """Moments of the requests that somebody wants explained."""

    def __init__(self, requests: Iterable[int]) -> None:
        self.moments: dict[int, list[Moment]] = {i: [] for i in requests}
        self._last: dict[int, tuple[str, str]] = {}
        self._streams: set[int] = set()  # that are known to decode
        self._worst_ps = dict.fromkeys(self.moments, 0)  # longest step of its decoding so far

    def listen(self, replica: "Replica") -> None:
        """Hear what this replica's scheduler notes."""
        replica.scheduler.note = partial(self._heard, replica)

    def routed(self, replica: "Replica", sequence: Sequence, now_ps: int) -> None:
        """A request is about to join a replica."""
        told = self.moments.get(sequence.id)
        if told is None:
            return
        if told:
            self._note(sequence.id, now_ps, "lost", "its replica is gone; it begins anew elsewhere")
        cached = replica.cached_tokens(sequence)
        why = (
            f"to replica {replica.number}, where {replica.requests_outstanding} requests are and "
            f"{replica.prompt_tokens_queued:,} prompt tokens wait; {cached:,} of its "
            f"{sequence.prompt_tokens:,} tokens are cached there"
        )
        self._note(sequence.id, now_ps, "routed", why)

    def stepped(
        self, replica: "Replica", step: Step, *, repeats: int, start_ps: int, now_ps: int
    ) -> None:
        """A step (or several alike) has ended; nothing is accounted yet."""
        for i in self.moments:
            s = replica.sequences.get(i)
            if s is None or s.state == WAITING:
                continue
            each_ps = (now_ps - start_ps) // repeats
            mine = next((tokens for other, tokens in step.chunks if other is s), 0)
            if mine:
                self._streams.discard(i)
                of = f"of {s.target_tokens:,}, after {s.cached_tokens:,}"
                steps = f" in {repeats} steps" if repeats > 1 else ""
                beside = f"beside {step.decodes} decodes, {_lasting(each_ps)} each"
                self._note(i, start_ps, "chunk", f"{mine * repeats:,} tokens{steps} {of}, {beside}")
            elif s.state == PREFILL and step.chunks and self._last.get(i, ("",))[0] != OVERTAKEN:
                why = f"prompts of others go first: {_chunks(step)}"
                self._note(i, start_ps, OVERTAKEN, why)
            elif s.state == DECODE and step.decodes:
                if i not in self._streams:
                    self._streams.add(i)
                    self._note(
                        i, start_ps, "decoding", f"goes on after {s.generated_tokens} tokens"
                    )
                self._slow(s, step, start_ps, each_ps)

    def _slow(self, s: Sequence, step: Step, start_ps: int, each_ps: int) -> None:
        """The longest gap so far, or one beyond its target, is worth a word."""
        over = s.itl_ps < each_ps
        if each_ps * 2 > self._worst_ps[s.id] * 3 or (over and each_ps > self._worst_ps[s.id]):
            self._worst_ps[s.id] = each_ps
            beside = f"with prompt tokens: {_chunks(step)}" if step.chunks else "without prompts"
            limit = f", its limit is {_lasting(s.itl_ps)}" if s.itl_ps < FOREVER_PS else ""
            why = f"a step of {step.decodes} decodes takes {_lasting(each_ps)} {beside}{limit}"
            self._note(s.id, start_ps, "longer gap", why)

    def _heard(self, replica: "Replica", now_ps: int, s: Sequence, what: str, why: str) -> None:
        if s.id in self.moments:
            if what == "blocked":
                why = f"{why}; {_holders(replica, s)}"
            elif what == "finished" and s.id in replica.scheduler.held_back:
                what, why = "handed over", "its cache goes to the replica that decodes"
            elif what == "first token":
                self._streams.add(s.id)
            self._note(s.id, now_ps, what, why)
        if what not in ("admitted", "blocked"):
            return
        for i in self.moments:
            waits = replica.sequences.get(i)
            if waits is None or waits is s or waits.state != WAITING:
                continue
            if what == "admitted":
                self._note(i, now_ps, "behind", _who_goes_first(s, waits, now_ps))
            else:
                head = f"request {s.id} is at the head of the queue and does not fit"
                self._note(i, now_ps, "behind", f"{head}: {why}; {_holders(replica, s)}")

    def _note(self, request: int, at_ps: int, what: str, why: str) -> None:
        """Write it down, unless it was the last thing said."""
        told = self.moments[request]
        full = what == "behind" and len(told) >= BEHIND_MAX
        if self._last.get(request) != (what, why) and not full:
            self._last[request] = (what, why)
            told.append(Moment(at_ps, what, why))


def _who_goes_first(first: Sequence, waits: Sequence, now_ps: int) -> str:
    """What an order goes by, of the one admitted and the one that waits."""
    facts = [f"{first.prompt_tokens:,} prompt tokens"]
    earlier_ps = waits.arrival_ps - first.arrival_ps
    facts.append(f"came {_lasting(abs(earlier_ps))} {'before' if earlier_ps >= 0 else 'after'} it")
    if first.rank != waits.rank:
        facts.append(f"class {first.rank} before class {waits.rank}")
    if first.due_ps != waits.due_ps:
        facts.append(f"due {_due(first, now_ps)}, this one {_due(waits, now_ps)}")
    for s, who in ((first, "it"), (waits, "this one")):
        if first.band != waits.band and s.band in BANDS:
            facts.append(f"{who} is {BANDS[s.band]}")
    return f"request {first.id} is admitted first ({'; '.join(facts)})"


def _chunks(step: Step) -> str:
    """Whose prompts a step computes."""
    shown = [f"{tokens:,} of request {s.id}" for s, tokens in step.chunks[:CHUNKS_NAMED]]
    more = len(step.chunks) - CHUNKS_NAMED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _holders(replica: "Replica", asks: Sequence) -> str:
    """Who holds memory, the most first."""
    scheduler = replica.scheduler
    running = [
        s
        for group in (scheduler.decoding, scheduler.prefilling, scheduler.loading)
        for s in group.values()
        if s is not asks
    ]
    running.sort(key=lambda s: (-s.pages, s.id))
    named = ", ".join(f"{s.id} ({s.pages:,} pages)" for s in running[:HOLDERS_NAMED])
    if not named:
        return "nobody runs"
    return f"{len(running)} run, the most is held by request{'s' * (len(running) > 1)} {named}"


def _due(s: Sequence, now_ps: int) -> str:
    left_ps = s.due_ps - now_ps
    return f"in {_lasting(left_ps)}" if left_ps >= 0 else f"{_lasting(-left_ps)} ago"


def _lasting(duration_ps: int) -> str:
    return format_seconds(duration_ps / PS_PER_S)
