"""A mask allows what the grammar allows, and what a budget still holds: answers are whole."""

import json
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch
from tests.demo_model import demo_model

from tierline.base.errors import RequestError
from tierline.engine.checkpoint import open_checkpoint
from tierline.engine.grammar import Grammars, Wanted
from tierline.engine.tokenizer import Tokenizer, load_tokenizer

PAD = 37  # logits beyond the tokenizer
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "child": {"$ref": "#"},
    },
    "required": ["name"],
    "additionalProperties": False,
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
    ids = tokenizer().encode(text, special=False)
    for token in ids:
        if matcher.over or not matcher.mask(10**6)[token]:
            return False
        matcher.accept(token)
    return matcher.over or bool(matcher.mask(10**6)[min(tokenizer().eos_ids)])


def random_answer(wanted: Wanted, *, budget_tokens: int, seed: int) -> str:
    """What logits without any sense say."""
    matcher = grammars().compile(wanted).matcher()
    generator = torch.Generator().manual_seed(seed)
    said: list[int] = []
    while len(said) < budget_tokens and not matcher.over:
        allowed = matcher.mask(budget_tokens - len(said)).nonzero()[:, 0]
        token = int(allowed[torch.randint(len(allowed), (1,), generator=generator)])
        matcher.accept(token)
        if token in tokenizer().eos_ids:
            break
        said.append(token)
    return tokenizer().decode(said, skip_special=False)


@pytest.mark.parametrize("spare_tokens", [0, 1, 3, 10, 40])
def test_random_answers_are_whole(spare_tokens: int) -> None:
    way = grammars().compile(schema(PERSON)).way
    assert way is not None
    for seed in range(4):
        text = random_answer(schema(PERSON), budget_tokens=len(way) + spare_tokens, seed=seed)

        jsonschema.validate(json.loads(text), PERSON)


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(RequestError, match="uniqueItems"):
        grammars().compile(schema({"type": "array", "uniqueItems": True}))
