"""Multi-turn structure: how many turns a session has, and how long people think between them.

The profile feeds every request. Sessions named in the trace are taken as they are. Otherwise
they are read from prefix blocks: a request continues an earlier one when its prompt begins with
all full blocks of that earlier prompt. The last block of a prompt is mostly part full and changes
when the conversation goes on, which is why it does not count; and prompts of a single full block
are no evidence, since a shared system prompt looks the same.
"""

from array import array
from dataclasses import dataclass
from typing import Any

from tierline.workload.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Turns and think times. A think time is from one arrival to the next of its session."""

    count: int
    inferred: bool  # from prefix blocks, not named by the trace
    turns_mean: float
    turns_p95: float
    multi_turn_share: float  # of requests, those in sessions of two turns or more
    think_s_p50: float | None  # None without a second turn
    think_s_p95: float | None


class SessionMeter:
    """Follows sessions through a trace, in order of arrival."""

    def __init__(self, *, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._turns = array("q")
        self._last_ns = array("q")
        self._think_ns = array("q")
        self._by_key: dict[Any, int] = {}  # session name, or last full block -> session number
        self._named = False
        self._known = False

    def add(self, request: Request) -> None:
        """One request; the first that names a session settles that sessions are named."""
        if request.session:
            self._named = self._known = True
            self._turn(request, self._by_key.get(request.session), request.session)
        elif request.prefix_blocks and not self._named:
            self._known = True
            full = min(request.input_tokens // self._block_tokens, len(request.prefix_blocks))
            found = None
            for block in reversed(request.prefix_blocks[1:full]):
                if (found := self._by_key.get(block)) is not None:
                    break
            self._turn(request, found, request.prefix_blocks[full - 1] if full > 1 else None)

    def _turn(self, request: Request, session: int | None, key: Any) -> None:
        if session is None:
            session = len(self._turns)
            self._turns.append(0)
            self._last_ns.append(request.arrival_ns)
        else:
            self._think_ns.append(max(0, request.arrival_ns - self._last_ns[session]))
        self._turns[session] += 1
        self._last_ns[session] = request.arrival_ns
        if key is not None:
            self._by_key[key] = session

    def result(self) -> Sessions | None:
        """None when the trace names no session and no blocks."""
        import numpy as np

        if not self._known:
            return None
        turns = np.asarray(self._turns)
        think_s = np.asarray(self._think_ns) / 1e9
        p50, p95 = np.percentile(think_s, [50, 95]).tolist() if len(think_s) else (None, None)
        return Sessions(
            count=len(turns),
            inferred=not self._named,
            turns_mean=float(turns.mean()),
            turns_p95=float(np.percentile(turns, 95)),
            multi_turn_share=float(turns[turns > 1].sum() / turns.sum()),
            think_s_p50=p50,
            think_s_p95=p95,
        )
