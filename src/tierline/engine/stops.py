"""Stop strings in text that arrives piece by piece.

`engine` feeds every new piece of an output's text to its `StopChecker` and shows the user what
comes back.  Held back is only text that could still be the beginning of a stop string, so a
reader waits for nothing that is already certain.

All stop strings are one automaton (Aho and Corasick 1975): a character costs the same with ten
thousand of them, and however the text is cut into pieces, the answer is the same.  Of several
matches the one that ends first counts, and of those that end together the longest.

Invariants
    INV-ENG-23  what was emitted is the text up to the first stop string, however it was cut
    INV-ENG-24  nothing is held back that cannot become a stop string
"""

from collections.abc import Sequence


class StopChecker:
    """One output's watch for stop strings. `include`: the stop string itself is emitted, too.

    Text that must not be checked (the first `min_tokens` tokens) is simply not fed.
    """

    __slots__ = ("_automaton", "_held", "_include", "_state", "stopped")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), "an empty stop string"
        self._automaton = _Automaton(stops)
        self._include = include
        self._state = 0
        self._held = ""
        self.stopped: str | None = None  # the stop string that ended the output

    def feed(self, piece: str) -> str:
        """Take the next piece of text; returns what may be shown now. Nothing after a stop."""
        if self.stopped is not None:
            return ""
        automaton, state = self._automaton, self._state
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            state = automaton.follow(state, character)
            length = automaton.ends[state]
            if length:
                self.stopped = text[end - length : end]
                self._state, self._held = 0, ""
                return text[: end if self._include else end - length]
        certain = len(text) - automaton.depths[state]
        self._state, self._held = state, text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The output ended otherwise: the text that was held back."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """States are beginnings of stop strings; state 0 is the empty one."""

    __slots__ = ("_fallbacks", "_next", "depths", "ends")

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: dict[tuple[int, str], int] = {}
        self.depths = [0]  # characters of the beginning
        self.ends = [0]  # characters of the longest stop string that ends here, or 0
        for stop in stops:
            self._add(stop)
        self._fallbacks = [0] * len(self.depths)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            found = self._next.setdefault((state, character), len(self.depths))
            if found == len(self.depths):
                self.depths.append(depth)
                self.ends.append(0)
            state = found
        self.ends[state] = len(stop)

    def _link(self) -> None:
        """The longest other beginning that a state ends with; shorter states come first."""
        edges = sorted(self._next.items(), key=lambda edge: self.depths[edge[1]])
        for (parent, character), state in edges:
            if parent:
                self._fallbacks[state] = self.follow(self._fallbacks[parent], character)
            self.ends[state] = self.ends[state] or self.ends[self._fallbacks[state]]

    def follow(self, state: int, character: str) -> int:
        """The state after one more character."""
        found = self._next.get((state, character))
        while found is None and state:
            state = self._fallbacks[state]
            found = self._next.get((state, character))
        return found or 0
