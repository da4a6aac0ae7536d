"""A model's calls of tools are what the caller allows, and reach the caller as they come."""

import json
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.errors import InputError, RequestError
from tierline.server.tool_parser import CallArguments, CallEnd, CallStart, Piece, TextPiece
from tierline.server.tools import Choice, Tool, tool_format
from tool_checks import (
    EOS,
    accepts,
    calls_of,
    compile_error,
    read,
    rendered,
    text_of,
    vocabulary,
)

FORMATS = ("hermes", "llama3_json", "qwen3_coder")
WEATHER = Tool(
    name="get_weather",
    description="The weather of a place.",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "unit": {"enum": ["C", "F", None]},
            "at": {"anyOf": [{"type": "number"}, {"type": "string"}]},
            "hours": {"type": "array", "items": {"$ref": "#/$defs/hour"}},
        },
        "required": ["city", "days"],
        "$defs": {"hour": {"type": "integer"}},
    },
)
NOW = Tool(name="now")
TOOLS = (WEATHER, NOW)
WHOLE = {"city": 'Lüneburg "West"\n{', "days": 2, "unit": "C", "at": "noon", "hours": [1, 2]}
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def lark(form: str, choice: Choice, *, tools: tuple[Tool, ...] = TOOLS) -> str:
    wanted = tool_format(None, named=form).wanted(tools, choice)
    assert wanted is not None
    return str(wanted.text)


# Formats.


@pytest.mark.parametrize(
    ("template", "name", "templated"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "hermes", False),
        ("{% if tools %}<tool_call>{% endif %}", "hermes", True),
        ("{{ tools }} <tool_call>\n<function=x>\n<parameter=y>", "qwen3_coder", True),
        ('{{ tools }} <|start_header_id|> {"name": x, "parameters": y}', "llama3_json", True),
        ("{{ tools }} [TOOL_CALLS]", "hermes", False),  # calls of a kind that is not read here
        (None, "hermes", False),
    ],
)
def test_a_format_is_found_from_the_template(
    template: str | None, name: str, templated: bool
) -> None:
    found = tool_format(template)

    assert (found.name, found.templated) == (name, templated)
    assert tool_format(template, named="llama3_json").name == "llama3_json"


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown format of tool calls 'hermse'") as refused:
        tool_format(None, named="hermse")

    assert "hermes" in refused.value.hint


