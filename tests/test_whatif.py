"""A replay of what an engine really served predicts what happened, to the picosecond where steps
take what the law says; a change moves it where it should, and a change of nothing does not."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import tiny_engine
from recorded import Arrival, record
from tierline.base.clock import PS_PER_S
from tierline.base.errors import DoesNotFitError, InputError
from tierline.engine.engine import Engine
from tierline.server.life import Life, StepSample
from tierline.server.prediction import (
    STEPS_LEAST,
    class_fits,
    price_ps,
    scale_of,
    scaled,
    step_fit,
)
from tierline.server.replay import at_load, replay, side_of, traffic_of
from tierline.server.running import Running, running_of
from tierline.server.whatif import Change, ask, change_of, changed, what_if, words_of
from tierline.sim.api import simulate
from tierline.workload.slo import parse_service_levels
from tiny_checkpoints import tiny_checkpoint

LEVELS = parse_service_levels(
    ["interactive@10:ttft_p95=20ms,itl_p95=5ms", "standard@0:ttft_p95=300ms,itl_p95=20ms"]
)
BATCH = replace(LEVELS[1], name="batch", priority=-10, targets=())
SMALL = {"sequences_max": 6, "batch_tokens": 64, "kv_bytes": 400_000}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("checkpoints"))


def arrivals_of(
    *, requests: int, rps: float, seed: int = 0, shared: int = 3, prompts: Sequence[int] = ()
) -> list[Arrival]:
    """Mixed lengths and classes; prompts begin with one of `shared` prefixes."""
    rng = random.Random(seed)
    prefixes = [tuple(rng.randrange(250) for _ in range(48)) for _ in range(shared)]
    at_s, made = 0.0, []
    for i in range(requests):
        at_s = round(at_s + rng.expovariate(rps), 9)  # requests are told in nanoseconds
        own = tuple(rng.randrange(250) for _ in range(rng.choice(prompts or (10, 40, 90))))
        made.append(
            Arrival(
                at_s=at_s,
                prompt=(prefixes[i % shared] if shared else ()) + own,
                output_tokens=rng.choice([1, 4, 8, 12]),
                level=rng.choice(["interactive", "standard", "standard", "batch"]),
            )
        )
    return made


class Recorded:
    """A recording, and the engine's `Running`."""

    def __init__(self, engine: Engine, arrivals: Sequence[Arrival], *, pace: float = 1.0) -> None:
        self.running = running_of(engine, levels=(*LEVELS, BATCH))
        recorder = record(engine, self.running, arrivals, pace=pace)
        self.lives: list[Life] = list(recorder.past)
        self.steps: list[StepSample] = list(recorder.steps)
        self.traffic = traffic_of(
            self.lives, self.running.levels, block_tokens=self.running.block_tokens
        )


@pytest.fixture(scope="module")
def busy(checkpoint: Path) -> Recorded:
    """More at once than there is room for, at the law's own pace."""
    return Recorded(tiny_engine(checkpoint, **SMALL), arrivals_of(requests=80, rps=1500))


# --- replays --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["tierline", "fcfs", "priority", "edf", "shortest"])
def test_a_replay_gives_back_what_the_engine_did(checkpoint: Path, policy: str) -> None:
    """Every first and last token at its instant: one scheduler, one law (INV-ENG-4)."""
    engine = tiny_engine(checkpoint, policy=policy, **SMALL)
    recorded = Recorded(engine, arrivals_of(requests=40, rps=1500, seed=3))
    run = replay(recorded.traffic, recorded.running.instance, policy=policy)
    was = recorded.traffic.measured

    assert list(run.requests.first_ps) == list(was.requests.first_ps)
    assert list(run.requests.finish_ps) == list(was.requests.finish_ps)
    assert list(run.requests.itl_max_ps) == list(was.requests.itl_max_ps)
    assert list(run.requests.cached_tokens) == list(was.requests.cached_tokens)
    assert run.replicas[0].preemptions == was.replicas[0].preemptions
    assert side_of(run).hit_share == side_of(was).hit_share > 0.1


def test_another_policy_is_told_apart(busy: Recorded) -> None:
    """Negative control: the equality above is not that of anything with anything."""
    run = replay(busy.traffic, busy.running.instance, policy="fcfs")

    assert list(run.requests.first_ps) != list(busy.traffic.measured.requests.first_ps)


