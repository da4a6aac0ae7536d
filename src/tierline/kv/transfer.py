"""Bytes on their way from one tier of memory to another.

`kv` and `scheduling` decide transfers; an executor carries them over `kv.link` and says
when they landed.  A transfer ends exactly once, done or cancelled.
"""

from typing import Any

DEVICE, DRAM, NVME, REMOTE = range(4)
TIER_NAMES = ("device", "dram", "nvme", "remote")

# Classes of urgency: somebody waits for it, somebody will, memory wants to be tidy.
DEMAND, PREFETCH, BACKGROUND = range(3)


class Transfer:
    """One object (or several that travel together) moving between two tiers."""

    __slots__ = (
        "blocks",
        "bytes",
        "kind",
        "runs",
        "serial",
        "source",
        "state",
        "target",
        "urgency",
        "waiters",
    )

    def __init__(
        self,
        kind: str,
        *,
        source: int,
        target: int,
        bytes: int = 0,  # noqa: A002
        blocks: int = 0,
        urgency: tuple[int, int] = (BACKGROUND, 0),
        serial: int = 0,
    ) -> None:
        self.kind = (
            kind  # load, prefetch, back, demote, swap-out, swap-in, handover, adapter, model
        )
        self.source = source
        self.target = target
        self.bytes = bytes
        self.blocks = blocks
        self.urgency = urgency  # (class, key of whoever waits): smaller goes first
        self.serial = serial  # order of decision: the last tie-break
        self.state = "queued"  # queued, moving, done, cancelled
        self.runs: list[Any] = []  # prefix runs it carries; grows when one is split under way
        self.waiters: list[Any] = []  # sequences that cannot go on before it lands

    def __repr__(self) -> str:
        way = f"{TIER_NAMES[self.source]}->{TIER_NAMES[self.target]}"
        return f"Transfer({self.kind} {way}, {self.bytes} bytes, {self.state})"