# Grammars.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["required", "auto", "function"])
def test_a_right_call_is_within_the_grammar(form: str, kind: Any) -> None:
    grammar = lark(form, Choice(kind=kind, name="get_weather"))

    assert accepts(grammar, rendered(form, [("get_weather", WHOLE)]))
    assert accepts(grammar, rendered(form, [("get_weather", {"city": "", "days": 1})]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["required", "auto"])
@pytest.mark.parametrize(
    "call",
    [
        ("get_wether", {"city": "a", "days": 1}),
        ("get_weather", {"city": "a"}),
        ("get_weather", {"city": "a", "days": "one"}),
        ("get_weather", {"city": "a", "days": 0}),
        ("get_weather", {"city": "a", "days": 1, "unit": "K"}),
        ("get_weather", {"city": "a", "days": 1, "hours": ["x"]}),
        ("get_weather", {"city": "a", "days": 1, "country": "x"}),
        ("now", {"city": "a"}),
    ],
)
def test_a_wrong_call_is_not(form: str, kind: Any, call: tuple[str, dict[str, Any]]) -> None:
    assert not accepts(lark(form, Choice(kind=kind)), rendered(form, [call]))


@pytest.mark.parametrize("form", FORMATS)
def test_a_choice_bounds_what_is_called_and_how_often(form: str) -> None:
    one = rendered(form, [("now", {})])
    two = rendered(form, [("now", {}), ("get_weather", {"city": "a", "days": 1})])
    grammars = {
        kind: lark(form, Choice(kind=kind, name="get_weather"))  # type: ignore[arg-type]
        for kind in ("auto", "required", "function")
    }
    single = lark(form, Choice(kind="required", parallel=False))
    free_single = lark(form, Choice(kind="auto", parallel=False))

    assert {kind: accepts(text, one) for kind, text in grammars.items()} == {
        "auto": True,
        "required": True,
        "function": False,
    }
    assert accepts(grammars["required"], two)
    assert accepts(grammars["auto"], two)
    assert accepts(single, one)
    assert accepts(free_single, one)
    assert not accepts(single, two)
    assert not accepts(free_single, two)
    for text in ("", "It is noon.", "a < b <tool_cal"):
        assert accepts(grammars["auto"], text)
        assert accepts(free_single, text)
        assert not accepts(grammars["required"], text)
    assert tool_format(None, named=form).wanted(TOOLS, Choice(kind="none")) is None


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
def test_text_around_calls_is_free_and_a_mark_begins_one(form: str) -> None:
    grammar = lark(form, Choice(kind="auto"))
    call = rendered(form, [("now", {})])

    assert accepts(grammar, f"Let me see.\n{call}\nand {call} so")
    assert not accepts(grammar, "Let me see. <tool_call> no")


def test_a_mark_may_be_a_special_token() -> None:
    special = ("<tool_call>", "</tool_call>", "<|python_tag|>")
    tokens = vocabulary(special)
    begin, end, tag = range(EOS + 1, EOS + 4)
    hermes = tool_format(None, named="hermes", special=special)
    llama = tool_format(None, named="llama3_json", special=special)
    body = list(b'{"name": "now", "arguments": {}}')
    llama_body = list(b'{"name": "now", "parameters": {}}')

    assert not hermes.skip_special_tokens
    assert tool_format(None, named="hermes").skip_special_tokens
    for kind in ("required", "auto"):
        wanted = hermes.wanted(TOOLS, Choice(kind=kind))  # type: ignore[arg-type]
        assert wanted is not None
        assert accepts(str(wanted.text), [begin, *body, end], tokens=tokens)
        assert accepts(str(wanted.text), list(CALL.encode()), tokens=tokens)
        assert not accepts(str(wanted.text), [begin, *b"no", end], tokens=tokens)
        wanted = llama.wanted(TOOLS, Choice(kind=kind))  # type: ignore[arg-type]
        assert wanted is not None
        assert accepts(str(wanted.text), [tag, *llama_body], tokens=tokens)
        assert not accepts(str(wanted.text), [tag, *b"no"], tokens=tokens)


def test_text_of_a_format_without_quotes_keeps_its_bounds() -> None:
    code = {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$", "maxLength": 4}
    tool = Tool(
        name="f",
        parameters={"properties": {"code": code}, "required": ["code"]},
        strict=True,
    )
    grammar = lark("qwen3_coder", Choice(kind="required"), tools=(tool,))

    for text, right in {"AB1": True, "AB12": True, "AB123": False, "ab1": False}.items():
        assert accepts(grammar, rendered("qwen3_coder", [("f", {"code": text})])) is right


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "date"},
        {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string"}]},
        {"type": "string", "pattern": "a$|^b"},
    ],
)
def test_what_cannot_be_enforced_is_refused_of_a_strict_tool(schema: dict[str, Any]) -> None:
    parameters = {"properties": {"x": schema}, "required": ["x"]}
    strict = Tool(name="f", parameters=parameters, strict=True)
    loose = Tool(name="f", parameters=parameters)

    with pytest.raises(RequestError, match=r"'f'.*'x'"):
        lark("qwen3_coder", Choice(kind="required"), tools=(strict,))
    assert not compile_error(lark("qwen3_coder", Choice(kind="required"), tools=(loose,)))


