"""Whether tenants were treated alike, from what each was served and when each waited.

`measure.summary` calls `fairness`.  Two numbers, because one is not enough: Jain's index
compares what tenants got in all, and says nothing of a tenant that was served everything an
hour late; the lag looks only at stretches of time in which two tenants both waited, where
whatever one got ahead the other was denied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tierline.sim.columns import Column, column
from tierline.sim.record import REFUSED, Requests, Run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Changes: TypeAlias = "tuple[Column, Column, npt.NDArray[np.float64]]"

COMPARED_MAX = 8  # tenants whose pairs are compared for the lag: those that were served most


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """How alike tenants fared; None with fewer than two of them."""

    tenants: int
    jain: float | None  # 1: equal tokens per weight; 1/n: one tenant got all
    lag_tokens: float | None  # the most that one waiting tenant fell behind another


def fairness(run: Run, weights: Mapping[str, float]) -> Fairness:
    """Served tokens of the tenants, each divided by its weight (1 when not named)."""
    import numpy as np

    shares = np.array([weights.get(name, 1.0) for name in run.tenants])
    tenant = column(run.requests, "tenant")
    served = np.bincount(tenant, served_tokens(run.requests), minlength=len(shares)) / shares
    present = np.flatnonzero(np.bincount(tenant, minlength=len(shares)))
    amounts = served[present]
    if len(amounts) < 2 or not amounts.any():
        return Fairness(tenants=len(amounts), jain=None, lag_tokens=None)
    jain = float(amounts.sum() ** 2 / (len(amounts) * (amounts**2).sum()))
    most = sorted(present.tolist(), key=lambda i: (-served[i], i))[:COMPARED_MAX]
    changes = [_changes(run.requests, i, float(shares[i])) for i in most]
    lag = max(_lag(a, b) for i, a in enumerate(changes) for b in changes[i + 1 :])
    return Fairness(tenants=len(amounts), jain=jain, lag_tokens=lag)


def served_tokens(requests: Requests) -> Column:
    """Tokens each request got: its prompt with the first token, its output with the last."""
    import numpy as np

    prompt = np.where(column(requests, "first_ps") >= 0, column(requests, "input_tokens"), 0)
    output = np.where(column(requests, "finish_ps") >= 0, column(requests, "output_tokens"), 0)
    return prompt + output


def _changes(requests: Requests, tenant: int, weight: float) -> Changes:
    """Instants, and by how much a tenant's queue and its weighted service change there."""
    import numpy as np

    mine = column(requests, "tenant") == tenant
    names = ("arrival_ps", "admitted_ps", "first_ps", "finish_ps", "input_tokens", "output_tokens")
    arrival, admitted, first, finish, prompt, output = (column(requests, n)[mine] for n in names)
    refused = column(requests, "outcome")[mine] == REFUSED
    queued = ~(refused & (admitted < 0))  # who was turned away did not wait
    one, none = np.ones_like(arrival), np.zeros_like(arrival)
    parts = (
        (queued, arrival, one, none),
        (admitted >= 0, admitted, -one, none),
        (first >= 0, first, none, prompt / weight),
        (finish >= 0, finish, none, output / weight),
    )
    at, queue, tokens = (np.concatenate([p[i][p[0]] for p in parts]) for i in (1, 2, 3))
    return at, queue, tokens


def _lag(a: Changes, b: Changes) -> float:
    """The largest change of one tenant's lead over another while both have somebody waiting.

    A stretch runs from the instant at which both begin to wait to the one at which either
    stops; all that happens at one instant is taken together.
    """
    import numpy as np

    at = np.concatenate([a[0], b[0]])
    order = np.argsort(at, kind="stable")
    settled = np.append(np.diff(at[order]) > 0, True)
    waits_a = np.cumsum(np.append(a[1], np.zeros_like(b[1]))[order])[settled] > 0
    waits_b = np.cumsum(np.append(np.zeros_like(a[1]), b[1])[order])[settled] > 0
    lead = np.cumsum(np.append(a[2], -b[2])[order])[settled]
    both = np.concatenate([[False], waits_a & waits_b])
    turns = np.flatnonzero(both[1:] != both[:-1])  # begin, end, begin, end, ...
    turns = np.append(turns, len(lead) - 1) if len(turns) % 2 else turns
    stretches = zip(turns[::2].tolist(), turns[1::2].tolist(), strict=True)
    return max((float(np.ptp(lead[i : j + 1])) for i, j in stretches), default=0.0)
