"""What a trace demands: rates, lengths, bursts, sessions, reuse; everything a plan is sized on.

`tierline profile` prints a `Profile`; the planner sizes on one; synthesis draws requests from
one. It is made in one pass over the requests that keeps three numbers for each of them, so a
million requests are tens of megabytes. A fact that the trace does not hold is None, never zero:
a trace without arrival times has no rate, and one without prefix blocks has no reuse.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from tierline.base.errors import InputError, TraceError
from tierline.base.units import format_seconds, significant
from tierline.workload.importers import BLOCK_TOKENS
from tierline.workload.request import Request
from tierline.workload.reuse import ReuseCurve, ReuseMeter
from tierline.workload.sessions import SessionMeter, Sessions
from tierline.workload.trace import TraceReader, read_trace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
PREFILL_HEAVY = 0.8
DECODE_HEAVY = 0.2
LONG_INPUT_TOKENS = 2048  # where the four archetypes part; the medians are compared
LONG_OUTPUT_TOKENS = 512

_BURST_WINDOW_S = 10
_BURSTS_MAX = 100
_SERIES_POINTS_MAX = 1440
_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A distribution of token counts."""

    mean: float
    std: float
    quantiles: tuple[float, ...]  # 101 of them, at 0 %, 1 % ... 100 %
    p99_9: float

    def percentile(self, percent: float) -> float:
        """The length that this percentage of requests does not exceed; linear in between."""
        assert 0 <= percent <= 100
        if percent >= 99:
            low, high = (99.0, 99.9) if percent <= 99.9 else (99.9, 100.0)
            ends = {99.0: self.quantiles[99], 99.9: self.p99_9, 100.0: self.quantiles[100]}
            return ends[low] + (percent - low) / (high - low) * (ends[high] - ends[low])
        below = int(percent)
        rest = percent - below
        return self.quantiles[below] * (1 - rest) + self.quantiles[below + 1] * rest

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report, the usual percentiles among them."""
        named = {f"p{p:g}": self.percentile(p) for p in PERCENTILES if p != 100}
        return asdict(self) | named | {"max": self.quantiles[100]}


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRates:
    """Requests per second over fixed windows that follow each other, empty ones included."""

    window_s: int
    p50: float
    p95: float
    p99: float
    max: float

    def scaled(self, factor: float) -> "WindowRates":
        """Every rate times `factor`."""
        return WindowRates(
            window_s=self.window_s,
            p50=self.p50 * factor,
            p95=self.p95 * factor,
            p99=self.p99 * factor,
            max=self.max * factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """A time with clearly more arrivals than the mean rate and chance explain."""

    start_s: float
    length_s: float
    factor: float  # its rate over the mean rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """When requests come. Times are seconds since the first arrival."""

    span_s: float
    rate_rps: float
    by_minute: WindowRates
    by_10s: WindowRates
    iat_cv: float  # of the gaps between arrivals; 1 for Poisson
    bursts: tuple[Burst, ...]  # the strongest, in order of time
    day_shape: tuple[float, ...] | None  # 24 hourly weights of mean 1; None under a day
    series_step_s: float
    series_rps: tuple[float, ...]  # the rate over time, at most 1,440 points

    @property
    def peak_to_mean(self) -> float:
        """The busiest minute over the mean rate."""
        return self.by_minute.max / self.rate_rps

    def scaled(self, factor: float) -> "Arrivals":
        """More (or fewer) of the same users: every rate times `factor`, over the same time."""
        return replace(
            self,
            rate_rps=self.rate_rps * factor,
            by_minute=self.by_minute.scaled(factor),
            by_10s=self.by_10s.scaled(factor),
            series_rps=tuple(rate * factor for rate in self.series_rps),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A workload in numbers. `None` means that the source does not say."""

    source: str
    requests: int
    input: Lengths
    output: Lengths
    total: Lengths
    length_correlation: float  # rank correlation of input and output
    arrivals: Arrivals | None
    sessions: Sessions | None
    tenants: int | None
    tenant_zipf: float | None  # exponent: the k-th largest tenant has a share near k ** -exponent
    priorities: Mapping[int, float]  # share of requests by priority
    reuse: ReuseCurve | None
    notes: tuple[str, ...] = ()  # what reading the source did, in sentences

    def prefill_share(self, *, prefill_tokens_per_s: float, decode_tokens_per_s: float) -> float:
        """Share of machine time that prefill takes, at these rates of one replica."""
        prefill_s = self.input.mean / prefill_tokens_per_s
        return prefill_s / (prefill_s + self.output.mean / decode_tokens_per_s)

    def concurrency(self, *, ttft_s: float, tpot_s: float, rate_rps: float | None = None) -> float:
        """Requests in flight on average (Little): rate times residence.

        A request stays for its first token and then for the tokens after it.
        """
        if rate_rps is None:
            assert self.arrivals is not None, "a workload without arrivals needs a rate"
            rate_rps = self.arrivals.rate_rps
        return rate_rps * (ttft_s + tpot_s * (self.output.mean - 1))

    def at_rate(self, rate_rps: float) -> "Profile":
        """The same workload at another mean rate, with the shape of its load over time.

        A workload without arrivals gets a steady Poisson hour.
        """
        if not 0 < rate_rps < float("inf"):
            raise InputError(f"a rate of {rate_rps} requests/s", hint="a rate is above zero")
        if self.arrivals is None:
            return replace(self, arrivals=poisson_arrivals(rate_rps))
        return replace(self, arrivals=self.arrivals.scaled(rate_rps / self.arrivals.rate_rps))

    @property
    def archetype(self) -> str:
        """chat, rag, code or agent, by median lengths alone: short or long in, short or long out.

        `code` stands for code generation and reasoning, which write more than they read.
        """
        long_input = self.input.percentile(50) >= LONG_INPUT_TOKENS
        long_output = self.output.percentile(50) >= LONG_OUTPUT_TOKENS
        return {
            (False, False): "chat",
            (True, False): "rag",
            (False, True): "code",
            (True, True): "agent",
        }[long_input, long_output]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report or a JSON file."""
        return asdict(self) | {
            "input": self.input.to_dict(),
            "output": self.output.to_dict(),
            "total": self.total.to_dict(),
            "priorities": {str(p): share for p, share in sorted(self.priorities.items())},
            "reuse": self.reuse.to_dict() if self.reuse else None,
            "archetype": self.archetype,
        }


def phase_balance(prefill_share: float) -> str:
    """What limits a workload, from the share of machine time that prefill takes."""
    if prefill_share >= PREFILL_HEAVY:
        return "prefill-heavy"
    return "decode-heavy" if prefill_share <= DECODE_HEAVY else "balanced"


def profile_trace(
    trace: Path | str | Iterable[Request],
    *,
    format: str | None = None,  # noqa: A002  # the word a caller expects
    mapping: Mapping[str, str] | None = None,
    source: str = "requests",
    block_tokens: int = BLOCK_TOKENS,
    has_arrivals: bool = True,
    progress: bool = False,
) -> Profile:
    """The profile of a trace: a file, a reader of one, or requests in order of arrival.

    A file and a `TraceReader` bring their own source, block size and arrivals. Raises
    `TraceError` for a file that cannot be read as a trace, or when there is no request.
    """
    if isinstance(trace, (Path, str)):
        trace = read_trace(trace, format=format, mapping=mapping)
    reader = trace if isinstance(trace, TraceReader) else None
    if reader is not None:
        source, block_tokens = reader.report.path, reader.block_tokens
        has_arrivals = reader.has_arrivals
    arrivals_ns, inputs, outputs = array("q"), array("q"), array("q")
    tenants: Counter[str] = Counter()
    priorities: Counter[int] = Counter()
    reuse = ReuseMeter(block_tokens=block_tokens)
    sessions = SessionMeter(block_tokens=block_tokens)
    for request in _with_progress(trace) if progress else trace:
        arrivals_ns.append(request.arrival_ns)
        inputs.append(request.input_tokens)
        outputs.append(request.output_tokens)
        tenants[request.tenant] += 1
        priorities[request.priority] += 1
        if request.prefix_blocks:
            reuse.add(request.prefix_blocks, request.input_tokens)
        sessions.add(request)
    if not inputs:
        raise TraceError(f"no requests in {source!r}", hint="give a trace with requests in it")
    known_tenants = [n for tenant, n in tenants.most_common() if tenant]
    return Profile(
        source=source,
        requests=len(inputs),
        **_length_facts(inputs, outputs),
        arrivals=_arrivals(arrivals_ns) if has_arrivals else None,
        sessions=sessions.result(),
        tenants=len(known_tenants) or None,
        tenant_zipf=_zipf_exponent(known_tenants),
        priorities={p: n / len(inputs) for p, n in sorted(priorities.items())},
        reuse=reuse.curve(),
        notes=tuple(reader.report.sentences()) if reader else (),
    )


def _with_progress(requests: Iterable[Request]) -> Iterable[Request]:
    """The requests, with a bar on a terminal once it takes more than a second."""
    import sys

    from tqdm import tqdm

    return tqdm(requests, unit=" requests", delay=1, disable=not sys.stderr.isatty(), leave=False)


def _length_facts(inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    import numpy as np

    x, y = np.asarray(inputs), np.asarray(outputs)
    return {
        "input": lengths_of(x),
        "output": lengths_of(y),
        "total": lengths_of(x + y),
        "length_correlation": _rank_correlation(x, y),
    }


def lengths_of(values: "Ints") -> Lengths:
    """The distribution of these token counts."""
    import numpy as np

    *quantiles, p99_9 = np.percentile(values, [*range(101), 99.9]).tolist()
    return Lengths(
        mean=float(values.mean()),
        std=float(values.std()),
        quantiles=tuple(quantiles),
        p99_9=p99_9,
    )


def _rank_correlation(x: "Ints", y: "Ints") -> float:
    """Spearman's, with the mean rank for ties; 0 when either does not vary."""
    import numpy as np

    ranks = []
    for values in (x, y):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[where])
    if min(r.std() for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _arrivals(arrivals_ns: Sequence[int]) -> Arrivals | None:
    """None when every request has one and the same time: that is no arrival process."""
    import numpy as np

    times_ns = np.sort(np.asarray(arrivals_ns))
    seconds = (times_ns - times_ns[0]) / 1e9
    span_s = float(seconds[-1])
    if span_s == 0:
        return None
    gaps = np.diff(seconds)
    counts = _window_counts(seconds, _BURST_WINDOW_S)
    step_s = max(60.0, span_s / _SERIES_POINTS_MAX)
    series = _window_counts(seconds, step_s) / step_s
    rate_rps = len(seconds) / span_s
    return Arrivals(
        span_s=span_s,
        rate_rps=rate_rps,
        by_minute=_window_rates(seconds, 60),
        by_10s=_window_rates(seconds, 10),
        iat_cv=float(gaps.std() / gaps.mean()),
        bursts=_bursts(counts, rate_rps),
        day_shape=_day_shape(seconds) if span_s >= _DAY_S else None,
        series_step_s=step_s,
        series_rps=tuple(np.round(series, 6).tolist()),
    )


def _window_counts(seconds: "Floats", window_s: float) -> "Ints":
    """Arrivals in each whole window; a trace shorter than one window is one window."""
    import numpy as np

    windows = max(1, int(seconds[-1] / window_s))
    index = (seconds / window_s).astype(np.int64)
    return np.bincount(index[index < windows], minlength=windows)


def _window_rates(seconds: "Floats", window_s: int) -> WindowRates:
    import numpy as np

    rates = _window_counts(seconds, window_s) / min(window_s, seconds[-1])
    p50, p95, p99 = np.percentile(rates, [50, 95, 99]).tolist()
    return WindowRates(window_s=window_s, p50=p50, p95=p95, p99=p99, max=float(rates.max()))


def poisson_arrivals(rate_rps: float, *, span_s: float = 3600.0) -> Arrivals:
    """A steady Poisson stream, by the normal law of its counts; nothing is drawn."""

    def windows(window_s: int) -> WindowRates:
        spread = (rate_rps / window_s) ** 0.5
        highest = NormalDist().inv_cdf(1 - 0.5 * window_s / span_s)  # median of the maximum
        return WindowRates(
            window_s=window_s,
            p50=rate_rps,
            p95=rate_rps + 1.645 * spread,
            p99=rate_rps + 2.326 * spread,
            max=rate_rps + highest * spread,
        )

    return Arrivals(
        span_s=span_s,
        rate_rps=rate_rps,
        by_minute=windows(60),
        by_10s=windows(10),
        iat_cv=1.0,
        bursts=(),
        day_shape=None,
        series_step_s=60.0,
        series_rps=(rate_rps,) * int(span_s / 60),
    )


def _bursts(counts: "Ints", rate_rps: float) -> tuple[Burst, ...]:
    """Runs of windows above 1.5 times the mean and above it by four Poisson deviations."""
    import numpy as np

    mean = rate_rps * _BURST_WINDOW_S
    high = counts > max(1.5 * mean, mean + 4 * mean**0.5)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], high.astype(np.int8), [0]])))
    bursts = [
        Burst(
            start_s=float(start * _BURST_WINDOW_S),
            length_s=float((end - start) * _BURST_WINDOW_S),
            factor=float(counts[start:end].mean() / mean),
        )
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]
    strongest = sorted(bursts, key=lambda b: -b.factor)[:_BURSTS_MAX]
    return tuple(sorted(strongest, key=lambda b: b.start_s))


