"""Schemas as people write them: every valid instance is accepted, every invalid one refused.

MaskBench (Guidance, 2025), a sample of 962 schemas with their instances.  What the grammar
library does not support is refused when compiling, by name, and counted.
"""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from test_grammar import grammars, schema, tokenizer
from tierline.base.errors import RequestError
from tierline.engine.grammar import Grammar

MASKED_EVERY = 12  # schemas of which every token is looked up in a real mask


def sample(data_dir: Path) -> list[dict[str, Any]]:
    path = data_dir / "evals" / "maskbench" / "maskbench_sample.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def is_accepted(grammar: Grammar, text: str, *, masked: bool) -> bool:
    """Whether each token may come, and then the end; by masks, unless accepting alone says so."""
    matcher = grammar.matcher()
    ids = tokenizer().encode(text, special=False)
    end = min(tokenizer().eos_ids)
    if not masked and matcher._inner.validate_tokens([*ids, end]) == len(ids) + 1:
        return True
    for token in ids:
        if matcher.over or not matcher.mask(10**6)[token]:
            return False
        matcher.accept(token)
    return matcher.over or bool(matcher.mask(10**6)[end])


def judged(entries: list[dict[str, Any]]) -> tuple[Counter[str], list[str]]:
    """Counts, and which instances were judged wrongly."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for number, entry in enumerate(entries):
        try:
            grammar = grammars().compile(schema(entry["schema"]))
        except RequestError:
            counts["refused"] += 1
            continue
        counts["compiled"] += 1
        counts["with a way out"] += grammar.way is not None
        for test in entry["tests"]:
            text = json.dumps(test["data"], ensure_ascii=False)
            masked = number % MASKED_EVERY == 0
            kind = "valid" if test["valid"] else "invalid"
            counts[kind] += 1
            counts["masked"] += masked
            if is_accepted(grammar, text, masked=masked) != test["valid"]:
                wrong.append(f"{entry['name']}: {kind}")
    return counts, wrong


@pytest.mark.slow
def test_instances_are_judged_as_the_benchmark_says(data_dir: Path) -> None:
    """All of them, by tokens accepted one after the other; some by every mask on the way."""
    counts, wrong = judged(sample(data_dir))

    assert wrong == []
    assert counts["compiled"] >= 878
    assert counts["with a way out"] >= 840
    assert counts["valid"] >= 1_070
    assert counts["invalid"] >= 1_030
    assert counts["masked"] >= 150


def test_a_few_instances_are_judged_by_every_mask(data_dir: Path) -> None:
    counts, wrong = judged(sample(data_dir)[::97])

    assert wrong == []
    assert counts["valid"] + counts["invalid"] >= 10


def test_an_instance_of_another_schema_is_noticed(data_dir: Path) -> None:
    """The control: judged by a neighbour's schema, what was valid is refused."""
    entries = sample(data_dir)[:40]
    swapped = [
        a | {"tests": b["tests"]} for a, b in zip(entries, entries[1:] + entries[:1], strict=True)
    ]

    assert judged(swapped)[1]
