"""Is one decision free beside the step it decides, with many running and a long queue?

Question   how long do `next_step` and `complete` take at 256 running and 10,000 waiting, one
           step at a time as an engine asks, and how long does it take to name the blocks?
Budget     100 us median and 1 ms at p99 for deciding and accounting, 0.5 % of a 20 ms step.
Baseline   the bookkeeping of a scheduler without ticks, in the same run: a walk over 256
           sequences that adds a token to each and asks whether it begins a block.
Method     3,000 steps for each policy after a warm-up; every request has a chain of its own,
           so publishing and eviction are paid for; whoever is admitted is replaced in the
           queue. `arrivals`: the newcomer's `add` counts as part of the step. One process.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from random import Random

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.groups import CacheGroup, CacheLayout
from tierline.kv.names import BlockNames
from tierline.kv.pages import Pages
from tierline.kv.pool import BlockPool
from tierline.kv.prefix import PrefixIndex
from tierline.perf.line import StepLine
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.policy import EDF, FCFS, SHORTEST, TIERLINE, Policy
from tierline.scheduling.scheduler import Limits, Scheduler
from tierline.scheduling.sequence import Sequence
from tierline.scheduling.step import Step

RUNNING, WAITING, STEPS, WARM_UP = 256, 10_000, 3000, 2500
BLOCK_TOKENS, BATCH_TOKENS, BLOCKS = 16, 2048, 35_000
BUDGET_MEDIAN_US, BUDGET_P99_US = 100.0, 1000.0
TTFT_S = (1, 5, 600)
ITL_PS = (60 * PS_PER_S // 1000, 100 * PS_PER_S // 1000, FOREVER_PS)


class Standing:
    """A scheduler with a queue that is kept long, and the outputs that it cannot know."""

    def __init__(self, policy: Policy) -> None:
        layout = CacheLayout(
            groups=(CacheGroup(pages_per_block=1),), block_tokens=BLOCK_TOKENS, page_bytes=1
        )
        pages = Pages(BLOCKS)
        parts = Layout(weights="fp8", kv="fp8", tp=4)
        cost = StepCost(load_model("llama-3.1-70b"), load_gpu("h100-sxm"), parts)
        self.line = StepLine(cost, tokens_max=BATCH_TOKENS + RUNNING)
        self.scheduler = Scheduler(
            pages=pages,
            index=PrefixIndex(pages, block_tokens=BLOCK_TOKENS),
            layout=layout,
            line=self.line,
            policy=policy,
            limits=Limits(
                batch_tokens=BATCH_TOKENS, sequences_max=RUNNING, chunk_tokens=BATCH_TOKENS
            ),
        )
        self.names = BlockNames(BlockPool(BLOCKS), layout)
        self.requests = self._requests()
        self.now_ps = 0
        self.left: dict[int, int] = {}  # output tokens to come, of those that decode
        for _ in range(WAITING + RUNNING):
            self.scheduler.add(next(self.requests))

    def _requests(self) -> Iterator[Sequence]:
        rng, i = Random(3), 0
        while True:
            rank = rng.randrange(3)
            prompt_tokens, output_tokens = rng.randrange(200, 1800), rng.randrange(300, 900)
            yield Sequence(
                i,
                arrival_ps=self.now_ps,
                prompt_tokens=prompt_tokens,
                output_max_tokens=output_tokens,
                rank=rank,
                due_ps=self.now_ps + TTFT_S[rank] * PS_PER_S,
                itl_ps=ITL_PS[rank],
                tenant=str(i % 16),
                chain=[i * 1000 + j for j in range(prompt_tokens // BLOCK_TOKENS)],
            )
            i += 1

    def ended(self, step: Step) -> list[Sequence]:
        """Who produces the last token in this step; the clock moves on by its length."""
        chunks = [(s.cached_tokens, tokens) for s, tokens in step.chunks]
        self.now_ps += self.line.line(step.decodes, step.context_tokens, chunks)[0]
        ended = []
        for i, s in step.decoding.items():
            self.left[i] = self.left.get(i, s.output_max_tokens) - 1
            if self.left[i] <= 1:
                ended.append(s)
                del self.left[i]
        return ended

    def name(self, step: Step) -> None:
        """Blocks for every token of the step: what an engine adds to the decision."""
        grow, tick = self.names.grow, step.tick
        for s in step.decoding.values():
            length = s.cached_tokens + tick - s.joined_tick
            if length % BLOCK_TOKENS == 0:  # its token begins a block
                grow(s.id, length + 1)
        for s, tokens in step.chunks:
            grow(s.id, s.cached_tokens + tokens)


def us_of(work: Callable[[], object]) -> float:
    start_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start_ns) / 1e3


def baseline_us() -> float:
    """A walk over everybody who runs."""
    lengths = {i: 300 + 7 * i for i in range(RUNNING)}

    def walk() -> int:
        begun = 0
        for i, length in lengths.items():
            lengths[i] = length + 1
            begun += length % BLOCK_TOKENS == 0
        return begun

    return statistics.median(us_of(walk) for _ in range(2000))


def sample(policy: Policy, *, arrivals: bool) -> tuple[list[float], list[float], Standing]:
    """Microseconds of deciding and accounting, and of naming, for each step."""
    standing = Standing(policy)
    scheduler = standing.scheduler
    deciding, naming = [], []
    for number in range(WARM_UP + STEPS):
        newcomers = max(WAITING - scheduler.queue.waiting, int(arrivals))
        new = [next(standing.requests) for _ in range(newcomers)]
        start_ns = time.perf_counter_ns()
        if arrivals:
            scheduler.add(new.pop())
        step = scheduler.next_step(standing.now_ps, 1)
        decided_ns = time.perf_counter_ns()
        for s in step.preempted:
            standing.names.release(s.id)
        named_us = us_of(lambda: standing.name(step))  # noqa: B023
        finished = standing.ended(step)
        account_us = us_of(
            lambda: scheduler.complete(step, 1, finished, standing.now_ps)  # noqa: B023
        )
        for s in finished:
            standing.names.release(s.id)
        for s in new:
            scheduler.add(s)
        if number >= WARM_UP:
            deciding.append((decided_ns - start_ns) / 1e3 + account_us)
            naming.append(named_us)
    return deciding, naming, standing


def main() -> None:
    """One JSON line a policy."""
    base_us = baseline_us()
    cases = [(p, False) for p in (FCFS, SHORTEST, EDF, TIERLINE)] + [(TIERLINE, True)]
    for policy, arrivals in cases:
        deciding, naming, standing = sample(policy, arrivals=arrivals)
        deciding.sort()
        median_us, p99_us = statistics.median(deciding), deciding[len(deciding) * 99 // 100]
        print(
            json.dumps(
                {
                    "benchmark": "schedule",
                    "policy": policy.name,
                    "arrivals": arrivals,
                    "running": standing.scheduler.running,
                    "waiting": standing.scheduler.queue.waiting,
                    "preemptions": standing.scheduler.preemptions,
                    "decide_us_median": round(median_us, 1),
                    "decide_us_p99": round(p99_us, 1),
                    "decide_us_max": round(deciding[-1], 1),
                    "decide_per_walk": round(median_us / base_us, 2),
                    "walk_us": round(base_us, 1),
                    "name_us_median": round(statistics.median(naming), 1),
                    "within_budget": median_us <= BUDGET_MEDIAN_US and p99_us <= BUDGET_P99_US,
                    "python": platform.python_version(),
                }
            )
        )


if __name__ == "__main__":
    main()
