"""The closed-loop client of the published benchmarks, replayed against the step law.

C clients send at once and each sends again when its answer is complete, ten prompts for
every client. Because all start together, prompts keep coming in bursts, and the published
mean TTFT contains the first wave: a benchmark's protocol, not a steady state. `accuracy`
replays it to test the step law apart from the queueing model of `planner.load`.

Decode steps in a row are one addition each run, so a replay costs what its prompts cost.
The launch settings of the row (`recipes`) decide when a waiting prompt may start: when the
scheduler next looks, when every attention rank has one, when it fits a step whole.
"""

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass
from functools import cached_property

from tierline.perf.speculation import tokens_per_pass
from tierline.perf.step import SEQUENCES_MAX, TOKENS_MAX, StepCost
from tierline.planner.load import Instance
from tierline.planner.measured import Row

PROMPTS_PER_CLIENT = 10
PROMPTS_ENOUGH = 400  # past four waves, more prompts only repeat the same state
STEP_TOKENS_MIN = 64
SCATTER = 0.2  # of the first answers where lengths are alike: how far clients are out of step
# Of a draft token, by position, on the benchmark's text; the engine's own loss is in it.
ACCEPTANCE = {"trtllm": 0.7, "sglang": 0.5}


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


@dataclass(frozen=True)
class Passes:
    """What passes of the model cost when each sequence brings draft tokens to be checked.

    A pass checks `drafts` tokens more for each sequence and is followed by as many passes of
    a draft layer; it yields `gain` tokens of each sequence on average. Without drafts this is
    the step law itself.
    """

    cost: StepCost
    drafts: int
    acceptance: float = 0.0

    @cached_property
    def gain(self) -> float:
        """Tokens that a sequence advances in a pass."""
        return tokens_per_pass(self.acceptance, self.drafts)

    def pass_s(self, decodes: int, context: float, tokens: int = 0, pairs: float = 0.0) -> float:
        """Seconds of a pass of `decodes` sequences beside `tokens` of prompts."""
        cost, checked = self.cost, decodes * self.drafts
        if not checked:
            return cost.step_s(decodes, context, tokens, pairs)
        room = TOKENS_MAX - SEQUENCES_MAX - tokens
        seconds = cost.step_s(decodes, context, tokens + min(checked, room), pairs)
        if not tokens:
            seconds -= cost.prompt_s * cost.slowdown
        return seconds + self.drafts * self._draft_s(decodes)

    def _draft_s(self, decodes: int) -> float:
        """One more layer, and the head again."""
        cost = self.cost
        head_s = cost.step_s(decodes, 0) - cost.step_s(0, 0, decodes)
        head_s += cost.prompt_s * cost.slowdown
        return cost.step_s(decodes, 0) / cost.model.layers + max(head_s, 0.0)

    def run_s(self, decodes: int, context: float, steps: int) -> float:
        """Seconds of `steps` passes in a row; every one adds `gain` tokens to each sequence."""
        if not self.drafts:
            return self.cost.decode_run_s(decodes, context, steps)
        return steps * self.pass_s(decodes, context + decodes * self.gain * (steps - 1) / 2)


