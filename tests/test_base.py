"""The base keeps its word: names are never guessed, units never mixed, files never half-written,
random streams never shifted, and every error says what to change."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base import errors, files, names, rng, units
from tierline.base.errors import (
    CapacityError,
    DependencyError,
    DoesNotFitError,
    InputError,
    OverloadedError,
    SpecError,
    TierlineError,
)

GPUS = {name: name.upper() for name in ("a100", "b200", "h100-pcie", "h100-sxm", "h200", "l4")}
MANY = GPUS | {f"model-{i}": str(i) for i in range(20)}


@pytest.mark.parametrize("module", [errors, files, names, rng, units])
def test_examples_in_docstrings(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]

    assert result.failed == 0


# Names


def test_a_known_name_is_found() -> None:
    assert names.lookup("gpu", "h200", GPUS) == "H200"


@pytest.mark.parametrize(
    ("typed", "known", "hint"),
    [
        ("h100-smx", MANY, "did you mean: h100-sxm"),  # near, among many: the near ones only
        ("zzzz", GPUS, "known: a100, b200, h100-pcie, h100-sxm, h200, l4"),  # few: all of them
        ("H200", MANY, "h200"),  # another case is near, yet not the same name
    ],
)
def test_an_unknown_name_is_an_error_that_shows_the_near_ones(
    typed: str, known: dict[str, str], hint: str
) -> None:
    with pytest.raises(SpecError, match=f"unknown gpu '{typed}'") as caught:
        names.lookup("gpu", typed, known, error=SpecError, way_out="or pass a file")

    assert hint in caught.value.hint
    assert caught.value.hint.endswith("; or pass a file")


@given(st.text(max_size=12))
def test_no_text_is_silently_taken_for_a_known_name(typed: str) -> None:
    if typed in MANY:
        assert names.lookup("gpu", typed, MANY) == MANY[typed]
        return
    with pytest.raises(InputError) as caught:
        names.lookup("gpu", typed, MANY)

    assert caught.value.hint


@given(st.text(max_size=12), st.integers(1, 5))
def test_near_names_are_known_names_without_repeats(typed: str, count: int) -> None:
    near = names.nearest(typed, MANY, count=count)

    assert set(near) <= set(MANY)
    assert len(set(near)) == len(near) <= count


def test_an_unknown_key_names_the_nearest_known_key() -> None:
    names.reject_unknown_keys("[limits]", ["tp"], ["tp", "max_batch"])  # the control: no error
    with pytest.raises(InputError, match=r"\[limits\]: unknown key 'max_bach'") as caught:
        names.reject_unknown_keys("[limits]", ["tp", "max_bach"], ["tp", "max_batch"])

    assert caught.value.hint == "did you mean 'max_batch'? known keys: max_batch, tp"


# Units


@pytest.mark.parametrize(
    ("text", "duration_ns"),
    [
        ("2s", 2 * 10**9),
        ("50ms", 50 * 10**6),
        (" 1.5 min ", 90 * 10**9),
        (".5s", 5 * 10**8),
        ("1e3us", 10**6),
        ("2m", 120 * 10**9),
        ("1h", 3600 * 10**9),
        ("1d", 86400 * 10**9),
    ],
)
def test_durations(text: str, duration_ns: int) -> None:
    assert units.parse_duration_ns(text) == duration_ns


@pytest.mark.parametrize("text", ["", "2", "s", "2 parsecs", "-2s", "0s", "2s 3s", "nan s", "1,5s"])
def test_what_is_not_a_duration_is_an_error_with_a_way_out(text: str) -> None:
    with pytest.raises(InputError, match="ttft") as caught:
        units.parse_duration_ns(text, what="ttft")

    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("512GB", 512 * 10**9), ("80GiB", 80 * 2**30), ("1.5TB", 15 * 10**11), ("7 B", 7)],
)
def test_sizes_keep_decimal_and_binary_apart(text: str, size_bytes: int) -> None:
    assert units.parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "512", "512 Gb", "-1GB", "1 gigabyte"])
def test_what_is_not_a_size_is_an_error_with_a_way_out(text: str) -> None:
    with pytest.raises(InputError, match="dram") as caught:
        units.parse_bytes(text, what="dram")

    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.significant(999.6), "1,000"),
        (units.significant(9.996), "10.00"),  # rounding up gains a digit; the value is right
        (units.significant(-1234567), "-1,230,000"),
        (units.significant(1e-9), "0.00000000100"),
        (units.significant(0), "0"),
        (units.significant(float("nan")), "nan"),
        (units.format_bytes(999), "999 B"),
        (units.format_bytes(80e9), "80.0 GB"),
        (units.format_seconds(119.9), "120 s"),
        (units.format_seconds(0.0000021), "2.10 us"),
        (units.format_seconds(7200), "2.00 h"),
        (units.format_seconds(float("inf")), "unbounded"),
        (units.format_usd(12_345), "$12.3 k"),
        (units.format_usd(2.95), "$2.95"),
        (units.format_usd(3.2e9), "$3.20 B"),
    ],
)
def test_what_people_read(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(1e-12, 1e15), st.integers(2, 6))
def test_printing_keeps_the_digits_it_promises(value: float, digits: int) -> None:
    printed = float(units.significant(value, digits).replace(",", ""))

    assert abs(printed / value - 1) <= 0.5 * 10 ** (1 - digits) * (1 + 1e-9)


# Files


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "new" / "plan.toml"
    files.write_text(target, "first")
    files.write_text(target, "second")

    assert target.read_text(encoding="utf-8") == "second"
    assert list(target.parent.iterdir()) == [target]  # no partial left beside it


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "plan.toml"
    files.write_text(target, "old")

    def disk_full(self: Path, other: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(DependencyError, match="No space left on device") as caught:
        files.write_text(target, "new")

    assert caught.value.hint
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")

    with pytest.raises(DependencyError, match="cannot write"):
        files.write_text(tmp_path / "out" / "report.html", "text")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"\xff\xfe\x00", "not UTF-8 text")]
)
def test_an_unreadable_file_says_which_and_why(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=message) as caught:
        files.read_text(path, what="trace")
    assert str(path) in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values))
def test_equal_values_have_equal_hashes_whatever_their_order(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))

    assert files.content_hash(value) == files.content_hash(backwards)
    assert files.content_hash(value) != files.content_hash({**value, "\0more": 1})


# Random streams


def test_streams_differ_by_seed_and_by_name_and_repeat() -> None:
    def draw(seed: int, name: str) -> list[int]:
        return rng.stream(seed, name).integers(0, 2**60, size=4).tolist()

    assert draw(0, "arrivals") == draw(0, "arrivals")
    assert draw(0, "arrivals") != draw(1, "arrivals")
    assert draw(0, "arrivals") != draw(0, "lengths")


def printed_under(hash_seed: str, code: str) -> bytes:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.check_output([sys.executable, "-c", code], env=environment)


def test_a_stream_does_not_depend_on_the_hash_seed() -> None:
    code = "from tierline.base.rng import stream; print(stream(7, 'a').integers(0, 2**60))"

    assert printed_under("0", code) == printed_under("1", code)


def test_two_hash_seeds_would_show_a_dependence() -> None:
    """Negative control of every test that compares hash seeds 0 and 1."""
    code = "print(list({'decode', 'prefill', 'queue', 'reuse'}), hash('tierline'))"

    assert printed_under("0", code) != printed_under("1", code)


# Errors


def every_error() -> list[type[TierlineError]]:
    return [v for v in vars(errors).values() if isinstance(v, type)]


def test_the_drawn_tree_is_the_real_tree() -> None:
    drawn = errors.__doc__ or ""

    for error in every_error():
        assert error.__name__ in drawn
        assert issubclass(error, TierlineError)


@pytest.mark.parametrize(
    ("error", "numbers"),
    [
        (DoesNotFitError("weights", needed_bytes=141e9, available_bytes=80e9), ["141.0", "80.0"]),
        (OverloadedError("queue", retry_after_ns=1_500_000_000), ["1.50"]),
    ],
)
def test_the_machine_says_no_with_numbers(error: CapacityError, numbers: list[str]) -> None:
    assert all(number in str(error) for number in numbers)


def test_claiming_that_what_fits_does_not_fit_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        DoesNotFitError("weights", needed_bytes=1, available_bytes=2)
