"""A summary as tables for a terminal: the answer, latencies, classes, promises, the fleet.

`tierline sim` prints these. Everything shown is a field of the summary; `--json` has them all.
"""

from collections.abc import Sequence

from tierline.base.units import format_bytes, format_seconds, format_usd, significant
from tierline.sim.measure import Group, Spread, Summary

ROWS_MAX = 12  # tenants shown; the rest is counted
LATENCY_NAMES = (
    ("ttft", "time to first token"),
    ("itl", "longest gap between tokens"),
    ("tpot", "time per output token"),
    ("e2e", "end to end"),
    ("queueing", "queued"),
)


def render(summary: Summary) -> str:
    """One run."""
    sections = [
        [headline(summary)],
        ["Latency", *table_lines([_LATENCY_HEAD, *_latencies(summary.all)])],
        ["Classes", *_groups(summary.levels)] if len(summary.levels) > 1 else [],
        ["Promises", *_promises(summary)],
        ["Tenants", *_groups(summary.tenants)] if summary.fairness.tenants > 1 else [],
        ["Fleet", *_fleet(summary)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def headline(summary: Summary) -> str:
    """What became of the requests, as a sentence with numbers."""
    everyone, fleet = summary.all, summary.fleet
    lost = [
        f"{count:,} {what}"
        for what, count in (
            ("refused", everyone.refused),
            ("failed", everyone.failed),
            ("left unfinished", everyone.unfinished),
        )
        if count
    ]
    late = sum(not promise.kept for promise in summary.promises)
    promised = len(summary.promises)
    kept = f"{promised - late} of {promised} promises kept" if promised else "nothing was promised"
    replicas = f"{fleet.replicas} replica{'s' * (fleet.replicas != 1)}"
    return (
        f"{summary.policy}: {everyone.good_share:.1%} of {everyone.requests:,} requests are good "
        f"({significant(everyone.goodput_rps)}/s on {replicas} in "
        f"{format_seconds(summary.duration_s)}), {kept}"
        f"{'; ' + ', '.join(lost) if lost else ''}."
    )


def compare(summaries: Sequence[Summary]) -> str:
    """Policies side by side, and their good requests by class."""
    head = ("policy", "good", "goodput/s", "TTFT p50", "TTFT p99", "ITL p99", "TPOT p99", "E2E p99")
    rows = [
        (
            s.policy,
            f"{s.all.good_share:.1%}",
            significant(s.all.goodput_rps),
            _seconds(s.all.ttft.p50_s),
            _seconds(s.all.ttft.p99_s),
            _seconds(s.all.itl.p99_s),
            _seconds(s.all.tpot.p99_s),
            _seconds(s.all.e2e.p99_s),
        )
        for s in summaries
    ]
    names = [group.name for group in summaries[0].levels]
    shares = [(s.policy, *(f"{group.good_share:.1%}" for group in s.levels)) for s in summaries]
    lines = ["Policies", *table_lines([head, *rows])]
    if len(names) > 1:
        lines += ["", "Good requests by class", *table_lines([("policy", *names), *shares])]
    return "\n".join(lines) + "\n"


# --- sections -------------------------------------------------------------------------------

_LATENCY_HEAD = ("", "requests", "mean", "p50", "p90", "p95", "p99")


def _latencies(group: Group) -> list[tuple[str, ...]]:
    spreads: list[tuple[str, Spread]] = [(words, getattr(group, n)) for n, words in LATENCY_NAMES]
    return [
        (words, f"{s.requests:,}", *map(_seconds, (s.mean_s, s.p50_s, s.p90_s, s.p95_s, s.p99_s)))
        for words, s in spreads
    ]


def _groups(groups: Sequence[Group]) -> list[str]:
    head = ("", "requests", "good", "goodput/s", "TTFT p50", "TTFT p99", "ITL p99", "E2E p99")
    shown = [group for group in groups if group.requests]
    rows = [
        (
            g.name or "(none)",
            f"{g.requests:,}",
            f"{g.good_share:.1%}",
            significant(g.goodput_rps),
            _seconds(g.ttft.p50_s),
            _seconds(g.ttft.p99_s),
            _seconds(g.itl.p99_s),
            _seconds(g.e2e.p99_s),
        )
        for g in shown[:ROWS_MAX]
    ]
    more = [f"  and {len(shown) - ROWS_MAX} more"] if len(shown) > ROWS_MAX else []
    return [*table_lines([head, *rows]), *more]


def _promises(summary: Summary) -> list[str]:
    if not summary.promises:
        return ["  none: give service levels in the deployment"]
    rows = [
        (
            p.level,
            p.target,
            "kept" if p.kept else "BROKEN",
            "not served" if p.value_s is None else _seconds(p.value_s),
            f"{p.met_share:.1%} of {p.of}",
        )
        for p in summary.promises
    ]
    return table_lines([("", "promise", "", "it is", "within"), *rows])


def _fleet(summary: Summary) -> list[str]:
    fleet, fairness, money = summary.fleet, summary.fairness, summary.money
    hits = [f"{name} {share:.1%}" for name, share in fleet.hit_share.items() if share]
    moved = [f"{kind} {format_bytes(count)}" for kind, count in fleet.moved_bytes.items() if count]
    evicted = [f"{name} {count:,}" for name, count in fleet.evicted_blocks.items() if count]
    rows = [
        (
            "in steps",
            f"{fleet.utilization:.1%} of the time paid for "
            f"(replicas: {fleet.utilization_least:.1%} to {fleet.utilization_most:.1%})",
        ),
        ("prompt tokens found", ", ".join(hits) or "none"),
        ("moved", ", ".join(moved) or "nothing"),
        ("evicted blocks", ", ".join(evicted) or "none"),
        ("preemptions", f"{fleet.preemptions:,}"),
        ("cost", _cost(money.usd, money.usd_per_million_output_tokens, money.usd_per_good_request)),
        ("run", f"hash {summary.hash}, seed {summary.seed}, {fleet.gpu_hours:.4g} GPU-hours"),
    ]
    if fairness.jain is not None and fairness.lag_tokens is not None:
        words = f"Jain index {fairness.jain:.3f}, a waiting tenant fell at most"
        rows.append(("fairness", f"{words} {fairness.lag_tokens:,.0f} tokens behind another"))
    if summary.fleet_events:
        words = "times something broke or was mended, or a replica came or went"
        rows.append(("events", f"{summary.fleet_events} {words}"))
    width = max(len(name) for name, _ in rows)
    return [f"  {name.ljust(width)}  {words}" for name, words in rows]


def _cost(usd: float | None, per_million: float | None, per_good: float | None) -> str:
    if usd is None:
        return "unknown: the accelerator has no price"
    million = "–" if per_million is None else format_usd(per_million)
    good = "–" if per_good is None else format_usd(per_good * 1000)
    return f"{format_usd(usd)}; {million} a million output tokens, {good} a thousand good requests"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else format_seconds(seconds)


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, words to the left and numbers to the right."""
    widths = [max(len(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
