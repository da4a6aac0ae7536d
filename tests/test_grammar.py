"""A mask allows what the grammar allows and what a budget still holds: answers are whole."""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from demo_model import demo_model
from engines import finish, tiny_engine
from tierline.base.errors import RequestError
from tierline.engine.checkpoint import open_checkpoint
from tierline.engine.grammar import Grammars, Matcher, Wanted
from tierline.engine.sampling import SamplingParams
from tierline.engine.tokenizer import Tokenizer, load_tokenizer
from tiny_checkpoints import tiny_checkpoint

PAD = 37  # logits beyond the tokenizer
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer"},
        "child": {"$ref": "#"},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object with these members and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, Any] = {
    "object": closed({"name": {"type": "string"}, "n": {"type": "integer"}}),
    "optional": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "null"}}},
    "nested": closed({"a": closed({"b": closed({"c": {"type": "boolean"}})})}),
    "tree": TREE,
    "forest": {
        "$defs": {"t": closed({"v": {"type": "integer"}, "of": {"items": {"$ref": "#/$defs/t"}}})},
        "$ref": "#/$defs/t",
    },
    "list": {"type": "array", "items": {"type": "number"}},
    "bounded": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "pair": {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "integer"}],
        "items": False,
        "minItems": 2,
    },
    "enum": {"enum": ["red", "green", "an azure that nobody knows", 7, None]},
    "enums": closed({"c": {"enum": ["red", "green"]}, "d": {"const": "x"}}),
    "either": {"anyOf": [{"type": "string"}, closed({"id": {"type": "integer"}})]},
    "null or list": {
        "anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 3}]
    },
    "date": {"type": "string", "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
    "address": {"type": "string", "pattern": r"^[a-z]+@x\.com$"},
    "long text": {"type": "string", "minLength": 40},
    "short text": {"type": "string", "maxLength": 5},
    "number": {"type": "integer", "minimum": 1000, "maximum": 99999},
    "fraction": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "map": {"type": "object", "additionalProperties": {"type": "number"}},
    "uuid": closed({"id": {"type": "string", "format": "uuid"}}),
}


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(open_checkpoint(demo_model()))


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), vocabulary=tokenizer().vocabulary_size + PAD)


def schema(value: Any) -> Wanted:
    return Wanted(kind="json_schema", text=json.dumps(value))


def accepts(wanted: Wanted, text: str) -> bool:
    """Token by token as the model would write it, then the end."""
    matcher = grammars().compile(wanted).matcher()
    for token in tokenizer().encode(text, special=False):
        if matcher.over or not matcher.mask(10**6)[token]:
            return False
        matcher.accept(token)
    return matcher.over or bool(matcher.mask(10**6)[min(tokenizer().eos_ids)])


def random_answer(
    matcher: Matcher, *, budget_tokens: int, seed: int, closes: bool = True, masked: bool = True
) -> str:
    """What logits without any sense say; the controls do without closing, or without masks."""
    generator = torch.Generator().manual_seed(seed)
    said: list[int] = []
    while len(said) < budget_tokens and not (masked and matcher.over):
        allowed = torch.ones(tokenizer().vocabulary_size, dtype=torch.bool)
        if masked:
            allowed = matcher.mask(budget_tokens - len(said) if closes else 10**9)
        logits = torch.randn(len(allowed), generator=generator).masked_fill_(~allowed, -torch.inf)
        token = int(logits.argmax())
        if masked:
            matcher.accept(token)
        if token in tokenizer().eos_ids:
            break
        said.append(token)
    return tokenizer().decode(said, skip_special=False)


def is_whole(text: str, value: Any) -> bool:
    """Whether a text is JSON of a schema."""
    try:
        jsonschema.Draft202012Validator(value).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


SPARE_TOKENS = {"few": (0, 2, 20), "many": (0, 0, 1, 2, 3, 5, 8, 16, 32, 64)}


