"""Does a real trace replay fast enough to search with, and faster than the fastest peer?

Question   how long does the production scheduler take for the Mooncake conversation on 8
           replicas with prefix-aware routing, for 10,000 Poisson requests, and for a million?
Budget     at most 1/5 of the peer's time with 512-token blocks and 1/30 with 16-token blocks;
           0.5 s for the 10,000 under the full policy; 60 s and 500 MB for the million.
Baseline   ai-dynamo 1.2.1's offline replay in the same run: set TIERLINE_PEER_PYTHON to an
           interpreter that has it. Without it only our own times are measured, and it is said.
Method     CPU seconds, because both sides are one thread and other work on the machine would
           decide otherwise; wall seconds beside them. Parsing the trace is not counted on
           either side. Rounds take turns; the best of each counts. Both sides have 8 replicas
           of 462,000 cached tokens, 512 tokens and 128 sequences a step. The budget is for the
           peer as it comes, with its built-in timing, which is of a faster machine than ours
           and so has shorter queues; beside it stands the peer with a table of our law.
           Both forget the least recently used. Lengths of the Poisson requests are Azure's
           conversations, at 60 % of the rate at which a backlog drains, three classes, and one
           tenant; the same for four tenants that share fairly is beside it. Growth is measured
           in processes of their own, with requests made when asked for: peak memory is all of
           the process.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, overload

import numpy as np

from tierline.base.clock import PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.line import StepLine
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.scheduler import Limits
from tierline.sim.api import simulate
from tierline.sim.instance import Instance, build_instance
from tierline.sim.record import FINISHED
from tierline.workload.request import Request
from tierline.workload.slo import ServiceLevel, parse_service_levels
from tierline.workload.trace import read_trace

REPLICAS, POOL_TOKENS, BATCH_TOKENS, SEQUENCES = 8, 462_000, 512, 128
LOAD = 0.6
LISTED = 10_000  # so many requests are made beforehand
CLASSES = parse_service_levels(
    [
        "interactive@2:ttft_p99=1s,itl_p99=60ms",
        "agentic@1:ttft_p99=5s,itl_p99=100ms",
        "batch@0:ttft_p99=600s",
    ]
)
TENANTS = tuple("abcd")
RATIOS = {512: 5.0, 16: 30.0}
POISSON_S, MILLION_S, MILLION_MB = 0.5, 60.0, 500.0
COST = StepCost(
    load_model("llama-3.1-70b"),
    load_gpu("h100-sxm"),
    Layout(weights="bf16", kv="bf16", tp=4),
)

PEER = """
import json, sys, time
from dynamo.llm import MockEngineArgs
from dynamo.replay import run_trace_replay
trace, workers, engine = sys.argv[1:]
start_s, start_cpu_s = time.perf_counter(), time.process_time()
report = run_trace_replay(
    trace,
    extra_engine_args=MockEngineArgs.from_json(engine),
    num_workers=int(workers),
    router_mode="kv_router",
)
assert report["completed_requests"] == report["num_requests"]
busy = (time.process_time() - start_cpu_s) / (time.perf_counter() - start_s)
print(json.dumps(report | {"cpu_s": report["wall_time_ms"] / 1e3 * busy}))
"""


def data_folder() -> Path:
    root = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("TIERLINE_DATA", root.parent / "shared" / "data")) / "traces"


# --- our side --------------------------------------------------------------------------------


def instance(block_tokens: int) -> Instance:
    built = build_instance(
        COST,
        name="bench",
        block_tokens=block_tokens,
        limits=Limits(
            batch_tokens=BATCH_TOKENS, sequences_max=SEQUENCES, chunk_tokens=BATCH_TOKENS
        ),
    )
    blocks = POOL_TOKENS // block_tokens
    pages = blocks * built.layout.pages_per_block
    return replace(built, pages_total=pages, placement="lru")  # what the peer forgets by


def replay(
    requests: Seq[Request],
    policy: str,
    *,
    replicas: int,
    block_tokens: int,
    levels: tuple[ServiceLevel, ...] = (),
) -> dict[str, Any]:
    """Seconds of one simulation, and what it did."""
    kind = instance(block_tokens)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    run = simulate(kind, requests, levels=levels, replicas=replicas, policy=policy)
    taken_s, taken_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    columns = run.requests
    assert columns.outcome.count(FINISHED) == len(requests), "somebody did not finish"
    waited_ps = sum(columns.first_ps) - sum(columns.arrival_ps)
    return {
        "wall_s": taken_s,
        "cpu_s": taken_cpu_s,
        "events": sum(r.events for r in run.replicas),
        "steps": sum(r.steps for r in run.replicas),
        "span_s": run.duration_s,
        "hit_share": sum(columns.cached_tokens) / sum(columns.input_tokens),
        "ttft_s": waited_ps / PS_PER_S / len(requests),
    }


class Poisson(Seq[Request]):
    """Requests made when asked for, so that a million of them are three columns."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        entries: int,
        rate_rps: float | None,
        tenants: Seq[str] = ("",),
    ) -> None:
        """Without a rate all arrive at once."""
        rng, at_s = Random(1), 0.0
        self.tenants = tenants
        self.arrival_ns, self.inputs, self.outputs = array("q"), array("l"), array("l")
        for _ in range(entries):
            at_s += rng.expovariate(rate_rps) if rate_rps else 0.0
            input_tokens, output_tokens = rng.choice(lengths)
            self.arrival_ns.append(int(at_s * 1e9))
            self.inputs.append(input_tokens)
            self.outputs.append(output_tokens)

    def __len__(self) -> int:
        return len(self.inputs)

    @overload
    def __getitem__(self, i: int) -> Request: ...
    @overload
    def __getitem__(self, i: slice) -> Seq[Request]: ...
    def __getitem__(self, i: int | slice) -> Request | Seq[Request]:
        assert isinstance(i, int)
        return Request(
            arrival_ns=self.arrival_ns[i],
            input_tokens=self.inputs[i],
            output_tokens=self.outputs[i],
            tenant=self.tenants[i % len(self.tenants)],
            priority=i % len(CLASSES),
        )


