"""Plan a fleet from Python: what growth costs, and what the second choice would have been.

python examples/plan_from_python.py [TRACE]
"""

import sys
from pathlib import Path

import tierline

TRACE = Path(__file__).with_name("chat.jsonl.gz")


def main() -> None:
    trace = sys.argv[1] if len(sys.argv) > 1 else TRACE
    for growth in (1.0, 1.5, 3.0):
        answer = tierline.plan(
            "llama-3.1-70b",
            trace=trace,
            slo="ttft_p99=2s,itl_p99=50ms",
            gpus=["h100-sxm", "h200"],
            growth=growth,
        )
        print(f"x {growth:g}: {answer.headline}")
        for other in answer.alternatives[:2]:
            usd = other.pessimistic.usd_per_year
            price = "no price" if usd is None else f"${usd:,.0f} a year"
            print(f"      or {other.name}: {other.pessimistic.gpus} GPUs, {price}")


if __name__ == "__main__":
    main()