def test_without_names_of_blocks_nothing_is_found_cached(busy: Recorded) -> None:
    """Negative control: it is the recorded chains that make a replay's hits."""
    lives = [replace(life, chain=()) for life in busy.lives]
    bare = traffic_of(lives, busy.running.levels, block_tokens=16)
    run = replay(bare, busy.running.instance, policy="tierline")

    assert side_of(run).hit_share == 0
    assert side_of(run).all.ttft.mean_s > side_of(busy.traffic.measured).all.ttft.mean_s


def test_a_replay_is_the_simulators_own_run(busy: Recorded) -> None:
    """INV-SRV-62."""
    own = simulate(
        busy.running.instance,
        busy.traffic.requests,
        levels=busy.traffic.levels,
        trace_block_tokens=16,
    )

    assert replay(busy.traffic, busy.running.instance, policy="tierline").hash() == own.hash()


def test_who_is_cancelled_is_replayed_for_what_it_got(checkpoint: Path) -> None:
    arrivals = arrivals_of(requests=12, rps=500)
    arrivals[4] = replace(arrivals[4], output_tokens=20, cancelled_after=7)
    recorded = Recorded(tiny_engine(checkpoint, **SMALL), arrivals)
    ordered = sorted(recorded.lives, key=lambda x: x.arrival_ps)
    number = next(i for i, x in enumerate(ordered) if x.outcome == "cancelled")

    assert recorded.traffic.requests[number].output_tokens == 7
    assert not recorded.traffic.left_out


def life(**changes: Any) -> Life:
    values: dict[str, Any] = {
        **dict.fromkeys(("id", "endpoint", "model", "tenant", "key_id"), "x"),
        "level": "standard",
        "priority": 0,
        "stream": True,
        "arrived_s": 0.0,
        "arrival_ps": 5 * PS_PER_S,
        "prompt_tokens": 10,
        "output_tokens_max": 9,
        "first_ps": 6 * PS_PER_S,
        "last_ps": 7 * PS_PER_S,
        "output_tokens": 4,
        "outcome": "stop",
    }
    return Life(**(values | changes))


def test_what_cannot_be_replayed_is_counted() -> None:
    lives = [
        life(),
        life(outcome="refused", first_ps=None, output_tokens=0),
        life(outcome="late", first_ps=None, output_tokens=0),
        life(outcome="late", first_ps=None, output_tokens=0),
        life(outcome=""),
        life(outcome="stop", first_ps=None, output_tokens=0),  # an embedding
        life(arrival_ps=PS_PER_S),
    ]
    traffic = traffic_of(lives, LEVELS, block_tokens=16, requests_max=1)

    assert [r.arrival_ns for r in traffic.requests] == [5_000_000_000]
    assert len(traffic.measured.requests) == 1
    assert traffic.left_out == (
        *("2 late", "1 refused", "1 under way", "1 without a token", "1 older ones"),
    )


def test_nothing_to_replay_is_said() -> None:
    with pytest.raises(InputError, match="no recorded request"):
        traffic_of([life(outcome="")], LEVELS, block_tokens=16)


def test_several_answers_are_as_many_requests() -> None:
    traffic = traffic_of([life(answers=3, output_tokens=8)], LEVELS, block_tokens=16)

    assert [r.output_tokens for r in traffic.requests] == [3, 3, 2]


def test_a_promise_of_its_own_is_a_deadline() -> None:
    lives = [life(ttft_limit_s=0.3), life(ttft_limit_s=1.5)]  # the class's, and another
    traffic = traffic_of(lives, LEVELS, block_tokens=16)

    assert [r.deadline_ns for r in traffic.requests] == [None, 6_500_000_000]
    assert [r.deadline_ns for r in at_load(traffic.requests, 2.0)] == [None, 6_500_000_000]


def test_load_moves_arrivals_and_their_deadlines() -> None:
    lives = [life(), life(arrival_ps=9 * PS_PER_S, ttft_limit_s=1.5)]
    dense = at_load(traffic_of(lives, LEVELS, block_tokens=16).requests, 4.0)

    assert [r.arrival_ns for r in dense] == [5_000_000_000, 6_000_000_000]
    assert dense[1].deadline_ns == 7_500_000_000


# --- predicted against measured -------------------------------------------------------------


