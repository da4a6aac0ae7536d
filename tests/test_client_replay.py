"""The replayed client sees what its launch settings do, and its closed forms where it has any.

Every mechanism is shown by switching it off: the same run without it must differ the way that
the mechanism says.
"""

from dataclasses import replace

import pytest

from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.step import Layout, load_engine
from tierline.planner.client_replay import Passes, replay
from tierline.planner.measured import Row
from tierline.planner.recipes import Labels, Launch, launch_of


def row_of(engine="vllm", *, clients=8, launch=None, dp=1, uniform=True, **changes):
    layout = Layout(weights="fp8-block", kv="fp8", tp=8 // dp, dp=dp, ep=8 if dp > 1 else 1)
    return Row(
        **{
            "source": "inferencex",
            "where": "here:1",
            "model": load_model("deepseek-r1"),
            "gpu": load_gpu("b200"),
            "engine": load_engine(engine),
            "version": "1",
            "layout": layout,
            "input_tokens": 1024,
            "output_tokens": 512,
            "uniform": uniform,
            "clients": clients,
            "launch": launch or Launch(batch_tokens=8192),
            **changes,
        }
    )


def times(row):
    return replay(row, row.instance())


def test_one_client_waits_for_its_prompt_and_decodes_alone():
    row = row_of(clients=1, uniform=False)
    row = replace(row, engine=replace(row.engine, wait_steps=0.0))
    instance = row.instance()
    cost, tokens = instance.cost, row.input_tokens
    ttft_s, tpot_s = replay(row, instance)
    prompt_s = cost.step_s(0, 0, tokens, tokens**2 / 2)
    decode_s = cost.step_s(1, tokens + row.output_tokens / 2)

    assert ttft_s == pytest.approx(prompt_s + instance.engine.host_s, rel=0.02)
    assert tpot_s == pytest.approx(decode_s, rel=0.02)


def test_equal_seeds_give_equal_times_and_other_seeds_nearly():
    row = row_of()

    assert times(row) == times(row)
    other = replay(row, row.instance(), seed=8)
    assert other != times(row)
    assert other == pytest.approx(times(row), rel=0.1)


def test_a_pass_with_drafts_yields_more_and_costs_more():
    cost = row_of().instance().cost
    plain, drafted = Passes(cost, 0), Passes(cost, 3, 0.7)

    assert plain.gain == 1
    assert drafted.gain == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    assert plain.pass_s(8, 9000) == cost.step_s(8, 9000)
    assert plain.run_s(8, 9000, 5) == cost.decode_run_s(8, 9000, 5)
    assert cost.step_s(8, 9000) < drafted.pass_s(8, 9000) < drafted.gain * cost.step_s(8, 9000)


def test_drafts_shorten_the_gaps_of_few_clients_and_gain_less_with_many():
    def gain(clients: int) -> float:
        plain = row_of("trtllm", clients=clients)
        drafted = replace(plain, launch=Launch(batch_tokens=8192, draft_tokens=3))
        return times(plain)[1] / times(drafted)[1]

    assert gain(4) > 1.5
    assert gain(256) < gain(4)


@pytest.mark.parametrize(
    ("engine", "dp", "setting"),
    [
        ("sglang", 1, {"poll_steps": 60}),
        ("trtllm", 8, {"balance_steps": 60}),
        ("trtllm", 1, {"gather_steps": 40, "gather_tokens": 8000}),
    ],
)
def test_a_scheduler_that_waits_delays_first_tokens(engine, dp, setting):
    plain = row_of(engine, clients=16, dp=dp)
    waits = replace(plain, launch=Launch(batch_tokens=8192, **setting))
    (plain_ttft_s, plain_tpot_s), (ttft_s, tpot_s) = times(plain), times(waits)

    assert ttft_s > 1.3 * plain_ttft_s
    assert tpot_s == pytest.approx(plain_tpot_s, rel=0.25)


def test_prompts_gather_until_a_step_is_full_enough():
    launch = Launch(batch_tokens=8192, gather_steps=400, gather_tokens=8000)
    full = times(row_of("trtllm", clients=16, launch=launch))[0]
    soon = times(row_of("trtllm", clients=16, launch=replace(launch, gather_tokens=1)))[0]

    assert full > 2 * soon


def test_a_prompt_that_does_not_fit_beside_others_waits_whole():
    launch = Launch(batch_tokens=1500)
    cut = times(row_of("trtllm", clients=64, launch=launch))
    whole = times(row_of("trtllm", clients=64, launch=replace(launch, whole_prompts=True)))

    assert whole[0] > cut[0]


def test_more_clients_than_slots_wait():
    row = row_of(clients=64)
    few = replace(row.instance(), sequences_max=16)

    assert replay(row, few)[0] > 5 * times(row)[0]


# --- recipes ---------------------------------------------------------------------------------


def labels(**changes):
    facts = {
        "model": load_model("deepseek-r1"),
        "gpu": load_gpu("b200"),
        "engine": load_engine("trtllm"),
        "version": "1.2.0rc6.post3",
        "date": "2026-02-05",
        "layout": Layout(weights="fp8-block", kv="fp8", tp=8),
        "input_tokens": 1024,
        "output_tokens": 1024,
        "clients": 64,
    }
    return Labels(**{**facts, **changes})


DP = Layout(weights="fp8-block", kv="fp8", tp=1, dp=8, ep=8)


@pytest.mark.parametrize(
    ("changes", "drafts"),
    [
        ({}, 3),
        ({"layout": DP}, 1),
        ({"version": "1.2.0rc6.post2"}, 0),
        ({"version": "1.1.0rc2.post2", "date": "2025-12-15"}, 0),
        ({"version": "1.1.0rc2.post2", "date": "2026-01-14"}, 3),
        ({"published": False}, 0),
        ({"published": False, "speculative": True}, 3),
        ({"speculative": False}, 0),
        ({"model": load_model("llama-3.1-70b")}, 0),
        ({"engine": load_engine("vllm")}, 0),
    ],
)
def test_drafts_follow_from_the_recipe_unless_the_row_says(changes, drafts):
    assert launch_of(labels(**changes)).draft_tokens == drafts


@pytest.mark.parametrize(
    ("changes", "batch_tokens", "poll_steps"),
    [
        ({"engine": load_engine("sglang")}, 32_768, 30),
        ({"engine": load_engine("sglang"), "clients": 8}, 32_768, 10),
        ({"engine": load_engine("sglang"), "published": False}, 16_384, 1),
        ({"engine": load_engine("sglang"), "gpu": load_gpu("h200")}, 32_768, 1),
        ({"engine": load_engine("vllm")}, 8_192, 1),
        ({"version": "1.2.0rc6.post2"}, 8_192, 1),
        ({}, 1_344, 1),
    ],
)
def test_budgets_and_polls_are_the_recipes(changes, batch_tokens, poll_steps):
    launch = launch_of(labels(**changes))

    assert (launch.batch_tokens, launch.poll_steps) == (batch_tokens, poll_steps)
