"""Plan it, run it, prove it: production LLM serving, from a trace to a fleet one can defend."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierline.planner.api import plan as plan

__all__ = ["plan"]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `import tierline` stays instant."""
    if name == "plan":
        from tierline.planner.api import plan

        return plan
    raise AttributeError(f"module 'tierline' has no attribute {name!r}")
