"""Progress on stderr while something long runs, and none when nobody watches."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
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


@contextmanager
def progress_bar(
    total: int, *, what: str, unit: str = " requests", show: bool = True
) -> Iterator[Callable[[int], None] | None]:
    """For work that counts by itself: call what this gives with how many more are done.

    None when nobody watches, so that the work need not count.
    """
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, file=sys.stderr, leave=False) as bar:

        def done(count: int) -> None:
            bar.update(count)

        yield done
