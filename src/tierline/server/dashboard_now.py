"""What the Now page says: the answer first, then every class, the steps, the memory.

`now_view` is made once a second while anybody watches, and once for the page itself; what it
returns is plain JSON.  `said` goes into the places of the page by name, `parts` are pictures
drawn here, `series` are numbers for the plots.

    INV-SRV-50  what a page says when it is loaded is what it is told live: both are one view
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from tierline.base.clock import PS_PER_MS, PS_PER_S
from tierline.server.dashboard_pictures import memory_strip
from tierline.server.dashboard_seen import Seen, mark
from tierline.server.dashboard_words import (
    NOTHING,
    Shown,
    ago,
    counted,
    duration,
    number,
    quantile,
    seconds,
    sentence,
    share,
)
from tierline.server.life import Life, StepSample
from tierline.server.recorder import WINDOW_S
from tierline.workload.slo import ServiceLevel

RATE_S = 10  # tokens/s are of this long
RATES_S = 120  # and drawn for this long
STEPS_DRAWN = 150
POINTS_DRAWN = 300
PERCENTILES = (0.5, 0.95, 0.99)


def now_view(seen: Seen) -> dict[str, Any]:
    """Everything the Now page shows, for the page and for its updates."""
    recent = seen.recent()
    steps = _drawn(seen.steps)
    said = _rates(seen) | _memory(seen) | _cache(recent) | _queue(seen)
    for level in seen.levels:
        said |= _class(seen, level, [life for life in recent if life.level == level.name])
    said["answer"] = Shown(_answer(seen, recent, said))
    said["steps-title"] = Shown(_steps_title(seen, steps))
    said["ttft-title"] = Shown(_ttft_title(recent))
    said["rates-title"] = Shown(_rates_title(said))
    return {
        "state": seen.state,
        "said": {place: list(shown) for place, shown in said.items()},
        "parts": {"memory": memory_strip(seen.steps[-1] if seen.steps else None)},
        "series": {
            "steps": _steps_series(seen, steps),
            "rates": _rates_series(seen),
            "ttft": _ttft_series(seen, recent),
        },
    }


# --- the answer -----------------------------------------------------------------------------


def _answer(seen: Seen, recent: Sequence[Life], said: dict[str, Shown]) -> str:
    waiting = [life for life in seen.live if life.state == "waiting"]
    if seen.live:
        served = counted(len(seen.live) - len(waiting), "request")
        doing = f"{said['output-rate'].text} tokens/s to {served}"
        if waiting:
            oldest_s = (seen.now_ps - min(life.arrival_ps for life in waiting)) / PS_PER_S
            doing += (
                f", {counted(len(waiting), 'waits', 'wait')}, the longest for {duration(oldest_s)}"
            )
        return sentence([doing, _promises(seen, recent), _memory_clause(seen)])
    if recent:
        ended_ps = max(life.finished_ps or 0 for life in recent)
        idle = f"idle: the last request ended {ago((seen.now_ps - ended_ps) / PS_PER_S)}"
        came = f"{counted(len(recent), 'request')} in {_window()}"
        return sentence([idle, came, _promises(seen, recent)])
    if seen.past:
        return sentence([f"idle: no request in {_window()}", f"{len(seen.past):,} before that"])
    return sentence([f"{seen.state} and idle: no request has come since the start"])


def _window() -> str:
    return f"the last {WINDOW_S / 60:.0f} min"


def _promises(seen: Seen, recent: Sequence[Life]) -> str:
    """Which class breaks what, or that none does."""
    broken, promised = [], 0
    for level in seen.levels:
        values = ttfts(recent, level.name)
        for metric, found in (("ttft", values), ("itl", None)):
            for target in level.targets:
                if target.metric != metric:
                    continue
                rank = f"{metric.upper()} p{target.percentile:g}"
                if found is None:
                    value = _gap(seen, level.name, target.percentile)
                else:
                    value = quantile(found, target.percentile / 100)
                if value is None:
                    continue
                promised += 1
                if value > target.limit_s:
                    over = f"{seconds(value).text}, over its {seconds(target.limit_s).text}"
                    broken.append(f"{level.name} {rank} is {over}")
    if broken:
        return ", ".join(broken)
    return "every promise is kept" if promised else ""


def _memory_clause(seen: Seen) -> str:
    if not seen.steps:
        return ""
    last = seen.steps[-1]
    held = last.kv_pages - last.kv_pages_free - last.kv_pages_cached
    return f"{share(held, last.kv_pages).text} of the KV cache is held"


# --- classes --------------------------------------------------------------------------------


def _class(seen: Seen, level: ServiceLevel, recent: Sequence[Life]) -> dict[str, Shown]:
    """A row of the table of classes."""
    name = level.name
    live = [life for life in seen.live if life.level == name]
    waits, gaps = ttfts(recent, name), seen.gaps_s.get(name) or (None, None, None)
    said = {
        f"{name} waiting": number(sum(life.state == "waiting" for life in live)),
        f"{name} running": number(sum(life.state != "waiting" for life in live)),
        f"{name} requests": number(len(recent)),
        f"{name} mark": Shown(mark(seen.place(name))),
    }
    for metric, values in (
        ("ttft", [quantile(waits, p) for p in PERCENTILES]),
        ("itl", list(gaps)),
    ):
        for p, value in zip(PERCENTILES, values, strict=True):
            said[f"{name} {metric} p{p * 100:g}"] = seconds(value)
        said[f"{name} {metric} kept"] = _kept(
            level, metric, dict(zip(PERCENTILES, values, strict=True))
        )
    return said


def _kept(level: ServiceLevel, metric: str, found: dict[float, float | None]) -> Shown:
    """A promise and whether it is kept, in words."""
    target = next((t for t in level.targets if t.metric == metric), None)
    if target is None:
        return Shown("nothing promised")
    promise = f"p{target.percentile:g} ≤ {seconds(target.limit_s).text}"
    value = found.get(target.percentile / 100)
    if value is None:
        return Shown(promise)
    verdict = "✓ kept" if value <= target.limit_s else "✗ broken"
    return Shown(f"{verdict}: {promise}", f"{value:.6f} s against {target.limit_s:g} s")


def ttfts(recent: Sequence[Life], level: str) -> list[float]:
    """Sorted seconds to the first token of a class's requests."""
    return sorted(life.ttft_s for life in recent if life.level == level and life.ttft_s is not None)


