"""The closed laws obey what must hold for every shape, and curves that a user gives are checked."""

import importlib.util
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shapes import m7, r70
from tierline.base.errors import DoesNotFitError, InputError
from tierline.base.rng import stream
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS
from tierline.catalog.gpus import load_gpu
from tierline.catalog.model import FfnGroup, ModelSpec
from tierline.perf import cost, curve, limits, memory, parallel, speculation, transfer
from tierline.perf.step import Layout, StepCost
from tierline.workload.slo import parse_service_levels

BF16 = KV_FORMATS["bf16"]
ROOT = Path(__file__).resolve().parents[1]


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8", "int4-g128", "nvfp4"])
@pytest.mark.parametrize("model", [r70(), m7()], ids=lambda m: m.name)
def test_weights_agree_with_the_step_law(model, fmt):
    step = StepCost(model, load_gpu("b200"), Layout(weights=fmt, kv="bf16", tp=1))

    ours = memory.weight_bytes(model, WEIGHT_FORMATS[fmt])

    assert ours == pytest.approx(step.weights_bytes_per_gpu, rel=0.005)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 4096, 100_000])
def test_kv_agrees_with_the_step_law(tp, tokens):
    step = StepCost(r70(), load_gpu("h200"), Layout(weights="bf16", kv="fp8", tp=tp))

    ours = memory.kv_bytes_per_gpu(r70(), tokens, KV_FORMATS["fp8"], tp=tp)

    assert ours == pytest.approx(step.kv_bytes_per_gpu(tokens))


def test_quantized_checkpoints_keep_their_tables_wide():
    model = r70()
    tables = model.embedding_params + model.head_params + model.norm_params

    extra = memory.weight_bytes(model, WEIGHT_FORMATS["fp8"]) - model.params

    assert extra == tables


def test_routed_experts_are_all_stored():
    dense = r70()
    moe = ModelSpec(
        **{name: getattr(dense, name) for name in ModelSpec.__slots__ if name != "ffn"},
        ffn=(
            FfnGroup(
                layers=80,
                experts=8,
                experts_active=2,
                params_per_expert=10**8,
                router_params_per_layer=65_536,
            ),
        ),
    )

    bf16 = memory.weight_bytes(moe, WEIGHT_FORMATS["bf16"])
    int4 = memory.weight_bytes(moe, WEIGHT_FORMATS["int4-g128"])

    assert bf16 == 2 * moe.params
    assert bf16 - int4 == pytest.approx(moe.expert_params * (2 - 4.15625 / 8))


@given(tokens=st.integers(1, 10**6), block=st.sampled_from([1, 16, 32, 128]))
def test_block_waste_is_under_a_block(tokens, block):
    waste = memory.block_waste_tokens(tokens, block_tokens=block)

    assert 0 <= waste < block
    assert (tokens + waste) % block == 0


@given(
    weights=st.floats(1e8, 2e12),
    kv=st.floats(0, 1e12),
    gpu=st.sampled_from([24e9, 80e9, 141e9, 192e9]),
)
def test_floor_fits_in_its_own_count_and_not_in_one_less(weights, kv, gpu):
    floor = memory.memory_floor(
        weights_bytes=weights, kv_bytes=kv, activations_bytes=0.2 * weights, gpu_memory_bytes=gpu
    )

    rest = weights + kv + 0.2 * weights

    assert floor.total_bytes <= floor.gpus_min * gpu * (1 + 1e-12)
    assert rest > (floor.gpus_min - 1) * (gpu - memory.overhead_bytes(gpu)) * (1 - 1e-12)


def test_overhead_that_leaves_no_room_says_so():
    with pytest.raises(DoesNotFitError, match="overhead"):
        memory.memory_floor(
            weights_bytes=1e9, kv_bytes=0, activations_bytes=0, gpu_memory_bytes=1e9
        )


def test_the_activation_rule_is_above_what_one_step_computes():
    computed = memory.computed_activation_bytes(r70(), batch_tokens=8192, sequences=256)

    assert 0 < computed < memory.activation_bytes(r70())


