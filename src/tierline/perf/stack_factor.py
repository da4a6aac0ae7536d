"""What a few measured points of a stack say about all its other points.

A stack (model, accelerator, engine, version, precision) is faster or slower than the law by
a factor that is nearly the same at every load: kernels, launch settings and speculation that
no label mentions. `calibrate` and the accuracy page call this; TPOT and TTFT have a factor
each, because queueing enters the second and hardly the first.

The factor is the median of the points' log ratios, shrunk towards 1 as n / (n + 0.7): one
point is trusted by 59 %, three by 81 %. A median, because one odd run must not decide.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SHRINK_POINTS = 0.7  # variance of a point over variance among stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class StackFactor:
    """How much longer than the law's a stack's times are; 1 where nothing was measured."""

    tpot: float = 1.0
    ttft: float = 1.0
    points: int = 0


def shrunk_factor(ratios: Sequence[float]) -> float:
    """The factor that `ratios` of measured over predicted time support.

    >>> [round(shrunk_factor([2.0] * n), 2) for n in (0, 1, 3, 100)]
    [1.0, 1.5, 1.75, 1.99]
    """
    if not ratios:
        return 1.0
    centre = statistics.median(math.log(ratio) for ratio in ratios)
    return math.exp(centre * len(ratios) / (len(ratios) + SHRINK_POINTS))


def stack_factor(*, tpot: Sequence[float], ttft: Sequence[float]) -> StackFactor:
    """The factors of a stack from measured over predicted TPOT and TTFT of its points."""
    return StackFactor(
        tpot=shrunk_factor(tpot), ttft=shrunk_factor(ttft), points=max(len(tpot), len(ttft))
    )
