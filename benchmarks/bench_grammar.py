"""Is a mask ready before the forward pass is?

Question   how long do a mask, its tight form near the end of a budget, taking a token, and
           compiling take; and what does applying the mask cost beside reading the logits?
Budget     200 us median a mask, 20 ms a compilation: a decode step takes longer on any machine.
Baseline   writing the row of logits once (`fill_`), in the same run, interleaved.
Method     the demo model's tokenizer, 49,152 tokens, and the same pieces padded with made-up words
           to 151,936.  Three schemas, answers from random logits; medians and 99th percentiles.
"""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch

from tierline.engine.checkpoint import open_checkpoint
from tierline.engine.demo import resolve_model
from tierline.engine.grammar import Grammars, Wanted
from tierline.engine.tokenizer import Tokenizer, load_tokenizer

WIDE = 151_936
ANSWERS = 12
BUDGET_TOKENS = 160
SCHEMAS = {
    "record": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"type": "string"}},
    "tree": {
        "type": "object",
        "properties": {"v": {"type": "string"}, "of": {"items": {"$ref": "#"}}},
        "required": ["v"],
    },
}


class Widened(Tokenizer):
    """The same tokenizer with more words, as a larger model has."""

    def widen(self, size: int) -> "Widened":
        """Add words of letters until there are `size` tokens."""
        chance = random.Random(0)
        self._more = {
            token: "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=7)).encode()
            for token in range(self.vocabulary_size, size)
        }
        self.vocabulary_size = size
        return self

    def token_bytes(self, token: int) -> bytes:
        """As before, or one of the added words."""
        return self._more.get(token) or super().token_bytes(token)


def timed_us(work: Callable[[], object]) -> float:
    """Microseconds of one call."""
    start_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start_ns) / 1e3


def spread(name: str, values_us: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(values_us)
    return {
        f"{name}_us_median": round(statistics.median(ordered), 1),
        f"{name}_us_p99": round(ordered[int(len(ordered) * 0.99)], 1),
    }


def measure(grammars: Grammars, schema: object) -> dict[str, float]:
    """One schema: masks far from the budget, near it, tokens taken, and masks applied."""
    wanted = Wanted(kind="json_schema", text=json.dumps(schema))
    compile_ms = timed_us(lambda: grammars.compile(wanted)) / 1e3
    grammar = grammars.compile(wanted)
    free: list[float] = []
    tight: list[float] = []
    taken: list[float] = []
    applied: list[float] = []
    filled: list[float] = []
    generator = torch.Generator().manual_seed(0)
    row = torch.empty(grammars.vocabulary)
    for _ in range(ANSWERS):
        matcher = grammar.matcher()
        for left in range(BUDGET_TOKENS, 0, -1):
            free.append(timed_us(lambda m=matcher: m.mask(10**9)))  # type: ignore[misc]
            tight.append(timed_us(lambda m=matcher, n=left: m.mask(n)))  # type: ignore[misc]
            mask = matcher.mask(left)
            row.normal_(generator=generator)
            applied.append(timed_us(lambda m=mask: row.masked_fill_(~m, -torch.inf)))  # type: ignore[misc]
            token = int(row.argmax())
            filled.append(timed_us(lambda: row.fill_(0.0)))
            if token in EOS:
                break
            taken.append(timed_us(lambda m=matcher, t=token: m.accept(t)))  # type: ignore[misc]
            if matcher.over:
                break
    figures = {"compile_ms": round(compile_ms, 2)}
    parts = {"mask": free, "within_budget": tight, "accept": taken}
    for name, values in (parts | {"apply": applied, "fill": filled}).items():
        figures |= spread(name, values)
    return figures


EOS: frozenset[int] = frozenset()


def main() -> None:
    """One JSON line a schema and vocabulary."""
    global EOS
    torch.set_num_threads(1)
    narrow = load_tokenizer(open_checkpoint(resolve_model("demo")))
    wide = Widened(narrow.backend, special_tokens=narrow.special_tokens, eos_ids=narrow.eos_ids)
    EOS = narrow.eos_ids
    for tokenizer in (narrow, wide.widen(WIDE)):
        start_ns = time.perf_counter_ns()
        grammars = Grammars(tokenizer, vocabulary=tokenizer.vocabulary_size)
        prepare_ms = (time.perf_counter_ns() - start_ns) / 1e6
        grammars.compile(Wanted(kind="json_object"))  # the first one warms the library
        for name, schema in SCHEMAS.items():
            figures = measure(grammars, schema)
            within = figures["mask_us_median"] <= 200 and figures["compile_ms"] <= 20
            print(
                json.dumps(
                    {"benchmark": "grammar", "schema": name, "vocabulary": grammars.vocabulary}
                    | {"prepare_ms": round(prepare_ms), **figures, "within_budget": within}
                    | {"python": platform.python_version()}
                )
            )


if __name__ == "__main__":
    main()
