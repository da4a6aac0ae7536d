"""Which cached blocks should a tier keep, and what is that worth?

Question   prefill seconds saved by LRU, LFU, ARC and expected reuse x penalty, by how much DRAM
           and NVMe a replica has, and what a clairvoyant (Belady) would have saved.
Budget     expected reuse saves at least what LRU and ARC save, at every size, on every trace;
           less than 1 % apart counts as equal, since three runs do not tell it apart.
Baseline   LRU, LFU and ARC in the same tiers, with the same scheduler, router and law.
Method     Mooncake's conversation and synthetic traces (the tool-agent trace, too, where it lies
           beside them), 8 replicas of 462,000 device tokens, first come first served,
           prefix-aware routing. A prompt's saved seconds are what its cached prefix would have
           cost to compute. Hits decide routes and routes decide hits, so one run says +-2 %
           at best: a figure is the mean over device pools that differ by less than 1 %.
           Belady forgets the block whose next use is furthest, block by block, with the routes
           of the first expected-reuse run and 80 % of the device as cache: indicative.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from tierline.base.clock import PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.scheduler import Limits
from tierline.sim.api import simulate
from tierline.sim.instance import Instance, build_instance
from tierline.workload.request import Request
from tierline.workload.trace import read_trace

REPLICAS, BLOCK_TOKENS = 8, 512
POOLS_TOKENS = (462_000, 464_500, 459_500)
PLACEMENTS = ("lru", "lfu", "arc", "cost-aware")
# Tokens of DRAM and NVMe for each replica: the sizes of the study this started from.
SIZES_TOKENS = (
    (200_000, 0),
    (400_000, 0),
    (800_000, 0),
    (1_600_000, 0),
    (400_000, 2_000_000),
    (800_000, 6_000_000),
)
EQUAL = 0.99
TRACES = ("conversation", "synthetic", "toolagent")


def instance(placement: str, pool_tokens: int, dram_tokens: int, nvme_tokens: int) -> Instance:
    cost = StepCost(
        load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=4)
    )
    built = build_instance(
        cost,
        name="bench",
        block_tokens=BLOCK_TOKENS,
        limits=Limits(batch_tokens=512, sequences_max=128, chunk_tokens=512),
    )
    blocks = pool_tokens // BLOCK_TOKENS
    return replace(
        built,
        pages_total=blocks * built.layout.pages_per_block,
        tier_blocks=(dram_tokens // BLOCK_TOKENS, nvme_tokens // BLOCK_TOKENS, 0),
        placement=placement,
    )


def saved_s(kind: Instance, cached_tokens: Seq[int]) -> float:
    """Seconds of prefill that cached prefixes of these lengths stand for."""
    line, chunk = kind.line(), kind.limits.chunk_tokens
    price = {n: line.prefill_ps(n, chunk=chunk) if n else 0 for n in set(cached_tokens)}
    return sum(price[n] for n in cached_tokens) / PS_PER_S


def replay(kind: Instance, requests: Seq[Request]) -> dict[str, Any]:
    started = time.process_time()
    run = simulate(kind, requests, levels=(), replicas=REPLICAS, policy="fcfs")
    cpu_s = time.process_time() - started
    columns = run.requests
    ttft_s = sorted(
        (first - arrival) / PS_PER_S
        for first, arrival in zip(columns.first_ps, columns.arrival_ps, strict=True)
    )
    moved: dict[str, int] = {}
    for totals in run.replicas:
        for way, size in totals.moved_bytes.items():
            moved[way] = moved.get(way, 0) + size
    return {
        "saved_s": saved_s(kind, columns.cached_tokens),
        "hits": sum(columns.cached_tokens) / sum(columns.input_tokens),
        "ttft_mean_s": sum(ttft_s) / len(ttft_s),
        "ttft_p99_s": ttft_s[len(ttft_s) * 99 // 100],
        "moved_gb": {way: round(size / 1e9) for way, size in sorted(moved.items())},
        "cpu_s": cpu_s,
        "routes": list(columns.replica),
    }


def belady_s(kind: Instance, requests: Seq[Request], routes: Seq[int]) -> float:
    """What forgetting the block whose next use is furthest would have saved."""
    never = len(requests)
    capacity = int(0.8 * kind.pages_total // kind.layout.pages_per_block) + sum(kind.tier_blocks)
    next_use: list[list[int]] = [[] for _ in requests]
    coming: dict[tuple[int, int], int] = {}
    for i in range(len(requests) - 1, -1, -1):
        names = requests[i].prefix_blocks[: requests[i].input_tokens // BLOCK_TOKENS]
        next_use[i] = [coming.get((routes[i], name), never) for name in names]
        for name in names:
            coming[routes[i], name] = i
    kept: list[dict[int, int]] = [{} for _ in range(REPLICAS)]
    orders: list[list[tuple[int, int, int]]] = [[] for _ in range(REPLICAS)]
    found = []
    for i, request in enumerate(requests):
        cache, order = kept[routes[i]], orders[routes[i]]
        names = request.prefix_blocks[: request.input_tokens // BLOCK_TOKENS]
        most = min(len(names), (request.input_tokens - 1) // BLOCK_TOKENS)
        hits = next((n for n in range(most) if names[n] not in cache), most)
        found.append(hits * BLOCK_TOKENS)
        for depth, name in enumerate(names):
            cache[name] = next_use[i][depth]
            heappush(order, (-next_use[i][depth], -depth, name))
        while len(cache) > capacity:
            use, _, name = heappop(order)
            if cache.get(name) == -use:
                del cache[name]
    return saved_s(kind, found)


def row(requests: Seq[Request], size: tuple[int, int], pools: Seq[int]) -> dict[str, Any]:
    """Every placement at one size of the tiers."""
    entry: dict[str, Any] = {"dram_tokens": size[0], "nvme_tokens": size[1]}
    for placement in PLACEMENTS:
        kinds = [instance(placement, pool, *size) for pool in pools]
        runs = [replay(kind, requests) for kind in kinds]
        entry[placement] = {
            "saved_s": round(sum(run["saved_s"] for run in runs) / len(runs), 1),
            "each_s": [round(run["saved_s"]) for run in runs],
            "hits": round(runs[0]["hits"], 4),
            "ttft_mean_s": round(sum(run["ttft_mean_s"] for run in runs) / len(runs), 3),
            "ttft_p99_s": round(sum(run["ttft_p99_s"] for run in runs) / len(runs), 2),
            "moved_gb": runs[0]["moved_gb"],
            "cpu_s": round(min(run["cpu_s"] for run in runs), 2),
        }
        if placement == "cost-aware":
            entry["belady_s"] = round(belady_s(kinds[0], requests, runs[0]["routes"]), 1)
    return entry


def main() -> None:
    """Run, print one JSON line, exit 1 outside the budget."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=len(POOLS_TOKENS))
    parser.add_argument("--traces", default=",".join(TRACES))
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("TIERLINE_DATA", root.parent / "shared" / "data")) / "traces"
    pools = POOLS_TOKENS[: arguments.rounds]
    report: dict[str, Any] = {}
    ok = True
    for name in arguments.traces.split(","):
        path = folder / f"mooncake_{name}.jsonl.gz"
        if not path.exists():
            continue
        requests = list(read_trace(path))
        report[name] = []
        for size in SIZES_TOKENS:
            entry = row(requests, size, pools)
            ours = entry["cost-aware"]["saved_s"]
            ok &= ours >= EQUAL * max(entry["lru"]["saved_s"], entry["arc"]["saved_s"])
            report[name].append(entry)
            print(f"{name} {size}", file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "placement", "ok": ok, "rounds": len(pools), **report}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
