"""No step with prompt tokens breaks the promise of a stream that runs (INV-SCHED-8).

The sizer keeps one number a stream; beside it stands the definition, which looks at all.
"""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deciding import line, request
from tierline.base.clock import FOREVER_PS, PS_PER_MS
from tierline.scheduling import chunking
from tierline.scheduling.chunking import ChunkSizer
from tierline.scheduling.sequence import Sequence

MIN, GRAIN, MOST = 64, 32, 512
TARGETS_MS = (45, 60, 100, 0)  # 0: none


@dataclass
class Streams:
    """Streams that decode together, and when each began."""

    sizer: ChunkSizer
    running: dict[int, Sequence]
    began: dict[int, int]
    tick: int = 0
    now_ps: int = 0
    context: int = 0

    def join(self, itl_ms: int, tpot_ms: int) -> None:
        s = request(len(self.began), 500, 1000)
        s.itl_ps = itl_ms * PS_PER_MS or FOREVER_PS
        s.tpot_ps = tpot_ms * PS_PER_MS or FOREVER_PS
        s.first_ps, s.generated_tokens = self.now_ps, 1
        self.running[s.id], self.began[s.id] = s, self.tick
        self.context += 500
        self.sizer.join(s, self.tick)

    def leave(self, which: int) -> None:
        if self.running:
            i = sorted(self.running)[which % len(self.running)]
            self.sizer.leave(self.running.pop(i))

    def slack_ps(self) -> int:
        """By definition: until the next token of the stream that is nearest to being late, of
        those that are not hopelessly late."""
        spans = [
            s.first_ps + s.tpot_ps * (self.tick + 1 - self.began[i]) - self.now_ps
            for i, s in self.running.items()
            if s.tpot_ps < FOREVER_PS
            and s.first_ps + s.tpot_ps * (self.tick + 1 - self.began[i])
            >= self.now_ps - chunking.BEHIND_MAX * s.tpot_ps
        ]
        return min(spans, default=FOREVER_PS)

    def step(self, past: int, wanted: int) -> tuple[int, int]:
        """(prompt tokens, picoseconds) of the next step; then it is done."""
        tokens = self.sizer.size(
            line(),
            MOST,
            past_tokens=past,
            wanted_tokens=wanted,
            decodes=len(self.running),
            context_tokens=self.context,
            tick=self.tick,
            now_ps=self.now_ps,
        )
        tokens = min(tokens, wanted)
        chunks = [(past, tokens)] if tokens else []
        lasts_ps, _ = line().line(len(self.running), self.context, chunks)
        self.now_ps += lasts_ps
        self.tick += 1
        self.context += len(self.running)
        return tokens, lasts_ps


def fresh() -> Streams:
    return Streams(ChunkSizer(tokens_min=MIN, grain=GRAIN), {}, {})


targets = st.sampled_from(TARGETS_MS)
moves = st.lists(
    st.one_of(
        st.tuples(st.just("join"), targets, targets),
        st.tuples(st.just("leave"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("step"), st.integers(0, 30_000), st.integers(1, 4000)),
    ),
    max_size=60,
)


def broken_promises(moves) -> list[str]:
    streams, found = fresh(), []
    for what, a, b in moves:
        if what == "join":
            streams.join(a, b)
        elif what == "leave":
            streams.leave(a)
        elif streams.running:
            gap_ps = min(s.itl_ps for s in streams.running.values())
            slack_ps, alone_ps = (
                streams.slack_ps(),
                line().line(len(streams.running), streams.context)[0],
            )
            tightest_ps = min(s.tpot_ps for s in streams.running.values())
            tokens, lasts_ps = streams.step(a, b)
            hardly_shorter = alone_ps * 5 >= tightest_ps * 4
            if tokens > MIN and lasts_ps > gap_ps:
                found.append(f"a gap of {lasts_ps}, at most {gap_ps} was promised")
            if tokens > MIN and lasts_ps > slack_ps and not hardly_shorter:
                found.append(f"{lasts_ps} with {slack_ps} of slack")
    return found


@given(moves)
def test_a_step_with_prompt_tokens_keeps_every_promise(moves):
    assert broken_promises(moves) == []


def test_without_the_due_instants_a_promise_breaks(monkeypatch):
    """Control: a sizer that believes in slack that is not there."""
    monkeypatch.setattr(
        ChunkSizer, "_next_due", lambda self, tick, now_ps: (now_ps + 10**12, 60 * PS_PER_MS)
    )
    moves = [("join", 0, 60), *[("step", 0, 4000)] * 5]

    assert broken_promises(moves)


def rate(streams: Streams, steps: int) -> float:
    """Prompt tokens a second over so many steps in front of one long prompt."""
    start_ps = streams.now_ps
    tokens = sum(streams.step(0, 100_000)[0] for _ in range(steps))
    return tokens / (streams.now_ps - start_ps) * 10**12


def test_saved_slack_computes_more_prompt_tokens_than_chunks_that_just_fit():
    paced, strict = fresh(), fresh()
    for _ in range(8):
        paced.join(0, 50)
        strict.join(50, 0)

    assert rate(paced, 200) > 1.2 * rate(strict, 200)
    assert paced.now_ps <= 200 * 50 * PS_PER_MS, "and the mean gap is within the promise"


def test_saving_ends():
    """Even with streams that are late, prompts go on after a bounded number of steps."""
    streams = fresh()
    for _ in range(8):
        streams.join(0, 50)
    streams.now_ps += 90 * PS_PER_MS  # everybody is behind by two tokens
    idle = 0
    while streams.step(0, 4000)[0] == 0:
        idle += 1

    assert 0 < idle <= 8


def test_who_is_hopelessly_late_binds_no_more():
    streams = fresh()
    streams.join(0, 50)
    streams.now_ps += 5 * 50 * PS_PER_MS
    streams.join(0, 0)

    assert streams.step(0, 4000)[0] == MOST


@pytest.mark.parametrize("itl_ms", [0, 60])
def test_repeats_hold_for_as_long_as_the_size_is_right(itl_ms):
    """Strict targets alone: the chunk stays the same until it would break one."""
    streams = fresh()
    for _ in range(4):
        streams.join(itl_ms or 100, 0)
    tokens, _ = streams.step(0, 100_000)
    streams.sizer.sized_for = 0
    alpha, beta = line().line(4, streams.context, [(0, tokens)])
    target = (itl_ms or 100) * PS_PER_MS
    holds = streams.sizer.holds_for(alpha, beta, tokens, 0)

    assert holds >= 1
    if tokens > MIN:
        assert alpha + (holds - 1) * beta <= target
