"""Names a person types: find the one that was meant, or say which are near.

A silent default for an unknown name is how a plan for one GPU gets priced on
another, so an unknown name is always an error that carries the nearest known ones.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from tierline.base.errors import InputError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """The `count` known names most like `name`, best first; empty when none is alike.

    >>> nearest("h100-smx", ["h100-sxm", "h200", "mi300x"])[0]
    'h100-sxm'
    """
    by_folded = {k.casefold(): k for k in known}
    hits = difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.4)
    inside = [k for k in by_folded if name.casefold() in k and k not in hits]
    return [by_folded[k] for k in (hits + inside)[:count]]


def lookup(
    kind: str,
    name: str,
    known: Mapping[str, T],
    *,
    error: type[InputError] = InputError,
    way_out: str = "",
) -> T:
    """`known[name]`, or an error that names the nearest names (all of them when they are few).

    `way_out` says what else the caller may do, for example pass a file instead.
    """
    if name in known:
        return known[name]
    near = nearest(name, known)
    names = sorted(known) if len(known) <= 8 or not near else near
    label = "did you mean" if names is near else "known"
    hint = f"{label}: {', '.join(names)}" + (f"; {way_out}" if way_out else "")
    raise error(f"unknown {kind} {name!r}", hint=hint)


def reject_unknown_keys(
    where: str,
    given: Iterable[str],
    known: Iterable[str],
    *,
    error: type[InputError] = InputError,
) -> None:
    """Raise for the first key of `given` that is not in `known`, naming the nearest known key."""
    known_keys = list(known)
    for key in given:
        if key not in known_keys:
            near = nearest(key, known_keys, count=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise error(
                f"{where}: unknown key {key!r}",
                hint=f"{meant}known keys: {', '.join(sorted(known_keys))}",
            )