@pytest.mark.parametrize("form", ["hermes", "llama3_json"])
def test_an_unknown_keyword_is_refused_of_a_strict_tool_and_left_out_of_others(form: str) -> None:
    parameters = {"properties": {"x": {"not": {"type": "string"}}}}
    for strict in (True, False):
        tool = Tool(name="f", parameters=parameters, strict=strict)
        told = compile_error(lark(form, Choice(kind="required"), tools=(tool,)))

        assert ("not" in told) is strict


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS, Choice(kind="function", name="get_wether"), "unknown tool 'get_wether'"),
        ((), Choice(kind="required"), "no tool to call"),
        ((NOW, NOW), Choice(kind="auto"), "two tools have one name"),
    ],
)
def test_a_choice_without_its_tool_is_refused(
    tools: tuple[Tool, ...], choice: Choice, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        tool_format(None).wanted(tools, choice)


# Parsers.


def call(name: str, arguments: str, *, index: int = 0) -> list[Piece]:
    return [CallStart(index, name), CallArguments(index, arguments), CallEnd(index)]


@pytest.mark.parametrize(
    ("form", "answer", "pieces"),
    [
        ("hermes", "a < b <tool_call> x\n", [TextPiece("a < b <tool_call> x\n")]),
        ("hermes", f"Well.\n{CALL}\n", [TextPiece("Well."), *call("now", "{}")]),
        ("hermes", CALL + CALL, call("now", "{}") + call("now", "{}", index=1)),
        (
            "hermes",
            '<tool_call>\n{"name": "now"}\n</tool_call> x',
            [*call("now", "{}"), TextPiece(" x")],
        ),
        ("hermes", CALL.replace("now", "no"), [TextPiece(CALL.replace("now", "no"))]),
        ("hermes", '<tool_call>{"name": "now", "arguments": []}', None),
        ("hermes", '<tool_call>{"name": "no', None),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a": "\\',
            call("now", '{"a": "\\'),
        ),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a": 1}, "b": 2}</tool_call>',
            [*call("now", '{"a": 1}'), TextPiece(', "b": 2}</tool_call>')],
        ),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>}"}}</tool_call>',
            call("now", '{"a": "</tool_call>}"}'),
        ),
        ("hermes", f"<tool_call>{CALL}", [TextPiece("<tool_call>"), *call("now", "{}")]),
        (
            "llama3_json",
            '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
            call("now", "{}") + call("now", "{}", index=1),
        ),
        (
            "llama3_json",
            '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}',
            call("now", "{}"),
        ),
        ("llama3_json", '{"name": "Ann"}', None),
        ("llama3_json", 'See {"name": "now", "parameters": {}}', None),
        (
            "llama3_json",
            'See <|python_tag|>{"name": "now", "parameters": {}}',
            [TextPiece("See"), *call("now", "{}")],
        ),
        (
            "qwen3_coder",
            "<tool_call><function=now><parameter=a>True</parameter></function></tool_call>",
            call("now", '{"a": true}'),
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=now>\n{}</function>",
            [*call("now", "{}"), TextPiece("\n{}</function>")],
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nRo",
            call("get_weather", '{"city": "Ro'),
        ),
        ("qwen3_coder", "<tool_call>\n<function=get_wether>\n</function>", None),
    ],
)
def test_what_is_read(form: str, answer: str, pieces: list[Piece] | None) -> None:
    spoken = tool_format(None, named=form)
    expected = [TextPiece(answer)] if pieces is None else pieces

    assert read(spoken, TOOLS, [answer]) == expected
    assert read(spoken, TOOLS, answer) == expected  # letter by letter


def test_a_call_streams_as_it_comes() -> None:
    parser = tool_format(None).parser(TOOLS)

    assert parser.push("Well <") == [TextPiece("Well")]
    assert parser.push('tool_call>\n{"name": "get_weather"') == []
    assert parser.push(', "arguments": {"ci') == [
        CallStart(0, "get_weather"),
        CallArguments(0, '{"ci'),
    ]
    assert parser.push('ty": "R') == [CallArguments(0, 'ty": "R')]
    assert parser.push('ome"}}\n</tool') == [CallArguments(0, 'ome"}'), CallEnd(0)]
    assert parser.push("_call>") == []
    assert parser.end() == []


fragments = st.sampled_from(
    [
        CALL,
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        '{"name": "now", "parameters": {}}',
        '{"name": "get_weather", "arguments": {"city": "a\\"b}"',
        "<function=now>",
        "<function=get_weather>\n<parameter=city>\nx\n</parameter>",
        "</function>",
        "<parameter=days>\n2",
        "\n</parameter>",
        "}",
        '"',
        "\\",
        ";",
        "<",
        " \n",
        "text",
    ]
)
answers = st.lists(fragments | st.text(max_size=3), max_size=8).map("".join)


@given(st.sampled_from(FORMATS), answers, st.lists(st.integers(0, 200), max_size=6))
def test_any_split_reads_the_same(form: str, answer: str, cuts: list[int]) -> None:
    spoken = tool_format(None, named=form)
    places = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    parts = [answer[a:b] for a, b in pairwise(places)]
    whole = read(spoken, TOOLS, [answer])

    assert read(spoken, TOOLS, parts) == whole  # INV-SRV-30
    assert read(spoken, TOOLS, answer) == whole
    if not any(isinstance(piece, CallStart) for piece in whole):
        assert text_of(whole) == answer  # INV-SRV-31