# --- parallel -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("per_rank", [4, 32, 512])
def test_fullest_expert_rank_agrees_with_simulation(ranks, per_rank):
    draws = stream(7, f"skew/{ranks}/{per_rank}").multinomial(
        ranks * per_rank, [1 / ranks] * ranks, size=4000
    )

    simulated = float(draws.max(axis=1).mean())

    assert parallel.expert_load_max(ranks * per_rank, ranks) == pytest.approx(simulated, rel=0.05)


@given(pp=st.integers(2, 16), m=st.integers(1, 64))
def test_halving_takes_more_than_twice_the_microbatches(pp, m):
    more = parallel.microbatches_to_halve(pp, m)

    assert parallel.bubble_share(pp, more) == pytest.approx(parallel.bubble_share(pp, m) / 2)
    assert more > 2 * m


@pytest.mark.parametrize("gpu", ["h100-sxm", "h100-pcie"])
def test_all_reduce_time_grows_with_the_degree(gpu):
    times = [parallel.step_reduce_s(r70(), load_gpu(gpu), tokens=64, tp=tp) for tp in (1, 2, 4, 8)]

    assert times[0] == 0
    assert times == sorted(times)


def test_pcie_pays_more_for_the_same_degree():
    shares = {
        name: parallel.reduce_share(
            parallel.step_reduce_s(r70(), load_gpu(name), tokens=64, tp=4), other_s=0.014
        )
        for name in ("h100-sxm", "l40s")
    }

    assert shares["l40s"] > 2 * shares["h100-sxm"]
    assert "TP=2" in parallel.tp_advice(load_gpu("l40s"), 8)
    assert parallel.tp_advice(load_gpu("h100-sxm"), 8) == ""


# --- curve ----------------------------------------------------------------------------------

HEADER = "concurrency,rps,ttft_p50_s,ttft_p99_s,itl_p50_s,itl_p99_s,e2e_mean_s\n"
GOOD = (
    HEADER
    + "1,0.4,0.20,0.25,0.011,0.012,2.5\n"
    + "16,5.1,0.28,0.45,0.014,0.020,\n"
    + "48,12.0,0.50,1.95,0.0175,0.040,4.0\n"
    + "64,13.5,1.10,4.80,0.018,0.055,4.7\n"
)


def written(tmp_path, text):
    path = tmp_path / "curve.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_measured_curve_answers_every_question(tmp_path):
    measured = curve.curve_from_csv(written(tmp_path, GOOD))
    (level,) = parse_service_levels(["ttft_p99=2s,itl_p99=50ms"])
    (tight,) = parse_service_levels(["ttft_p99=2s,itl_p99=30ms"])

    assert curve.usable_point(measured, level).rps == 12.0
    assert curve.usable_point(measured, tight).concurrency == 16  # ITL binds before TTFT does
    assert measured.knee.concurrency == 48
    assert measured.rps_peak == 13.5
    assert measured.points[1].e2e_mean_s is None
    assert not curve.ended_inside(measured, curve.usable_point(measured, level))
    assert curve.c_max(measured, ttft_p99_s=0.1) is None


def test_a_pass_behind_a_break_does_not_count(tmp_path):
    noisy = GOOD + "96,13.6,1.2,1.9,0.018,0.03,4.9\n"
    measured = curve.curve_from_csv(written(tmp_path, noisy))

    assert curve.c_max(measured, ttft_p99_s=2.0).concurrency == 48


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("ttft_p99_s", "ttft_p99"), "unknown key 'ttft_p99'"),
        (GOOD.replace("rps,", "").replace("0.4,", "", 1), "missing column 'rps'"),
        (GOOD.replace("12.0", "fast"), "line 4, column 'rps': 'fast'"),
        (GOOD.replace("12.0", "-1"), "'-1' is not a number above zero"),
        (GOOD.replace("12.0", "nan"), "'nan' is not a number above zero"),
        (GOOD.replace("1.95", "0.45"), "ttft p99 is below p50"),
        (GOOD.replace("64,", "48,"), "does not rise"),
        (GOOD.replace("4.7\n", "4.7,9\n"), "more fields"),
        (HEADER, "no points"),
        ("", "missing column"),
    ],
)
def test_a_broken_curve_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        curve.curve_from_csv(written(tmp_path, text))


