"""The way out of a grammar: tokens that complete an answer before its budget ends.

`grammar.Matcher` asks for it when few tokens are left.  A grammar library says what may come
next and nothing of how far the end is, so the end is looked for: copies of the matcher are
advanced a token at a time, level by level, and the first level on which one of them accepts is
the length of the way.  What makes that cheap: a copy, a token and a mask cost microseconds; of
what may come next only what can lead out is tried (closing quotes before the content they would
enclose); and copies on one level that allow the same tokens inside the same brackets, and are
forced to say the same, are one.

That last step and the width of the search make the way short, not shortest.  What is found is
always a way: each of its tokens was accepted, and an accepting state stands at its end.

Copying and taking a token hold the interpreter's lock, for microseconds each; a mask does not.
A search asks before every copy whether it is `late`, so its time is bounded whatever the grammar.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BEAM = 12  # copies kept on a level
NODES_MAX = 1_500  # copies that one search makes: some 30 ms
FEW = 64  # as many allowed tokens are all tried

Words = NDArray[np.uint32]  # a mask, one bit a token
_CLOSING = ('"', "}", "]", '"}', '"]', "}}", "]}", "]]", '"}}', '"}]', '""', "[]", "{}")
_JOINING = (":", ",", '":', '":"', '","', "null", "true", "false")
_LENGTHS = (2, 4, 8, 16)  # of words that fill a text with a least length


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a text stands among the brackets and quotes of JSON."""

    open: str = ""  # brackets opened and not closed, as far as they were looked at
    closed: int = 0  # brackets closed that were opened before that
    in_string: bool = False
    escaped: bool = False

    def after(self, piece: bytes) -> "Place":
        """The place behind `piece`."""
        if not (_TELLING & set(piece)) and not self.escaped:
            return self
        opened, closed, in_string, escaped = self.open, self.closed, self.in_string, self.escaped
        for c in piece.decode("latin-1"):
            if in_string:
                in_string = escaped or c != '"'
                escaped = c == "\\" and not escaped
            elif c == '"':
                in_string = True
            elif c in "[{":
                opened += c
            elif c in "]}":
                opened, closed = (opened[:-1], closed) if opened else ("", closed + 1)
        return Place(open=opened, closed=closed, in_string=in_string, escaped=escaped)

    @property
    def depth(self) -> int:
        """Brackets that still have to be closed, more or less than at the start."""
        return len(self.open) - self.closed


_TELLING = frozenset(b'"[]{}\\')


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A copy of the matcher, and how it came here."""

    matcher: Any
    tokens: tuple[int, ...]
    produced_bytes: int
    place: Place
    words: Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How far one search goes."""

    tokens_max: int
    nodes_max: int
    late: Callable[[], bool]


