"""Any weights call tools: under a grammar of calls, what is written parses and validates."""

from typing import Any

import jsonschema
import pytest
import torch

from engines import finish, tiny_engine
from tierline.engine import closing
from tierline.engine.engine import Engine
from tierline.engine.grammar import Grammar, Grammars
from tierline.engine.sampling import SamplingParams
from tierline.server.tools import Choice, Tool, tool_format
from tiny_checkpoints import tiny_checkpoint
from tool_checks import calls_of, read, text_of

FORMATS = ("hermes", "llama3_json", "qwen3_coder")
TOOLS = (
    Tool(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "days"],
        },
    ),
    Tool(
        name="add",
        parameters={
            "type": "object",
            "properties": {
                "terms": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
                "exact": {"type": "boolean"},
            },
            "required": ["terms"],
        },
    ),
    Tool(name="now"),
)
SCHEMAS = {tool.name: dict(tool.parameters) for tool in TOOLS}
SEEDS = 2
TOKENS = 220


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tiny_checkpoint("llama", tmp_path_factory.mktemp("tools")))


def said(engine: Engine, form: str, choice: Choice) -> list[str]:
    """What random weights say under a choice, once for each seed."""
    assert engine.tokenizer is not None
    spoken = tool_format(None, named=form)
    wanted = spoken.wanted(TOOLS, choice)
    grammars = Grammars(engine.tokenizer, vocabulary=engine.vocabulary)
    grammar = None if wanted is None else grammars.compile(wanted)
    asked = [
        engine.add(
            [1, 2, 3],
            SamplingParams(
                temperature=1.0,
                seed=seed,
                max_tokens=TOKENS,
                skip_special_tokens=spoken.skip_special_tokens,
            ),
            grammar=grammar,
        )
        for seed in range(SEEDS)
    ]
    texts = dict.fromkeys(asked, "")
    for delta in finish(engine):
        texts[delta.request_id] += delta.text
    return list(texts.values())


def valid(form: str, text: str) -> list[tuple[str, Any]]:
    """The calls of an answer that is nothing but calls; raises when it is not."""
    pieces = read(tool_format(None, named=form), TOOLS, [text])
    calls = calls_of(pieces)
    assert calls
    assert not text_of(pieces)
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
    return calls


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_a_required_call_is_made(engine: Engine, form: str, parallel: bool) -> None:
    answers = said(engine, form, Choice(kind="required", parallel=parallel))

    counts = [len(valid(form, text)) for text in answers]
    assert parallel or set(counts) == {1}


@pytest.mark.parametrize(
    "budget_tokens", [170, *(pytest.param(n, marks=pytest.mark.slow) for n in (70, 220))]
)
@pytest.mark.parametrize("form", FORMATS)
def test_a_budget_closes_calls(engine: Engine, form: str, budget_tokens: int) -> None:
    """One call or more, of logits without any sense, whatever the format."""
    grammar = parallel_calls(engine, form)
    assert grammar.way is not None
    assert len(grammar.way) <= budget_tokens
    for seed in (7, 19):
        assert valid(form, drawn(engine, grammar, budget_tokens=budget_tokens, seed=seed))


def test_a_way_that_takes_names_for_alike_finds_none(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: `now>` and `add>` allow the same token, and only one of them ends soon."""
    monkeypatch.setattr(closing, "_forced", lambda node: b"")

    assert parallel_calls(engine, "qwen3_coder").way is None


def parallel_calls(engine: Engine, form: str) -> Grammar:
    """The grammar of one call or more."""
    assert engine.tokenizer is not None
    wanted = tool_format(None, named=form).wanted(TOOLS, Choice(kind="required"))
    assert wanted is not None
    return Grammars(engine.tokenizer, vocabulary=engine.vocabulary).compile(wanted)


def drawn(engine: Engine, grammar: Grammar, *, budget_tokens: int, seed: int) -> str:
    """An answer of random logits."""
    assert engine.tokenizer is not None
    matcher, said = grammar.matcher(), list[int]()
    chance = torch.Generator().manual_seed(seed)
    while len(said) < budget_tokens and not matcher.over:
        allowed = matcher.mask(budget_tokens - len(said))
        logits = torch.randn(len(allowed), generator=chance).masked_fill_(~allowed, -torch.inf)
        token = int(logits.argmax())
        if token in engine.eos_ids:
            break
        matcher.accept(token)
        said.append(token)
    return engine.tokenizer.decode(said, skip_special=False)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_named_function_is_called(engine: Engine, form: str) -> None:
    answers = said(engine, form, Choice(kind="function", name="add"))

    assert {name for text in answers for name, _ in valid(form, text)} == {"add"}


def test_without_the_grammar_nothing_is_called(engine: Engine) -> None:
    """Negative control: it is the grammar that makes calls of random weights."""
    for text in said(engine, "hermes", Choice(kind="none")):
        with pytest.raises(AssertionError):
            valid("hermes", text)
