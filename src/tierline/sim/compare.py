"""Two policies on the same requests: by how much one is better, and how sure that is."""

from dataclasses import dataclass

from tierline.sim.measure import good_requests
from tierline.sim.record import Run

BATCHES = 20
T_95 = 2.093  # Student's t for 19 degrees of freedom, two-sided 95 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference of shares with its 95 % interval."""

    mean: float
    low: float
    high: float


def good_difference(run: Run, other: Run) -> Difference | None:
    """How many more of the requests are good in `run` than in `other`, as a share.

    Both replay one trace, so requests are compared pair by pair.  Neighbours share their
    fate, and so the interval is taken over the means of twenty stretches of the trace and not
    over requests.  None when the traces differ or are too short for that.
    """
    requests = run.requests
    if len(requests) < 2 * BATCHES or requests.arrival_ps != other.requests.arrival_ps:
        return None
    import numpy as np

    gains = good_requests(run).astype(float) - good_requests(other)
    means = np.array([part.mean() for part in np.array_split(gains, BATCHES)])
    mean = float(gains.mean())
    half = T_95 * float(means.std(ddof=1)) / BATCHES**0.5
    return Difference(mean=mean, low=mean - half, high=mean + half)
