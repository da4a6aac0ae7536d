"""Does a whole plan fit into a coffee sip: real traces, real models, every accelerator?

Question   how long does `tierline.plan` take from trace file to finished plan, for two Azure
           and two Mooncake traces and five models, over all accelerators of the catalogue?
Budget     20 s for each of the 20 plans by the closed form (`--quick`): a search people repeat
           while they talk. 60 s with the replay that decides, for one model on the Mooncake
           conversation (`--replay`); what the other nineteen take with it is told beside.
Baseline   a pure-Python loop of known cost in the same run, so that a slow machine shows:
           figures are also given as multiples of it.
Method     one process, one plan each, warnings are errors; the trace is read every time.
"""

import argparse
import json
import os
import platform
import time
import warnings
from pathlib import Path

from tierline.planner.api import plan

BUDGET_S = 20.0
REPLAY_BUDGET_S = 60.0
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b", "mixtral-8x7b", "deepseek-r1")
TRACES = {
    "azure2023_conv.csv.gz": "ttft_p99=3s,itl_p99=100ms",
    "azure2023_code.csv.gz": "ttft_p99=5s,itl_p99=100ms",
    "mooncake_conversation.jsonl.gz": "ttft_p99=30s,itl_p99=100ms",
    "mooncake_synthetic.jsonl.gz": "ttft_p99=30s,itl_p99=100ms",
}


def data_folder() -> Path:
    root = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("TIERLINE_DATA", root.parent / "shared" / "data"))


def baseline_s() -> float:
    """Seconds of ten million additions: the speed of this machine today."""
    started = time.perf_counter()
    total = 0
    for i in range(10_000_000):
        total += i
    assert total == 49_999_995_000_000
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--traces", default=",".join(TRACES))
    parser.add_argument("--replay", action="store_true", help="with the replay that decides")
    args = parser.parse_args()
    warnings.simplefilter("error")
    unit_s = baseline_s()
    rows, replay = [], args.replay
    budget_s = REPLAY_BUDGET_S if replay else BUDGET_S
    for model in args.models.split(","):
        for trace in args.traces.split(","):
            slo = TRACES[trace]
            started = time.perf_counter()
            cpu_s = time.process_time()
            answer = plan(model, trace=data_folder() / "traces" / trace, slo=slo, replay=replay)
            took_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
            best = answer.recommended
            told = answer.survival
            if told is None:
                assert best.pessimistic.point.meets(answer.question.levels)
            else:
                assert told.deciding.kept
            rows.append(
                {
                    "model": model,
                    "trace": trace,
                    "replay": replay,
                    "seconds": round(took_s, 2),
                    "cpu_seconds": round(cpu_s, 2),
                    "baselines": round(took_s / unit_s, 1),
                    "plan": best.name,
                    "usd_per_year": best.pessimistic.usd_per_year,
                    "closed_form_instances": told.closed_form_instances if told else None,
                    "replays": told.replays if told else 0,
                }
            )
    seconds = [row["seconds"] for row in rows]
    print(
        json.dumps(
            {
                "benchmark": "plan",
                "seconds_max": max(seconds),
                "seconds_median": sorted(seconds)[len(seconds) // 2],
                "baseline_s": round(unit_s, 2),
                "budget_s": budget_s,
                "within_budget": max(seconds) <= budget_s,
                "plans": rows,
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
