"""How well a number is known.

Every figure that a plan prints is a `Value`: the number, its unit, where it comes from,
and the band in which the truth lies. What is not known is an `unknown` value, which has
no number to compute with, instead of a plausible default.

The kinds, best first:

    measured    read from a benchmark of this stack, or a published table
    exact       derived from shapes and definitions, with nothing to estimate
    fitted      a law whose constants were fitted to measurements; the band is its residual
    datasheet   a peak rate times a stated efficiency
    assumed     chosen by us or by the user; the sensitivity says what it does
    unknown     no number
"""

from dataclasses import dataclass, replace

KINDS = ("exact", "measured", "fitted", "datasheet", "assumed", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Where a number comes from, and the band of truth over it (p10 and p90 of true / ours)."""

    kind: str
    source: str
    low: float = 1.0  # true value / ours, 10th percentile
    high: float = 1.0  # true value / ours, 90th percentile

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert self.low <= self.high

    @property
    def is_known(self) -> bool:
        """Whether there is a number at all."""
        return self.kind != "unknown"

    def with_source(self, source: str) -> "Evidence":
        """The same band under another source."""
        return replace(self, source=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A number with its unit and its evidence; `amount` is NaN when unknown."""

    amount: float
    unit: str
    evidence: Evidence

    @property
    def low(self) -> float:
        """The low edge of the band, in `unit`."""
        return self.amount * self.evidence.low

    @property
    def high(self) -> float:
        """The high edge of the band, in `unit`."""
        return self.amount * self.evidence.high


def weakest(*evidences: Evidence) -> Evidence:
    """The evidence of a result that rests on all of these: the worst kind, the widest band."""
    worst = max(evidences, key=lambda e: KINDS.index(e.kind))
    return Evidence(
        kind=worst.kind,
        source=worst.source,
        low=min(e.low for e in evidences),
        high=max(e.high for e in evidences),
    )


EXACT = Evidence(kind="exact", source="derived from the model's shapes")
