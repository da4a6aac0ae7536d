"""A form that a request asks for over HTTP holds, or is refused by the name the caller knows."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from servers import Served, engine_of, served
from test_grammar import SCHEMAS, closed, is_whole
from tiny_checkpoints import tiny_checkpoint

TEMPLATE = (  # knows tools and calls, and spends no position on them
    "{% if tools %}{# <tool_call> #}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = [{"role": "user", "content": "hello"}]
GAP_S = 3.0  # that a bystander's stream may stand still: no measurement, a limit


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tiny_checkpoint("llama", tmp_path_factory.mktemp("structured"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with served(engine_of(path, kv_bytes=40_000_000)) as one:
        yield one


def ask(server: Served, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    own = {"input": "hello"} if path.endswith("responses") else {"messages": SAID}
    return httpx.post(server.url + path, json={"model": "tiny", **own, **fields}, timeout=120)


def refusal(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def formatted(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


def function(name: str, parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


# What is hostile.


class Bystander(threading.Thread):
    """Another client, who streams all the time, and the longest time in which nothing came."""

    def __init__(self, url: str) -> None:
        super().__init__(name="bystander")
        self.url, self.over, self.tokens, self.longest_gap_s = url, False, 0, 0.0

    def run(self) -> None:
        asked = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 200, "stream": True}
        while not self.over:
            with httpx.stream(
                "POST",
                self.url + "/v1/completions",
                json=asked | {"ignore_eos": True},
                timeout=60,
            ) as stream:
                self._read(stream)

    def _read(self, stream: httpx.Response) -> None:
        last_s = time.monotonic()
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                self.tokens += 1
                self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - last_s)
                last_s = time.monotonic()
            if self.over:
                break


def refers(levels: int) -> dict[str, Any]:
    """Each level refers to the next one twice."""
    defs = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 2} for n in range(levels)}
    return {"$defs": defs | {f"l{levels}": {"type": "null"}}, "$ref": "#/$defs/l0"}


def chained(levels: int) -> dict[str, Any]:
    """Each level is an object with the next one in it."""
    defs = {f"l{n}": {"properties": {"x": {"$ref": f"#/$defs/l{n + 1}"}}} for n in range(levels)}
    return {"$defs": defs | {f"l{levels}": {"type": "null"}}, "$ref": "#/$defs/l0"}


def rules(count: int) -> str:
    """Each rule needs the next one."""
    return "\n".join(
        ("start: r0", *(f"r{n:x}: r{n + 1:x}" for n in range(count)), f'r{count:x}: "x"')
    )


def doubling(levels: int) -> str:
    """A terminal of two to the power of `levels` letters."""
    rules = "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(levels))
    return f'start: A0\n{rules}\nA{levels}: "x"'


HOSTILE: dict[str, dict[str, Any]] = {
    "optional letters": {"regex": "(a?){1000}a{1000}"},
    "repeated repeats": {"regex": "(x{1000}){1000}"},
    "a billion letters": {"regex": "x{1000000000}"},
    "many alternatives": {"regex": "|".join(f"alternative {n}" for n in range(20_000))},
    "a long choice": {"choice": ["x" * 200_000]},
    "many choices": {"choice": [f"value {n}" for n in range(40_000)]},
    "an enormous enum": {"json": {"enum": [f"value {n}" for n in range(40_000)]}},
    "ten thousand branches": {
        "json": {"anyOf": [{"properties": {f"p{n}": {}}} for n in range(10_000)]}
    },
    "many properties": {"json": {"properties": {f"p{n}": {} for n in range(10_000)}}},
    "deep references": {"json": refers(2_000)},
    "a chain of objects": {"json": chained(1_500)},
    "a chain of rules": {"grammar": rules(2_000)},
    "references without an end": {"json": {"$ref": "#"}},
    "deep": {"json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "multiples": {"json": {"type": "integer", "multipleOf": 99_999_989}},
    "a grammar that doubles": {"grammar": doubling(15)},
    "a grammar that doubles on": {"grammar": doubling(40)},
    "a grammar of counts": {"grammar": 'root ::= ("a" | "b"){1,5000} "c"{3000}'},
    "a schema in a grammar": {"grammar": 'start: %json {"multipleOf": 99999989}'},
}


LONGER = ("a grammar of counts", "a grammar that doubles on", "repeated repeats", "a long choice")


@pytest.mark.parametrize(
    "names",
    [
        [name for name in HOSTILE if name not in LONGER],
        pytest.param(LONGER, marks=pytest.mark.slow),
    ],
    ids=["most", "those that take longer"],
)
def test_hostile_forms_are_refused_soon_and_stop_nobody(
    server: Served, names: Sequence[str]
) -> None:
    """The processor's time is bounded for each; on a machine under load it takes longer."""
    other = Bystander(server.url)
    other.start()
    try:
        for name in names:
            start_s, before = time.monotonic(), other.tokens
            error = refusal(ask(server, structured_outputs=HOSTILE[name], max_tokens=10))
            took_s = time.monotonic() - start_s

            assert error["param"] == "structured_outputs", name
            assert error["hint"], name
            assert len(error["message"]) < 500, name
            assert took_s < 20, name
            assert took_s < 1 or other.tokens > before, name
    finally:
        other.over = True
        other.join(60)

    assert not other.is_alive()
    assert other.longest_gap_s < GAP_S


