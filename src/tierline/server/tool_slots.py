"""What the parameters of a tool are in a format that writes values as bare text.

`qwen3_coder` writes `<parameter=city>`, a line break, and the value: text as it is, anything
else as JSON. Which of the two it is only the tool's JSON schema can tell, so a parameter's
`Slot` is made from its schema once, and serves the parser (what does this text mean?) and the
grammar (which texts may stand here?). Where a value may be text or something else, text that
reads as the something else is that: `5` for a number or a text is the number.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
REFERENCES_MAX = 16  # one behind the other
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # as templates write them
_NOTES = {"type", "title", "description", "default", "examples", "deprecated", "nullable"}
_LENGTHS = {"minLength", "maxLength", "pattern"}

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One parameter: what its text may mean, and its schema."""

    types: frozenset[str] = TYPES
    values: tuple[Any, ...] | None = None  # the only ones there are
    schema: Schema | bool = True
    required: bool = False

    @property
    def text(self) -> bool:
        """Whether it is text whatever it says."""
        return self.types == {"string"}

    @property
    def exact(self) -> bool:
        """Whether the schema bounds no value that cannot be told from text."""
        if self.values is not None or "string" not in self.types:
            return True
        if self.text:
            return isinstance(self.schema, Mapping) and self.schema.keys() <= _NOTES | _LENGTHS
        return _plain(self.schema)

    def json(self, text: str) -> str:
        """The value that `text` means, as JSON."""
        if self.values is not None:
            for value in self.values:
                if written(value) == text:
                    return json.dumps(value, ensure_ascii=False)
        value = text
        if not self.text:
            try:
                read = json.loads(_PYTHON.get(text.strip(), text), parse_constant=_refused)
            except (ValueError, RecursionError):
                pass
            else:
                fits = "string" not in self.types or _type(read) in self.types - {"string"}
                value = read if fits else text
        return json.dumps(value, ensure_ascii=False)


def slots(parameters: Schema) -> tuple[dict[str, Slot], Slot | None]:
    """A tool's parameters, and what any other parameter may be; None: there are no others."""
    schema = resolved(parameters, parameters)
    schema = schema if isinstance(schema, Mapping) else {}
    listed = schema.get("properties")
    listed = listed if isinstance(listed, Mapping) else {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    found = {
        name: _slot(value, parameters, required=name in required) for name, value in listed.items()
    }
    found |= {
        name: Slot(required=True)
        for name in required
        if isinstance(name, str) and name not in found
    }
    others = schema.get("additionalProperties", not (listed or closed(schema)))
    return found, _slot(others, parameters, required=False) if others is not False else None


def closed(schema: Schema) -> bool:
    """Whether an object schema that does not say so is meant to have no other properties.

    Function calling reads `properties` as the list of a function's parameters, and nothing as a
    function without any; JSON schema would allow every other name besides.
    """
    return "properties" in schema or (
        not (schema.keys() - {"type", "required"} - _NOTES) and ("type" not in schema)
    )


def written(value: Any) -> str:
    """A value as text: a string as it is, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def resolved(schema: Any, root: Schema) -> Any:
    """The schema that a local `$ref` leads to; what leads nowhere stays as it is."""
    for _ in range(REFERENCES_MAX):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        found: Any = root
        for part in reference[2:].split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                return schema
            found = found[key]
        schema = found
    return schema


def _slot(schema: Any, root: Schema, *, required: bool) -> Slot:
    return Slot(
        types=_types(schema, root, REFERENCES_MAX),
        values=_values(schema, root, REFERENCES_MAX),
        schema=schema if isinstance(schema, Mapping | bool) else True,
        required=required,
    )


def _types(schema: Any, root: Schema, depth: int) -> frozenset[str]:
    """The JSON types that a schema allows, or more."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or not depth:
        return TYPES
    found = TYPES
    given = schema.get("type")
    if isinstance(given, str | list):
        found = found & _named([given] if isinstance(given, str) else given)
    values = _listed(schema)
    if values is not None:
        found = found & {_type(value) for value in values}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found = found & frozenset().union(*(_types(s, root, depth - 1) for s in schema[key]))
    if isinstance(schema.get("allOf"), list):
        for part in schema["allOf"]:
            found = found & _types(part, root, depth - 1)
    return found


def _named(names: list[Any]) -> frozenset[str]:
    """A number may be whole."""
    return frozenset(names) | ({"integer"} if "number" in names else frozenset())


def _values(schema: Any, root: Schema, depth: int) -> tuple[Any, ...] | None:
    """The values of an enumeration, also of one that may be null."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or not depth:
        return None
    listed = _listed(schema)
    if listed is not None:
        named = _named([schema["type"]]) if isinstance(schema.get("type"), str) else TYPES
        return tuple(value for value in listed if _type(value) in named)
    if schema.get("type") == "null":
        return (None,)
    branches = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(branches, list) and branches and not schema.keys() - {"anyOf", "oneOf"} - _NOTES:
        parts = [_values(branch, root, depth - 1) for branch in branches]
        if all(part is not None for part in parts):
            return tuple(value for part in parts for value in part or ())
    return None


def _listed(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _plain(schema: Any) -> bool:
    """Whether a schema only names types."""
    if not isinstance(schema, Mapping):
        return True
    branches = [b for key in ("anyOf", "oneOf") for b in schema.get(key, ())]
    return not schema.keys() - _NOTES - {"anyOf", "oneOf"} and all(map(_plain, branches))


def _type(value: Any) -> str:
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
        (dict, "object"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
