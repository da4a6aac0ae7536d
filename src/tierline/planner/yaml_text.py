"""YAML for the files that other tools read, without a YAML library.

Only what the exports need: tables, lists, text, numbers, booleans. Text is left bare where
YAML cannot read it as anything else, and quoted with escapes everywhere else.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@-]*")
_WORDS_WITH_MEANING = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def to_yaml(value: Mapping[str, Any], *, indent: int = 0) -> str:
    """Block-style YAML of nested mappings and sequences, keys in the order given."""
    pad = " " * indent
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            lines += [f"{pad}{scalar(key)}:\n", to_yaml(item, indent=indent + 2)]
        elif isinstance(item, Sequence) and not isinstance(item, str) and item:
            lines += [f"{pad}{scalar(key)}:\n", *(_entry(entry, indent=indent) for entry in item)]
        else:
            lines.append(f"{pad}{scalar(key)}: {scalar(item)}\n")
    return "".join(lines)


def _entry(value: Any, *, indent: int) -> str:
    """One entry of a list; the first key of a mapping stands on the line of its dash."""
    if isinstance(value, Mapping) and value:
        return " " * indent + "- " + to_yaml(value, indent=indent + 2)[indent + 2 :]
    return f"{' ' * indent}- {scalar(value)}\n"


def scalar(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        text = repr(value)  # YAML 1.1 takes 1e-05 for text, and 1.0e-05 for a number
        return text if "." in text else text.replace("e", ".0e")
    if isinstance(value, str):
        if _BARE.fullmatch(value) and value.casefold() not in _WORDS_WITH_MEANING:
            return value
        return '"' + "".join(_escaped(c) for c in value) + '"'
    assert value in ({}, [], ()), value
    return "{}" if value == {} else "[]"


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