def _gap(seen: Seen, level: str, percentile: float) -> float | None:
    known = dict(zip(PERCENTILES, seen.gaps_s.get(level, ()), strict=False))
    return known.get(percentile / 100)


# --- numbers --------------------------------------------------------------------------------


def _rates(seen: Seen) -> dict[str, Shown]:
    since_ps = seen.now_ps - RATE_S * PS_PER_S
    last = list(takewhile(lambda step: step.end_ps >= since_ps, reversed(seen.steps)))
    return {
        "output-rate": number(round(sum(map(_output, last)) / RATE_S, 1)),
        "prompt-rate": number(round(sum(s.prefill_tokens for s in last) / RATE_S, 1)),
    }


def _output(step: StepSample) -> int:
    """Tokens generated: one a decode, and the first of every prompt that ended."""
    if not step.notes:
        return step.decodes
    return step.decodes + len([1 for note in step.notes if note.what == "first token"])


def _memory(seen: Seen) -> dict[str, Shown]:
    if not seen.steps:
        return {"kv-held": Shown(NOTHING), "kv-cached": Shown(NOTHING), "kv-free": Shown(NOTHING)}
    last = seen.steps[-1]
    held = last.kv_pages - last.kv_pages_free - last.kv_pages_cached
    return {
        "kv-held": share(held, last.kv_pages),
        "kv-cached": share(last.kv_pages_cached, last.kv_pages),
        "kv-free": share(last.kv_pages_free, last.kv_pages),
    }


def _cache(recent: Sequence[Life]) -> dict[str, Shown]:
    begun = [life for life in recent if life.admitted_ps is not None]
    asked = sum(life.prompt_tokens for life in begun)
    return {"hit-rate": share(sum(life.cached_tokens for life in begun), asked)}


def _queue(seen: Seen) -> dict[str, Shown]:
    waiting = sum(life.state == "waiting" for life in seen.live)
    return {
        "waiting": number(waiting),
        "running": number(len(seen.live) - waiting),
    }


# --- titles that say what their picture shows ------------------------------------------------


def _drawn(steps: Sequence[StepSample]) -> list[StepSample]:
    last: list[StepSample] = []
    for step in reversed(steps):
        if len(last) == STEPS_DRAWN:
            break
        last.append(step)
    return last[::-1]


