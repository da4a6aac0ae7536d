"""Progress on stderr while something long runs, and none when nobody watches."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Iterable[T], *, what: str, show: bool = True) -> Iterable[T]:
    """`items`, with a bar on stderr when `show` and stderr is a terminal."""
    if not (show and sys.stderr.isatty()):
        return items
    return _bar(items, what)


def _bar(items: Iterable[T], what: str) -> Iterator[T]:
    from tqdm import tqdm

    total = len(items) if isinstance(items, Sized) else None
    yield from tqdm(items, desc=what, total=total, unit=" items", file=sys.stderr, leave=False)
