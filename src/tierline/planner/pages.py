"""What the HTML pages of the planner share: one template environment, one look.

`report` and `sim_page` render with `render_page`.  Everything is escaped unless it is a
picture, which was escaped where it was drawn.
"""

from collections.abc import Callable
from importlib import resources
from typing import Any


def render_page(name: str, *, filters: dict[str, Callable[..., str]], **facts: Any) -> str:
    """The template `name` of this package filled with facts; a fact that is missing is an error."""
    import jinja2  # off the import path of `tierline --help`
    from markupsafe import Markup

    folder = resources.files("tierline.planner") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"svg": Markup, **filters}
    return environment.get_template(name).render(**facts)
