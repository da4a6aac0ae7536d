"""What the HTML pages of the planner share: one template environment, one look.

`report` and `sim_page` render with `render_page`.  Everything is escaped unless it is a
picture, which was escaped where it was drawn.
"""

from collections.abc import Callable
from typing import Any

from tierline.base.markup import templates


def render_page(name: str, *, filters: dict[str, Callable[..., str]], **facts: Any) -> str:
    """The template `name` of this package filled with facts; a fact that is missing is an error."""
    return templates("tierline.planner", **filters).get_template(name).render(**facts)