@pytest.mark.slow
def test_without_the_limit_of_time_a_form_that_takes_long_is_taken(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: it is the limit that refuses it."""
    asked = {"grammar": doubling(11)}
    grammars = server.server.grammars
    assert grammars is not None
    monkeypatch.setattr(grammars, "_seconds_max", 0.2)
    assert "to prepare" in refusal(ask(server, structured_outputs=asked, max_tokens=3))["message"]
    monkeypatch.setattr(grammars, "_seconds_max", 1_000)

    assert ask(server, structured_outputs=asked, max_tokens=3).status_code == 200


UNBOUNDED = """
import json, sys
from test_structured_server import chained
from test_grammar import grammars, schema
import tierline.engine.grammar

if sys.argv[1] == "unbounded":
    tierline.engine.grammar.require_bounded = lambda schema: None
try:
    grammars().compile(schema(chained(2_500)))
except tierline.engine.grammar.RequestError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [True, False])
def test_without_the_limit_of_levels_the_process_would_end(bounded: bool) -> None:
    """The control: the library's stack overflows, and nothing in the process can help."""
    word = "bounded" if bounded else "unbounded"
    command = [sys.executable, "-c", UNBOUNDED, word]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert ("nested too deeply" in ended.stdout) == bounded
    assert (ended.returncode == 0) == bounded


# What a refusal names.

NOT = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
FINE = {"type": "object", "properties": {"a": {"type": "string"}}}
NAMED: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    (
        "/v1/chat/completions",
        {"response_format": formatted(NOT, strict=True)},
        "response_format.json_schema.schema",
        "not",
    ),
    (
        "/v1/chat/completions",
        {"response_format": formatted({"type": "strin"})},
        "response_format.json_schema.schema",
        "strin",
    ),
    (
        "/v1/chat/completions",
        {"structured_outputs": {"regex": "("}},
        "structured_outputs",
        "unclosed",
    ),
    (
        "/v1/chat/completions",
        {"tools": [function("fine", FINE), function("wrong", {"type": "strin"})]},
        "tools.1.function.parameters",
        "'wrong'.*strin",
    ),
    (
        "/v1/chat/completions",
        {"tools": [function("a", FINE), function("b", NOT, strict=True)]},
        "tools.1.function.parameters",
        "'b'.*uses not",
    ),
    (
        "/v1/chat/completions",
        {"tools": [function("large", {"properties": {f"p{n}": {} for n in range(2_001)}})]},
        "tools.0.function.parameters",
        "'large'.*2001 properties",
    ),
    (
        "/v1/chat/completions",
        {"tools": [function(f"t{n}", {"description": "x" * 30_000}) for n in range(10)]},
        "tools",
        "bytes",
    ),
    (
        "/v1/responses",
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": NOT, "strict": True}}},
        "text.format.schema",
        "not",
    ),
    (
        "/v1/responses",
        {"tools": [{"type": "function", "name": "b", "parameters": NOT, "strict": True}]},
        "tools.0.parameters",
        "'b'.*uses not",
    ),
)


