"""What a schema or a pattern costs, from its text: before it is compiled, and near its end.

`require_bounded` refuses by counting what the grammar library would not survive, or would work
on for seconds.  It follows references by recursion, so a chain of 700 objects overflows its
stack and ends the process; its time grows with the square of the optional properties of an object
and of a `multipleOf`.

The rest is how much one token can lengthen the way out.

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
from decimal import Decimal
from typing import Any

from tierline.base.errors import RequestError

PROPERTIES_MAX = 2_000  # of a schema's objects together: 0.3 s
LEVELS_MAX = 400  # brackets in brackets, those that references lead to added up
MULTIPLES_MAX = 20_000  # the digits of all `multipleOf` as whole numbers, summed: 0.1 s
REACH_MAX_TOKENS = 4_096
_OPENED = 2  # values that one token opens, as in `[{"`, beside the outermost
_SEVERAL = ("properties", "patternProperties", "$defs", "definitions")
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "not")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_DEFAULT_BYTES = 64  # a reference that is not followed here
_FORMAT_BYTES = 48
_NUMBER_BYTES = 24
_ROUNDS_MAX = 16


def require_bounded(schema: Any) -> None:
    """Raise `RequestError` for a schema that would take the grammar library too far."""
    properties, multiples, references = 0, 0, set()
    for node in _everything(schema):
        properties += len(_map(node.get("properties")))
        multiples += _digits(node.get("multipleOf"))
        references.add(str(node.get("$ref", "#")))
    levels = 0
    for reference in references:
        levels += _levels(_resolved(schema, reference), LEVELS_MAX)
        if levels > LEVELS_MAX:
            raise RequestError(
                "the schema is nested too deeply, references included",
                hint=f"at most {LEVELS_MAX} levels are taken, over all that is referred to",
            )
    for said, found, most in (
        ("properties", properties, PROPERTIES_MAX),
        ("in the digits of its multipleOf", multiples, MULTIPLES_MAX),
    ):
        if found > most:
            raise RequestError(
                f"the schema is too large: it has {found} {said}", hint=f"at most {most} are taken"
            )


def _everything(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All objects of a JSON value, itself included."""
    open_nodes = [schema]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, Mapping):
            yield node
            open_nodes += node.values()
        elif isinstance(node, list):
            open_nodes += node


def _levels(node: Any, most: int) -> int:
    """How deep brackets are nested; more than `most` is `most` + 1."""
    level, depth = [node], 0
    while depth <= most:
        level = [n for n in level if isinstance(n, Mapping | list)]
        if not level:
            break
        depth += 1
        level = [v for n in level for v in (n.values() if isinstance(n, Mapping) else n)]
    return depth


def softened(schema: Any) -> Any:
    """A copy without the patterns that the library does not know: look-around and the like.

    Other keywords that it does not know it leaves out itself, when it is asked to be lenient.
    """
    if isinstance(schema, list):
        return [softened(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy = {
        name: value if name in _VALUES else softened(value)
        for name, value in schema.items()
        if not (name == "pattern" and isinstance(value, str) and _UNKNOWN.search(value))
    }
    named = copy.get("patternProperties")
    if isinstance(named, Mapping):
        copy["patternProperties"] = {p: s for p, s in named.items() if not _UNKNOWN.search(p)}
    return copy


_UNKNOWN = re.compile(r"\(\?<?[=!]|\\[bB1-9]|\\k<")
_VALUES = frozenset({"const", "enum", "default", "examples"})


def _digits(value: Any) -> int:
    """0.25 is 25: states that a text of digits is in, when it is divided."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 0
    return int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits))[:18])


def pattern_bytes(pattern: str) -> int:
    """Upper estimate of a text that a pattern needs: itself, and what it repeats."""
    repeated = 0
    for found in re.finditer(r"(.)\{(\d+)", pattern, re.DOTALL):
        repeated += int(found[2][:7]) * (len(pattern) if found[1] == ")" else 4)
    return len(pattern.encode()) + repeated


class SchemaSize:
    """Sizes of the values of a JSON schema, in bytes."""

    def __init__(self, schema: Any) -> None:
        self._nodes = list(_nodes(schema))
        self._known: dict[int, float] = {}  # by the node's id, with the references as they are
        refs = (n["$ref"] for n in self._nodes if isinstance(n, Mapping) and "$ref" in n)
        self._refs: dict[str, float] = {str(ref): math.inf for ref in refs}
        for forward in range(_ROUNDS_MAX):  # sizes fall from infinity to what recursion leaves
            before = dict(self._refs)
            order = list(before) if forward % 2 else reversed(before)  # most are defined behind
            for ref in order:
                self._known = {}
                self._refs[ref] = self._least(_resolved(schema, ref))
            if self._refs == before:
                break
        self._known = {}
        self.least_bytes = self._least(schema)

    @property
    def finite(self) -> bool:
        """Whether some value of the schema ends: recursion has a way out."""
        return self.least_bytes < math.inf

    def reach_tokens(self) -> int:
        """By how much one token lengthens the way out, at most."""
        sizes = [self._promise(node) for node in self._nodes]
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
        if id(node) not in self._known:
            self._known[id(node)] = self._found(node)
        return self._known[id(node)]

    def _found(self, node: Mapping[str, Any]) -> float:
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
