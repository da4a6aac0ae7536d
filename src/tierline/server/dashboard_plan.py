"""What was promised of this machine beside what it does, and what another one would do.

The Plan page shows `Running` (what `serve` printed) beside the live steps and requests; its form
becomes a `whatif.Change`, and `whatif_view` lays the three sides next to each other.
"""

from collections.abc import Sequence
from typing import Any

from tierline.base.units import format_bytes, format_seconds, significant
from tierline.server.dashboard_now import PERCENTILES, ttfts
from tierline.server.dashboard_pictures import curve_picture, shares_picture
from tierline.server.dashboard_seen import Seen, mark
from tierline.server.dashboard_words import Shown, counted, number, quantile, seconds, share
from tierline.server.prediction import StepFit, step_fit
from tierline.server.recorder import WINDOW_S
from tierline.server.replay import Fared, Side
from tierline.server.running import Forecast, Running, headline
from tierline.server.whatif import WhatIf

FIELDS = (
    ("load", "load, times as recorded", "1"),
    ("chunk_tokens", "chunk, tokens of one prompt in a step", ""),
    ("batch_tokens", "tokens of one step", ""),
    ("sequences_max", "sequences at once", ""),
    ("device_kv_bytes", "KV on the device", ""),
    ("dram_bytes", "KV tier in DRAM", "none"),
    ("nvme_bytes", "KV tier on NVMe", "none"),
)


def plan_view(seen: Seen, running: Running) -> dict[str, Any]:
    """Predicted against measured, now."""
    fit = step_fit(seen.steps, running)
    recent = seen.recent()
    here = running.here
    level = running.level(here.level)
    waited = ttfts(recent, level.name)
    rate = seen.request_rate
    measured_s = quantile(waited, 0.99)
    return {
        "answer": f"{headline(here)} {fit.sentence}",
        "reason": fit.reason,
        "rows": _beside(seen, running, fit, rate),
        "curve": curve_picture(
            [(point.rps, point.ttft_p50_s, point.ttft_p99_s) for point in here.curve],
            limit_s=level.limit_s("ttft"),
            usable_rps=here.usable_rps,
            measured=(rate, measured_s) if measured_s else None,
        ),
        "curve_title": _curve_title(here, level.limit_s("ttft"), rate),
        "facts": _facts(running),
        "warnings": running.warnings,
        "evidence": (
            f"{here.source} ({here.kind}): eight in ten steps take {here.low:.2f} to"
            f" {here.high:.2f} times what is predicted"
        ),
        "plan": running.plan,
        "planned": headline(running.planned) if running.planned else "",
        "fields": _fields(running),
        "replayable": sum(life.first_ps is not None for life in seen.past),
    }


def _curve_title(here: Forecast, limit_s: float | None, rate: float) -> str:
    if here.usable_rps is None:
        told = f"The promises of {here.level} do not hold at any load that was tried"
    elif limit_s is None:
        told = f"{here.level} is promised nothing, so any load will do"
    else:
        told = f"{here.level} keeps its promises up to {significant(here.usable_rps, 2)} requests/s"
    return f"{told} (predicted); now {significant(rate, 2)}"


def _beside(seen: Seen, running: Running, fit: StepFit, rate: float) -> list[dict[str, Any]]:
    """Rows of predicted, measured, and their ratio, each of the same thing."""
    rows = [
        _fit_row(name, ratio)
        for name, ratio in (
            ("a step, all of them", fit.all),
            ("a step without prompt tokens", fit.decode),
            ("a step with prompt tokens", fit.mixed),
        )
    ]
    here = running.here
    usable = here.usable_rps
    rows.append(
        {
            "what": f"load: requests/s that keep the promises of {here.level}; those that came,"
            f" last {WINDOW_S / 60:.0f} min",
            "predicted": number(usable and round(usable, 3)),
            "measured": number(round(rate, 3)),
            "ratio": share(round(rate, 3), round(usable, 3)) if usable else Shown("–"),
        }
    )
    for level in seen.levels:
        for metric, found in (("ttft", ttfts(seen.recent(), level.name)), ("itl", None)):
            target = next((t for t in level.targets if t.metric == metric), None)
            if target is None:
                continue
            if found is None:
                known = dict(zip(PERCENTILES, seen.gaps_s.get(level.name, ()), strict=False))
                value = known.get(target.percentile / 100)
            else:
                value = quantile(found, target.percentile / 100)
            kept = "" if value is None else "✓ kept" if value <= target.limit_s else "✗ broken"
            rows.append(
                {
                    "what": f"{mark(seen.place(level.name))} {level.name}: {metric.upper()}"
                    f" p{target.percentile:g}, promised and measured",
                    "predicted": seconds(target.limit_s),
                    "measured": seconds(value),
                    "ratio": Shown(kept),
                }
            )
    return rows


