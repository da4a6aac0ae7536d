"""Do usage records and keys stay off the path of an answer?

Question   what does a usage record cost the event loop at 2,000 a second, each awaited until it is
           committed; how long does its acknowledgement take; how long does a key's check take?
Budget     50 us of the loop's thread a record, 10 us a check.
Baseline   the same paced tasks awaiting a future that the loop itself resolves: what asyncio takes.
Method     three rounds of each, interleaved, CPU time of the loop's thread over 2 s, in a folder
           on this disk; a row for every record is required at the end.
"""

import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tierline.server.keys import Keys
from tierline.server.state import State, Usage

PER_S, ROUND_S, ROUNDS, CHECKS = 2000, 2, 3, 20_000
BURST = 50  # requests that end in one turn of the loop
BUDGET_RECORD_US, BUDGET_CHECK_US = 50.0, 10.0
RECORD = Usage(
    request_id="",
    key_id="",
    tenant="default",
    model="demo",
    endpoint="chat",
    level="interactive",
    outcome="stop",
    prompt_tokens=100,
    cached_tokens=64,
    output_tokens=20,
    arrived_s=1.7e9,
    queue_s=0.001,
    ttft_s=0.02,
    e2e_s=0.4,
)


async def paced(give: Callable[[], "asyncio.Future[bool]"]) -> tuple[float, list[float]]:
    """Microseconds of this thread a record, and milliseconds until each was acknowledged."""
    waits_ms: list[float] = []

    async def one() -> None:
        start_s = time.perf_counter()
        assert await give()
        waits_ms.append((time.perf_counter() - start_s) * 1e3)

    start_s, cpu_s = time.perf_counter(), time.thread_time()
    tasks = []
    for burst in range(PER_S * ROUND_S // BURST):
        tasks += [asyncio.ensure_future(one()) for _ in range(BURST)]
        await asyncio.sleep(start_s + (burst + 1) * BURST / PER_S - time.perf_counter())
    await asyncio.gather(*tasks)
    return (time.thread_time() - cpu_s) / len(tasks) * 1e6, waits_ms


def at_once() -> "asyncio.Future[bool]":
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()
    loop.call_soon(done.set_result, True)
    return done


async def measure(folder: Path) -> dict[str, float]:
    state = State.open(folder)
    keys = await Keys.open(state, clock_s=time.time)
    key, text = await keys.create(tenant="default", name="bench", budget_tokens=10**15)
    numbers = iter(range(10**9))

    def record() -> "asyncio.Future[bool]":
        usage = replace(RECORD, request_id=f"chatcmpl-{next(numbers):032x}", key_id=key.id)
        return state.record(usage)

    record_us, baseline_us, waits_ms = [], [], []
    for _ in range(ROUNDS):
        baseline_us.append((await paced(at_once))[0])
        cost_us, waits = await paced(record)
        record_us.append(cost_us)
        waits_ms += waits
    start_s = time.perf_counter()
    many = [record() for _ in range(50_000)]
    handed_s = time.perf_counter() - start_s
    assert all(await asyncio.gather(*many))
    flood_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    for _ in range(CHECKS):
        keys.check(text)
    check_us = (time.perf_counter() - start_s) / CHECKS * 1e6
    assert (await state.totals(by=[]))[0].requests == next(numbers)
    await state.close(ended="stopped", now_s=time.time())
    quantiles = statistics.quantiles(waits_ms, n=100)
    return {
        "record_us": round(statistics.median(record_us), 1),
        "baseline_us": round(statistics.median(baseline_us), 1),
        "acknowledged_p50_ms": round(quantiles[49], 2),
        "acknowledged_p99_ms": round(quantiles[98], 2),
        "flood_records_per_s": round(50_000 / flood_s),
        "flood_hand_over_us": round(handed_s / 50_000 * 1e6, 1),
        "check_us": round(check_us, 2),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(measure(Path(folder)))
    within = measured["record_us"] <= BUDGET_RECORD_US and measured["check_us"] <= BUDGET_CHECK_US
    print(
        json.dumps(
            {
                "benchmark": "state",
                **measured,
                "budget_record_us": BUDGET_RECORD_US,
                "budget_check_us": BUDGET_CHECK_US,
                "within_budget": within,
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
