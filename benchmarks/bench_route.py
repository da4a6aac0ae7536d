"""Does choosing a replica stay far under what serving the request costs to simulate?

Question   how long do 12,031 routes over 8 replicas take, each policy, besides the look-ups
           in the replicas' caches and the predictions, which belong to the replicas?
Budget     0.1 s for all of them: an eighth of a replay of that many requests.
Baseline   reading every field that a policy may read, 12,031 x 8 times.
Method     best and median of 5 rounds; loads move after every route; chosen numbers are
           counted, so that no round times an empty loop.
"""

import json
import platform
import statistics
import time

from tierline.base.clock import FOREVER_PS
from tierline.scheduling.routing import ROUTERS, Candidate
from tierline.scheduling.sequence import Sequence

REQUESTS, REPLICAS, ROUNDS = 12_031, 8, 5
BUDGET_S = 0.1
DUE_PS = FOREVER_PS // 2  # a promise that everybody keeps


class Standing:
    """A replica whose answers cost nothing."""

    __slots__ = ("accepting", "number", "prompt_tokens_queued", "requests_outstanding")
    speed_permille = 1000

    def __init__(self, number: int) -> None:
        self.number = number
        self.accepting = True
        self.requests_outstanding = self.prompt_tokens_queued = 0

    def cached_tokens(self, _sequence: Sequence) -> int:
        return 0

    def has_adapter(self, _name: str) -> bool:
        return False

    def predicted_ttft_ps(self, _sequence: Sequence) -> int:
        return self.prompt_tokens_queued


def requests() -> list[Sequence]:
    """Prompts like those of the conversation trace, two in three in one of 300 sessions."""
    return [
        Sequence(
            i,
            arrival_ps=i,
            prompt_tokens=12_000,
            output_max_tokens=300,
            due_ps=DUE_PS,
            chain=[0, i % 300 if i % 3 else i, *range(20)],
        )
        for i in range(REQUESTS)
    ]


def seconds(name: str, arrivals: list[Sequence]) -> float:
    replicas = [Standing(number) for number in range(REPLICAS)]
    route = ROUTERS[name](replicas, seed=7, block_tokens=512)
    chosen = [0] * REPLICAS
    start_ns = time.perf_counter_ns()
    for sequence in arrivals:
        number = route(sequence, sequence.arrival_ps)
        chosen[number] += 1  # type: ignore[index]
        replicas[number].prompt_tokens_queued += 12_000  # type: ignore[index]
    taken_s = (time.perf_counter_ns() - start_ns) / 1e9
    assert sum(chosen) == REQUESTS
    return taken_s


def baseline_s() -> float:
    replicas: list[Candidate] = [Standing(number) for number in range(REPLICAS)]
    start_ns = time.perf_counter_ns()
    for _ in range(REQUESTS):
        for r in replicas:
            _ = (r.accepting, r.requests_outstanding, r.prompt_tokens_queued, r.speed_permille)
    return (time.perf_counter_ns() - start_ns) / 1e9


def main() -> None:
    arrivals = requests()
    rounds = {name: [seconds(name, arrivals) for _ in range(ROUNDS)] for name in ROUTERS}
    medians = {name: statistics.median(taken) for name, taken in rounds.items()}
    print(
        json.dumps(
            {
                "benchmark": "route",
                "best_s": {name: round(min(taken), 4) for name, taken in rounds.items()},
                "median_s": {name: round(taken, 4) for name, taken in medians.items()},
                "baseline_s": round(min(baseline_s() for _ in range(ROUNDS)), 4),
                "budget_s": BUDGET_S,
                "within_budget": max(medians.values()) <= BUDGET_S,
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