class Closer:
    """Searches over one vocabulary."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self._words = -(-len(pieces) // 32)
        places = {piece: token for token, piece in reversed(list(enumerate(pieces)))}
        letters = [p for p in places if p.isalpha() and p.isascii()]
        words = [next((p for p in letters if len(p) == n), b"") for n in _LENGTHS]
        single = [bytes([b]) for b in (9, 10, 13, *range(32, 127))]
        wanted = [*single, *words, *(text.encode() for text in (*_CLOSING, *_JOINING))]
        self.tried = np.array(
            sorted({places[p] for p in wanted if p in places and p}), dtype=np.int64
        )
        self._ends_string = np.array([pieces[t][:1] == b'"' for t in self.tried], dtype=bool)
        self._letters = np.array([pieces[t].isalpha() for t in self.tried], dtype=bool)
        self._kinds = np.array([_kind(pieces[t]) for t in self.tried], dtype=np.int64)
        self._white = np.array([pieces[t].isspace() for t in self.tried], dtype=bool)

    def words_of(self, matcher: Any) -> Words:
        """What may come next, one bit a token."""
        words = np.empty(self._words, dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return words

    def way(
        self,
        matcher: Any,
        place: Place,
        *,
        tokens_max: int,
        late: Callable[[], bool],
        nodes_max: int = NODES_MAX,
    ) -> tuple[int, ...] | None:
        """A short way to an accepting state, or None when none of `tokens_max` was found."""
        search = Search(tokens_max=tokens_max, nodes_max=nodes_max, late=late)
        found = self._search(matcher, place, search, guided=True)
        if found is None and nodes_max >= NODES_MAX and not late():
            found = self._search(matcher, place, search, guided=False)
        return found

    def _search(
        self, matcher: Any, place: Place, search: "Search", *, guided: bool
    ) -> tuple[int, ...] | None:
        """Level by level. `guided` takes quotes and brackets for those of JSON."""
        start = Place(in_string=place.in_string, escaped=place.escaped)
        words = self.words_of(matcher)
        level = [_Node(matcher=matcher, tokens=(), produced_bytes=0, place=start, words=words)]
        made, beam = 0, BEAM if search.nodes_max >= NODES_MAX else BEAM // 4
        for _ in range(search.tokens_max + 1):
            for node in level:
                if node.matcher.is_accepting():
                    return node.tokens
            found: dict[tuple[bytes, bytes, Place], _Node] = {}
            for node in level:
                candidates = self._candidates(node, guided=guided)
                made += len(candidates) if len(candidates) > 1 else 0  # what is forced is no search
                for token in candidates:
                    if search.late():
                        return None
                    child = self._child(node, token, guided=guided)
                    if child is None:
                        continue
                    key = (child.words.tobytes(), _forced(child), child.place)
                    if key not in found or found[key].produced_bytes < child.produced_bytes:
                        found[key] = child
            if not found or made > search.nodes_max:
                return None
            level = sorted(found.values(), key=_hope)[:beam]
        return None

    def _child(self, node: _Node, token: int, *, guided: bool) -> _Node | None:
        matcher = node.matcher.deep_copy()
        if not matcher.consume_token(token):
            return None
        words = self.words_of(matcher)
        if matcher.is_error():
            return None
        piece = self.pieces[token]
        return _Node(
            matcher=matcher,
            tokens=(*node.tokens, token),
            produced_bytes=node.produced_bytes + len(piece),
            place=node.place.after(piece) if guided else node.place,  # brackets in text are text
            words=words,
        )

    def _candidates(self, node: _Node, *, guided: bool) -> list[int]:
        """Tokens worth trying: those that end a string; all, when few; or one of each kind."""
        allowed = has(node.words, self.tried)
        if guided and node.place.in_string:
            ending = allowed & self._ends_string
            if ending.any():
                return [int(t) for t in self.tried[ending]]
        if count(node.words) <= FEW:
            few = tokens_in(node.words).tolist()
            dark = [t for t in few if not self.pieces[t].isspace()]
            return self._furthest(dark or few if guided and not node.place.in_string else few)
        if guided and not node.place.in_string and (allowed & ~self._white).any():
            allowed &= ~self._white
        kinds, order = self._kinds[allowed], np.arange(int(allowed.sum()))
        _, first = np.unique(kinds, return_index=True)
        kept = (kinds == 0) | np.isin(order, first)  # where there are many, one of a kind will do
        if guided and node.place.in_string and {1, 2, 3} <= set(kinds.tolist()):
            kept &= self._letters[allowed]  # any text: what fills it soonest
        return [int(t) for t in self.tried[allowed][kept]]

    def _furthest(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that are no beginning of another: what stops half way is tried no more."""
        order = sorted(tokens, key=lambda token: self.pieces[token])
        follows = zip(order, [*order[1:], None], strict=True)
        return [
            token
            for token, after in follows
            if after is None or not self.pieces[after].startswith(self.pieces[token])
        ]


def _forced(node: _Node) -> bytes:
    """What must follow: names that end alike lead to different parts."""
    return node.matcher.compute_ff_bytes() if count(node.words) <= FEW else b""


def _kind(piece: bytes) -> int:
    """Letters are alike, and digits; 0 is what is like nothing else."""
    if len(piece) != 1 or not piece.isalnum():
        return 0
    return 1 if piece.isdigit() else 2 if piece.isupper() else 3


def _hope(node: _Node) -> tuple[int, bool, bool, int]:
    """Fewest open brackets first, then outside strings and other text, then who said most."""
    free = count(node.words) > FEW
    return node.place.depth, node.place.in_string, free, -node.produced_bytes


def has(words: Words, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of `tokens` are in a mask."""
    found: NDArray[np.bool_] = (words[tokens >> 5] >> (tokens & 31).astype(np.uint32)) & 1 == 1
    return found


def count(words: Words) -> int:
    """How many tokens are in a mask."""
    return int.from_bytes(words.tobytes(), "little").bit_count()


def tokens_in(words: Words) -> NDArray[np.int64]:
    """The tokens of a mask, in their order."""
    filled = np.flatnonzero(words)
    bits = np.unpackbits(words[filled].view(np.uint8), bitorder="little").reshape(-1, 32)
    rows, columns = np.nonzero(bits)
    return (filled[rows] * 32 + columns).astype(np.int64)