def test_a_step_at_the_laws_pace_takes_what_was_predicted(busy: Recorded) -> None:
    """INV-SRV-63: sample by sample, to the picosecond."""
    line = busy.running.instance.line()
    fit = step_fit(busy.steps, busy.running)

    assert len(busy.steps) > 80
    assert all(price_ps(line, s) == s.end_ps - s.start_ps for s in busy.steps)
    assert fit.all is not None
    assert (fit.all.p10, fit.all.p50, fit.all.p90) == (1, 1, 1)
    assert "1.00 x" in fit.sentence
    assert not fit.reason
    assert scale_of(busy.steps, busy.running) == 1


@pytest.mark.parametrize("pace", [0.4, 1.7])
def test_another_pace_is_seen_and_corrected(checkpoint: Path, pace: float) -> None:
    engine = tiny_engine(checkpoint, **SMALL)
    recorded = Recorded(engine, arrivals_of(requests=50, rps=600), pace=pace)
    fit, scale = (f(recorded.steps, recorded.running) for f in (step_fit, scale_of))
    assert fit.all is not None
    right = class_fits(recorded.lives, recorded.running, scale=scale)[0]
    wrong = class_fits(recorded.lives, recorded.running)[0]

    assert fit.all.p50 == pytest.approx(pace, rel=1e-6)
    assert scale == pytest.approx(pace, rel=1e-6)
    assert f"{pace:.2f} x" in fit.sentence
    assert "calibrate" in fit.reason
    for name in ("ttft_p50", "tpot_p50", "e2e_p50"):
        was, said = getattr(right, name)
        assert said == pytest.approx(was, rel=0.02), name
    assert wrong.e2e_p50[1] / wrong.e2e_p50[0] == pytest.approx(1 / pace, rel=0.35)
    assert abs(wrong.e2e_p50[1] / wrong.e2e_p50[0] - 1) > 0.2


def sample(measured: float, *, line: Any, mixed: bool = False, number: int = 0) -> StepSample:
    """A step that took `measured` times its price."""
    chunks = ((7, 32, 0),) if mixed else ()
    price = line.line(4, 200, [(0, 32)] if mixed else [])[0]
    return StepSample(
        number=number,
        start_ps=number * 10**12,
        end_ps=number * 10**12 + round(price * measured),
        decodes=4,
        context_tokens=200,
        prefill_tokens=32 * mixed,
        chunks=chunks,
        **dict.fromkeys(("preempted", "notes"), ()),
        **dict.fromkeys(("running", "kv_pages"), 4),
        **dict.fromkeys(("waiting", "kv_pages_free", "kv_pages_cached", "kv_evicted_blocks"), 0),
    )


@pytest.mark.parametrize(
    ("ratios", "mixed_ratio", "guessed", "words"),
    [
        ([1.0, 1.1], None, False, ""),
        ([1.0, 1.1], None, True, ""),
        ([1.6, 1.7], None, True, "Nobody has measured"),
        ([1.6, 1.7], None, False, "slower than when it was measured"),
        ([0.5, 0.55], None, False, "faster than when it was measured"),
        ([0.9, 3.0], None, False, "something else uses"),
        ([1.0, 1.05], 1.6, False, "with prompt tokens are further off"),
        ([1.6, 1.65], 1.0, False, "without prompt tokens are further off"),
    ],
)
def test_a_reason_fits_what_is_off(
    busy: Recorded, ratios: list[float], mixed_ratio: float | None, guessed: bool, words: str
) -> None:
    running = replace(busy.running, guessed=guessed)
    line = running.instance.line()
    steps = [sample(ratios[i % 2], line=line, number=2 * i) for i in range(60)]
    if mixed_ratio is not None:
        steps += [sample(mixed_ratio, line=line, mixed=True, number=200 + 2 * i) for i in range(60)]
    fit = step_fit(steps, running)

    assert (words in fit.reason) if words else not fit.reason, fit.reason


def test_few_steps_say_nothing(busy: Recorded) -> None:
    line = busy.running.instance.line()
    few = [sample(9.0, line=line, number=i) for i in range(STEPS_LEAST - 1)]

    assert step_fit([], busy.running).all is None
    assert "No step" in step_fit([], busy.running).sentence
    assert not step_fit(few, busy.running).reason
    assert scale_of(few, busy.running) == 1


def test_time_between_steps_is_seen(busy: Recorded) -> None:
    line = busy.running.instance.line()
    price = line.line(4, 200)[0]
    steps = []
    for i in range(40):
        one = sample(1.0, line=line, number=i)
        start_ps = i * 2 * price
        steps.append(replace(one, start_ps=start_ps, end_ps=start_ps + price))
    fit = step_fit(steps, busy.running)

    assert fit.between_share == pytest.approx(0.5)
    assert "between them" in fit.reason


