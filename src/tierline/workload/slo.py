"""Service levels: which percentile of which latency must stay under what, by request class."""

from collections.abc import Iterable
from dataclasses import dataclass

from tierline.base.errors import InputError
from tierline.base.names import lookup
from tierline.base.units import format_seconds, parse_duration_ns

METRICS = {
    "ttft": "time to first token",
    "itl": "inter-token latency, one gap",
    "tpot": "time per output token, mean over a request",
    "e2e": "end to end",
}

_UNITS = (("s", 10**9), ("ms", 10**6), ("us", 10**3), ("ns", 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One promise: this percentile of this metric stays at or under this limit."""

    metric: str
    percentile: float  # 99 means p99
    limit_ns: int

    @property
    def limit_s(self) -> float:
        """The limit in seconds, for laws."""
        return self.limit_ns / 1e9

    @property
    def text(self) -> str:
        """The target as a person types it and `parse_target` reads it: 'ttft_p99=2000ms'."""
        unit, size = next((u, n) for u, n in _UNITS if self.limit_ns % n == 0)
        return f"{self.metric}_p{self.percentile:g}={self.limit_ns // size}{unit}"

    def __str__(self) -> str:
        return f"{self.metric}_p{self.percentile:g} <= {format_seconds(self.limit_s)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """The promises to one class of requests; a larger priority is more urgent."""

    name: str = "default"
    priority: int = 0
    targets: tuple[Target, ...]

    def limit_s(self, metric: str) -> float | None:
        """The strictest limit on `metric` in seconds, or None when it carries no promise."""
        limits = [t.limit_s for t in self.targets if t.metric == metric]
        return min(limits) if limits else None

    def __str__(self) -> str:
        return ", ".join(str(t) for t in self.targets)


def parse_target(text: str) -> Target:
    """A target from 'ttft_p99=2s'; raises `InputError` that says which part is wrong."""
    name, equals, limit = text.partition("=")
    metric, p, percentile = name.strip().partition("_p")
    if not equals or not p:
        raise InputError(
            f"service level {text!r} is not METRIC_pNN=LIMIT", hint="for example ttft_p99=2s"
        )
    lookup("latency metric", metric, METRICS)
    try:
        value = float(percentile)
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise InputError(
            f"service level {text!r}: {percentile!r} is not a percentile",
            hint="a percentile lies between 0 and 100: p50, p99, p99.9",
        )
    return Target(
        metric=metric,
        percentile=value,
        limit_ns=parse_duration_ns(limit, what=f"limit of {name.strip()}"),
    )


def parse_service_levels(texts: Iterable[str]) -> tuple[ServiceLevel, ...]:
    """Service levels from '[CLASS[@PRIORITY]:]ttft_p99=2s,itl_p99=50ms', one text per class.

    >>> str(parse_service_levels(["ttft_p99=2s,itl_p99=50ms"])[0])
    'ttft_p99 <= 2.00 s, itl_p99 <= 50.0 ms'
    """
    levels: list[ServiceLevel] = []
    for text in texts:
        head, colon, body = text.rpartition(":")
        name, at, priority = head.partition("@")
        if at and not priority.lstrip("-").isdigit():
            raise InputError(
                f"service level {text!r}: priority {priority!r} is not a whole number",
                hint="write CLASS@PRIORITY, for example chat@10:ttft_p99=1s",
            )
        parts = [part for part in body.split(",") if part.strip()]
        if not parts:
            raise InputError(f"service level {text!r} is empty", hint="for example ttft_p99=2s")
        levels.append(
            ServiceLevel(
                name=name.strip() if colon else "default",
                priority=int(priority) if at else 0,
                targets=tuple(parse_target(part) for part in parts),
            )
        )
    names = [level.name for level in levels]
    if len(set(names)) != len(names):
        raise InputError("two service levels have one name", hint="name each class once")
    return tuple(levels)
