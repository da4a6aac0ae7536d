"""How much one token can lengthen the way out of a schema or a pattern, from its text.

`grammar.Grammars.compile` asks once a grammar.  A token that opens an object promises its
required members; one that begins an optional key promises the rest of the key and a value.  So
long as more tokens are left than the way out and one such promise, `grammar.Matcher` need not
look whether an answer still fits.

Sizes are in bytes of compact JSON, and a token is at least a byte, so they bound tokens.  They
are estimates from above of short values, not of the shortest: only too small would be wrong.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

REACH_MAX_TOKENS = 4_096
_OPENED = 2  # values that one token opens, as in `[{"`, beside the outermost
_SEVERAL = ("properties", "patternProperties", "$defs", "definitions")
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "not")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_DEFAULT_BYTES = 64  # a reference that is not followed here
_FORMAT_BYTES = 48
_NUMBER_BYTES = 24
_ROUNDS_MAX = 64


def pattern_bytes(pattern: str) -> int:
    """Upper estimate of a text that a pattern needs: itself, and what it repeats."""
    repeated = 0
    for found in re.finditer(r"(.)\{(\d+)", pattern, re.DOTALL):
        repeated += int(found[2][:7]) * (len(pattern) if found[1] == ")" else 4)
    return len(pattern.encode()) + repeated


class SchemaSize:
    """Sizes of the values of a JSON schema, in bytes."""

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._refs: dict[str, float] = {}
        for _ in range(_ROUNDS_MAX):  # sizes fall from infinity to what recursion leaves finite
            before = dict(self._refs)
            self.least_bytes = self._least(schema)
            for ref in list(self._refs):
                self._refs[ref] = self._least(_resolved(schema, ref))
            if self._refs == before:
                break

    @property
    def finite(self) -> bool:
        """Whether some value of the schema ends: recursion has a way out."""
        return self.least_bytes < math.inf

    def reach_tokens(self) -> int:
        """By how much one token lengthens the way out, at most."""
        sizes = [self._promise(node) for node in _nodes(self._root)]
        longest = max((size for size in sizes if size < math.inf), default=0)
        return min(REACH_MAX_TOKENS, int(_OPENED * longest) + 16)

    def _promise(self, node: Any) -> float:
        if not isinstance(node, Mapping):
            return 4
        values = [*_list(node.get("enum")), node.get("const")]
        members = [
            len(name) + 6 + least
            for name, value in _map(node.get("properties")).items()
            if (least := self._least(value)) < math.inf
        ]
        kinds = [self._of(kind, node) for kind, names in _ASKING.items() if names & node.keys()]
        ends = [size for size in (self._least(node), *kinds) if size < math.inf]
        return max(0, *map(_written, values), *members, *ends)

    def _least(self, node: Any) -> float:
        if not isinstance(node, Mapping):
            return 4
        if "const" in node:
            return _written(node["const"])
        if "enum" in node:
            return max(map(_written, _list(node["enum"])), default=0)
        size = self._own(node)
        if "$ref" in node:
            size += self._refs.setdefault(str(node["$ref"]), math.inf)
        for name in ("anyOf", "oneOf"):
            if branches := _list(node.get(name)):
                size += min(map(self._least, branches))
        return size + sum(map(self._least, _list(node.get("allOf"))))

    def _own(self, node: Mapping[str, Any]) -> float:
        """What the keywords for a type ask, by the cheapest type that is allowed."""
        asked = node.get("type")
        if not isinstance(asked, str | list):
            kinds = [kind for kind, names in _ASKING.items() if names & node.keys()]
            return max([4.0, *(self._of(kind, node) for kind in kinds if kind != "object")])
        return min(self._of(k, node) for k in ([asked] if isinstance(asked, str) else asked))

    def _of(self, kind: Any, node: Mapping[str, Any]) -> float:
        if kind == "object":
            known = _map(node.get("properties"))
            extra = max(0, _whole(node.get("minProperties")) - len(_list(node.get("required"))))
            required = [str(name) for name in _list(node.get("required"))]
            return (
                2
                + 32 * extra
                + sum(
                    _written(name)
                    + 2
                    + self._least(known.get(name, node.get("additionalProperties")))
                    for name in required
                )
            )
        if kind == "array":
            first = _list(node.get("prefixItems")) or _list(node.get("items"))
            least = _whole(node.get("minItems"))
            rest = max(0, least - len(first))
            size = sum(1 + self._least(item) for item in first[:least])
            return 2 + size + (rest * (1 + self._least(node.get("items"))) if rest else 0)
        if kind == "string":
            pattern, named = node.get("pattern"), "format" in node
            return (
                2
                + _whole(node.get("minLength"))
                + (pattern_bytes(pattern) if isinstance(pattern, str) else 0)
                + (_FORMAT_BYTES if named else 0)
            )
        bounded = kind in ("number", "integer") and _ASKING["number"] & node.keys()
        return _NUMBER_BYTES if bounded else 5


_ASKING: dict[str, set[str]] = {
    "object": {"required", "properties", "minProperties"},
    "array": {"minItems", "prefixItems"},
    "string": {"minLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}


def _resolved(root: Any, ref: str) -> Any:
    """What a pointer into the schema names; a value of an ordinary size when it is none."""
    node = root
    if not ref.startswith("#"):
        return {"const": "x" * _DEFAULT_BYTES}
    for part in ref[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return {"const": "x" * _DEFAULT_BYTES}
    return node


def _nodes(node: Any) -> Iterator[Any]:
    """A schema and all those inside it."""
    yield node
    if not isinstance(node, Mapping):
        return
    for name in _SEVERAL:
        for inner in _map(node.get(name)).values():
            yield from _nodes(inner)
    for name in _ONE:
        if isinstance(node.get(name), Mapping):
            yield from _nodes(node[name])
    for name in _LISTS:
        for inner in _list(node.get(name)):
            yield from _nodes(inner)


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value < 1e9 else 0


def _written(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())
