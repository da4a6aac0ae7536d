"""How long an answer will be: a distribution, and what is left of it as tokens arrive.

The scheduler asks when a request is admitted (how much KV memory it will come to hold), when
it predicts who ends when, and when it charges a tenant; the maximum that a request allows is
a poor guess for all three.  It reports every answer that ended.

One histogram for each kind of request (who asks, and how long the prompt is) and one for
all.  Buckets grow with the length, eight to an octave, exact below 16.  What little is known
about a kind is filled up with what is known about all, and that with a prior: every octave
is equally likely.  Each counts as much as `PRIOR_ANSWERS` answers, so it fades as answers
come, and past the longest answer ever seen it is all there is: then what is left is about as
long as what there is.  An answer that is over the request's own maximum ends there.

A request that has generated g tokens is one of those longer than g.  That is the refinement;
a predictor without it expects an answer of mean length to end when it is about to go on.

Asking costs a bisection: sums over the buckets are kept, and drawn anew only when an eighth
more has been observed since.  Counts are halved from time to time, so that what was long ago
fades.

Invariants
    INV-SCHED-45  1 <= remaining <= maximum - generated, and a quantile rises with its share
    INV-SCHED-46  on real traces, of the answers that had generated g tokens, a share q ends
                  within the predicted quantile q, for every g
"""

from bisect import bisect
from itertools import accumulate, pairwise
from math import ceil, log2

PRIOR_ANSWERS = 4
HALVE_AT = 4096  # answers of one kind; from then on the last few thousand decide
KINDS_MAX = 512  # later ones are not told apart, so that a million tenants cost no more
_REFRESH = 8  # sums may be an eighth behind

_EXACT, _PER_OCTAVE, _LONGEST = 16, 8, 1 << 20

Kind = tuple[str, int]


def kind_of(asker: str, prompt_tokens: int) -> Kind:
    """The kind of a request: its tenant or class, and the octave of its prompt."""
    return asker, prompt_tokens.bit_length()


def _bucket(tokens: int) -> int:
    shift = max(tokens.bit_length() - 4, 0)
    return shift * _PER_OCTAVE + (tokens >> shift)


_BUCKETS = _bucket(_LONGEST)
# _LOW[i] is the shortest length of bucket i, and _LOW[i + 1] the first beyond it.
_LOW = [
    i if i < _EXACT else (i % _PER_OCTAVE + _PER_OCTAVE) << (i // _PER_OCTAVE - 1)
    for i in range(_BUCKETS + 1)
]
_MIDDLE = [(low + high - 1) / 2 for low, high in pairwise(_LOW)]
# Octaves equally likely: a bucket's share is its width in octaves. No answer has no token.
_PRIOR = [0.0, *(log2(high / low) / log2(_LONGEST) for low, high in pairwise(_LOW[1:]))]


class _Histogram:
    """Lengths of one kind, and sums over them from each bucket to the last."""

    __slots__ = ("added", "answers", "counts", "shares", "tail", "tail_tokens")

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.answers = 0
        self.added = 0  # since the sums were drawn
        self.shares: list[float] = []  # of each bucket
        self.tail: list[float] = []  # tail[i]: shares of bucket i and all beyond
        self.tail_tokens: list[float] = []  # and shares times lengths

    def add(self, tokens: int) -> None:
        self.counts[_bucket(tokens)] += 1
        self.answers += 1
        self.added += 1
        if self.answers >= HALVE_AT:
            self.counts = [n // 2 for n in self.counts]
            self.answers = sum(self.counts)

    def draw(self, base: list[float]) -> None:
        """Blend the counts with the shares of something more general, unless that is fresh."""
        if self.shares and self.added * _REFRESH <= self.answers:
            return
        scale = 1 / (self.answers + PRIOR_ANSWERS)
        self.shares = [
            (n + PRIOR_ANSWERS * b) * scale for n, b in zip(self.counts, base, strict=True)
        ]
        backwards = self.shares[::-1]
        self.tail = [0.0, *accumulate(backwards)][::-1]
        tokens = (s * m for s, m in zip(backwards, reversed(_MIDDLE), strict=True))
        self.tail_tokens = [0.0, *accumulate(tokens)][::-1]
        self.added = 0

    def beyond(self, tokens: int) -> tuple[float, float]:
        """Share of the answers longer than `tokens`, and that share times their mean length."""
        low = min(tokens + 1, _LONGEST - 1)
        bucket = _bucket(low)
        high = _LOW[bucket + 1]
        share = self.shares[bucket] * (high - low) / (high - _LOW[bucket])
        middle = (low + high - 1) / 2
        return share + self.tail[bucket + 1], share * middle + self.tail_tokens[bucket + 1]


class LengthPredictor:
    """The only owner of "how long answers have been"."""

    def __init__(self) -> None:
        self._all = _Histogram()
        self._kinds: dict[Kind, _Histogram] = {}

    def observe(self, kind: Kind, tokens: int) -> None:
        """An answer of this kind ended with so many tokens."""
        assert tokens > 0
        tokens = min(tokens, _LONGEST - 1)
        self._all.add(tokens)
        if kind not in self._kinds and len(self._kinds) < KINDS_MAX:
            self._kinds[kind] = _Histogram()
        if kind in self._kinds:
            self._kinds[kind].add(tokens)

    def expected_remaining(self, kind: Kind, *, generated: int, at_most: int) -> int:
        """Mean tokens still to come; `at_most` is what the whole answer may have."""
        assert 0 <= generated < at_most
        drawn = self._drawn(kind)
        mass, tokens = drawn.beyond(generated)
        mass_cut, tokens_cut = drawn.beyond(at_most - 1)  # these end at the maximum
        mean = (tokens - tokens_cut + mass_cut * at_most) / mass
        return min(max(ceil(mean) - generated, 1), at_most - generated)

    def quantile_remaining(self, kind: Kind, share: float, *, generated: int, at_most: int) -> int:
        """Tokens still to come that a `share` of such answers does not exceed."""
        assert 0 <= generated < at_most
        assert 0 < share < 1
        drawn = self._drawn(kind)
        mass, _ = drawn.beyond(generated)
        left = (1 - share) * mass  # what is to lie beyond the answer
        # The tail falls from bucket to bucket: the last one that starts with no less than that.
        i = bisect(drawn.tail, -left, key=lambda tail: -tail) - 1
        width = _LOW[i + 1] - _LOW[i]
        into = (drawn.tail[i] - left) / drawn.shares[i] * width if drawn.shares[i] else 0
        return min(max(_LOW[i] - 1 + ceil(into) - generated, 1), at_most - generated)

    def _drawn(self, kind: Kind) -> _Histogram:
        """The histogram of a kind, its sums at most an eighth behind."""
        self._all.draw(_PRIOR)
        histogram = self._kinds.get(kind)
        if histogram is None:
            return self._all
        histogram.draw(self._all.shares)
        return histogram
