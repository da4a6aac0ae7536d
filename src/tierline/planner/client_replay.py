"""The closed-loop client of the published benchmarks, replayed against the step law.

C clients send at once and each sends again when its answer is complete, ten prompts for
every client. Because all start together, prompts keep coming in bursts, and the published
mean TTFT contains the first wave: a benchmark's protocol, not a steady state. `accuracy`
replays it to test the step law apart from the queueing model of `planner.load`.
"""

import heapq
import random
from dataclasses import dataclass

from tierline.perf.step import SEQUENCES_MAX, TOKENS_MAX
from tierline.planner.load import Instance
from tierline.planner.measured import Row

PROMPTS_PER_CLIENT = 10
PROMPTS_ENOUGH = 400  # past four waves, more prompts only repeat the same state


@dataclass(slots=True)
class Sent:
    """One prompt on its way."""

    number: int  # in sending order
    wave: int
    inputs: int
    outputs: int
    sent_s: float
    visible_tick: int
    computed: int = 0
    first_s: float = 0.0


def replay(row: Row, instance: Instance, *, seed: int = 7) -> tuple[float, float]:
    """Mean TTFT and TPOT in seconds, as that benchmark's client would report them."""
    client = _Client(row, instance, random.Random(seed))
    while client.step():
        pass
    return client.means()


class _Client:
    """All clients of one run and the instance that serves them."""

    def __init__(self, row: Row, instance: Instance, rng: random.Random) -> None:
        self.row, self.instance, self.rng = row, instance, rng
        self.now_s, self.tick, self.decode_tick = 0.0, 0, 0
        self.to_send = min(PROMPTS_PER_CLIENT * row.clients, max(4 * row.clients, PROMPTS_ENOUGH))
        self.waiting: list[Sent] = []
        self.computing: list[Sent] = []
        self.running: list[tuple[int, int, Sent]] = []  # heap by the decode tick of its end
        self.context = self.reserved = 0
        self.ttft: dict[bool, list[float]] = {True: [], False: []}  # by "of the first wave"
        self.tpot: list[float] = []
        self.budget = min(row.batch_tokens * row.layout.dp, TOKENS_MAX - SEQUENCES_MAX)
        lock_step = row.engine.name == "sglang" and row.input_tokens % 1024 == 0
        self.scatter_first = not row.uniform and not lock_step
        for _ in range(row.clients):
            self.send(visible_tick=0)

    def send(self, *, visible_tick: int) -> None:
        if self.to_send == 0:
            return
        row, rng = self.row, self.rng
        wave = 0 if not (self.tpot or self.running or self.tick) else 1
        inputs, outputs = row.input_tokens, row.output_tokens
        if row.uniform:
            inputs = max(int(inputs * rng.uniform(0.8, 1)), 1)
            outputs = max(int(outputs * rng.uniform(0.8, 1)), 2)
        elif wave == 0 and self.scatter_first:
            outputs = max(int(outputs * rng.uniform(0.5, 1.5)), 2)
        self.to_send -= 1
        self.waiting.append(Sent(self.to_send, wave, inputs, outputs, self.now_s, visible_tick))

    def step(self) -> bool:
        """One step with prompt tokens, or a run of decode steps; False when all is done."""
        self.admit()
        if self.computing:
            self.compute()
        elif self.running:
            self.decode()
        elif not self.waiting:
            return False
        while self.running and self.running[0][0] <= self.decode_tick:
            self.finish(heapq.heappop(self.running)[2])
        return True

    def admit(self) -> None:
        while self.waiting:
            sent = self.waiting[0]
            idle = not (self.running or self.computing)
            need = sent.inputs + sent.outputs // 2
            if not idle and (
                sent.visible_tick > self.tick or self.reserved + need > self.instance.kv_tokens
            ):
                return
            self.reserved += need
            self.computing.append(self.waiting.pop(0))

    def compute(self) -> None:
        mixes = self.instance.engine.mixes_prefill
        beside = len(self.running) if mixes else 0
        budget = max(self.budget - beside, 64)
        tokens, pairs = 0, 0.0
        for sent in self.computing:
            chunk = min(budget - tokens, sent.inputs - sent.computed)
            if chunk == 0:
                break
            pairs += chunk * (sent.computed + chunk / 2)
            sent.computed += chunk
            tokens += chunk
        cached = self.context if mixes else 0
        self.now_s += self.instance.cost.step_s(beside, cached, tokens, pairs)
        self.tick += 1
        self.decode_tick += mixes
        self.context += beside
        done = [sent for sent in self.computing if sent.computed == sent.inputs]
        self.computing = [sent for sent in self.computing if sent.computed < sent.inputs]
        for sent in done:
            sent.first_s = self.now_s
            self.ttft[sent.wave == 0].append(self.now_s - sent.sent_s)
            self.context += sent.inputs + 1
            heapq.heappush(self.running, (self.decode_tick + sent.outputs - 1, sent.number, sent))

    def decode(self) -> None:
        steps = self.running[0][0] - self.decode_tick
        if self.waiting and self.waiting[0].visible_tick > self.tick:
            steps = min(steps, self.waiting[0].visible_tick - self.tick)
        sequences = len(self.running)
        self.now_s += self.instance.cost.decode_run_s(sequences, self.context, max(steps, 1))
        self.tick += max(steps, 1)
        self.decode_tick += max(steps, 1)
        self.context += sequences * max(steps, 1)

    def finish(self, sent: Sent) -> None:
        self.tpot.append((self.now_s - sent.first_s) / (sent.outputs - 1))
        self.context -= sent.inputs + sent.outputs
        self.reserved -= sent.inputs + sent.outputs // 2
        delay = int(self.rng.random() * self.instance.engine.wait_steps)
        self.send(visible_tick=self.tick + 1 + delay)

    def means(self) -> tuple[float, float]:
        first, later = self.ttft[True], self.ttft[False]
        ttft_s = sum(first) / len(first)
        if later:
            share = 1 / PROMPTS_PER_CLIENT
            ttft_s = share * ttft_s + (1 - share) * sum(later) / len(later)
        return ttft_s + self.instance.engine.host_s, sum(self.tpot) / len(self.tpot)