def _fit_row(name: str, ratio: Any) -> dict[str, Any]:
    if ratio is None:
        nothing = Shown("–")
        return {"what": name, "predicted": nothing, "measured": nothing, "ratio": nothing}
    told = f"{ratio.p50:.2f} × (p10–p90 {ratio.p10:.2f}–{ratio.p90:.2f})"
    return {
        "what": f"{name}: mean of the last {counted(ratio.steps, 'one')}",
        "predicted": seconds(ratio.predicted_s / ratio.steps),
        "measured": seconds(ratio.measured_s / ratio.steps),
        "ratio": Shown(told),
    }


def _facts(running: Running) -> list[tuple[str, str]]:
    limits, here = running.limits, running.here
    alone = f"{format_seconds(here.ttft_s)} for a prompt of {here.prompt_tokens:,} tokens, alone"
    gaps = ", ".join(f"{format_seconds(s)} with {n} generating" for n, s in here.itl_s)
    fits = here.prompt_tokens + here.output_tokens
    return [
        ("model", f"{running.model}, {running.architecture}, {running.dtype}"),
        ("runs on", f"{here.machine} ({running.device}); kernels: {running.kernels}"),
        ("policy", running.policy),
        (
            "limits",
            f"{limits.sequences_max} sequences, {limits.batch_tokens:,} tokens a step, chunks of"
            f" {limits.chunk_tokens:,}",
        ),
        ("fits at once", f"{running.sequences_fit} sequences of {fits:,} tokens"),
        ("longest prompt", f"{running.prompt_longest_tokens:,} tokens"),
        ("TTFT, predicted", alone),
        ("ITL, predicted", gaps),
    ]


def _fields(running: Running) -> list[tuple[str, str, str]]:
    """(name, label, what it is now) of each field of the form."""
    limits = running.limits
    now = {
        "chunk_tokens": f"{limits.chunk_tokens}",
        "batch_tokens": f"{limits.batch_tokens}",
        "sequences_max": f"{limits.sequences_max}",
        "device_kv_bytes": format_bytes(running.rooms[0].bytes),
    }
    return [(name, label, now.get(name, default)) for name, label, default in FIELDS]


# --- what if --------------------------------------------------------------------------------


def whatif_view(answer: WhatIf) -> dict[str, Any]:
    """Three sides, next to each other: measured, simulated as it is, simulated with the change."""
    sides = (answer.measured, answer.before, answer.after)
    names = [fared.name for fared in answer.before.levels]
    groups: list[tuple[str, list[Fared | None]]] = [("all", [side.all for side in sides])]
    if len(names) > 1:
        groups += [(name, [_of(side, name) for side in sides]) for name in names]
    pictures = [
        (
            title,
            shares_picture(
                {
                    "measured": answer.measured.curves.get(key, ()),
                    "simulated as it is": answer.before.curves.get(key, ()),
                    "with the change": answer.after.curves.get(key, ()),
                }
            ),
        )
        for key, title in (
            ("ttft", "Share of requests with their first token within"),
            ("itl", "Share of gaps between tokens within"),
        )
    ]
    return {
        "answer": answer,
        "groups": [(name, _rows(group)) for name, group in groups],
        "whole": _whole(sides),
        "pictures": pictures,
    }


def _of(side: Side, name: str) -> Fared | None:
    return next((fared for fared in side.levels if fared.name == name), None)


def _rows(group: Sequence[Fared | None]) -> list[tuple[str, list[Shown]]]:
    told = []
    for label, metric, which in (
        ("TTFT p50", "ttft", "p50_s"),
        ("TTFT p99", "ttft", "p99_s"),
        ("ITL p50", "itl", "p50_s"),
        ("ITL p99", "itl", "p99_s"),
        ("whole time p50", "e2e", "p50_s"),
    ):
        told.append(
            (label, [seconds(getattr(getattr(f, metric), which) if f else None) for f in group])
        )
    told.append(("within every promise", [_percent(f.good_share if f else None) for f in group]))
    told.append(("goodput, requests/s", [number(f.goodput_rps if f else None) for f in group]))
    return told


def _whole(sides: Sequence[Side]) -> list[tuple[str, list[Shown]]]:
    return [
        ("prompt tokens found on the device", [_percent(side.hit_share) for side in sides]),
        ("found in a lower tier", [_percent(side.hit_below) for side in sides]),
        ("preemptions", [number(side.preemptions) for side in sides]),
        ("of the time in steps", [_percent(side.utilization) for side in sides]),
    ]


def _percent(value: float | None) -> Shown:
    return Shown("–") if value is None else Shown(f"{value:.1%}", f"{value:.6f}")
