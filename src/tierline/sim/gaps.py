"""How long streams paused between two tokens, over all gaps and not over requests.

`workload.slo` promises ITL of *one gap*: a percentile over all gaps of a class.  The longest
gap of a request, which `measure` tells, is another figure: with a thousand tokens a request
nearly everybody meets the slowest percent of gaps once.  The planner judges by these.

All sequences of a replica that decode get their tokens at the same instants, so gaps are
counted per step event and class instead of per token: who decodes during an event is known
from when requests got their first and their last token, since a stream joins and leaves at
the end of an event only.  Right for policies that mix prompts into steps with decodes.

    INV-SIM-30  gaps of all requests = tokens after their first ones, when nobody was preempted
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierline.sim.columns import Column, column
from tierline.sim.record import FINISHED, Run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Gaps between two tokens of some streams: so many of each length, in order of length."""

    gap_ps: Column
    counts: Column

    @property
    def total(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    def percentile_ps(self, percent: float) -> int:
        """The shortest gap that `percent` of the gaps do not exceed; 0 when there is none."""
        import numpy as np

        if not len(self.counts):
            return 0
        ahead = np.cumsum(self.counts)
        at = int(np.searchsorted(ahead, percent * float(ahead[-1]) / 100 - 1e-6))
        return int(self.gap_ps[min(at, len(ahead) - 1)])

    def within_share(self, limit_ps: int) -> float:
        """Share of the gaps that are no longer than the limit; 1 when there is none."""
        total = self.total
        return float(self.counts[self.gap_ps <= limit_ps].sum()) / total if total else 1.0


def gaps_of(
    run: Run, members: "npt.NDArray[np.bool_]", *, host_ps: int = 0, mixes: bool = True
) -> Gaps:
    """All gaps between tokens of the finished requests in `members`.

    The run must have kept its steps.  `host_ps` is what the replicas add to the instants that
    requests remember (`Instance.host_s`).  A pause by preemption counts as one gap.  Without
    `mixes` streams stand still while prompts are computed.
    """
    import numpy as np

    assert run.steps is not None, "gaps need the steps of the run"
    steps = {name: column(run.steps, name) for name in ("start_ps", "end_ps", "repeats")}
    decodes, of = column(run.steps, "decodes"), column(run.steps, "replica")
    requests = run.requests
    streamed = members & (column(requests, "outcome") == FINISHED)
    streamed &= column(requests, "output_tokens") > 1
    first, last = (column(requests, name) - host_ps for name in ("first_ps", "finish_ps"))
    served = column(requests, "replica")
    lengths, counts = [], []
    for number in np.unique(served[streamed]).tolist():
        mine = np.flatnonzero((of == number) & ((decodes > 0) | mixes))
        start, end, repeats = (steps[n][mine] for n in ("start_ps", "end_ps", "repeats"))
        here = streamed & (served == number)
        change = np.zeros(len(mine) + 1, dtype=np.int64)
        np.add.at(change, np.searchsorted(end, first[here], side="right"), 1)
        np.add.at(change, np.searchsorted(end, last[here], side="right"), -1)
        members_now = np.cumsum(change[:-1])
        each = (end - start) // repeats
        stood = start - np.concatenate([start[:1], end[:-1]])  # since the step before
        lengths += [each, each + np.maximum(stood, 0)]
        counts += [members_now * (repeats - 1), members_now]
    paused = streamed & (column(requests, "preemptions") > 0)
    lengths.append(column(requests, "itl_max_ps")[paused])
    counts.append(np.ones(int(paused.sum()), dtype=np.int64))
    gap_ps, count = np.concatenate(lengths), np.concatenate(counts)
    order = np.argsort(gap_ps, kind="stable")
    some = count[order] > 0
    return Gaps(gap_ps=gap_ps[order][some], counts=count[order][some])
