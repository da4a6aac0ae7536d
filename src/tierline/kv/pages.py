"""How many pages of device memory are free: a count, not a list.

A scheduler must know whether a step fits; it need not know which pages it gets.  Names are
bound by an executor that really holds memory (`kv.names`).

Invariant INV-KV-20: free + held by sequences + held by runs + on their way = total.  The
owners of the parts check it together (`Scheduler.check`).
"""


class Pages:
    """The device pages of one instance, by count."""

    __slots__ = ("free", "total")

    def __init__(self, total: int) -> None:
        assert total > 0
        self.total = self.free = total

    def __repr__(self) -> str:
        return f"Pages({self.free} of {self.total} free)"
