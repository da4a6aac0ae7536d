"""Pages and pictures as text: an escaped element, and templates that escape.

`planner` draws reports and `server` its dashboard; siblings that may not import each other.
"""

from collections.abc import Callable
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def element(name: str, content: str = "", **attributes: object) -> str:
    """One element: attributes and nothing else are escaped; `content` is markup already.

    `class_` writes `class`, underscores inside names write dashes, floats have one decimal.

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


def templates(package: str, **filters: Callable[..., str]) -> "jinja2.Environment":
    """The templates of `package`; a fact that is missing is an error.

    Everything is escaped but what the filter `svg` marks, which was escaped where it was drawn.
    """
    import jinja2  # off the import path of `tierline --help`
    from markupsafe import Markup

    folder = resources.files(package) / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"svg": Markup, **filters}
    return environment