def _day_shape(seconds: "Floats") -> tuple[float, ...]:
    """Arrivals by hour of the trace's own clock, each hour over the time it was observed."""
    import numpy as np

    whole_hours = int(seconds[-1] // 3600)
    by_hour = _window_counts(seconds, 3600)[:whole_hours]
    hour = np.arange(whole_hours) % 24
    rates = np.bincount(hour, weights=by_hour, minlength=24) / np.bincount(hour, minlength=24)
    return tuple((rates / rates.mean()).tolist())


def _zipf_exponent(counts: Sequence[int]) -> float | None:
    """Slope of log count over log rank, by least squares; None under three tenants."""
    import numpy as np

    if len(counts) < 3:
        return None
    slope = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0]
    return float(max(0.0, -slope))


def describe(profile: Profile) -> str:
    """The profile for a terminal, one fact a line; what is unknown says so."""
    rows = [
        ("source", profile.source),
        ("requests", f"{profile.requests:,}"),
        *[(f"{n} tokens", _length_line(getattr(profile, n))) for n in ("input", "output", "total")],
        ("input with output", f"rank correlation {profile.length_correlation:+.2f}"),
        ("looks like", f"{profile.archetype} (by median lengths)"),
        *_arrival_lines(profile.arrivals),
        ("sessions", _session_line(profile.sessions)),
        ("tenants", "unknown" if profile.tenants is None else f"{profile.tenants:,}"),
        ("prefix reuse", _reuse_line(profile.reuse)),
        *[("note", note) for note in profile.notes],
    ]
    return "\n".join(f"{name:<20}{text}" for name, text in rows)


