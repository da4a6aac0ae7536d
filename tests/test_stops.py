"""However a text is cut into pieces, what is shown ends at the first stop string."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.engine.stops import StopChecker


def cut(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """Brute force: the match that ends first, and of those the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def pieces(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


texts = st.text(alphabet="abé🙂", max_size=30)
stop_lists = st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=5), max_size=6)


@given(text=texts, stops=stop_lists, places=st.lists(st.integers(0, 30), max_size=8), include=...)
def test_any_cut_gives_the_brute_force_answer(
    text: str, stops: list[str], places: list[int], include: bool
) -> None:
    checker = StopChecker(stops, include=include)
    shown = "".join(checker.feed(piece) for piece in pieces(text, places))
    shown += checker.flush()

    assert (shown, checker.stopped) == cut(text, stops, include=include)


@given(text=texts, stops=stop_lists)
def test_nothing_certain_is_held_back(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        shown += checker.feed(text[end - 1])
        if checker.stopped is not None:
            return
        held = text[len(shown) : end]

        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_check_of_each_piece_alone_would_miss_a_stop() -> None:
    """The control: the property above notices a checker that does not look across pieces."""
    stops, parts = ["</end>"], ["text </e", "nd> more"]
    forgetful = "".join(StopChecker(stops).feed(part) for part in parts)
    checker = StopChecker(stops)

    assert "".join(checker.feed(part) for part in parts) == "text "
    assert forgetful != "text "


@pytest.mark.parametrize(
    ("stops", "text", "shown", "stopped"),
    [
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # the one that ends first
        (["bc", "abc"], "xabc", "x", "abc"),  # of two that end together the longest
        (["aab"], "aaab", "a", "aab"),
        ([], "anything", "anything", None),
        (["never"], "neve", "neve", None),
    ],
)
def test_which_stop_counts(stops: list[str], text: str, shown: str, stopped: str | None) -> None:
    checker = StopChecker(stops)
    got = "".join(checker.feed(character) for character in text) + checker.flush()

    assert (got, checker.stopped) == (shown, stopped)


def test_text_that_cannot_become_a_stop_comes_at_once() -> None:
    checker = StopChecker(["STOP"])

    assert checker.feed("hello S") == "hello "
    assert checker.feed("T") == ""
    assert checker.feed("A") == "STA"


def test_holding_back_as_much_as_the_longest_stop_would_be_noticed() -> None:
    """The control: the usual shortcut keeps text that is certain."""
    stops, text = ["STOP"], "hello"
    shortcut = text[: len(text) - (len("STOP") - 1)]

    assert not any(stop.startswith(text[len(shortcut) :]) for stop in stops)
    assert StopChecker(stops).feed(text) == text


def test_nothing_comes_after_a_stop() -> None:
    checker = StopChecker(["."])

    assert checker.feed("a.b") == "a"
    assert checker.feed("c") == ""
    assert checker.flush() == ""


class Counted(StopChecker):
    """Counts states looked at, by way of the automaton's table."""

    def looks(self, text: str) -> int:
        table = _Counting(self._automaton._next)
        self._automaton._next = table
        self.feed(text)
        return table.looks


class _Counting(dict[tuple[int, str], int]):
    looks = 0

    def get(self, key, default=None):  # type: ignore[no-untyped-def]
        self.looks += 1
        return super().get(key, default)


@pytest.mark.parametrize("count", [10, 10_000])
def test_a_character_costs_the_same_with_ten_thousand_stops(count: int) -> None:
    stops = [f"{'a' * 10}{number:05d}" for number in range(count)]
    checker = Counted(stops)

    assert checker.looks("a" * 9 + "b" + "a" * 2_000) <= 3 * 2_010


def test_ten_thousand_stops_are_found() -> None:
    checker = StopChecker([f"stop number {number:05d}" for number in range(10_000)])
    shown = checker.feed("so stop number 0999") + checker.feed("9 and on")

    assert (shown, checker.stopped) == ("so ", "stop number 09999")
