"""Plan -> plain text for a terminal: the answer, what could be wrong, and why each step."""

import textwrap
from collections.abc import Iterable, Sequence

from tierline.base.units import format_seconds, format_usd, significant
from tierline.planner.figures import why_not
from tierline.planner.finding import Candidate, Plan, Survival
from tierline.planner.report import mixed_fleet, worth_rows

WIDTH = 96
ALTERNATIVES_MAX = 5


def render_text(plan: Plan) -> str:
    """What `tierline plan` prints."""
    sections = [
        [*_wrap(plan.headline)],
        ["What could be wrong", *_items(plan.caveats)],
        ["Band (the plan buys for the pessimistic edge)", *_band(plan.recommended)],
        ["Why", *_reasons(plan)],
        *([["What survives the replay", *_survival(plan.survival)]] if plan.survival else []),
        ["Alternatives", *_alternatives(plan)],
        ["What changes the answer", *_sensitivities(plan)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if len(lines) > 1 or lines[0]) + "\n"


def _wrap(words: str, indent: str = "", first: str | None = None) -> list[str]:
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _items(lines: Iterable[str]) -> list[str]:
    return [row for line in lines for row in _wrap(line, "    ", "  - ")]


def _band(best: Candidate) -> list[str]:
    head = ("", "GPUs", "$ a year", "requests/s of one", "TTFT p99", "ITL p99")
    rows = [
        (
            edge.name,
            str(edge.gpus),
            _usd(edge.usd_per_year),
            significant(edge.usable_rps),
            format_seconds(edge.point.ttft_s(99)),
            format_seconds(edge.point.itl_s(99)),
        )
        for edge in (best.pessimistic, best.expected, best.optimistic)
    ]
    return _table([head, *rows])


def _reasons(plan: Plan) -> list[str]:
    return [
        row
        for finding in plan.findings
        for row in _wrap(f"{finding.title}: {finding.answer}", " " * 6, f"  {finding.step:>2}  ")
    ]


def _survival(told: Survival) -> list[str]:
    rows = [("smallest fleet with", "instances", "GPUs", "$ a year", "saves", "TTFT p99")]
    for worths in (told.tiers, told.policies):
        rows += [
            (
                row["label"] + " (chosen)" * row["chosen"],
                *(row[name] for name in ("instances", "gpus", "cost", "saved", "ttft")),
            )
            for row in worth_rows(worths)
        ]
    return _table(rows)


def _alternatives(plan: Plan) -> list[str]:
    best = plan.recommended
    others = plan.alternatives[:ALTERNATIVES_MAX]
    rows = [("plan", "GPUs", "$ a year", "TTFT p99", "why not")]
    for candidate in (best, *others):
        edge = candidate.pessimistic
        rows.append(
            (
                candidate.name,
                str(edge.gpus),
                _usd(edge.usd_per_year),
                format_seconds(edge.point.ttft_s(99)),
                "chosen" if candidate is best else why_not(candidate, best),
            )
        )
    rest = len(plan.alternatives) - len(others)
    counted = f"{len(plan.rejected)} configurations were turned down"
    counted += f", {rest} more keep the promises" if rest > 0 else ""
    return [*_table(rows), *_wrap(mixed_fleet(plan), "  "), f"  {counted}."]


def _sensitivities(plan: Plan) -> list[str]:
    rows = [("change", "GPUs", "$ a year", "then")]
    for s in plan.sensitivities:
        gpus = "–" if s.gpus is None else str(s.gpus)
        then = s.recommended if s.changes_choice else "same choice"
        rows.append((f"{s.what} {s.change}", gpus, _usd(s.usd_per_year), then))
    return _table(rows) if len(rows) > 1 else ["  nothing could be varied"]


def _usd(amount: float | None) -> str:
    return "unknown" if amount is None else format_usd(amount)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: words to the left, the numbers between them to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    words = (0, len(widths) - 1) if rows[0][-1] in ("why not", "then") else (0,)
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