# --- changes --------------------------------------------------------------------------------


def test_a_change_of_nothing_changes_nothing(busy: Recorded) -> None:
    """INV-SRV-64; and what is simulated is what was measured."""
    told = what_if(busy.traffic, busy.running, Change())

    assert told.before == told.after
    assert told.before.all.ttft == told.measured.all.ttft
    assert told.sentence.startswith("no change: nothing that a user would feel changes")
    assert "TTFT 1.00 x, TPOT 1.00 x, end to end 1.00 x" in told.believe
    assert told.requests == 80


@pytest.fixture(scope="module")
def crowded(checkpoint: Path) -> Recorded:
    """All classes want more than there is: the order decides who suffers."""
    arrivals = arrivals_of(requests=120, rps=2500, seed=5)
    return Recorded(tiny_engine(checkpoint, **SMALL), arrivals)


def test_first_come_first_served_lets_the_urgent_wait(crowded: Recorded) -> None:
    told = what_if(crowded.traffic, crowded.running, Change(policy="fcfs"))
    before, after = ({x.name: x for x in side.levels} for side in (told.before, told.after))

    assert after["interactive"].ttft.p95_s > 2 * before["interactive"].ttft.p95_s
    assert after["interactive"].good_share < before["interactive"].good_share
    assert after["batch"].ttft.p50_s < before["batch"].ttft.p50_s
    assert "policy tierline -> fcfs: " in told.sentence


@pytest.mark.parametrize(("load", "shorter"), [(0.5, True), (2.0, False)])
def test_load_makes_queues(crowded: Recorded, load: float, shorter: bool) -> None:
    told = what_if(crowded.traffic, crowded.running, Change(load=load))

    assert (told.after.all.ttft.p50_s < told.before.all.ttft.p50_s) == shorter
    assert told.after.all.requests == told.before.all.requests
    assert any("would adapt" in words for words in told.caveats)
    assert f"load x {load:g}" in told.sentence


def test_a_larger_cache_keeps_more_and_a_smaller_one_less(checkpoint: Path) -> None:
    arrivals = arrivals_of(requests=60, rps=900, shared=12)
    recorded = Recorded(tiny_engine(checkpoint, **SMALL), arrivals)
    larger, same, smaller = (
        what_if(recorded.traffic, recorded.running, Change(device_kv_bytes=size))
        for size in (4_000_000, recorded.running.rooms[0].bytes, 230_000)
    )

    assert larger.after.hit_share > same.after.hit_share > smaller.after.hit_share
    assert same.before == same.after
    assert larger.before == same.before
    assert "prompt tokens found cached" in larger.sentence
    assert smaller.after.all.ttft.p95_s > larger.after.all.ttft.p95_s


def test_a_smaller_step_shortens_gaps_and_delays_first_tokens(checkpoint: Path) -> None:
    options = SMALL | {"batch_tokens": 512, "kv_bytes": 2_000_000, "policy": "fcfs"}
    arrivals = arrivals_of(requests=30, rps=300, prompts=(400,), shared=0)
    recorded = Recorded(tiny_engine(checkpoint, **options), arrivals)
    told = what_if(recorded.traffic, recorded.running, Change(batch_tokens=64))

    assert told.after.all.itl.p99_s < told.before.all.itl.p99_s
    assert told.after.all.ttft.p50_s > told.before.all.ttft.p50_s
    assert "ITL p99" in told.sentence
    assert told.change == "tokens a step 512 -> 64"


def test_fewer_at_once_wait_longer(crowded: Recorded) -> None:
    told = what_if(crowded.traffic, crowded.running, Change(sequences_max=1))

    assert told.after.all.queueing.p50_s > told.before.all.queueing.p50_s
    assert told.after.all.itl.p50_s <= told.before.all.itl.p50_s


def test_a_lower_tier_keeps_what_the_device_forgets(checkpoint: Path) -> None:
    """On a machine where recomputing is slow; the counterpart is one where it is not."""
    arrivals = arrivals_of(requests=48, rps=600, shared=12, prompts=(10,))
    recorded = Recorded(tiny_engine(checkpoint, **SMALL | {"kv_bytes": 230_000}), arrivals)
    change = Change(dram_bytes=50_000_000)
    slow = what_if(recorded.traffic, recorded.running, change, scale=200.0)
    fast = what_if(recorded.traffic, recorded.running, change, scale=1e-4)

    assert slow.after.hit_below > 0
    assert fast.after.hit_below == 0
    assert any("lower tier" in words for words in fast.caveats)
    assert any("the same memory" in words for words in slow.caveats)


