"""Pictures that the server draws itself: memory that fills, and the life of a request.

Inline SVG without a style attribute, so that the pages' content policy can refuse all inline
code, and with words in it, so that no state is told by colour alone.
"""

from collections.abc import Iterable
from html import escape

from tierline.server.life import StepSample

CELLS = 50  # of the memory strip: two per cent each


def element(name: str, content: str = "", **attributes: object) -> str:
    """One element; attributes are escaped, `content` is markup already.

    >>> element("rect", x=1.25, class_="held")
    '<rect x="1.2" class="held"/>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def memory_strip(step: StepSample | None) -> str:
    """KV blocks of the device as fifty cells: held, cached, free; empty before the first step."""
    if step is None:
        held, cached, total = 0, 0, 1
    else:
        total, cached = step.kv_pages, step.kv_pages_cached
        held = total - step.kv_pages_free - cached
    return "".join(_cells(held, cached, total))


def _cells(held: int, cached: int, total: int) -> Iterable[str]:
    """Whatever is held or cached shows at least one cell."""
    held_cells = min(-(-held * CELLS // total), CELLS)
    cached_cells = min(-(-cached * CELLS // total), CELLS - held_cells)
    width, gap = 12, 2
    cells = []
    for i in range(CELLS):
        kind = "held" if i < held_cells else "cached" if i < held_cells + cached_cells else "free"
        cells.append(
            element("rect", x=i * width + 1, y=1, width=width - gap, height=26, rx=1.5, class_=kind)
        )
        if kind == "cached":  # a stripe, for eyes that do not see the colour
            x = i * width + 1
            cells.append(element("path", d=f"M{x} 27L{x + width - gap} 1", class_="stripe"))
    words = (
        f"KV blocks of the device: {held:,} held, {cached:,} cached, {total - held - cached:,} free"
    )
    yield element(
        "svg",
        element("title", words) + "".join(cells),
        viewBox=f"0 0 {CELLS * width} 28",
        class_="strip",
        role="img",
    )