def _step_s(step: StepSample) -> float:
    return (step.end_ps - step.start_ps) / PS_PER_S


def _strictest(seen: Seen) -> tuple[str, float] | None:
    """The class with the shortest promised gap between tokens, and that gap."""
    limits = [(level.limit_s("itl"), level.name) for level in seen.levels]
    promised = [(limit_s, name) for limit_s, name in limits if limit_s is not None]
    return (min(promised)[1], min(promised)[0]) if promised else None


def _steps_title(seen: Seen, steps: Sequence[StepSample]) -> str:
    if not steps:
        return "No step yet: the first request makes the first one"
    median_s = quantile(sorted(map(_step_s, steps)), 0.5)
    told = f"The last {counted(len(steps), 'step')} took {seconds(median_s).text} at the median"
    strictest = _strictest(seen)
    if strictest is None:
        return told
    name, limit_s = strictest
    over = sum(_step_s(step) > limit_s for step in steps)
    return f"{told}; {over or 'none'} longer than the {seconds(limit_s).text} ITL of {name}"


def _ttft_title(recent: Sequence[Life]) -> str:
    begun = [life for life in recent if life.ttft_s is not None]
    if not begun:
        return f"No first token in {_window()}"
    limited = [life for life in begun if life.ttft_limit_s is not None]
    late = sum(1 for life in limited if (life.ttft_s or 0) > (life.ttft_limit_s or 0))
    told = f"{counted(len(begun), 'first token')} in {_window()}"
    if not limited:
        return f"{told}, none of them promised by a time"
    return f"{told}: {late or 'none'} of {len(limited)} came later than promised"


def _rates_title(said: dict[str, Shown]) -> str:
    output, prompt = said["output-rate"].text, said["prompt-rate"].text
    return f"{output} tokens/s generated, {prompt} of prompts computed, over the last {RATE_S} s"


# --- series ---------------------------------------------------------------------------------


def _steps_series(seen: Seen, steps: Sequence[StepSample]) -> dict[str, Any]:
    """Columns: number, decode tokens, decode and prefill tokens, milliseconds."""
    strictest = _strictest(seen)
    return {
        "columns": [
            [step.number for step in steps],
            [step.decodes for step in steps],
            [step.decodes + step.prefill_tokens for step in steps],
            [round((step.end_ps - step.start_ps) / PS_PER_MS, 3) for step in steps],
        ],
        "limit_ms": None if strictest is None else strictest[1] * 1000,
        "limit_of": "" if strictest is None else strictest[0],
    }


def _rates_series(seen: Seen) -> dict[str, Any]:
    """Columns: Unix second, tokens generated in it, prompt tokens computed in it."""
    output, prompt = [0] * (RATES_S + 1), [0] * (RATES_S + 1)
    now = int(seen.now_s)
    first_ps = seen.now_ps - round((seen.now_s - now + RATES_S) * PS_PER_S)
    for step in reversed(seen.steps):
        second = (step.end_ps - first_ps) // PS_PER_S
        if second < 0:
            break
        output[second] += _output(step)
        prompt[second] += step.prefill_tokens
    # The second under way is left out: it would always look like a drop.
    return {"columns": [list(range(now - RATES_S, now)), output[:-1], prompt[:-1]]}


def _ttft_series(seen: Seen, recent: Sequence[Life]) -> dict[str, Any]:
    """Unix seconds of first tokens, and of each class its TTFT in seconds there."""
    begun = sorted(
        (life for life in recent if life.first_ps is not None), key=lambda life: life.first_ps or 0
    )[-POINTS_DRAWN:]
    offset_s = seen.now_s - seen.now_ps / PS_PER_S
    names = [level.name for level in seen.levels]
    at_s = [round((life.first_ps or 0) / PS_PER_S + offset_s, 3) for life in begun]
    return {
        "columns": [
            at_s,
            *(
                [round(life.ttft_s or 0, 6) if life.level == name else None for life in begun]
                for name in names
            ),
        ],
        "names": names,
        "marks": [mark(i) for i in range(len(names))],
        "limits_s": [level.limit_s("ttft") for level in seen.levels],
        "now_s": seen.now_s,
        "window_s": WINDOW_S,
    }