def azure_lengths() -> list[tuple[int, int]]:
    requests = read_trace(data_folder() / "azure2023_conv.csv.gz")
    return [(r.input_tokens, max(1, r.output_tokens)) for r in requests]


def drain_rps(lengths: list[tuple[int, int]], entries: int = 3000) -> float:
    """The rate at which a backlog is worked off: capacity."""
    backlog = Poisson(lengths, entries, None)
    return entries / float(replay(backlog, "fcfs", replicas=1, block_tokens=16)["span_s"])


def serve(
    lengths: list[tuple[int, int]], entries: int, rate_rps: float, tenants: Seq[str] = ("",)
) -> dict[str, Any]:
    requests: Seq[Request] = Poisson(lengths, entries, rate_rps, tenants)
    if entries <= LISTED:
        requests = list(requests)
    return replay(requests, "tierline", replicas=1, block_tokens=16, levels=CLASSES)


def grown(entries: int, rate_rps: float) -> dict[str, Any]:
    """The same in a process of its own, with its peak memory."""
    command = [sys.executable, __file__, "--grow", str(entries), "--rate", str(rate_rps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def grow(entries: int, rate_rps: float) -> None:
    figures = serve(azure_lengths(), entries, rate_rps)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures | {"peak_mb": peak_mb}))


# --- the peer --------------------------------------------------------------------------------


