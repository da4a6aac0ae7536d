"""Why one request took as long as it did: every wait, what ended it, what was chosen and why.

`tierline explain` prints this of a run that watched the request.  What the scheduler saw
comes from the moments; who else was there, and who made room, from the columns of all
requests, so that a wait has names and not just a length.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tierline.base.clock import PS_PER_NS, PS_PER_S
from tierline.base.errors import InputError
from tierline.base.units import format_seconds
from tierline.sim.life import KINDS, Stretch, beside, life
from tierline.sim.measure import promised_ps
from tierline.sim.record import FINISHED, OUTCOMES, Moment, Run
from tierline.sim.text import table_lines

LETTERS = {"queued": ".", "loading": "~", "prefill": "#", "preempted": "!", "decode": "="}
BAR_WIDTH = 72
WAITS_TOLD = 5
NAMED_MAX = 5  # requests called by their number in one sentence
WAITS = ("queued", "loading", "preempted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of its life."""

    kind: str
    after_s: float  # since it arrived
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A stretch in which nothing was computed for it."""

    kind: str
    after_s: float  # since it arrived
    for_s: float
    ahead: tuple[int, ...]  # requests that were served on its replica meanwhile, in their turn
    ended_by: tuple[int, ...]  # requests that left at the instant at which the wait ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Moments of one kind in a row."""

    after_s: float
    what: str
    why: str  # of the first
    times: int
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One limit of its class and what became of it."""

    target: str
    limit_s: float
    value_s: float | None
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The life of one request, told."""

    request: int
    level: str
    tenant: str
    replica: int | None
    outcome: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    total_s: float
    seconds: dict[str, float]  # by kind of stretch
    parts: tuple[Part, ...]
    verdicts: tuple[Verdict, ...]
    waits: tuple[Wait, ...]
    happenings: tuple[Happening, ...]

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


def explain(run: Run, request: int) -> Explanation:
    """The life of `request` in a run that watched it."""
    requests = run.requests
    if not 0 <= request < len(requests):
        raise InputError(
            f"there is no request {request}",
            hint=f"requests are numbered in order of arrival, 0 to {len(requests) - 1}",
        )
    stretches = life(run, request)
    spent = {k: sum(s.end_ps - s.start_ps for s in stretches if s.kind == k) for k in KINDS}
    replica = requests.replica[request]
    return Explanation(
        request=request,
        level=run.levels[requests.level[request]].name if run.levels else "",
        tenant=run.tenants[requests.tenant[request]],
        replica=replica if replica >= 0 else None,
        outcome=OUTCOMES[requests.outcome[request]],
        input_tokens=requests.input_tokens[request],
        output_tokens=requests.output_tokens[request],
        cached_tokens=requests.cached_tokens[request],
        preemptions=requests.preemptions[request],
        total_s=sum(spent.values()) / PS_PER_S,
        seconds={kind: ps / PS_PER_S for kind, ps in spent.items() if ps},
        parts=tuple(_part(s, requests.arrival_ps[request]) for s in stretches),
        verdicts=_verdicts(run, request),
        waits=tuple(_wait(run, request, s) for s in stretches if s.kind in WAITS),
        happenings=_happenings(run.moments.get(request, ()), requests.arrival_ps[request]),
    )


def _part(stretch: Stretch, arrival_ps: int) -> Part:
    return Part(
        kind=stretch.kind,
        after_s=(stretch.start_ps - arrival_ps) / PS_PER_S,
        for_s=(stretch.end_ps - stretch.start_ps) / PS_PER_S,
    )


def _verdicts(run: Run, request: int) -> tuple[Verdict, ...]:
    targets = run.levels[run.requests.level[request]].targets if run.levels else ()
    values = promised_ps(run.requests)
    finished = run.requests.outcome[request] == FINISHED
    return tuple(
        Verdict(
            target=target.text,
            limit_s=target.limit_s,
            value_s=int(values[target.metric][request]) / PS_PER_S if finished else None,
            kept=bool(values[target.metric][request] <= target.limit_ns * PS_PER_NS),
        )
        for target in targets
    )