def test_another_accelerator_is_priced_by_its_own_law(busy: Recorded) -> None:
    told = what_if(busy.traffic, busy.running, Change(gpu="h100-sxm"), scale=3.0)
    there = changed(busy.running.instance, Change(gpu="h100-sxm"))
    alone = replay(busy.traffic, there, policy="tierline")

    assert there.cost.gpu.name == "h100-sxm"
    assert there.cost.model == busy.running.instance.cost.model
    assert told.after == side_of(alone)  # not three times as long: that is this machine's
    assert told.before == side_of(
        replay(busy.traffic, scaled(busy.running.instance, 3.0), policy="tierline")
    )
    assert told.change == "gpu this-machine -> h100-sxm"
    assert any("priced by the law alone" in words for words in told.caveats)


def test_what_does_not_fit_is_said(busy: Recorded) -> None:
    with pytest.raises(InputError, match="device_kv_bytes is 10"):
        changed(busy.running.instance, Change(device_kv_bytes=10))
    with pytest.raises(DoesNotFitError):
        changed(busy.running.instance, Change(gpu="h100-sxm", device_kv_bytes=10))
    told = what_if(busy.traffic, busy.running, Change(device_kv_bytes=100_000))

    assert told.after.all.finished < told.after.all.requests
    assert "do not fit any more" in told.sentence


def test_curves_rise_to_everybody(busy: Recorded) -> None:
    side = what_if(busy.traffic, busy.running, Change()).before

    assert set(side.curves) == {"ttft", "itl", "e2e"}
    for points in side.curves.values():
        assert list(points) == sorted(points)
        assert points[-1][1] == 1
    assert side.curves["e2e"][-1][0] == pytest.approx(
        max(x.last_ps - x.arrival_ps for x in busy.lives) / PS_PER_S
    )


# --- forms ----------------------------------------------------------------------------------


def test_a_form_becomes_a_change() -> None:
    form = {"policy": "edf", "load": "1.5", "dram_bytes": "2GB", "gpu": " ", "chunk_tokens": "256"}

    assert change_of(form) == Change(
        policy="edf", load=1.5, dram_bytes=2_000_000_000, chunk_tokens=256
    )
    assert change_of({}) == Change()


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"polcy": "fcfs"}, "polcy"),
        ({"policy": "fifo"}, "unknown policy 'fifo'"),
        ({"gpu": "h900"}, "unknown gpu 'h900'"),
        ({"load": "much"}, "load 'much' is not a number"),
        ({"load": "0"}, "load 0 is not between"),
        ({"load": "nan"}, "load nan is not between"),
        ({"sequences_max": "2.5"}, "sequences_max '2.5' is not a whole number"),
        ({"sequences_max": "0"}, "sequences_max is 0"),
        ({"sequences_max": "99999"}, "sequences_max is 99,999"),
        ({"batch_tokens": "99999"}, "batch_tokens is 99,999"),
        ({"dram_bytes": "many"}, "dram_bytes 'many' is not a size"),
    ],
)
def test_a_wrong_field_is_named(form: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as refused:
        change_of(form)

    assert words in str(refused.value)
    assert refused.value.hint


def test_a_change_is_told_in_words(busy: Recorded) -> None:
    change = Change(chunk_tokens=32, sequences_max=6, nvme_bytes=10**9, load=2)

    assert words_of(change, busy.running) == "chunk 64 -> 32, NVMe 0 -> 1.00 GB, load x 2"


# --- in another process ---------------------------------------------------------------------


def asked(recorded: Recorded, change: Change, running: Running | None = None, **more: Any) -> Any:
    return asyncio.run(ask(recorded.traffic, running or recorded.running, change, **more))


def test_another_process_says_the_same(busy: Recorded) -> None:
    change = Change(policy="fcfs", load=1.3)

    assert asked(busy, change, scale=1.2) == what_if(busy.traffic, busy.running, change, scale=1.2)


def test_its_errors_come_back(busy: Recorded) -> None:
    with pytest.raises(InputError, match="one KV block") as refused:
        asked(busy, Change(gpu="h100-sxm", device_kv_bytes=10))

    assert refused.value.hint


def test_it_is_ended_when_it_takes_too_long(busy: Recorded) -> None:
    with pytest.raises(InputError, match="takes more than"):
        asked(busy, Change(), seconds_max=0.05)
