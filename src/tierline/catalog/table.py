"""A TOML table that somebody wrote by hand, read strictly.

The catalogue and the deployment file read their tables through this one type, so that a
key nobody knows, a wrong type and a number out of range are each an error that names the
file and the dotted key, and none of them becomes a silent default.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from tierline.base.errors import SpecError
from tierline.base.names import nearest, reject_unknown_keys


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The tables of `text`; raises `SpecError` with the line when it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where} is not valid TOML: {error}") from None


class Table:
    """One table: the keys it may have are given at once, then each is read by its type."""

    def __init__(
        self, values: Mapping[str, Any], *, where: str, keys: Sequence[str], path: str = ""
    ) -> None:
        self._values, self._where, self._path = values, where, path
        label = f"{where}: {path}" if path else where
        reject_unknown_keys(label, values, keys, error=SpecError)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def error(self, key: str, problem: str, *, hint: str = "") -> SpecError:
        """The error that `key` of this table has `problem`."""
        return SpecError(f"{self._where}: {self._dotted(key)} {problem}", hint=hint)

    def text(self, key: str, *, choices: Sequence[str] = ()) -> str:
        """One line of text; one of `choices` when there are any."""
        value = self._get(key)
        if not isinstance(value, str) or not _is_line(value):
            raise self._wrong(key, "one line of text")
        if choices and value not in choices:
            near = nearest(value, choices, count=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise self.error(key, f"is {value!r}", hint=f"{meant}one of: {', '.join(choices)}")
        return value

    def whole(self, key: str, *, low: int = 1) -> int:
        """A whole number of at least `low`."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self._wrong(key, f"a whole number of at least {low}")
        return value

    def number(self, key: str, *, above: float = 0.0, high: float = math.inf) -> float:
        """A finite number over `above` and at most `high`."""
        value = self._get(key)
        if not _is_number(value) or not above < value <= high:
            bound = f" and at most {high:g}" if high < math.inf else ""
            raise self._wrong(key, f"a number above {above:g}{bound}")
        return float(value)

    def number_from(self, key: str, *, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number of at least `low` and at most `high`."""
        value = self._get(key)
        if not _is_number(value) or not low <= value <= high:
            bound = f" and at most {high:g}" if high < math.inf else ""
            raise self._wrong(key, f"a number of at least {low:g}{bound}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number above zero, or None when the key is absent: unknown."""
        return self.number(key) if key in self else None

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of lines of text."""
        value = self._get(key)
        if not isinstance(value, list) or not all(_is_line(v) for v in value):
            raise self._wrong(key, "a list of text")
        return tuple(value)

    def table(self, key: str, keys: Sequence[str]) -> "Table":
        """The table under `key`, which may have `keys`."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "a table")
        return Table(value, where=self._where, keys=keys, path=self._dotted(key))

    def tables(self, key: str, keys: Sequence[str]) -> list["Table"]:
        """The array of tables under `key`, empty when absent; each may have `keys`."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self._wrong(key, f"an array of tables, [[{self._dotted(key)}]]")
        return [
            Table(v, where=self._where, keys=keys, path=f"{self._dotted(key)}[{i}]")
            for i, v in enumerate(value)
        ]

    def keys(self) -> list[str]:
        """The keys that are there."""
        return list(self._values)

    def _get(self, key: str) -> Any:
        if key not in self._values:
            raise self.error(key, "is missing", hint="add it; nothing is filled in silently")
        return self._values[key]

    def _wrong(self, key: str, wanted: str) -> SpecError:
        return self.error(key, f"must be {wanted}, not {self._values[key]!r}")

    def _dotted(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_line(value: object) -> bool:
    """Text that can stand in a command, a comment or a table without breaking out of it."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()
