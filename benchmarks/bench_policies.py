"""What is a scheduling policy worth when classes share a replica and more is asked than it can do?

Question   which share of the requests keeps its promise under the tierline policy, under first
           come first served (as vLLM v1 decides), and under the plain orders, at 0.7, 1.0 and
           1.3 of capacity; and what is each mechanism of the policy worth?
Budget     goodput >= 2.5 times FCFS at capacity and >= 4 times at 1.3; >= 1.4 times the best
           plain order at both; everything finishes.
Baseline   fcfs, vllm-v1, shortest, priority and edf in the same run; the tierline policy with
           one mechanism off at a time.
Method     70B in BF16 on four H100, priced by our step law, 512 tokens and 128 sequences a
           step. Half of the requests are interactive (lengths of Azure's conversations; first
           token within 1 s, 50 ms a token), three in ten agentic (Mooncake's conversations
           below 30,000 tokens; 4 s, 100 ms), two in ten batch (arXiv summaries; first token
           within 900 s), Poisson for 1,800 s. Capacity is the rate at which FCFS works off a
           backlog. Goodput counts requests, each within all limits of its class.
           `tuned`: FCFS and shortest with whatever chunk suits them best, which an operator
           could find for one load; `whole_batches`: the same with 2,048 tokens a step, at the
           capacity that has. `mechanisms`: traces on which share floors, giving way, parking
           in DRAM and foreseeing matter. `flood`: one tenant sends 8 of 11 requests a second.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tierline.base.clock import PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.transfer import DRAM
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.policy import FCFS, PRIORITY, TIERLINE, Policy
from tierline.scheduling.profiles import POLICIES
from tierline.scheduling.scheduler import Limits
from tierline.sim.api import simulate
from tierline.sim.columns import column
from tierline.sim.instance import Instance, build_instance
from tierline.sim.measure import good_requests, latencies_ps
from tierline.sim.record import FINISHED, Run
from tierline.workload.mix import Part, lengths_of, mixed
from tierline.workload.request import Request
from tierline.workload.slo import ServiceLevel, parse_service_levels
from tierline.workload.trace import read_trace

LEVELS = parse_service_levels(
    [
        "interactive@2:ttft_p99=1s,tpot_p99=50ms",
        "agentic@1:ttft_p99=4s,tpot_p99=100ms",
        "batch@0:ttft_p99=900s",
    ]
)
PLAIN = ("fcfs", "shortest", "priority", "edf")
OFF = {
    "adaptive chunk": replace(TIERLINE, adaptive_chunk=False),
    "overtaking": replace(TIERLINE, overtakes=False),
    "shedding": replace(TIERLINE, sheds=False),
}
FCFS_RATIO = {1.0: 2.5, 1.3: 4.0}
BEST_PLAIN_RATIO = 1.4
SPAN_S, SEED = 1800.0, 5
MECHANISM_SPAN_S = 300.0


def data_folder() -> Path:
    root = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("TIERLINE_DATA", root.parent / "shared" / "data")) / "traces"


def parts() -> tuple[Part, Part, Part]:
    """The three classes, with the lengths of real requests."""
    folder = data_folder()
    conversations = read_trace(folder / "azure2023_conv.csv.gz")
    agents = read_trace(folder / "mooncake_conversation.jsonl.gz")
    papers = read_trace(folder / "arxiv_summarization_lengths.csv.gz")
    return (
        Part(name="interactive", priority=2, share=5, lengths=lengths_of(conversations)),
        Part(name="agentic", priority=1, share=3, lengths=lengths_of(agents, below_tokens=30_000)),
        Part(name="batch", priority=0, share=2, lengths=lengths_of(papers)),
    )


def instance(
    *, chunk: int = 512, sequences: int = 128, pool_tokens: int = 0, dram_bytes: int = 0
) -> Instance:
    cost = StepCost(
        load_model("llama-3.1-70b"),
        load_gpu("h100-sxm"),
        Layout(weights="bf16", kv="bf16", tp=4),
    )
    built = build_instance(
        cost,
        name="70B on 4 H100",
        block_tokens=16,
        limits=Limits(batch_tokens=chunk, sequences_max=sequences, chunk_tokens=chunk),
        tier_bytes={DRAM: dram_bytes},
    )
    return replace(built, pages_total=pool_tokens // 16) if pool_tokens else built


def drawn(
    mix: Iterable[Part], *, rate_rps: float, span_s: float, seed: int = SEED
) -> list[Request]:
    """The requests of a span."""
    endless = mixed(tuple(mix), rate_rps=rate_rps, seed=seed)
    return list(takewhile(lambda r: r.arrival_ns < span_s * 1e9, endless))


def capacity_rps(kind: Instance, mix: tuple[Part, ...], entries: int = 3000) -> float:
    """The rate at which FCFS works off a backlog."""
    backlog = islice(mixed(mix, rate_rps=1.0, seed=50), entries)
    requests = [replace(r, arrival_ns=0) for r in backlog]
    return entries / served(kind, requests, FCFS).duration_s


def served(
    kind: Instance,
    requests: list[Request],
    policy: Policy,
    levels: tuple[ServiceLevel, ...] = LEVELS,
) -> Run:
    run = simulate(kind, requests, levels=levels, policy=policy)
    assert run.requests.outcome.count(FINISHED) == len(requests), "somebody did not finish"
    return run


def figures(run: Run, span_s: float) -> dict[str, Any]:
    """Goodput in all and by class; what finished in time; how much was computed twice."""
    good, level = good_requests(run), column(run.requests, "level")
    finish, prompt = column(run.requests, "finish_ps"), column(run.requests, "input_tokens")
    by_class, finished, share = [], [], []
    first_in_span = column(run.requests, "first_ps") <= span_s * PS_PER_S
    for number in range(len(run.levels)):
        mine = level == number
        if mine.any():
            by_class.append(round(float(good[mine].mean()), 3))
            finished.append(round(float((finish[mine] <= span_s * PS_PER_S).mean()), 3))
            share.append(
                round(float(prompt[mine & first_in_span].sum() / prompt[first_in_span].sum()), 3)
            )
    e2e = latencies_ps(run.requests)["e2e"][level == level.max()]
    return {
        "goodput": round(float(good.mean()), 4),
        "by_class": by_class,
        "finished_in_span": finished,
        "share_of_prompt_tokens": share,
        "last_class_e2e_s": round(float(e2e.mean()) / PS_PER_S, 1),
        "computed_again": round(run.replicas[0].prefill_tokens / int(prompt.sum()) - 1, 4),
        "preemptions": run.replicas[0].preemptions,
        "drained_s": round(run.duration_s),
    }


# --- the mixed trace -------------------------------------------------------------------------


def beside_baselines(kind: Instance, mix: tuple[Part, ...], loads: Iterable[float]) -> Any:
    """Every policy at every load, and the ratios that the budget is about."""
    capacity = capacity_rps(kind, mix)
    answer: dict[str, Any] = {"capacity_rps": round(capacity, 3)}
    for load in loads:
        requests = drawn(mix, rate_rps=capacity * load, span_s=SPAN_S)
        policies = [POLICIES[name] for name in (*PLAIN, "vllm-v1")] + [TIERLINE]
        policies += [replace(policy, name=f"without {name}") for name, policy in OFF.items()]
        rows = {p.name: figures(served(kind, requests, p), SPAN_S) for p in policies}
        ours = rows["tierline"]["goodput"]
        best = max(PLAIN, key=lambda name: rows[name]["goodput"])
        fcfs = max(rows[name]["goodput"] for name in ("fcfs", "vllm-v1"))
        answer[str(load)] = rows | {
            "requests": len(requests),
            "over_fcfs": round(ours / fcfs, 2),
            "best_plain": best,
            "over_best_plain": round(ours / rows[best]["goodput"], 2),
        }
    return answer


def tuned(mix: tuple[Part, ...], capacity: float, loads: Iterable[float]) -> dict[str, Any]:
    """FCFS and shortest, each with the chunk that suits it best."""
    answer: dict[str, Any] = {}
    for load in loads:
        requests = drawn(mix, rate_rps=capacity * load, span_s=SPAN_S)
        for name in ("fcfs", "shortest"):
            tried = {
                chunk: figures(served(instance(chunk=chunk), requests, POLICIES[name]), SPAN_S)
                for chunk in (192, 256, 512, 1024, 2048)
            }
            chunk = max(tried, key=lambda chunk: tried[chunk]["goodput"])
            row = {"chunk": chunk, "goodput": tried[chunk]["goodput"]}
            answer.setdefault(str(load), {})[name] = row
    return answer


# --- mechanisms ------------------------------------------------------------------------------


def long_answers(
    chat: Part, background: Part, *, chat_rps: float, background_rps: float, times: int
) -> list[Request]:
    """Interactive requests beside background work whose answers are `times` as long."""
    lengths = [(a, b * times) for a, b in background.lengths]
    parts = (
        replace(chat, share=chat_rps),
        replace(background, share=background_rps, priority=0, lengths=lengths),
    )
    rate_rps = chat_rps + background_rps
    return drawn(parts, rate_rps=rate_rps, span_s=MECHANISM_SPAN_S, seed=1)


def mechanisms(mix: tuple[Part, ...], capacity: float) -> dict[str, Any]:
    """Each on a trace on which it matters, with and without."""
    answer: dict[str, Any] = {}

    def compare(name: str, kind: Instance, requests: list[Request], off: Policy) -> None:
        span_s = requests[-1].arrival_ns / 1e9
        answer[name] = {
            label: figures(served(kind, requests, policy), span_s)
            for label, policy in (("with", TIERLINE), ("without", off))
        }

    flooded = drawn(mix, rate_rps=3 * capacity, span_s=2 * MECHANISM_SPAN_S)
    compare("share floors", instance(), flooded, replace(TIERLINE, floors_percent=(0, 0, 0)))
    chat, agents, papers = mix
    few = instance(chunk=2048, sequences=24, pool_tokens=120_000, dram_bytes=300 * 10**9)
    requests = long_answers(chat, papers, chat_rps=1.5, background_rps=0.5, times=4)
    compare("giving way", few, requests, replace(TIERLINE, gives_way=False))
    compare("parking in DRAM", few, requests, replace(TIERLINE, swaps=False))
    small = instance(chunk=2048, pool_tokens=80_000)
    requests = long_answers(chat, agents, chat_rps=1.0, background_rps=0.5, times=3)
    compare("foreseeing answers", small, requests, replace(TIERLINE, foresees=False))
    return answer


def flood(mix: tuple[Part, ...]) -> dict[str, Any]:
    """One of four tenants sends 8 of 11 requests a second: TTFT of the other three."""
    rng = Random(9)
    names = ("flood", "b", "c", "d")
    requests = [
        replace(r, tenant=rng.choices(names, (8, 1, 1, 1))[0])
        for r in drawn(mix[:1], rate_rps=11, span_s=MECHANISM_SPAN_S, seed=3)
    ]
    levels = parse_service_levels(["chat:ttft_p99=5s"])
    alike = replace(TIERLINE, name="tenants not told apart", debt_max_tokens=0)
    answer = {}
    for policy in (FCFS, PRIORITY, alike, TIERLINE):
        run = served(instance(), requests, policy, levels)
        others = column(run.requests, "tenant") != run.tenants.index("flood")
        ttft_s = latencies_ps(run.requests)["ttft"] / PS_PER_S
        answer[policy.name] = {
            f"{who} p{p}_s": round(float(np.percentile(ttft_s[group], p)), 2)
            for who, group in (("others", others), ("flood", ~others))
            for p in (50, 99)
        }
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the mixed trace at 1.0 and 1.3")
    args = parser.parse_args()
    start_s, mix = time.perf_counter(), parts()
    loads = (1.0, 1.3) if args.quick else (0.7, 1.0, 1.3)
    mixed_trace = beside_baselines(instance(), mix, loads)
    within = all(
        mixed_trace[str(load)]["over_fcfs"] >= ratio
        and mixed_trace[str(load)]["over_best_plain"] >= BEST_PLAIN_RATIO
        for load, ratio in FCFS_RATIO.items()
    )
    answer: dict[str, Any] = {"benchmark": "policies", "mixed": mixed_trace}
    if not args.quick:
        capacity = mixed_trace["capacity_rps"]
        answer["tuned"] = tuned(mix, capacity, FCFS_RATIO)
        answer["whole_batches"] = beside_baselines(instance(chunk=2048), mix, FCFS_RATIO)
        answer["mechanisms"] = mechanisms(mix, capacity)
        answer["flood"] = flood(mix)
    answer |= {
        "within_budget": within,
        "wall_s": round(time.perf_counter() - start_s, 1),
        "python": platform.python_version(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
