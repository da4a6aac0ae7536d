"""Which replica gets a request.

The fleet (`sim`) and later the gateway build one route by name, `ROUTERS[name](replicas,
seed=7, block_tokens=16)`, and ask it for every arrival and for every request that lost its
replica.  The answer is the number of a replica, or None while nobody accepts.

`replicas` is the fleet's own list, read anew at every call: ordered by number, and a number
is never given twice.  A replica that is down or draining stays in the list or leaves it; the
answer is the same.  Work is counted in prompt tokens of the reference accelerator, so that
replicas of different speed compare: integers throughout, ties to the lowest number.

Replicas are asked what they hold, one by one.  A directory fed by what they publish would
need one look-up for all; but between two reports it knows less than the replica does, and
how often reports come depends on how many equal steps are done at once.

Invariants
    INV-SCHED-40  only a replica that accepts is chosen; None only when none does
    INV-SCHED-41  a policy that prices takes the least price, ties to the lowest number
    INV-SCHED-42  by hash, a new replica takes over 1/(N+1) of the prefixes and no other moves,
                  and nobody over the load cap is given a request
"""

from bisect import bisect
from collections import abc
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from random import Random
from typing import Protocol

from tierline.base.clock import FOREVER_PS
from tierline.base.rng import stream_seed
from tierline.scheduling.sequence import Sequence

# An outstanding request slows prompts down although its own prompt is computed: it decodes.
REQUEST_TOKENS = 200
# Loading an adapter of 0.4 GB from a local drive, in prompt tokens not computed meanwhile.
ADAPTER_TOKENS = 1000
# By hash: past a common system prompt, and no deeper than where conversations begin to differ.
DEPTH_TOKENS = 1024
RING_POINTS = 128  # for each replica: shares of the ring then differ by a tenth
LOAD_CAP_PERMILLE = 1250  # of the average work, the usual slack of bounded loads

_WORD = (1 << 64) - 1
_LAST = 1 << 62  # above any price


class Candidate(Protocol):
    """What a policy may know about a replica. Nothing more is passed."""

    @property
    def number(self) -> int:
        """Its place in the order of births."""
        ...

    @property
    def accepting(self) -> bool:
        """Up, and not draining."""
        ...

    @property
    def requests_outstanding(self) -> int:
        """Sent there and not finished."""
        ...

    @property
    def prompt_tokens_queued(self) -> int:
        """Prompt tokens of those that are still to be computed."""
        ...

    @property
    def speed_permille(self) -> int:
        """Prompt tokens a second, in thousandths of the reference accelerator's."""
        ...

    def cached_tokens(self, sequence: Sequence) -> int:
        """The part of its prompt that lies in this replica's KV memory, whatever the tier."""
        ...

    def has_adapter(self, name: str) -> bool:
        """Whether it could run the adapter without loading it."""
        ...

    def predicted_ttft_ps(self, sequence: Sequence) -> int:
        """From now to its first token if it went there now, among what is queued before it."""
        ...


Replicas = abc.Sequence[Candidate]
Route = Callable[[Sequence, int], int | None]  # (request, now_ps) -> number


class Builder(Protocol):
    """What `ROUTERS` holds; `block_tokens` is the grain of the requests' chains."""

    def __call__(self, replicas: Replicas, *, seed: int, block_tokens: int) -> Route:
        """A route over a fleet that may change."""
        ...


def work_tokens(replica: Candidate) -> int:
    """What is ahead of a newcomer, in reference tokens."""
    tokens = replica.prompt_tokens_queued + REQUEST_TOKENS * replica.requests_outstanding
    return tokens * 1000 // replica.speed_permille


# --- without looking at the prompt ----------------------------------------------------------