def test_littles_law_flags_what_does_not_belong_together():
    good = curve.little_ratio(concurrency=48, rps=12, e2e_mean_s=4.0)
    bad = curve.little_ratio(concurrency=48, rps=12, e2e_mean_s=2.0)

    assert curve.little_holds(good)
    assert not curve.little_holds(bad)
    assert not curve.guide_gap_passes(2.001)


# --- money, limits, speculation, transfer ---------------------------------------------------


@given(peak=st.floats(0.1, 1e4), usable=st.floats(0.1, 100), safety=st.floats(1.0, 2.0))
def test_fleet_carries_the_peak_and_the_guide_never_needs_less(peak, usable, safety):
    ours = cost.instances_needed(peak, usable_rps=usable, safety=safety)
    guide = cost.instances_guide_mode(peak, usable_rps=usable, safety=safety)

    assert ours * usable >= peak * safety * (1 - 1e-6) - usable * 1e-6
    assert guide >= ours


def test_idle_accelerators_make_the_first_tokens_dear():
    fleet = {"usd_per_hour": 130.0, "capacity_tokens_per_s": 31_200.0}
    prices = [cost.usd_per_million_at(x, **fleet) for x in (312, 3_120, 31_200, 60_000)]

    assert prices[0] == pytest.approx(100 * prices[2])
    assert prices[2] == prices[3]


def test_break_even_is_where_the_api_costs_as_much():
    request = cost.api_usd_per_request(
        input_tokens=1000, output_tokens=200, usd_per_million_in=0.6, usd_per_million_out=0.6
    )
    rps = cost.break_even_rps(130.0, api_usd_per_request_=request)

    assert rps * 3600 * request == pytest.approx(130.0)


def test_shares_of_energy():
    assert cost.joules_per_token(700, tokens_per_s=1000) == 0.7
    assert cost.kwh_per_million_tokens(700, tokens_per_s=1000) == pytest.approx(0.1944, rel=1e-3)


def test_resize_reasons_name_the_trigger():
    reasons = limits.resize_reasons(eviction=0.3, fleet_utilization=0.95)

    assert len(reasons) == 2
    assert "30.0%" in reasons[0]
    assert limits.resize_reasons(eviction=0.1, fleet_utilization=0.7) == ()


@given(alpha=st.floats(0, 1), k=st.integers(1, 16), c=st.floats(0.01, 0.5))
def test_a_pass_gives_between_one_and_all_tokens(alpha, k, c):
    expected = speculation.tokens_per_pass(alpha, k)
    best = speculation.best_draft_tokens(alpha, draft_cost=c)

    assert 1 <= expected <= k + 1
    assert speculation.speedup(alpha, best, draft_cost=c) >= speculation.speedup(
        alpha, k, draft_cost=c
    ) * (1 - 1e-12)


@given(prefill=st.floats(0.001, 10), sent=st.floats(0.001, 10), layers=st.integers(1, 128))
def test_pipelining_never_loses_and_never_beats_the_longer_part(prefill, sent, layers):
    total = transfer.pipelined_s(prefill, sent, layers=layers)

    assert max(prefill, sent) <= total * (1 + 1e-9)
    assert total <= (prefill + sent) * (1 + 1e-9)


def test_a_tier_at_the_break_even_rate_restores_as_fast_as_computing():
    recompute = transfer.recompute_s_per_token(70e9, flops_per_s=4 * 989e12, mfu=0.5)
    rate = transfer.restore_bandwidth_min(327_680, recompute_s=recompute)

    assert transfer.restore_s_per_token(327_680, bytes_per_s=rate) == pytest.approx(recompute)
    assert math.isclose(rate, 4.63e9, rel_tol=0.01)


def test_the_page_of_oracles_is_the_tables():
    spec = importlib.util.spec_from_file_location("oracles_tool", ROOT / "tools" / "oracles.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    assert tool.PAGE.read_text("utf-8") == tool.render()
