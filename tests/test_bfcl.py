"""Tools of the Berkeley function-calling leaderboard: grammars for all, their calls read back."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tierline.base.errors import RequestError
from tierline.server.tools import Choice, Tool, tool_format
from tool_checks import accepts, calls_of, compile_error, read, rendered

FILES = ("simple_python", "parallel", "multiple", "parallel_multiple", "live_simple")
FORMATS = ("hermes", "llama3_json", "qwen3_coder")
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
# What the answers themselves get wrong: their calls are no calls of their tools.
WRONG = {
    "simple_python_200": "a required parameter is missing",
    "parallel_multiple_21": "a text in place of an array",
    "parallel_multiple_26": "a parameter that the tool does not have",
    "parallel_multiple_94": "a text in place of an integer",
    "live_simple_71-35-0": "the enumeration has no array, as which it is declared",
}
# What cannot be enforced. Text that is written bare has no format.
STRICTLY_REFUSED = {
    "hermes": {"live_simple_71-35-0"},
    "llama3_json": {"live_simple_71-35-0"},
    "qwen3_coder": {"live_simple_71-35-0", "multiple_5", "parallel_multiple_63"},
}


@dataclass(frozen=True)
class Case:
    """A question's tools, and the calls that answer it."""

    name: str
    tools: tuple[Tool, ...]
    calls: tuple[tuple[str, dict[str, Any]], ...]


def as_schema(value: Any) -> Any:
    """BFCL's Python types as JSON schema's; what is optional there is not required here."""
    if isinstance(value, list):
        return [as_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {key: as_schema(item) for key, item in value.items()}
    kind = made.get("type")
    if kind == "any":
        del made["type"]
    elif isinstance(kind, str):
        made["type"] = TYPES.get(kind, kind)
    if isinstance(made.get("optional"), bool | str):
        del made["optional"]
    return made


def first(value: Any) -> Any:
    """One of the accepted values, also inside of objects; a key without one is left out."""
    if isinstance(value, dict):
        chosen = {key: o[0] if isinstance(o, list) and o else o for key, o in value.items()}
        return {key: first(item) for key, item in chosen.items() if item != ""}
    if isinstance(value, list):
        return [first(item) for item in value]
    return value


def ordered(value: Any, schema: Any) -> Any:
    """With keys in the order of the schema's properties, which a grammar keeps."""
    if isinstance(value, list):
        return [ordered(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    listed = schema.get("properties", {})
    names = [*(name for name in listed if name in value), *(n for n in value if n not in listed)]
    return {name: ordered(value[name], listed.get(name, {})) for name in names}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        yield from map(json.loads, file)


def cases(data_dir: Path, name: str) -> list[Case]:
    folder = data_dir / "evals" / "bfcl"
    made = []
    for asked, answer in zip(
        lines(folder / f"{name}.jsonl.gz"), lines(folder / f"{name}.answers.jsonl.gz"), strict=True
    ):
        assert asked["id"] == answer["id"]
        tools = {
            f["name"]: Tool(
                name=f["name"], description=f["description"], parameters=as_schema(f["parameters"])
            )
            for f in asked["function"]
        }
        calls = [
            (function, ordered(first(arguments), tools[function].parameters))
            for call in answer["ground_truth"]
            for function, arguments in call.items()
        ]
        made.append(Case(asked["id"], tuple(tools.values()), tuple(calls)))
    return made


def breaches(case: Case) -> list[str]:
    """What is wrong with the case's own answer."""
    schemas = {tool.name: {**tool.parameters, "additionalProperties": False} for tool in case.tools}
    return [
        error.message
        for name, arguments in case.calls
        for error in jsonschema.Draft202012Validator(schemas[name]).iter_errors(arguments)
    ]


def check(case: Case, form: str) -> None:
    """The case's calls are within the grammar, and read back; wrong ones are not within it."""
    spoken = tool_format(None, named=form)
    required = spoken.wanted(case.tools, Choice(kind="required"))
    free = spoken.wanted(case.tools, Choice(kind="auto"))
    assert required is not None
    assert free is not None
    answer = rendered(form, case.calls)

    assert accepts(str(required.text), answer), case.name
    assert accepts(str(free.text), answer), case.name
    assert calls_of(read(spoken, case.tools, [answer])) == list(case.calls), case.name
    for wrong in wrong_calls(case):
        assert not accepts(str(required.text), rendered(form, [wrong])), (case.name, wrong)


def wrong_calls(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first call with another function, with one argument more, fewer, or of a wrong type."""
    name, arguments = case.calls[0]
    schema = next(tool.parameters for tool in case.tools if tool.name == name)
    yield f"{name}_", arguments
    if schema.get("properties"):
        yield name, arguments | {"not_a_parameter": 1}
    for parameter in schema.get("required", ())[:1]:
        yield name, {key: value for key, value in arguments.items() if key != parameter}
    for parameter in arguments:
        if schema["properties"][parameter].get("type") in ("integer", "number", "boolean"):
            yield name, arguments | {parameter: "seven"}


@pytest.mark.parametrize("form", FORMATS)
def test_calls_of_a_sample_are_within_the_grammar_and_read_back(form: str, data_dir: Path) -> None:
    for file in FILES:
        for case in cases(data_dir, file)[5::60]:
            check(case, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("file", FILES)
def test_all_calls_are_within_the_grammar_and_read_back(
    file: str, form: str, data_dir: Path
) -> None:
    found = cases(data_dir, file)

    for case in found:
        if case.name not in WRONG:
            check(case, form)
    assert {case.name for case in found if breaches(case)} == {
        name for name in WRONG if name.rsplit("_", 1)[0] == file
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_every_tool_compiles_strictly_but_the_one_without_a_value(
    form: str, data_dir: Path
) -> None:
    spoken = tool_format(None, named=form)
    refused: dict[str, str] = {}
    tools = {
        f"{case.name} {tool.name}": tool
        for file in FILES
        for case in cases(data_dir, file)
        for tool in case.tools
    }
    for name, tool in tools.items():
        try:
            wanted = spoken.wanted([replace(tool, strict=True)], Choice(kind="required"))
        except RequestError as error:
            refused[name] = str(error)
            continue
        assert wanted is not None
        if told := compile_error(str(wanted.text)):
            refused[name] = told

    assert len(tools) == 1935
    assert {name.split()[0] for name in refused} == STRICTLY_REFUSED[form], refused