class _Client:
    """All clients of one run and the instance that serves them."""

    def __init__(self, row: Row, instance: Instance, rng: random.Random) -> None:
        self.row, self.instance, self.rng = row, instance, rng
        self.launch = row.launch
        self.passes = Passes(
            instance.cost, row.launch.draft_tokens, ACCEPTANCE.get(row.engine.name, 0.0)
        )
        self.now_s, self.tick, self.generated = 0.0, 0, 0.0  # generated: by each sequence
        self.look_tick = 0  # at which the scheduler looks for new requests next
        self.to_send = min(PROMPTS_PER_CLIENT * row.clients, max(4 * row.clients, PROMPTS_ENOUGH))
        self.waiting: deque[Sent] = deque()
        self.computing: list[Sent] = []
        self.running: list[tuple[float, int, Sent]] = []  # heap by what was generated at its end
        self.context = self.reserved = 0.0
        self.ttft: dict[bool, list[float]] = {True: [], False: []}  # by "of the first wave"
        self.tpot: list[float] = []
        self.budget = min(row.launch.batch_tokens * row.layout.dp, TOKENS_MAX - SEQUENCES_MAX)
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
            outputs = max(int(outputs * rng.uniform(1 - SCATTER, 1 + SCATTER)), 2)
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
        while self.running and self.running[0][0] <= self.generated:
            self.finish(heapq.heappop(self.running)[2])
        return True

    # --- which prompts may start ----------------------------------------------------------

    def admit(self) -> None:
        """Take waiting prompts in order, while the scheduler sees them and they fit."""
        idle = not (self.running or self.computing)
        if not self.waiting or not (idle or self.next_look() <= self.tick):
            return
        while self.waiting:
            sent = self.waiting[0]
            need = sent.inputs + sent.outputs // 2
            full = len(self.running) + len(self.computing) >= self.instance.sequences_max
            full = full or self.reserved + need > self.instance.kv_tokens
            if not idle and (sent.visible_tick > self.tick or full):
                return
            idle = False
            self.reserved += need
            self.computing.append(self.waiting.popleft())

    def next_look(self) -> int:
        """The tick at which the scheduler sees the first waiting prompt and may take it."""
        first, ranks = self.waiting[0], self.row.layout.dp
        late = max(first.visible_tick - self.look_tick, 0)
        tick = self.look_tick + math.ceil(late / self.launch.poll_steps) * self.launch.poll_steps
        if self.launch.balance_steps and len(self.running) >= ranks and not self.computing:
            tick = max(tick, self.balanced(ranks, first.visible_tick + self.launch.balance_steps))
        if self.launch.gather_steps and self.running and not self.computing:
            tick = max(tick, self.gathered(first.visible_tick + self.launch.gather_steps))
        return tick

    def balanced(self, ranks: int, given_up: int) -> int:
        """The tick at which every attention rank has a prompt: coupons of `ranks` kinds."""
        needed = round(ranks * sum(1 / i for i in range(1, ranks + 1)))
        if len(self.waiting) < needed:
            return given_up
        return min(self.waiting[needed - 1].visible_tick, given_up)

    def gathered(self, given_up: int) -> int:
        """The tick at which what waits, with what decodes, fills a step enough to start."""
        tokens = len(self.running)
        for sent in self.waiting:
            tokens += sent.inputs
            if tokens >= self.launch.gather_tokens:
                return min(sent.visible_tick, given_up)
        return given_up

    # --- steps ----------------------------------------------------------------------------

    def compute(self) -> None:
        mixes = self.instance.engine.mixes_prefill
        beside = len(self.running) if mixes else 0
        tokens, pairs = self.take_chunks(beside)
        cached = self.context if mixes else 0.0
        self.now_s += self.passes.pass_s(beside, cached, tokens, pairs)
        self.tick += 1
        self.look_tick = self.tick  # after prompts it looks at once
        if mixes:
            self.generated += self.passes.gain
            self.context += beside * self.passes.gain
        done = [sent for sent in self.computing if sent.computed == sent.inputs]
        self.computing = [sent for sent in self.computing if sent.computed < sent.inputs]
        for sent in done:
            sent.first_s = self.now_s
            self.ttft[sent.wave == 0].append(self.now_s - sent.sent_s)
            self.context += sent.inputs + 1
            heapq.heappush(self.running, (self.generated + sent.outputs - 1, sent.number, sent))

    def take_chunks(self, beside: int) -> tuple[int, float]:
        """Prompt tokens of this step and the query-key pairs that they score."""
        budget = max(self.budget - beside * (1 + self.launch.draft_tokens), STEP_TOKENS_MIN)
        tokens, pairs = 0, 0.0
        for sent in self.computing:
            chunk = min(budget - tokens, sent.inputs - sent.computed)
            if self.launch.whole_prompts and tokens + sent.inputs <= budget:
                chunk = sent.inputs
            elif self.launch.whole_prompts and tokens:
                break
            if chunk == 0:
                break
            pairs += chunk * (sent.computed + chunk / 2)
            sent.computed += chunk
            tokens += chunk
        return tokens, pairs

    def decode(self) -> None:
        gain = self.passes.gain
        steps = max(-int((self.generated - self.running[0][0]) // gain), 1)
        ahead = self.next_look() - self.tick if self.waiting else 0
        if ahead > 0:  # otherwise what waits does not fit before a sequence ends
            steps = min(steps, ahead)
        sequences = len(self.running)
        self.now_s += self.passes.run_s(sequences, self.context, steps)
        self.tick += steps
        self.generated += steps * gain
        self.context += sequences * steps * gain
        passed = max(self.tick - self.look_tick, 0)
        self.look_tick += math.ceil(passed / self.launch.poll_steps) * self.launch.poll_steps

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