def _length_line(lengths: Lengths) -> str:
    shown = " / ".join(f"{lengths.percentile(p):,.0f}" for p in (50, 95, 99))
    return f"mean {lengths.mean:,.0f}, p50 / p95 / p99 {shown}, max {lengths.quantiles[-1]:,.0f}"


def _arrival_lines(arrivals: Arrivals | None) -> list[tuple[str, str]]:
    if arrivals is None:
        return [("arrivals", "unknown: the trace has no arrival times")]
    minute = arrivals.by_minute
    return [
        (
            "arrivals",
            f"{significant(arrivals.rate_rps)} requests/s over {format_seconds(arrivals.span_s)}",
        ),
        (
            "busiest minutes",
            f"p95 {significant(minute.p95)}, p99 {significant(minute.p99)}, "
            f"max {significant(minute.max)} requests/s ({arrivals.peak_to_mean:.2f} of the mean)",
        ),
        ("gaps", f"CV {arrivals.iat_cv:.2f}, {len(arrivals.bursts)} bursts"),
    ]


def _session_line(sessions: Sessions | None) -> str:
    if sessions is None:
        return "unknown: the trace names none and has no prefix blocks"
    how = "read from prefixes" if sessions.inferred else "named"
    think = (
        ""
        if sessions.think_s_p50 is None
        else f", {format_seconds(sessions.think_s_p50)} between turns (p50)"
    )
    return f"{sessions.count:,} ({how}), {sessions.turns_mean:.2f} turns each{think}"


def _reuse_line(curve: ReuseCurve | None) -> str:
    if curve is None:
        return "unknown: the trace has no prefix blocks"
    sizes = (1e6, 1e7, 1e8)
    shown = ", ".join(f"{curve.hit_rate(s):.1%} at {s / 1e6:g} M tokens" for s in sizes)
    return f"{shown}; {curve.ideal.token_hit_rate:.1%} of prompt tokens at most"
