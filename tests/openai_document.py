"""OpenAI's own OpenAPI document as a judge: whether a value has a shape, and values that have one.

Its dialect is JSON Schema 2020-12 with what is left of OpenAPI 3.0: `nullable`, and branches that
`discriminator` chooses among.
"""

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema

FILE = Path("evals") / "openai_openapi" / "openapi_subset.json.gz"
DEPTH_MAX = 6
BRANCHES_MAX = 8  # of one choice that are tried


class Judge:
    """The shapes by name."""

    def __init__(self, data_dir: Path) -> None:
        with gzip.open(data_dir / FILE) as file:
            document = json.load(file)
        self.paths: dict[str, Any] = document["paths"]
        self.schemas: dict[str, Any] = _modern(document["components"]["schemas"])

    def errors(self, schema: str | dict[str, Any], value: Any) -> list[str]:
        """What is wrong with a value, where and why; [] for a value that has the shape."""
        top = {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema
        whole = {**top, "components": {"schemas": self.schemas}}
        found = jsonschema.Draft202012Validator(whole).iter_errors(value)
        best = (jsonschema.exceptions.best_match([error]) for error in found)
        return [f"{list(one.absolute_path)}: {one.message[:300]}" for one in best]

    def properties(self, name: str) -> dict[str, Any]:
        """Every property of a shape, those of `allOf` included."""
        schema = self._resolved(self.schemas[name])
        found: dict[str, Any] = {}
        for part in schema.get("allOf", ()):
            found |= self._properties(part)
        return found | schema.get("properties", {})

    def _properties(self, schema: dict[str, Any]) -> dict[str, Any]:
        schema = self._resolved(schema)
        found: dict[str, Any] = {}
        for part in schema.get("allOf", ()):
            found |= self._properties(part)
        return found | schema.get("properties", {})

    def values(self, schema: dict[str, Any], *, most: int = 24) -> list[Any]:
        """Some values of a shape, few of each kind, always the same; all have the shape."""
        found: list[Any] = []
        for value in islice(self._values(schema, 0), 4 * most):
            if value not in found and not self.errors(schema, value):
                found.append(value)
        return found[:most]

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            rest = {name: value for name, value in schema.items() if name != "$ref"}
            schema = self.schemas[schema["$ref"].rpartition("/")[2]] | rest
        return schema

    def _values(self, schema: dict[str, Any], depth: int) -> Iterator[Any]:
        schema = self._resolved(schema)
        if "enum" in schema:
            yield from schema["enum"]
        elif branches := schema.get("anyOf", schema.get("oneOf")):
            for branch in branches[:BRANCHES_MAX]:
                yield from islice(self._values(branch, depth + 1), 4)
        elif depth < DEPTH_MAX:
            yield from self._plain(schema, depth)

    def _plain(self, schema: dict[str, Any], depth: int) -> Iterator[Any]:
        kind = schema.get("type")
        if kind == "object" or "properties" in schema or "allOf" in schema:
            yield from self._objects(schema, depth)
        elif kind == "array":
            for item in islice(self._values(schema.get("items", {}), depth + 1), 3):
                yield [item] * max(1, schema.get("minItems", 1))
        elif kind == "boolean":
            yield from (True, False)
        elif kind in ("integer", "number"):
            yield schema.get("maximum", 2)
            yield schema.get("minimum", 1)
            yield 1
        elif kind == "string":
            yield "text"
            yield schema.get("default", "words")
        elif kind == "null":
            yield None

    def _objects(self, schema: dict[str, Any], depth: int) -> Iterator[Any]:
        """With what it needs only, then with each other property."""
        properties = self._properties(schema)
        parts = [schema, *map(self._resolved, schema.get("allOf", ()))]
        required = [name for part in parts for name in part.get("required", ())]
        least: dict[str, Any] = {}
        for name in required:
            value = next(self._values(properties.get(name, {}), depth + 1), None)
            least[name] = value
        yield least
        for name in sorted(set(properties) - set(required)):
            for value in islice(self._values(properties[name], depth + 1), 1):
                yield {**least, name: value}


def _modern(schema: Any) -> Any:
    """Without what 2020-12 does not know."""
    if isinstance(schema, list):
        return [_modern(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        name: _modern(value)
        for name, value in schema.items()
        if name not in ("discriminator", "example", "nullable")
        or (isinstance(value, dict) and name != "discriminator")
    }
    if schema.get("nullable") is True:
        return {"anyOf": [kept, {"type": "null"}]}
    return kept
