"""Real plans for tests of what is printed: small enough to be made in a second or two."""

import functools
from dataclasses import replace

from tierline.catalog.gpus import load_gpus
from tierline.catalog.models import load_model
from tierline.planner.finding import Plan, Question
from tierline.planner.plan import make_plan
from tierline.workload.profile import profile_trace
from tierline.workload.request import Request
from tierline.workload.slo import parse_service_levels


@functools.cache
def small_plan(*, reuse: bool = True, priced: bool = True) -> Plan:
    """Llama-3.1-8B on two kinds of accelerator, for ten minutes of steady requests."""
    requests = [
        Request(
            arrival_ns=i * 150_000_000,
            input_tokens=200 + 37 * (i % 41) ** 2 % 6000,
            output_tokens=20 + 13 * (i % 29),
            prefix_blocks=(i % 7, 100 + i % 50, 1000 + i) if reuse else (),
        )
        for i in range(4000)
    ]
    gpus = tuple(load_gpus(["l40s", "h100-sxm"]))
    if not priced:
        nothing = {"low_usd": None, "typical_usd": None, "high_usd": None, "owner_usd": None}
        gpus = tuple(replace(g, price=replace(g.price, **nothing)) for g in gpus)
    question = Question(
        model=load_model("llama-3.1-8b"),
        levels=parse_service_levels(["ttft_p99=1s,itl_p99=60ms"]),
        gpus=gpus,
        workload_name="steady.jsonl",
    )
    profile = profile_trace(requests, source="steady.jsonl", block_tokens=128)
    return make_plan(question, profile)
