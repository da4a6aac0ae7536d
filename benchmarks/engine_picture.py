"""The figures of `bench_engine` as bars: one group for each metric, one bar for each engine."""

from collections.abc import Mapping
from typing import Any

from tierline.planner.svg import WIDTH, box, element, line, svg, text

ROW, GAP, LABELS, VALUES = 16, 26, 76, 132
TITLES = {
    "decode": "One request, tokens/s after the first",
    "prefill": "A prompt of 1,024 tokens, tokens/s",
    "concurrent": "16 requests at once, output tokens/s",
    "shared_prefix": "32 requests that share 1,024 tokens, seconds (less is better)",
}
STYLE = """
text{font:11px system-ui,sans-serif;fill:#333}.head{font-weight:600}.value{fill:#666}
.own{fill:#0b7285}.peer{fill:#ced4da}.range{stroke:#495057;stroke-width:1}
@media(prefers-color-scheme:dark){text{fill:#ddd}.value{fill:#aaa}.peer{fill:#495057}
.range{stroke:#ced4da}}
"""


def picture(models: Mapping[str, Any]) -> str:
    """An SVG of medians, the lines inside the bars from the least to the greatest sample."""
    parts: list[str] = [element("style", STYLE)]
    y = 12.0
    for model in models.values():
        for metric, engines in model["results"].items():
            parts.append(text(4, y, f"{model['title']}: {TITLES[metric]}", class_="head"))
            most = max(figures["max"] for figures in engines.values())
            for name, figures in engines.items():
                parts += _bar(y, name, figures, most)
                y += ROW
            y += GAP
    return svg(parts, label="engines compared", height=y)


def _bar(y: float, name: str, figures: Mapping[str, Any], most: float) -> list[str]:
    scale = (WIDTH - LABELS - VALUES) / most
    low, high = (LABELS + figures[end] * scale for end in ("min", "max"))
    middle = y + 6 + ROW / 2
    value, share = figures["median"], figures.get("share")
    words = f"{value:.{1 if value < 1000 else 0}f}"
    words += f"  ({share['median']:.0%} of bandwidth)" if share else ""
    kind = "own" if name == "tierline" else "peer"
    return [
        text(4, middle + 4, name),
        box(LABELS, middle - 5, value * scale, 10, kind, tip=f"{name}: {words}"),
        line(low, middle, high, middle, "range"),
        text(high + 6, middle + 4, words, class_="value"),
    ]
