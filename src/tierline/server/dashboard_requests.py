"""The table of requests: who is here, who was, how each fared.

Live ones first, then the past ones, the latest to come first; every row links to its life.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any
from urllib.parse import quote

from tierline.base.clock import PS_PER_S
from tierline.server.dashboard_life import Stretch, stretches
from tierline.server.dashboard_pictures import life_bar
from tierline.server.dashboard_seen import Seen, mark
from tierline.server.dashboard_words import NOTHING, Shown, counted, number, seconds, sentence
from tierline.server.life import OUTCOMES, Life

ROWS_MAX = 100
SHOWS = ("all", "live", "past", "late", "failed")
FAILED = ("error", "refused", "late", "stalled", "cancelled")


def requests_view(seen: Seen, *, show: str, level: str) -> dict[str, Any]:
    """The rows to show, and what there is in all."""
    lives = [*_latest_first(seen.live), *_latest_first(seen.past)]
    chosen = [life for life in lives if _wanted(life, show) and level in ("", life.level)]
    rows = chosen[:ROWS_MAX]
    longest_ps = max((_end_ps(life, seen) - life.arrival_ps for life in rows), default=0)
    return {
        "answer": _answer(seen),
        "rows": [_row(life, seen, longest_ps) for life in rows],
        "more": len(chosen) - len(rows),
        "scale": seconds(longest_ps / PS_PER_S),
        "any": bool(lives),
    }


def _latest_first(lives: Iterable[Life]) -> list[Life]:
    return sorted(lives, key=attrgetter("arrival_ps"), reverse=True)


def _wanted(life: Life, show: str) -> bool:
    if show == "live":
        return not life.outcome
    if show == "past":
        return bool(life.outcome)
    if show == "late":
        return _late(life)
    return show != "failed" or life.outcome in FAILED


def _late(life: Life) -> bool:
    return None not in (life.ttft_s, life.ttft_limit_s) and life.ttft_s > life.ttft_limit_s  # type: ignore[operator]


def _end_ps(life: Life, seen: Seen) -> int:
    return seen.now_ps if life.finished_ps is None else life.finished_ps


def _answer(seen: Seen) -> str:
    if not seen.live and not seen.past:
        return "No request has come since the start."
    waiting = sum(life.state == "waiting" for life in seen.live)
    here = f"{counted(len(seen.live), 'request')} here" if seen.live else "Nobody is here"
    here += f", {waiting:,} of them waiting" if waiting else ""
    failed = sum(life.outcome in FAILED for life in seen.past)
    late = sum(map(_late, seen.past))
    ended = (
        f"of the last {counted(len(seen.past), 'request')}, {late or 'none'} had a late first token"
    )
    return sentence([here, f"{ended} and {failed or 'none'} broke off" if seen.past else ""])


def _row(life: Life, seen: Seen, longest_ps: int) -> dict[str, Any]:
    end_ps = _end_ps(life, seen)
    late, parts = _late(life), stretches(life, seen.now_ps)
    return {
        "id": life.id,
        "href": f"/dashboard/requests/{quote(life.id, safe='')}",
        "arrived_s": life.arrived_s,
        "level": life.level,
        "place": seen.place(life.level),
        "mark": mark(seen.place(life.level)),
        "state": _state(life, parts),
        "sign": _sign(life),
        "prompt": number(life.prompt_tokens),
        "cached": number(life.cached_tokens),
        "output": number(life.output_tokens),
        "queue": seconds(life.queue_s),
        "ttft": seconds(life.ttft_s),
        "late": late,
        "tpot": seconds(life.tpot_s),
        "gap": seconds(life.gap_longest_ps / PS_PER_S) if life.gaps else Shown(NOTHING),
        "bar": life_bar(life, parts, end_ps, scale_ps=longest_ps, small=True),
        "why": _why(life),
    }


def _state(life: Life, parts: Sequence[Stretch]) -> str:
    gave_way = not life.outcome and parts and parts[-1].kind == "preempted"
    return "preempted" if gave_way else life.state


def _sign(life: Life) -> str:
    if not life.outcome:
        return "…"
    return "✗" if life.outcome in FAILED else "✓"


def _why(life: Life) -> str:
    """The last reason that anybody gave."""
    if life.outcome in FAILED and life.error:
        return life.error
    said: Sequence[str] = [
        event.why
        for event in life.events
        if event.why and event.kind in ("blocked", "stepped back", "preempted")
    ]
    return said[-1] if said else ""


assert set(FAILED) < set(OUTCOMES)