@pytest.mark.parametrize("spare", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_are_whole_in_any_budget(name: str, spare: str) -> None:
    """Answers for each of twenty schemas: from the shortest budget to a wide one."""
    grammar = grammars().compile(schema(SCHEMAS[name]))
    assert grammar.way is not None
    for seed, spare_tokens in enumerate(SPARE_TOKENS[spare]):
        budget_tokens = max(1, len(grammar.way) + spare_tokens)
        text = random_answer(grammar.matcher(), budget_tokens=budget_tokens, seed=seed)

        assert is_whole(text, SCHEMAS[name]), (spare_tokens, text)


def test_without_the_way_out_answers_are_cut() -> None:
    """The control: a matcher that knows no budget is cut in the middle."""
    grammar = grammars().compile(schema(TREE))
    texts = [
        random_answer(grammar.matcher(), budget_tokens=12, seed=seed, closes=False)
        for seed in range(5)
    ]

    assert not all(is_whole(text, TREE) for text in texts)


def test_without_masks_answers_are_none() -> None:
    """The control: what is ignored holds nothing."""
    grammar = grammars().compile(schema(TREE))
    texts = [
        random_answer(grammar.matcher(), budget_tokens=12, seed=seed, masked=False)
        for seed in range(5)
    ]

    assert not any(is_whole(text, TREE) for text in texts)


JSON_ROOT = r"""
root ::= "{" ws "\"" [a-z]+ "\"" ws ":" ws number "}"
number ::= "-"? [0-9]+
ws ::= " "?
"""
TEXTS = (
    (Wanted(kind="json_object"), '{"a": [1, 2.5e3, null, {"b": "c"}]}', True),
    (Wanted(kind="json_object"), "[1]", False),
    (Wanted(kind="json_object"), '{"say": "\\"quoted\\" \\\\ \\n \\u0001 end"}', True),
    (Wanted(kind="json_object"), '{"naïve": "日本 🙂é"}', True),
    (Wanted(kind="json_object"), '{"a": 1', False),
    (Wanted(kind="json_object"), '{"a":' + " " * 60 + "1}", False),
    (Wanted(kind="json_object"), '{\n    "a": [\n        1\n    ]\n}', True),
    (schema({"type": "string"}), '"word"', True),
    (schema({"type": "string"}), '"ends in escape\\\\"', True),
    (schema({"type": "string"}), '"line\nbreak"', False),
    (schema(closed({"a": {"type": "string"}})), '{"a": "b", "c": 1}', False),
    (schema({"type": "object", "properties": {"a": {"type": "string"}}}), '{"b": 1}', True),
    (Wanted(kind="regex", text=r"[0-9]{3}-[a-z]+"), "123-abc", True),
    (Wanted(kind="regex", text=r"[0-9]{3}-[a-z]+"), "12-abc", False),
    (Wanted(kind="regex", text=r"^ab$"), "ab", True),
    (Wanted(kind="regex", text=r"\p{Greek}+"), "λόγος", True),
    (Wanted(kind="choice", text=("yes", "no", "yes, but")), "yes, but", True),
    (Wanted(kind="choice", text=("yes", "no", "yes, but")), "yes", True),
    (Wanted(kind="choice", text=("yes", "no")), "maybe", False),
    (Wanted(kind="choice", text=('a"b\\c', "x\ny", "🙂 (.*)")), 'a"b\\c', True),
    (Wanted(kind="choice", text=('a"b\\c', "x\ny", "🙂 (.*)")), "x\ny", True),
    (Wanted(kind="choice", text=('a"b\\c', "x\ny", "🙂 (.*)")), "🙂 (.*)", True),
    (Wanted(kind="choice", text=('a"b\\c', "x\ny", "🙂 (.*)")), "🙂 xy", False),
    (Wanted(kind="ebnf", text=JSON_ROOT), '{"ab": -12}', True),
    (Wanted(kind="ebnf", text=JSON_ROOT), '{"ab": x}', False),
    (Wanted(kind="ebnf", text='start: "a" NUMBER\nNUMBER: /[0-9]+/'), "a17", True),
    (Wanted(kind="lark", text='start: "call " %json {"type": "object"}'), 'call {"a": 1}', True),
)


@pytest.mark.parametrize(("wanted", "text", "fits"), TEXTS)
def test_a_mask_allows_what_the_grammar_says(wanted: Wanted, text: str, fits: bool) -> None:
    assert accepts(wanted, text) == fits


def test_a_string_may_end_behind_letters_and_escapes() -> None:
    for begun in ('"', '"abc', '"a\\n', '"é', '"\\\\', '"\\u0001'):
        matcher = grammars().compile(schema({"type": "string"})).matcher()
        for token in tokenizer().encode(begun, special=False):
            matcher.accept(token)
        mask = matcher.mask(100)

        assert mask[tokenizer().encode('"', special=False)[0]], begun
        assert not mask[tokenizer().vocabulary_size :].any()
        assert not mask[[t for t in range(17) if tokenizer().is_special(t)]].any()


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def regex(text: str) -> Wanted:
    return Wanted(kind="regex", text=text)


def as_text(text: str) -> Wanted:
    return Wanted(kind="json_schema", text=text)


REFUSED = {
    "uniqueItems": (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "not": (schema({"not": {"type": "string"}}), "not"),
    "if": (schema({"if": {}, "then": {}}), "if"),
    "oneOf": (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    "format": (schema({"type": "string", "format": "zip"}), "zip"),
    "type": (schema({"type": "strin"}), "strin"),
    "no schema": (schema([]), "object or boolean"),
    "no JSON": (as_text("{"), "not JSON"),
    "nothing": (schema(False), "no value"),
    "bounds": (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "no such": (schema({"$ref": "#/$defs/none"}), "none"),
    "elsewhere": (schema({"$ref": "http://example.com/s.json"}), "example.com"),
    "x-guidance": (schema({"x-guidance": {"lenient": True}, "not": {}}), "x-guidance"),
    "self": (schema({"$ref": "#"}), "finite"),
    "endless": (schema(closed({"a": {"$ref": "#"}})), "finite"),
    "deep": (as_text(nested(1_000)), "recursion limit|nested"),
    "very deep": (as_text(nested(20_000)), "nested"),
    "rather deep": (as_text(nested(200)), "nested"),
    "not a number": (as_text('{"const": NaN}'), "not JSON"),
    "no character": (as_text('{"enum": ["\\ud800"]}'), "not JSON"),
    "large": (as_text('{"enum": ["' + "x" * 256_000 + '"]}'), "bytes"),
    "many values": (schema({"enum": [f"{i} value" for i in range(60_000)]}), "bytes"),
    "many properties": (schema({"properties": {f"p{i}": {} for i in range(2_001)}}), "2001 prop"),
    "multiples": (schema({"items": [{"multipleOf": 0.00009973}] * 3}), "multipleOf"),
    "JSON in Lark": (Wanted(kind="ebnf", text='start: %json {"multipleOf": 99999989}'), "%json"),
    "huge": (regex("(x{1000}){1000}"), "too many|too big|complex"),
    "huge too": (regex("((x{100}){100}){100}"), "too many|too big|complex"),
    "look-ahead": (regex("(?=a)b"), "look-around"),
    "backreference": (regex(r"(a)\1"), "backreference"),
    "parentheses": (regex("(" * 20_000 + ")" * 20_000), "nest"),
    "open": (regex("(a"), "unclosed"),
    "no choice": (Wanted(kind="choice", text=()), "empty"),
    "no grammar": (Wanted(kind="ebnf", text="what is this"), "GBNF"),
    "nested grammar": (Wanted(kind="ebnf", text="start: " + "(" * 9_000), "nested"),
    "nested GBNF": (Wanted(kind="ebnf", text="root ::= " + "(" * 9_000), "nested|GBNF"),
    "no end": (Wanted(kind="ebnf", text="start: start"), "finite"),
    "surrogate": (Wanted(kind="regex", text="\ud800"), "Unicode"),
    "kind": (Wanted(kind="jsn", text=""), "jsn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name: str) -> None:
    wanted, said = REFUSED[name]
    start_s = time.monotonic()
    with pytest.raises(RequestError, match=said) as refused:
        grammars().compile(wanted)

    assert refused.value.hint or name == "kind"
    assert len(str(refused.value)) < 500
    assert time.monotonic() - start_s < 20  # bounded: a machine under load is no failure


def test_what_is_lenient_ignores_it() -> None:
    """The control: a grammar that is told to ignore a keyword allows what it forbids."""
    for value, text in (
        ({"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}}, "[1,1]"),
        ({"not": {"type": "string"}}, '"a"'),
        ({"type": "string", "pattern": "^(?=b)[ab]$"}, '"a"'),
    ):
        with pytest.raises(RequestError):
            grammars().compile(schema(value))

        assert accepts(replace(schema(value), lenient=True), text)


@pytest.mark.parametrize(
    "wanted",
    [
        regex("(a+)+$"),
        regex(".*a.{200}"),
        schema({"type": "string", "pattern": "^(a+)+$"}),
        schema({"enum": [f"value {i}" for i in range(10_000)]}),
        as_text(nested(40)),
    ],
    ids=["backtracking", "automaton", "pattern", "many values", "deep"],
)
def test_what_is_hard_and_possible_works(wanted: Wanted) -> None:
    text = random_answer(grammars().compile(wanted).matcher(), budget_tokens=60, seed=1)

    assert text


def test_what_takes_too_long_is_refused() -> None:
    """The clock is an argument: here each look at it takes a second."""
    ticks: Iterator[float] = iter(range(100))
    slow = Grammars(
        tokenizer(),
        vocabulary=tokenizer().vocabulary_size,
        seconds_max=0.5,
        now_s=lambda: next(ticks),
    )
    with pytest.raises(RequestError, match="takes more than"):
        slow.compile(Wanted(kind="json_object"))


def test_masks_that_take_too_long_end_their_answer() -> None:
    """The clock is an argument: at first it stands (the control), then each look takes 50 ms."""
    looks_s, now_s = 0.0, 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += looks_s
        return now_s

    own = Grammars(tokenizer(), vocabulary=tokenizer().vocabulary_size, now_s=clock)
    matcher = own.compile(schema(TREE)).matcher()
    for token in tokenizer().encode('{"name":"x', special=False):
        assert matcher.mask(10**6)[token]
        matcher.accept(token)
    looks_s = 0.05
    masks = (matcher.mask(10**6) for _ in range(20))
    with pytest.raises(RequestError, match="take too long"):
        list(masks)


def test_matchers_know_nothing_of_each_other() -> None:
    """Answers drawn at once, on threads, are those drawn one after the other."""
    grammar = grammars().compile(schema(TREE))

    def drawn(seed: int) -> str:
        return random_answer(grammar.matcher(), budget_tokens=24, seed=seed)

    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(drawn, range(8)))

    assert at_once == [drawn(seed) for seed in range(8)]
    assert len(set(at_once)) > 1
    assert grammars().compile(schema(TREE)) is grammar


def test_a_matcher_that_reaches_a_limit_takes_no_other_along() -> None:
    """Copies share a lexer: when one is spoiled, the others go on with a new one."""
    grammar = grammars().compile(schema(closed({"deed": {"type": "string", "minLength": 7}})))
    spoiled, other = grammar.matcher(), grammar.matcher()
    begun = tokenizer().encode('{"deed":"done', special=False)
    for token in begun[:-1]:
        other.accept(token)
    other._inner.consume_token(0)  # special: the library is in error from here on
    spoiled._inner.consume_token(0)

    assert other._inner.is_error()
    assert not other.over
    other.accept(begun[-1])
    expected = grammar.matcher()
    for token in begun:
        expected.accept(token)
    assert torch.equal(other.mask(10**6), expected.mask(10**6))
    assert torch.equal(spoiled.mask(10**6), grammar.matcher().mask(10**6))


@pytest.fixture(scope="module")
def engine_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("grammar"))


@pytest.mark.parametrize("constrained", [True, False])
def test_the_engine_gives_whole_answers(engine_path: Path, constrained: bool) -> None:
    """Random weights, byte tokens; without the grammar (the control) nothing parses."""
    engine = tiny_engine(engine_path, kv_bytes=8_000_000)
    own = load_tokenizer(open_checkpoint(engine_path))
    compiled = Grammars(own, vocabulary=engine.sampler.vocabulary)
    values = [SCHEMAS[name] for name in ("object", "tree", "list", "enum", "either", "map")]
    asked: dict[int, Any] = {}
    for value in values:
        grammar = compiled.compile(schema(value)) if constrained else None
        for seed, spare_tokens in enumerate((0, 3, 30)):
            way = compiled.compile(schema(value)).way
            assert way is not None
            params = SamplingParams(
                temperature=1.0, seed=seed, max_tokens=max(1, len(way) + spare_tokens)
            )
            asked[engine.add([1, 2, 3], params, grammar=grammar)] = value
    texts = dict.fromkeys(asked, "")
    for delta in finish(engine):
        texts[delta.request_id] += delta.text

    whole = [is_whole(texts[number], value) for number, value in asked.items()]
    assert all(whole) if constrained else not any(whole)
