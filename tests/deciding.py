"""A scheduler with nothing around it, for tests of its decisions.

`drive` executes steps that last as long as the law says, and finishes requests when they have
said what they were given to say: the least that can stand in for an executor.
"""

from collections.abc import Callable
from functools import cache

from tierline.base.clock import FOREVER_PS
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.groups import CacheGroup, CacheLayout
from tierline.kv.pages import Pages
from tierline.kv.prefix import PrefixIndex
from tierline.perf.line import StepLine
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.policy import Policy
from tierline.scheduling.scheduler import Limits, Scheduler
from tierline.scheduling.sequence import Sequence
from tierline.scheduling.step import Step

BLOCK_TOKENS = 16
Decided = tuple[int, dict[int, int], list[int]]  # (decodes, prompt tokens by id, preempted ids)


@cache
def line() -> StepLine:
    cost = StepCost(
        load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=4)
    )
    return StepLine(cost, tokens_max=4096)


def scheduler_of(
    policy: Policy,
    *,
    blocks: int = 1000,
    slots: int = 8,
    batch_tokens: int = 256,
    tenants: bool = False,
) -> Scheduler:
    pages = Pages(blocks)
    return Scheduler(
        pages=pages,
        index=PrefixIndex(pages, block_tokens=BLOCK_TOKENS),
        layout=CacheLayout(
            groups=(CacheGroup(pages_per_block=1),), block_tokens=BLOCK_TOKENS, page_bytes=1
        ),
        line=line(),
        policy=policy,
        limits=Limits(batch_tokens=batch_tokens, sequences_max=slots, chunk_tokens=batch_tokens),
        tenant_weights={} if tenants else None,
    )


def request(
    number: int,
    prompt: int,
    output: int,
    *,
    at_ps: int = 0,
    ttft_ps: int = FOREVER_PS,
    rank: int = 0,
    tenant: str = "",
    chain: list[int] | None = None,
) -> Sequence:
    return Sequence(
        number,
        arrival_ps=at_ps,
        prompt_tokens=prompt,
        output_max_tokens=output,
        due_ps=at_ps + ttft_ps if ttft_ps < FOREVER_PS else FOREVER_PS,
        rank=rank,
        tenant=tenant,
        chain=chain,
    )


def drive(
    scheduler: Scheduler,
    requests: list[Sequence],
    *,
    steps_max: int = 100_000,
    each: Callable[[Step, int], None] | None = None,
) -> list[Decided]:
    """Serve requests, in order of arrival, until all are done; what every step decided."""
    decided: list[Decided] = []
    coming, now_ps = list(reversed(requests)), 0
    while len(decided) < steps_max:
        while coming and coming[-1].arrival_ps <= now_ps:
            scheduler.add(coming.pop())
        step = scheduler.next_step(now_ps, 1)
        if step.empty and not step.preempted:
            if not coming:
                break
            now_ps = coming[-1].arrival_ps
            continue
        chunks = [(s.cached_tokens, tokens) for s, tokens in step.chunks]
        if each is not None:
            each(step, now_ps)
        now_ps += scheduler.line.line(step.decodes, step.context_tokens, chunks)[0]
        preempted = [s.id for s in step.preempted]
        decided.append((step.decodes, {s.id: n for s, n in step.chunks}, preempted))
        ended = [s for s in scheduler.decoding.values() if step.decodes and _says_last(s, step)]
        ended += [
            s
            for s, tokens in step.chunks
            if s.cached_tokens + tokens == s.target_tokens
            and s.generated_tokens + 1 >= s.output_max_tokens
        ]
        scheduler.complete(step, 1, ended, now_ps)
        scheduler.check()
    assert scheduler.idle or len(decided) == steps_max
    return decided


def _says_last(s: Sequence, step: Step) -> bool:
    said = s.generated_tokens + step.tick - s.joined_tick
    return said + 1 >= s.output_max_tokens