def _wait(run: Run, request: int, stretch: Stretch) -> Wait:
    requests = run.requests
    ahead = beside(
        run, request, start_ps=stretch.start_ps, end_ps=stretch.end_ps, most=len(requests)
    )
    ended_by = [other for other in ahead if requests.finish_ps[other] == stretch.end_ps]
    return Wait(
        kind=stretch.kind,
        after_s=(stretch.start_ps - requests.arrival_ps[request]) / PS_PER_S,
        for_s=(stretch.end_ps - stretch.start_ps) / PS_PER_S,
        ahead=tuple(ahead),
        ended_by=tuple(ended_by),
    )


def _happenings(moments: Sequence[Moment], arrival_ps: int) -> tuple[Happening, ...]:
    """Moments that repeat the one before them are told once, with how often."""
    told: list[Happening] = []
    for moment in moments:
        after_s, times = (moment.at_ps - arrival_ps) / PS_PER_S, 1
        began_s, why = after_s, moment.why
        if told and told[-1].what == moment.what:
            same = told.pop()
            began_s, why, times = same.after_s, same.why, same.times + 1
        told.append(
            Happening(after_s=began_s, what=moment.what, why=why, times=times, until_s=after_s)
        )
    return tuple(told)


# --- text -----------------------------------------------------------------------------------


def render_explanation(told: Explanation) -> str:
    """What a person reads."""
    sections = [
        [_headline(told)],
        _bar(told),
        ["Promises", *_promises(told)] if told.verdicts else [],
        ["Waits", *_waits(told)] if told.waits else [],
        ["What happened", *_timeline(told)] if told.happenings else [],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _headline(told: Explanation) -> str:
    who = ", ".join(word for word in (told.level, told.tenant) if word)
    parts = [f"{format_seconds(s)} {kind}" for kind, s in told.seconds.items()]
    where = "" if told.replica is None else f" on replica {told.replica}"
    cached = f", {told.cached_tokens:,} of them cached" if told.cached_tokens else ""
    return (
        f"Request {told.request} ({who}; {told.input_tokens:,} tokens in{cached}, "
        f"{told.output_tokens:,} out) {told.outcome} after {format_seconds(told.total_s)}{where}: "
        f"{', '.join(parts) or 'it never waited nor ran'}."
    )


def _bar(told: Explanation) -> list[str]:
    """The life as one line of characters, a letter for each kind."""
    if not told.total_s:
        return []
    cells = [
        LETTERS[part.kind] * max(round(part.for_s / told.total_s * BAR_WIDTH), 1)
        for part in told.parts
    ]
    legend = "  ".join(f"{LETTERS[kind]} {kind}" for kind in told.seconds)
    return [f"  [{''.join(cells)}]", f"   {legend}"]


def _promises(told: Explanation) -> list[str]:
    rows = [
        (
            v.target,
            "not served" if v.value_s is None else format_seconds(v.value_s),
            "kept" if v.kept else "BROKEN",
        )
        for v in told.verdicts
    ]
    return table_lines([("promise", "it was", ""), *rows])


def _waits(told: Explanation) -> list[str]:
    """The longest waits, in order of time."""
    ranked = sorted(told.waits, key=lambda wait: -wait.for_s)
    shown, rest = ranked[:WAITS_TOLD], ranked[WAITS_TOLD:]
    lines = [line for wait in told.waits if wait in shown for line in _told(wait)]
    if rest:
        seconds = format_seconds(sum(wait.for_s for wait in rest))
        lines.append(f"  and {len(rest)} shorter ones, {seconds} in all")
    return lines


def _told(wait: Wait) -> list[str]:
    lines = [f"  {wait.kind} {format_seconds(wait.for_s)}, {format_seconds(wait.after_s)} in"]
    if wait.ahead:
        lines.append(f"    served meanwhile: {_names(wait.ahead)}")
    if wait.ended_by:
        lines.append(f"    it ended when {_names(wait.ended_by)} finished and left its memory")
    return lines


def _names(requests: Sequence[int]) -> str:
    shown = ", ".join(str(request) for request in requests[:NAMED_MAX])
    more = len(requests) - NAMED_MAX
    return f"request{'s' * (len(requests) != 1)} {shown}" + (
        f" and {more} more" if more > 0 else ""
    )


def _timeline(told: Explanation) -> list[str]:
    lines = []
    for h in told.happenings:
        what = f"{h.what} ×{h.times:,}" if h.times > 1 else h.what
        until = f" (the first; until {format_seconds(h.until_s)})" if h.times > 1 else ""
        lines.append(f"  {format_seconds(h.after_s):>9}  {what:<16} {h.why}{until}".rstrip())
    return lines