@pytest.mark.parametrize(("path", "asked", "param", "said"), NAMED)
def test_a_refusal_names_what_the_caller_wrote(
    server: Served, path: str, asked: dict[str, Any], param: str, said: str
) -> None:
    error = refusal(ask(server, path, **asked))

    assert error["param"] == param
    assert re.search(said, error["message"]), error
    assert error["hint"]
    assert not re.search(r"call_\d|value_\d|\bOPEN\b|%json", error["message"])


# What is at odds with a form.


@pytest.mark.parametrize("param", ["ignore_eos", "min_tokens"])
@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"tools": [function("fine", FINE)], "tool_choice": "required"},
    ],
    ids=["format", "choice", "tools"],
)
def test_what_forbids_the_end_is_refused_with_a_form(
    server: Served, param: str, form: dict[str, Any]
) -> None:
    """Alone (the control) each is taken."""
    asked: dict[str, Any] = {"ignore_eos": True} if param == "ignore_eos" else {"min_tokens": 2}
    error = refusal(ask(server, max_tokens=60, **form, **asked))

    assert error["param"] == param
    assert "end of the answer" in error["message"]
    assert error["hint"]
    assert ask(server, max_tokens=3, **asked).status_code == 200
    assert ask(server, max_tokens=3, **form, min_tokens=0).status_code == 200


# What strict says.

SOFT: dict[str, dict[str, Any]] = {
    "not": {"not": {"type": "null"}},
    "uniqueItems": {"type": "array", "uniqueItems": True, "maxItems": 3},
    "format": {"type": "string", "format": "zip", "maxLength": 5},
    "overlapping": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "look-ahead": {"type": "string", "pattern": "^(?=a)[ab]{2}$"},
    "back reference": {"type": "string", "pattern": r"^(a)\1$"},
    "condition": {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
}


@pytest.mark.parametrize(
    "name", ["not", *(pytest.param(n, marks=pytest.mark.slow) for n in SOFT if n != "not")]
)
def test_what_cannot_be_enforced_is_refused_only_where_strict(server: Served, name: str) -> None:
    """Else the rest of the schema holds, as far as an answer that has to stay short shows."""
    schema = closed({"a": {"enum": ["x", "y"]}, "b": SOFT[name]})
    for strict in ({}, {"strict": False}):
        answer = ask(server, response_format=formatted(schema, **strict), max_tokens=90)
        assert answer.status_code == 200, answer.text
        made = answer.json()["choices"][0]["message"]["content"]
        assert json.loads(made).keys() == {"a", "b"}
        assert json.loads(made)["a"] in ("x", "y")
        offered = [function("f", schema, **strict)]
        called = ask(server, tools=offered, tool_choice="required", max_tokens=20)
        assert called.status_code == 200, called.text
    error = refusal(ask(server, response_format=formatted(schema, strict=True)))
    offered = [function("f", schema, strict=True)]
    tool_error = refusal(ask(server, tools=offered, tool_choice="required"))

    assert error["param"] == "response_format.json_schema.schema"
    assert tool_error["param"] == "tools.0.function.parameters"


# Many answers at once.


def answers(server: Served, names: Sequence[str], seeds: Sequence[int], **own: Any) -> list[Any]:
    """(schema's name, text) of random answers, asked for at once."""

    def one(name: str, seed: int) -> tuple[str, str]:
        asked = {"response_format": formatted(SCHEMAS[name], strict=True), **own}
        answer = ask(server, temperature=1.5, seed=seed, max_tokens=60 + 15 * seed, **asked)
        assert answer.status_code == 200, answer.text
        return name, answer.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda pair: one(*pair), [(n, s) for n in names for s in seeds]))


@pytest.mark.parametrize(
    ("names", "seeds"),
    [
        (("tree", "either", "date"), range(3)),
        pytest.param(tuple(SCHEMAS), range(10), marks=pytest.mark.slow),
    ],
    ids=["few", "many"],
)
def test_random_answers_over_http_are_whole(
    server: Served, names: Sequence[str], seeds: Sequence[int]
) -> None:
    made = answers(server, names, seeds)

    assert len(made) == len(names) * len(seeds)
    assert [(name, text) for name, text in made if not is_whole(text, SCHEMAS[name])] == []


def test_without_a_form_random_answers_are_none(server: Served) -> None:
    """The control."""
    made = answers(server, ("tree", "either"), range(3), response_format=None)

    assert not any(is_whole(text, SCHEMAS[name]) for name, text in made)