def write_law(path: Path) -> None:
    """Our law as the peer's table: milliseconds by prompt length, and by cached tokens in all
    and in each sequence."""
    line = StepLine(COST, tokens_max=2**14)
    prompts = [1, *(2**k for k in range(5, 15))]
    cached = np.linspace(0, POOL_TOKENS, 24).round().astype(int)
    each = [1, 1000, 4000, 16_000, 64_000, 131_072]
    prefill = [line.line(0, 0, [(0, n)])[0] / 1e9 for n in prompts]
    decode = [
        [line.line(min(SEQUENCES, max(1, int(c) // e)), int(c))[0] / 1e9 for e in each]
        for c in cached
    ]
    np.savez(
        path,
        prefill_isl=np.array(prompts, float),
        prefill_ttft_ms=np.array(prefill),
        decode_active_kv_tokens=cached.astype(float),
        decode_context_length=np.array(each, float),
        decode_itl=np.array(decode),
    )


def peer_replay(python: str, trace: Path, *, block_tokens: int, law: Path | None) -> dict[str, Any]:
    engine: dict[str, int | str] = {
        "block_size": block_tokens,
        "num_gpu_blocks": POOL_TOKENS // block_tokens,
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": BATCH_TOKENS,
    }
    if law is not None:
        engine["planner_profile_data"] = str(law)
    done = subprocess.run(
        [python, "-c", PEER, str(trace), str(REPLICAS), json.dumps(engine)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"DYN_LOG": "error"},
    )
    report = json.loads(done.stdout.splitlines()[-1])
    return {
        "wall_s": report["wall_time_ms"] / 1e3,
        "cpu_s": report["cpu_s"],
        "hit_share": report["prefix_cache_reused_ratio"],
        "ttft_s": report["mean_ttft_ms"] / 1e3,
    }


def beside_the_peer(python: str | None, rounds: dict[int, int]) -> dict[str, Any]:
    """Figures of both sides for each block size, in turns."""
    packed = data_folder() / "mooncake_conversation.jsonl.gz"
    answer: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        trace, law = Path(folder) / "conversation.jsonl", Path(folder) / "law.npz"
        trace.write_bytes(gzip.decompress(packed.read_bytes()))
        write_law(law)
        requests = list(read_trace(packed))
        for block_tokens, turns in rounds.items():

            def run(block_tokens: int = block_tokens) -> dict[str, Any]:
                return replay(requests, "fcfs", replicas=REPLICAS, block_tokens=block_tokens)

            ours, theirs, same_law = [run()], [], []
            for _ in range(turns):
                ours.append(run())
                if python is not None:
                    case = {"block_tokens": block_tokens}
                    theirs.append(peer_replay(python, trace, law=None, **case))
                    ours.append(run())
                    same_law.append(peer_replay(python, trace, law=law, **case))
                ours.append(run())
            answer[str(block_tokens)] = compared(ours, theirs, same_law, RATIOS[block_tokens])
    return answer


def compared(
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    same_law: list[dict[str, Any]],
    asked: float,
) -> dict[str, Any]:
    best = least(ours)
    answer: dict[str, Any] = {"ours": rounded(best)}
    if theirs:
        peer, law = least(theirs), least(same_law)
        ratio = peer["cpu_s"] / best["cpu_s"]
        answer |= {
            "peer": rounded(peer),
            "peer_same_law": rounded(law),
            "ratio": round(ratio, 2),
            "ratio_same_law": round(law["cpu_s"] / best["cpu_s"], 2),
            "within_budget": ratio >= asked,
        }
    return answer


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return min(rounds, key=lambda figures: figures["cpu_s"])


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="with 512-token blocks")
    parser.add_argument("--no-growth", action="store_true", help="leave the million out")
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=1.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grow:
        grow(args.grow, args.rate)
        return
    python = os.environ.get("TIERLINE_PEER_PYTHON")
    if python is None:
        print("TIERLINE_PEER_PYTHON is not set: no peer, ours alone", file=sys.stderr)
    mooncake = beside_the_peer(python, {512: args.rounds, 16: 1})
    lengths = azure_lengths()
    rate_rps = LOAD * drain_rps(lengths)
    served = [serve(lengths, 10_000, rate_rps) for _ in range(5)]
    best = least(served)
    shared = least([serve(lengths, 10_000, rate_rps, TENANTS) for _ in range(3)])
    sizes = (10_000,) if args.no_growth else (10_000, 100_000, 1_000_000)
    growth = {str(n): rounded(grown(n, rate_rps)) for n in sizes}
    million = growth[str(sizes[-1])]
    within = best["cpu_s"] <= POISSON_S and million["cpu_s"] <= MILLION_S
    within = within and million["peak_mb"] < MILLION_MB
    within = within and all(case.get("within_budget", True) for case in mooncake.values())
    print(
        json.dumps(
            {
                "benchmark": "replay",
                "peer": "ai-dynamo 1.2.1" if python is not None else None,
                "mooncake": mooncake,
                "poisson_10000": rounded(best) | {"rate_rps": round(rate_rps, 3)},
                "poisson_10000_four_tenants": rounded(shared),
                "growth": growth,
                "within_budget": within,
                "python": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    main()
