"""Runs for tests of what is measured and drawn: written by hand, or served by a tiny loop.

`served_run` is no simulator: requests of three classes go through two replicas, one prompt
chunk and one token for everybody at a time, first come or most urgent first.  That is enough
for columns, steps, totals and moments that agree with each other, as those of a real run do.
"""

from dataclasses import replace

from tierline.base.clock import PS_PER_MS, PS_PER_S
from tierline.base.rng import stream
from tierline.planner.sim_page import SimPage, render_sim_page
from tierline.sim.life import slowest
from tierline.sim.measure import summary
from tierline.sim.record import (
    FAILED,
    FINISHED,
    REFUSED,
    Moment,
    ReplicaTotals,
    Requests,
    Run,
    Steps,
)
from tierline.workload.slo import parse_service_levels

LEVELS = parse_service_levels(
    ["chat@2:ttft_p99=1s,itl_p99=80ms", "agent@1:ttft_p99=4s,e2e_p95=30s", "batch:ttft_p90=120s"]
)
TENANTS = ("acme", "blue", "coop")
CHUNK_TOKENS, SEQUENCES_MAX = 512, 24


def run_of(rows: list[dict[str, int]], **more: object) -> Run:
    """A run with one request for each row of columns; what a row leaves out keeps its default."""
    requests = Requests(len(rows))
    for number, row in enumerate(rows):
        for name, value in row.items():
            getattr(requests, name)[number] = value
    run = Run(requests=requests, levels=LEVELS, tenants=TENANTS, end_ps=10 * PS_PER_S)
    for name, value in more.items():
        setattr(run, name, value)
    return run


def finished(
    arrival_s: float, first_s: float, finish_s: float, output_tokens: int, **more: int
) -> dict[str, int]:
    """The row of a request that was admitted halfway to its first token and finished."""
    arrival, first = round(arrival_s * PS_PER_S), round(first_s * PS_PER_S)
    return {
        "arrival_ps": arrival,
        "admitted_ps": (arrival + first) // 2,
        "first_ps": first,
        "finish_ps": round(finish_s * PS_PER_S),
        "input_tokens": 100,
        "output_tokens": output_tokens,
        "outcome": FINISHED,
    } | more


class _Replica:
    """One of the two: who waits, who runs, and what it has done."""

    def __init__(self, number: int) -> None:
        self.now_ps = 0
        self.waiting: list[int] = []
        self.prefill: list[list[int]] = []  # [request, tokens left]
        self.running: dict[int, int] = {}  # request -> tokens generated
        self.totals = ReplicaTotals(
            number=number, name=f"h100-{number}", gpus=2, usd_per_hour=5.0, pages_total=4000
        )


