"""One request's life as a picture and a story: where its time went, why, and beside what.

`stretches` turns events into the parts of a life; `life_view` tells it, and `beside` says who
else was computed meanwhile, from the steps that are still remembered.

    INV-SRV-53  the stretches of a life cover it from its arrival to its end, without a hole
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from tierline.base.clock import PS_PER_S
from tierline.server.dashboard_pictures import beside_columns, life_bar
from tierline.server.dashboard_seen import Seen, mark
from tierline.server.dashboard_words import Shown, counted, number, seconds, sentence, share
from tierline.server.life import Event, Life, StepSample

NAMED_MAX = 5  # others that are called by their number
COLUMNS = 120  # of the picture of what ran beside
WORDS = {
    "queued": "queued",
    "loading": "loaded from a lower tier",
    "prompt": "prompt computed",
    "decode": "generating",
    "preempted": "preempted",
}


class Stretch(NamedTuple):
    """A part of a life."""

    kind: str  # of WORDS
    start_ps: int
    end_ps: int


def stretches(life: Life, now_ps: int) -> list[Stretch]:
    """The parts of a life, one after the other (INV-SRV-53)."""
    end_ps = now_ps if life.finished_ps is None else life.finished_ps
    parts: list[Stretch] = []
    kind, since_ps = "queued", life.arrival_ps

    def turn(into: str, at_ps: int) -> None:
        nonlocal kind, since_ps
        at_ps = min(max(at_ps, since_ps), end_ps)
        if at_ps > since_ps:
            parts.append(Stretch(kind, since_ps, at_ps))
        kind, since_ps = into, at_ps

    for event in life.events:
        if event.kind == "loading" and kind in ("queued", "preempted"):
            turn("loading", event.at_ps)
        elif event.kind == "admitted":
            turn("prompt", event.at_ps)
        elif event.kind == "preempted":
            turn("preempted", event.at_ps)
        elif event.kind == "prefill" and kind == "decode":  # computed again, or a later chunk
            kind, since_ps = _back(parts, since_ps)
        if event.kind == "prefill" and event.until_ps < end_ps and life.first_ps is not None:
            turn("decode", event.until_ps)
    if kind == "prompt" and life.first_ps is not None:  # its last chunks are past EVENTS_MAX
        turn("decode", life.first_ps)
    turn("", end_ps)
    return parts


def _back(parts: list[Stretch], since_ps: int) -> tuple[str, int]:
    """The prompt goes on: the stretch before was not its end."""
    if parts and parts[-1].kind == "prompt":
        last = parts.pop()
        return "prompt", last.start_ps
    return "prompt", since_ps


# --- beside ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What the engine computed for others while a request was here."""

    known: bool  # False: the steps of that time are forgotten
    prompt_tokens: int
    decode_tokens: int
    by_request: tuple[tuple[Life, int], ...]  # prompt tokens of each, the most first
    columns: tuple[tuple[int, int], ...]  # (decodes, prompt tokens) of equal slices of the time