class RoundRobin:
    """In turns."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._last = -1  # number of the replica that was chosen last

    def __call__(self, _sequence: Sequence, _now_ps: int) -> int | None:
        """The next one that accepts."""
        first = None
        for replica in self._replicas:
            if replica.accepting:
                if replica.number > self._last:
                    self._last = replica.number
                    return replica.number
                if first is None:
                    first = replica.number
        if first is not None:
            self._last = first
        return first


def least_outstanding(replicas: Replicas, _sequence: Sequence, _now_ps: int) -> int | None:
    """Least work ahead."""
    chosen, least = None, _LAST
    for replica in replicas:
        if replica.accepting and (work := work_tokens(replica)) < least:
            chosen, least = replica.number, work
    return chosen


class PowerOfTwo:
    """The lighter of two drawn at random: what a gateway without a full view can do."""

    def __init__(self, replicas: Replicas, *, seed: int) -> None:
        self._replicas = replicas
        self._random = Random(stream_seed(seed, "routing")).random

    def __call__(self, sequence: Sequence, now_ps: int) -> int | None:
        """Two draws for every request that has a choice."""
        accepting = [r for r in self._replicas if r.accepting]
        if len(accepting) < 2:
            return accepting[0].number if accepting else None
        one = int(self._random() * len(accepting))
        other = int(self._random() * (len(accepting) - 1))
        other += other >= one  # never the same twice
        pair = (accepting[min(one, other)], accepting[max(one, other)])
        return least_outstanding(pair, sequence, now_ps)


# --- by hash of the prefix ------------------------------------------------------------------


class PrefixHash:
    """Prompts with a common beginning go to one replica, unless it is loaded beyond its cap.

    Needs no knowledge of anyone's cache: a ring of points, each replica at `RING_POINTS` of
    them, and a prefix belongs to the next point.  The prefix is named by one block at a fixed
    depth; deeper would part the turns of one conversation, shallower would gather all that
    share a system prompt.  Overflow goes on along the ring, so it finds its prefix again.
    The cap lets a request wait for as long as its own prompt takes: below that a hit pays.
    """

    def __init__(self, replicas: Replicas, *, seed: int, block_tokens: int) -> None:
        self._replicas = replicas
        self._salt = stream_seed(seed, "routing")
        self._depth_blocks = max(1, DEPTH_TOKENS // block_tokens)
        self._members = (0, -1)  # how many and the last number: births are in order
        self._points: list[int] = []
        self._owners: list[Candidate] = []

    def __call__(self, sequence: Sequence, now_ps: int) -> int | None:
        """The owner of its prefix, or the next along the ring that is under its cap."""
        chain = sequence.chain
        if chain is None or not len(chain):  # shorter than a block: there is nothing to share
            return least_outstanding(self._replicas, sequence, now_ps)
        self._follow_fleet()
        work = [work_tokens(r) for r in self._replicas if r.accepting]
        if not work:
            return None
        cap_tokens = LOAD_CAP_PERMILLE * sum(work) // (1000 * len(work)) + sequence.prompt_tokens
        key = mix(chain[min(len(chain), self._depth_blocks) - 1] ^ self._salt)
        start = bisect(self._points, key)
        for i in range(start, start + len(self._owners)):
            owner = self._owners[i % len(self._owners)]
            if owner.accepting and work_tokens(owner) <= cap_tokens:
                return owner.number
        raise AssertionError("somebody is always at or under the average")

    def _follow_fleet(self) -> None:
        """Draw the ring anew when a replica has come or gone."""
        members = (len(self._replicas), self._replicas[-1].number if self._replicas else -1)
        if members == self._members:
            return
        self._members = members
        ring = sorted(
            (mix((replica.number << 16 | i) ^ self._salt), replica.number, replica)
            for replica in self._replicas
            for i in range(RING_POINTS)
        )
        self._points = [point for point, _, _ in ring]
        self._owners = [owner for _, _, owner in ring]


def mix(value: int) -> int:
    """A 64-bit word in which every bit depends on every bit of `value` (splitmix64).

    Not `hash`: that leaves small integers as they are.  Names of blocks have more bits, of
    which a salt may take the upper ones.
    """
    z = (value ^ value >> 64) + 0x9E3779B97F4A7C15 & _WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
    return z ^ z >> 31


# --- by what each replica holds -------------------------------------------------------------


def prefix_aware(replicas: Replicas, sequence: Sequence, _now_ps: int) -> int | None:
    """Least work until its prompt is computed: what is ahead, and what is not cached there.

    A long hit outweighs a backlog up to its own length, so a popular prefix spreads as soon
    as waiting for it costs more than computing it again.
    """
    return _least_work(replicas, sequence, adapter_tokens=0)


def adapter_aware(replicas: Replicas, sequence: Sequence, _now_ps: int) -> int | None:
    """The same, and loading its adapter is work as well."""
    return _least_work(replicas, sequence, adapter_tokens=ADAPTER_TOKENS)


def _least_work(replicas: Replicas, sequence: Sequence, *, adapter_tokens: int) -> int | None:
    """Look-ups cost more than all else here: who loses even with a full hit is not asked."""
    chosen, least = None, _LAST
    for replica in replicas:
        if replica.accepting:
            tokens, speed = _tokens_ahead(replica, sequence, adapter_tokens), replica.speed_permille
            if tokens * 1000 // speed < least:
                tokens += sequence.prompt_tokens - replica.cached_tokens(sequence)
                if (work := tokens * 1000 // speed) < least:
                    chosen, least = replica.number, work
    return chosen


def _tokens_ahead(replica: Candidate, sequence: Sequence, adapter_tokens: int) -> int:
    tokens = replica.prompt_tokens_queued + REQUEST_TOKENS * replica.requests_outstanding
    if adapter_tokens and sequence.adapter and not replica.has_adapter(sequence.adapter):
        tokens += adapter_tokens
    return tokens


def slo_aware(replicas: Replicas, sequence: Sequence, now_ps: int) -> int | None:
    """The least work among those that keep the promise; when none does, the earliest.

    Priority is in the prediction: only what is queued before this request counts.  Whoever
    has the least work is asked for a prediction first, and most often keeps the promise.
    """
    if sequence.due_ps >= FOREVER_PS:
        return adapter_aware(replicas, sequence, now_ps)
    priced = []
    for replica in replicas:
        if replica.accepting:
            tokens = _tokens_ahead(replica, sequence, ADAPTER_TOKENS)
            tokens += sequence.prompt_tokens - replica.cached_tokens(sequence)
            priced.append((tokens * 1000 // replica.speed_permille, replica.number, replica))
    priced.sort(key=itemgetter(0, 1))
    slack_ps, late = sequence.due_ps - now_ps, []
    for _, number, replica in priced:
        ttft_ps = replica.predicted_ttft_ps(sequence)
        if ttft_ps <= slack_ps:
            return number
        late.append((ttft_ps, number))
    return min(late)[1] if late else None


# --- by name --------------------------------------------------------------------------------


def _stateless(decide: Callable[[Replicas, Sequence, int], int | None]) -> Builder:
    return lambda replicas, **_: partial(decide, replicas)


ROUTERS: dict[str, Builder] = {
    "round-robin": lambda replicas, **_: RoundRobin(replicas),
    "least-outstanding": _stateless(least_outstanding),
    "power-of-two": lambda replicas, *, seed, **_: PowerOfTwo(replicas, seed=seed),
    "prefix-hash": PrefixHash,
    "prefix-aware": _stateless(prefix_aware),
    "adapter-aware": _stateless(adapter_aware),
    "slo-aware": _stateless(slo_aware),
}