class _Service:
    """The loop: serves what has arrived until nothing is left."""

    def __init__(self, run: Run, *, urgent_first: bool, watched: int) -> None:
        self.run, self.urgent_first, self.watched = run, urgent_first, watched
        self.replicas = [_Replica(0), _Replica(1)]
        self.last_ps: dict[int, int] = {}
        self.gaps: dict[int, list[int]] = {}  # by class, one for each token after the first
        self.rank = [level.priority for level in run.levels]

    def note(self, request: int, at_ps: int, what: str, why: str) -> None:
        if request == self.watched:
            self.run.moments.setdefault(request, []).append(Moment(at_ps, what, why))

    def serve(self, replica: _Replica, mine: list[int]) -> None:
        requests = self.run.requests
        while mine or replica.waiting or replica.prefill or replica.running:
            if not (replica.waiting or replica.prefill or replica.running):
                replica.now_ps = max(replica.now_ps, requests.arrival_ps[mine[0]])
            while mine and requests.arrival_ps[mine[0]] <= replica.now_ps:
                new = mine.pop(0)
                replica.waiting.append(new)
                behind = f"{len(replica.waiting) - 1} wait before it"
                self.note(new, requests.arrival_ps[new], "arrived", behind)
            self.admit(replica)
            self.step(replica)
        replica.totals.up_ps = max(replica.now_ps, 1)

    def admit(self, replica: _Replica) -> None:
        requests, totals = self.run.requests, replica.totals
        if self.urgent_first:
            replica.waiting.sort(key=lambda r: (-self.rank[requests.level[r]], r))
        while replica.waiting and len(replica.running) + len(replica.prefill) < SEQUENCES_MAX:
            new = replica.waiting.pop(0)
            requests.admitted_ps[new] = replica.now_ps
            requests.replica[new] = totals.number
            prompt = requests.input_tokens[new]
            cached = prompt // 4 if new % 3 == 0 else 0
            requests.cached_tokens[new] = cached
            if new % 6 == 0:
                requests.loaded_tokens[new] = cached
                totals.moved_bytes["load"] = totals.moved_bytes.get("load", 0) + cached * 4096
                self.note(new, replica.now_ps, "loading", f"{cached} tokens come up from DRAM")
                totals.loaded_tokens[1] += cached
            replica.prefill.append([new, prompt - cached])
            self.note(new, replica.now_ps, "admitted", f"{len(replica.running)} are decoding")

    def step(self, replica: _Replica) -> None:
        requests, totals, steps = self.run.requests, replica.totals, self.run.steps
        start_ps, budget, chunks = replica.now_ps, CHUNK_TOKENS, 0
        ready = []
        for item in replica.prefill:
            tokens = min(budget, item[1])
            if tokens:
                self.note(item[0], start_ps, "chunk", f"{tokens} prompt tokens")
            item[1] -= tokens
            budget, chunks = budget - tokens, chunks + tokens
            ready += [item[0]] if item[1] == 0 and tokens else []
        replica.prefill = [item for item in replica.prefill if item[1]]
        decodes = len(replica.running)
        replica.now_ps += 12 * PS_PER_MS + 60_000_000 * (chunks + decodes)
        for request in [*replica.running, *ready]:
            self.token(replica, request)
        totals.steps, totals.events = totals.steps + 1, totals.events + 1
        totals.busy_ps += replica.now_ps - start_ps
        totals.prefill_tokens, totals.decode_tokens = (
            totals.prefill_tokens + chunks,
            totals.decode_tokens + decodes,
        )
        assert steps is not None
        values = {
            "start_ps": start_ps,
            "end_ps": replica.now_ps,
            "replica": totals.number,
            "repeats": 1,
            "decodes": decodes,
            "prefill_tokens": chunks,
            "context_tokens": sum(requests.input_tokens[r] for r in replica.running),
            "waiting": len(replica.waiting),
            "preempted": 0,
            "pages_used": min(len(steps) + 16 * decodes, totals.pages_total),
        }
        for name, value in values.items():
            getattr(steps, name).append(value)
        for tier, stored in enumerate(steps.stored_blocks):
            stored.append(len(steps) // (tier + 1) if tier < 2 else 0)

    def token(self, replica: _Replica, request: int) -> None:
        requests, now_ps = self.run.requests, replica.now_ps
        done = replica.running.get(request, 0) + 1
        if done == 1:
            requests.first_ps[request] = now_ps
            self.note(request, now_ps, "first token", "the prompt is computed")
        else:
            gap_ps = now_ps - self.last_ps[request]
            self.gaps.setdefault(requests.level[request], []).append(gap_ps)
            requests.itl_max_ps[request] = max(requests.itl_max_ps[request], gap_ps)
        self.last_ps[request] = now_ps
        replica.running[request] = done
        if done == requests.output_tokens[request]:
            del replica.running[request]
            requests.finish_ps[request], requests.outcome[request] = now_ps, FINISHED
            self.note(request, now_ps, "finished", f"{done} tokens")


def served_run(
    *,
    count: int = 300,
    seed: int = 7,
    policy: str = "fcfs",
    rate_rps: float = 24,
    watched: int = 40,
    gaps: dict[int, list[int]] | None = None,
) -> Run:
    """`count` requests of three classes and tenants; `policy` is fcfs or urgent-first.

    `gaps` is filled with every gap between two tokens, by class.
    """
    rng = stream(seed, "tests.runs")
    requests = Requests(count)
    arrival_s = 0.0
    for number in range(count):
        arrival_s += float(rng.exponential(1 / rate_rps))
        level = (0, 0, 1, 0, 2)[number % 5]
        requests.arrival_ps[number] = round(arrival_s * PS_PER_S)
        requests.level[number] = level
        requests.tenant[number] = number % 7 % 3
        requests.input_tokens[number] = 40 + int(rng.exponential((400, 1500, 3000)[level]))
        requests.output_tokens[number] = 1 + int(rng.exponential((60, 80, 150)[level]))
    run = Run(
        requests=requests, levels=LEVELS, tenants=TENANTS, steps=Steps(), policy=policy, seed=seed
    )
    lost = {3: REFUSED, 11: FAILED} if count > 11 else {}
    for number, outcome in lost.items():
        requests.outcome[number] = outcome
    turns = [i for i in range(count) if i not in lost]
    service = _Service(run, urgent_first=policy == "urgent-first", watched=watched)
    for replica in service.replicas:
        service.serve(replica, [i for i in turns if i % 2 == replica.totals.number])
    if gaps is not None:
        gaps.update(service.gaps)
    run.end_ps = max(r.now_ps for r in service.replicas)
    for replica in service.replicas:
        replica.totals.up_ps = run.end_ps
    run.replicas = [r.totals for r in service.replicas]
    run.faults = [Moment(run.end_ps // 3, "slow", "replica 1 runs at half its speed for 5 s")]
    return run


def page_of(runs: list[Run], **page: object) -> str:
    """The page of these runs."""
    told = [summary(run) for run in runs]
    return render_sim_page(replace(PAGE, **page), runs, told)  # type: ignore[arg-type]


def sim_page_of(*, several: bool = True, request: int | None = None, **page: object) -> str:
    """A page of served runs: urgent-first alone, or beside first come, first served."""
    first = served_run(policy="urgent-first")
    chosen = slowest(first, 1, latency="ttft")[0] if request is None else request
    first = served_run(policy="urgent-first", watched=chosen)
    runs = [first, served_run(policy="fcfs")] if several else [first]
    return page_of(runs, request=chosen, **page)


PAGE = SimPage(
    model="llama-3.1-70b",
    fleet="2 × 2 H100 SXM",
    trace="served.jsonl, 300 requests",
    command="tierline sim deployment.toml --trace served.jsonl --compare urgent-first,fcfs -o out",
    inputs=(("trace", "served.jsonl, sha256 0123"), ("seed", "7")),
    deployment="schema = 1\n",
    caveats=("Step times are fitted: half of them are within 4.2% on rows left out.",),
)
