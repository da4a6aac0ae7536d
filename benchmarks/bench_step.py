"""Is the step law cheap enough to be asked for every step and every candidate?

Question   how long do one step, one construction, and one usable rate take, in plain Python?
Budget     3 us a step (a simulator prices millions), 1 ms to build (a planner builds
           thousands), 10 ms a usable rate.
Baseline   a pure-Python addition in the same run, so that a slow machine shows.
Method     three models of different shape; median of 7 rounds each.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable

from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.step import Layout, StepCost, load_engine
from tierline.planner.load import Demand, Instance, usable_rate
from tierline.workload.slo import parse_service_levels

ROUNDS = 7
BUDGETS_US = {"step": 3.0, "build": 1000.0, "usable_rate": 10_000.0}
CASES = (
    ("llama-3.1-70b", "h100-sxm", Layout(weights="fp8", kv="fp8", tp=4)),
    ("gpt-oss-120b", "h200", Layout(weights="mxfp4", kv="bf16", tp=2)),
    ("deepseek-r1", "b200", Layout(weights="nvfp4", kv="fp8", tp=8)),
)
DEMAND = Demand(
    input_tokens=tuple(200 * 1.5**i for i in range(12)),
    output_tokens=tuple(50 * 1.3**i for i in range(12)),
)
LEVELS = parse_service_levels(["ttft_p99=10s,itl_p99=200ms"])


def median_us(work: Callable[[], object], *, calls: int) -> float:
    """Microseconds of one call, median over rounds."""
    rounds = []
    for _ in range(ROUNDS):
        start_ns = time.perf_counter_ns()
        for _ in range(calls):
            work()
        rounds.append((time.perf_counter_ns() - start_ns) / calls / 1e3)
    return statistics.median(rounds)


def baseline_us() -> float:
    """A thousand additions."""
    return median_us(lambda: sum(range(1000)), calls=200)


def measure(name: str, gpu: str, layout: Layout) -> dict[str, float]:
    """Median microseconds of each question for one model."""
    model, spec = load_model(name), load_gpu(gpu)
    cost = StepCost(model, spec, layout)
    instance = Instance(
        cost=cost,
        engine=load_engine("vllm"),
        kv_tokens=1e6,
        sequences_max=1024,
        chunk_tokens=2048,
    )
    return {
        "step": median_us(lambda: cost.step_s(64, 1e5, 512, 3e5), calls=5000),
        "decode_run": median_us(lambda: cost.decode_run_s(64, 100_000, 50), calls=5000),
        "build": median_us(lambda: StepCost(model, spec, layout), calls=20),
        "usable_rate": median_us(lambda: usable_rate(instance, DEMAND, LEVELS), calls=5),
    }


def main() -> None:
    """One JSON line a model."""
    base_us = baseline_us()
    for name, gpu, layout in CASES:
        figures = measure(name, gpu, layout)
        print(
            json.dumps(
                {
                    "benchmark": "step",
                    "model": name,
                    **{f"{k}_us_median": round(us, 2) for k, us in figures.items()},
                    **{
                        f"{k}_per_1000_additions": round(us / base_us, 2)
                        for k, us in figures.items()
                    },
                    "within_budget": all(figures[k] <= us for k, us in BUDGETS_US.items()),
                    "python": platform.python_version(),
                }
            )
        )


if __name__ == "__main__":
    main()
