"""Does choosing tokens stay small beside the step that made the logits?

Question   how long does one pass take for 16 greedy rows, and for 64 rows with mixed settings,
           over 151,936 tokens?
Budget     2 ms and 25 ms, with two threads.
Baseline   the usual loop in torch, a row at a time (softmax, sort, cumulative sum,
           multinomial), interleaved with the pass in the same run.
Method     median of 9 rounds; logits are copied outside the clock, since a pass overwrites
           them.  `peaked` logits have most of their mass in few tokens, as a model's have;
           `flat` ones are a normal sample, whose nucleus holds half the vocabulary.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from tierline.engine.sampling import Row, Sampler, SamplingParams

VOCABULARY = 151_936
ROUNDS = 9
BUDGETS_MS = {"greedy_16": 2.0, "mixed_64_peaked": 25.0}
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=0.8, top_k=50),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k_top_p": SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    "min_p": SamplingParams(min_p=0.05),
    "penalties": SamplingParams(top_k=50, repetition_penalty=1.1, frequency_penalty=0.2),
    "bans": SamplingParams(top_k=50, banned_tokens=(1, 2), logit_bias={5: 1.0}),
}


def naive(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    """One row after the other, the whole vocabulary sorted where anything is cut off."""
    tokens = []
    for z, row in zip(logits, rows, strict=True):
        params = row.params
        ids, counts = (torch.from_numpy(array) for array in row.counted())
        if len(ids):
            seen = z[ids]
            theta = params.repetition_penalty
            seen = torch.where(seen > 0, seen / theta, seen * theta)
            z[ids] = seen - params.frequency_penalty * counts
        for token, bias in params.logit_bias.items():
            z[token] += bias
        z[list(params.banned_tokens)] = -torch.inf
        if params.temperature == 0:
            tokens.append(int(z.argmax()))
            continue
        z = z / params.temperature
        if params.top_k > 0:
            z = z.masked_fill(z < z.topk(params.top_k).values[-1], -torch.inf)
        p = z.softmax(-1)
        if params.top_p < 1:
            ordered, order = p.sort(descending=True)
            p[order[ordered.cumsum(-1) - ordered >= params.top_p]] = 0
        if params.min_p > 0:
            p[p < params.min_p * p.max()] = 0
        tokens.append(int(p.multinomial(1)))
    return tokens


def logits_of(rows: int, *, peaked: bool) -> torch.Tensor:
    """Normal logits, or such as fall off with the rank of a token."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, VOCABULARY, generator=draws)
    if not peaked:
        return noise
    ranks = torch.stack([torch.randperm(VOCABULARY, generator=draws) for _ in range(rows)])
    return 12 - 1.6 * (ranks + 1).log() + noise / 2


def interleaved_ms(logits: torch.Tensor, *works: Callable[[torch.Tensor], object]) -> list[float]:
    """Median milliseconds of each, in turns on the same logits."""
    rounds: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, samples in zip(works, rounds, strict=True):
            copy = logits.clone()
            start_ns = time.perf_counter_ns()
            work(copy)
            samples.append((time.perf_counter_ns() - start_ns) / 1e6)
    return [statistics.median(samples) for samples in rounds]


def measure(name: str, kinds: list[str], *, peaked: bool) -> dict[str, object]:
    """One case as a line of the report."""
    sampler = Sampler(VOCABULARY)
    prompt = list(range(0, 100_000, 100))
    rows = [
        sampler.open(KINDS[kind], prompt=prompt, seed=number) for number, kind in enumerate(kinds)
    ]
    logits = logits_of(len(rows), peaked=peaked)
    pass_ms, naive_ms = interleaved_ms(
        logits, lambda x: sampler.sample(x, rows), lambda x: naive(x, rows)
    )
    line: dict[str, object] = {
        "benchmark": "sampling",
        "case": name,
        "pass_ms_median": round(pass_ms, 2),
        "naive_ms_median": round(naive_ms, 2),
        "times_faster": round(naive_ms / pass_ms, 2),
        "threads": torch.get_num_threads(),
    }
    if name in BUDGETS_MS:
        line["within_budget"] = pass_ms <= BUDGETS_MS[name]
    return line


def main() -> None:
    """One JSON line a case: the mixed ones, and every kind of setting by itself."""
    torch.set_num_threads(2)
    mixed = list(KINDS) * 8
    print(json.dumps(measure("greedy_16", ["greedy"] * 16, peaked=True)))
    print(json.dumps(measure("mixed_64_peaked", mixed, peaked=True)))
    print(json.dumps(measure("mixed_64_flat", mixed, peaked=False)))
    for kind in KINDS:
        print(json.dumps(measure(f"{kind}_8_peaked", [kind] * 8, peaked=True)))


if __name__ == "__main__":
    main()