def test_a_parser_that_judges_each_part_alone_would_be_seen() -> None:
    """Negative control: without what it holds back, marks that are cut in two are lost."""
    spoken = tool_format(None)

    def forgetful(parts: list[str]) -> list[Piece]:
        return [piece for part in parts for piece in read(spoken, TOOLS, [part])]

    assert forgetful([CALL]) == read(spoken, TOOLS, [CALL])
    assert forgetful([CALL[:5], CALL[5:]]) != read(spoken, TOOLS, [CALL])


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('<>/"\\\n{}'), max_size=12
).filter(lambda text: "</parameter>" not in text)
weather = st.fixed_dictionaries(
    {"city": texts, "days": st.integers(1, 99)},
    optional={
        "unit": st.sampled_from(["C", "F", None]),
        "at": st.floats(allow_nan=False, allow_infinity=False) | st.just("noon"),
        "hours": st.lists(st.integers(), max_size=3),
    },
)
call_lists = st.lists(
    st.tuples(st.just("get_weather"), weather) | st.just(("now", {})), min_size=1, max_size=3
)


@given(st.sampled_from(FORMATS), call_lists)
def test_calls_survive_the_way_out_and_back(form: str, calls: list[tuple[str, Any]]) -> None:
    spoken = tool_format(None, named=form)
    answer = rendered(form, calls)

    pieces = read(spoken, TOOLS, [answer])
    assert calls_of(pieces) == calls
    assert text_of(pieces) == ""
    for name, arguments in calls_of(pieces):
        jsonschema.validate(arguments, WEATHER.parameters if name == "get_weather" else {})


@given(call_lists)
def test_what_is_written_is_within_the_grammar(calls: list[tuple[str, Any]]) -> None:
    ordered = [
        (name, {key: a[key] for key in WEATHER.parameters["properties"] if key in a})
        for name, a in calls
    ]
    for form in FORMATS:
        assert accepts(lark(form, Choice(kind="required")), rendered(form, ordered))


# Messages.

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Time and weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}},
            {
                "id": "b",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome", "days": 1}'},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "noon"},
    {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "sunny"}]},
    {"role": "user", "content": "Thanks."},
]


def test_a_template_that_takes_tools_gets_objects_and_names() -> None:
    told = tool_format("{{ tools }}<tool_call>").messages(TALK, TOOLS)

    assert told[2]["tool_calls"][1]["function"]["arguments"] == {"city": "Rome", "days": 1}
    assert told[2]["content"] == ""
    assert [(m["name"], m["content"]) for m in told[3:5]] == [
        ("now", "noon"),
        ("get_weather", "sunny"),
    ]
    assert TALK[2]["tool_calls"][0]["function"]["arguments"] == "{}"  # the caller's are untouched


def test_llama_gets_one_call_a_message_with_its_result_behind_it() -> None:
    spoken = tool_format('{{ tools }}<|start_header_id|>{"name": x, "parameters": y}')
    told = spoken.messages([*TALK, *TALK[2:5]], TOOLS)

    assert [m["role"] for m in told] == [
        *("system", "user", "assistant", "tool", "assistant", "tool", "user"),
        *("assistant", "tool", "assistant", "tool"),
    ]
    assert all(len(m["tool_calls"]) == 1 for m in told if m["role"] == "assistant")
    assert [m["content"] for m in told if m["role"] == "tool"] == ["noon", "sunny"] * 2


@pytest.mark.parametrize("form", FORMATS)
def test_a_template_without_tools_gets_all_of_it_as_text(form: str) -> None:
    told = tool_format(None, named=form).messages(TALK, TOOLS)
    calls = [("now", {}), ("get_weather", {"city": "Rome", "days": 1})]

    assert [m["role"] for m in told] == ["system", "user", "assistant", "user", "user"]
    assert all(m.keys() == {"role", "content"} for m in told)
    assert told[0]["content"].startswith("Be brief.\n\n")
    assert '"get_weather"' in told[0]["content"]
    assert told[2]["content"] == rendered(form, calls)
    assert "noon" in told[3]["content"]
    assert "sunny" in told[3]["content"]


def test_without_a_system_message_one_is_written() -> None:
    told = tool_format(None).messages(TALK[1:2], TOOLS)

    assert [m["role"] for m in told] == ["system", "user"]
    assert json.dumps(WEATHER.parameters) in told[0]["content"]
    assert tool_format(None).messages(TALK[1:2], ()) == TALK[1:2]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (TALK[3:4], "answers the call 'a', which no message made"),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}],
                }
            ],
            "not one JSON object",
        ),
    ],
)
def test_a_broken_conversation_is_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tool_format(None).messages(messages, TOOLS)