def beside(life: Life, seen: Seen, start_ps: int, end_ps: int) -> Beside:
    """Others' tokens between two instants."""
    lives = {n: other for other in (*seen.past, *seen.live) for n in other.engine_ids}
    chunks: Counter[int] = Counter()
    columns = [[0, 0] for _ in range(COLUMNS)]
    span_ps = max(end_ps - start_ps, 1)
    for step in _between(seen.steps, start_ps, end_ps):
        slot = min(max((step.end_ps - start_ps) * COLUMNS // span_ps, 0), COLUMNS - 1)
        own_decode = life.first_ps is not None and step.start_ps >= life.first_ps
        columns[slot][0] += max(step.decodes - own_decode, 0)
        for request, tokens, _ in step.chunks:
            if request not in life.engine_ids:
                chunks[request] += tokens
                columns[slot][1] += tokens
    named = [(lives[n], tokens) for n, tokens in chunks.most_common() if n in lives]
    return Beside(
        known=bool(seen.steps) and seen.steps[0].start_ps <= start_ps,
        prompt_tokens=sum(chunks.values()),
        decode_tokens=sum(decodes for decodes, _ in columns),
        by_request=tuple(named),
        columns=tuple((decodes, prompt) for decodes, prompt in columns),
    )


def _between(steps: Sequence[StepSample], start_ps: int, end_ps: int) -> Iterable[StepSample]:
    for step in reversed(steps):
        if step.end_ps <= start_ps:
            return
        if step.start_ps < end_ps:
            yield step


# --- words ----------------------------------------------------------------------------------


def life_view(seen: Seen, life: Life) -> dict[str, Any]:
    """Everything that the page of one request shows."""
    parts = stretches(life, seen.now_ps)
    end_ps = parts[-1].end_ps if parts else life.arrival_ps
    waited = beside(life, seen, life.arrival_ps, life.admitted_ps or end_ps)
    whole = beside(life, seen, life.arrival_ps, end_ps)
    totals: Counter[str] = Counter()
    for part in parts:
        totals[part.kind] += part.end_ps - part.start_ps
    return {
        "life": life,
        "mark": mark(seen.place(life.level)),
        "place": seen.place(life.level),
        "answer": _answer(seen, life, waited),
        "bar": life_bar(life, parts, end_ps),
        "parts": [(kind, WORDS[kind], seconds(ps / PS_PER_S)) for kind, ps in totals.items()],
        "beside": beside_columns(whole.columns),
        "beside_known": whole.known,
        "beside_title": _beside_title(whole),
        "others": [(other, tokens) for other, tokens in whole.by_request[:NAMED_MAX]],
        "others_more": max(len(whole.by_request) - NAMED_MAX, 0),
        "gap": _gap(seen, life),
        "events": [_event(life, event) for event in sorted(life.events, key=_at)],
        "facts": _facts(life),
    }


def _answer(seen: Seen, life: Life, waited: Beside) -> str:
    if life.outcome == "refused":
        return sentence([f"turned away at the door: {life.error.replace('_', ' ')}"])
    return sentence([_queued(seen, life, waited), _prompt(life), _first(life), _rest(life)])


def _queued(seen: Seen, life: Life, waited: Beside) -> str:
    until_ps = life.admitted_ps or life.finished_ps or seen.now_ps
    queue_s = (until_ps - life.arrival_ps) / PS_PER_S
    told = f"queued {seconds(queue_s).text}"
    if waited.prompt_tokens:
        behind = counted(len(waited.by_request), "other prompt")
        told += f" while {waited.prompt_tokens:,} tokens of {behind} were computed"
    if life.admitted_ps is None:
        ended = f", and {life.outcome} before it was begun" if life.outcome else " so far"
        why = next((e.why for e in reversed(life.events) if e.kind == "blocked"), "")
        return told + ended + (f" ({why})" if why else "")
    return told


def _prompt(life: Life) -> str:
    chunks = [event for event in life.events if event.kind == "prefill"]
    if not chunks:
        return ""
    computed = sum(event.tokens for event in chunks)
    told = f"{computed:,} prompt tokens computed in {counted(len(chunks), 'chunk')}"
    if life.cached_tokens:
        told += f", {life.cached_tokens:,} of {life.prompt_tokens:,} found cached"
    if life.preemptions:
        told += f", preempted {'once' if life.preemptions == 1 else f'{life.preemptions} times'}"
    return told


def _first(life: Life) -> str:
    if life.ttft_s is None:
        return ""
    told = f"first token after {seconds(life.ttft_s).text}"
    if life.ttft_limit_s is None:
        return told
    limit = seconds(life.ttft_limit_s).text
    kept = life.ttft_s <= life.ttft_limit_s
    return f"{told}, {'within the' if kept else 'later than the'} promised {limit}"


def _rest(life: Life) -> str:
    if life.first_ps is None:
        return ""
    told = counted(life.output_tokens, "token") + (" so far" if not life.outcome else "")
    if life.tpot_s is not None:
        told += f" at {seconds(life.tpot_s).text} each"
        longest_s = life.gap_longest_ps / PS_PER_S
        told += f", the longest gap {seconds(longest_s).text}"
        if life.itl_limit_s is not None:
            kept = "within" if longest_s <= life.itl_limit_s else "over"
            told += f" ({kept} the promised {seconds(life.itl_limit_s).text})"
    return told


def _gap(seen: Seen, life: Life) -> str:
    """What the longest gap between its tokens was spent on, where the steps are remembered."""
    if life.first_ps is None or life.last_ps is None or not life.gaps:
        return ""
    steps = list(_between(seen.steps, life.first_ps, life.last_ps + 1))[::-1]
    if len(steps) < 2 or steps[0].start_ps > life.first_ps:
        return ""
    before, longest = max(pairwise(steps), key=lambda pair: pair[1].end_ps - pair[0].end_ps)
    gap_s = (longest.end_ps - before.end_ps) / PS_PER_S
    took_s = (longest.end_ps - longest.start_ps) / PS_PER_S
    told = f"Its longest gap was step {longest.number:,}: {seconds(gap_s).text}"
    if gap_s - took_s > took_s:
        return f"{told}, of which {seconds(gap_s - took_s).text} between two steps."
    if not longest.prefill_tokens:
        return f"{told}, with {counted(longest.decodes, 'sequence')} generating and no prompt."
    prompts = counted(len(longest.chunks), "prompt")
    return (
        f"{told}, in which {longest.prefill_tokens:,} tokens of {prompts} were computed beside"
        f" {counted(longest.decodes, 'generating sequence')}."
    )


def _beside_title(found: Beside) -> str:
    if not (found.prompt_tokens or found.decode_tokens):
        return "Nobody else was computed meanwhile"
    prompts = f"{found.prompt_tokens:,} prompt tokens of {counted(len(found.by_request), 'other')}"
    return f"Meanwhile {prompts} were computed, and {found.decode_tokens:,} generated for others"


def _at(event: Event) -> int:
    """Prefills are told when they end, by when they began."""
    return event.at_ps


def _event(life: Life, event: Event) -> dict[str, Any]:
    return {
        "kind": event.kind,
        "after": seconds((event.at_ps - life.arrival_ps) / PS_PER_S),
        "took": seconds((event.until_ps - event.at_ps) / PS_PER_S)
        if event.until_ps > event.at_ps
        else Shown(""),
        "tokens": f"{event.tokens:,}" if event.tokens else "",
        "why": event.why,
    }


def _facts(life: Life) -> list[tuple[str, Shown]]:
    found = [
        ("endpoint", Shown(life.endpoint + (", streamed" if life.stream else ""))),
        ("class", Shown(f"{life.level} (priority {life.priority})")),
        ("tenant", Shown(life.tenant or "none")),
        ("prompt", number(life.prompt_tokens, "tokens")),
        ("of it cached", share(life.cached_tokens, life.prompt_tokens)),
        ("from tier", Shown(life.tier or "none")),
        ("generated", Shown(f"{life.output_tokens:,} of at most {life.output_tokens_max:,}")),
        ("answers asked for", number(life.answers)),
        ("temperature", number(life.temperature)),
        ("time queued", seconds(life.queue_s)),
        ("TTFT", seconds(life.ttft_s)),
        ("mean gap (TPOT)", seconds(life.tpot_s)),
        ("whole time", seconds(life.e2e_s)),
    ]
    for name, text in (
        ("key", life.key_id),
        ("bounded by", life.structured),
        ("tools offered", str(life.tools) if life.tools else ""),
        ("trace", life.trace_id),
        ("error", life.error if life.outcome in ("error", "cancelled", "stalled", "late") else ""),
    ):
        if text:
            found.append((name, Shown(text)))
    return found
