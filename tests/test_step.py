"""The step law: one formula, its tables and its closed forms agree, and physics bounds it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.step import Layout, StepCost, collective_s, load_rates

CASES = {
    "dense": ("llama-3.1-70b", "h100-sxm", Layout(weights="fp8", kv="fp8", tp=4)),
    "windows": ("gpt-oss-120b", "h200", Layout(weights="mxfp4", kv="bf16", tp=2)),
    "latent": ("deepseek-r1", "b200", Layout(weights="nvfp4", kv="fp8", tp=8)),
    "data parallel": ("deepseek-r1", "h200", Layout(weights="fp8", kv="bf16", dp=8, ep=8)),
    "sparse attention": ("glm-5", "b200", Layout(weights="fp8", kv="fp8", tp=8)),
    "hybrid": ("qwen3.5-397b-a17b", "b200", Layout(weights="fp8", kv="fp8", tp=8)),
    "pipeline": ("llama-3.1-405b", "a100-80", Layout(weights="int8", kv="bf16", tp=8, pp=2)),
    "no rates of its own": ("llama-3.1-8b", "mi300x", Layout(weights="bf16", kv="bf16")),
}


def build(case: str) -> StepCost:
    model, gpu, layout = CASES[case]
    return StepCost(load_model(model), load_gpu(gpu), layout)


COSTS = {case: build(case) for case in CASES}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
@given(
    decodes=st.integers(1, 1024),
    context=st.integers(1, 20_000),
    steps=st.integers(1, 300),
)
def test_a_run_of_decode_steps_is_the_sum_of_its_steps(case, decodes, context, steps):
    cost = COSTS[case]
    start = decodes * context
    one_by_one = math.fsum(cost.step_s(decodes, start + decodes * i) for i in range(steps))

    assert cost.decode_run_s(decodes, start, steps) == pytest.approx(one_by_one, rel=1e-9)


def test_the_sum_notices_a_window_that_fills_up_on_the_way():
    cost = COSTS["windows"]
    unbounded = StepCost(cost.model, cost.gpu, cost.layout)
    unbounded._bounded = [(10**9, seconds) for _, seconds in cost._bounded]

    assert unbounded.decode_run_s(8, 800, 300) > cost.decode_run_s(8, 800, 300) * 1.0001


@every_case
@given(
    decodes=st.integers(0, 2048),
    context=st.floats(0, 1e7),
    tokens=st.integers(0, 16_384),
    past=st.floats(0, 1e5),
)
def test_tables_give_what_the_formula_gives(case, decodes, context, tokens, past):
    cost = COSTS[case]
    pairs = tokens * (past + tokens / 2)

    assert cost.step_s(decodes, context, tokens, pairs) == pytest.approx(
        float(cost.formula_s(decodes, context, tokens, pairs)), rel=2e-3
    )


@every_case
@given(
    decodes=st.integers(1, 1000),
    context=st.floats(0, 1e7),
    tokens=st.integers(1, 16_000),
    pairs=st.floats(0, 1e9),
    more=st.integers(1, 300),
)
def test_more_work_never_takes_less_time(case, decodes, context, tokens, pairs, more):
    step_s = COSTS[case].step_s
    now = step_s(decodes, context, tokens, pairs)

    assert step_s(decodes, context + more, tokens, pairs) >= now
    assert step_s(decodes, context, tokens, pairs + more) >= now
    # Attention data parallelism spreads unevenly at few tokens, so its imbalance may shrink.
    slack = 1 if COSTS[case].layout.ep == 1 else 0.98
    assert step_s(decodes + more, context, tokens, pairs) >= now * slack
    assert step_s(decodes, context, tokens + more, pairs) >= now * slack


@every_case
@pytest.mark.parametrize("decodes", [1, 16, 256])
def test_no_step_beats_the_datasheet(case, decodes):
    cost = COSTS[case]
    gpu, model, layout = cost.gpu, cost.model, cost.layout
    flops = 2 * decodes * (model.params_active - model.embedding_params)
    fastest = max(gpu.flops_per_s.values())
    # A dense model reads every weight; a sparse one at least what one token visits.
    read = cost.weights_bytes_per_gpu * layout.pp
    if model.is_moe:
        read *= model.params_active / model.params / 4
    floor_s = max(flops / fastest / layout.gpus, read / layout.pp / gpu.memory_bytes_per_s * 0.9)

    assert cost.step_s(decodes, decodes * 1000.0) > floor_s


def test_the_floor_would_be_broken_by_rates_above_the_datasheet():
    gpu = load_gpu("h100-sxm")
    rates = replace(load_rates(gpu), memory=3.0, layer_dense_us=0.0, step_ms=0.0, sequence_us=0.0)
    cost = StepCost(load_model("llama-3.1-8b"), gpu, Layout(weights="bf16", kv="bf16"), rates=rates)

    assert cost.step_s(1, 1000.0) < cost.weights_bytes_per_gpu / gpu.memory_bytes_per_s


def test_tensor_parallelism_shares_weights_and_cache_evenly():
    model, gpu = load_model("llama-3.1-70b"), load_gpu("h100-sxm")
    one, four = (StepCost(model, gpu, Layout(weights="bf16", kv="bf16", tp=tp)) for tp in (1, 4))

    assert four.weights_bytes_per_gpu == pytest.approx(one.weights_bytes_per_gpu / 4, rel=1e-3)
    assert four.kv_bytes_per_gpu(1000) == pytest.approx(one.kv_bytes_per_gpu(1000) / 4)
    assert one.kv_bytes_per_gpu(1) == 2 * 80 * 8 * 128 * 2


def test_a_latent_cache_is_whole_on_every_rank():
    model, gpu = load_model("deepseek-r1"), load_gpu("b200")
    bytes_by_tp = {
        tp: StepCost(model, gpu, Layout(weights="fp8", kv="bf16", tp=tp)).kv_bytes_per_gpu(100)
        for tp in (1, 8)
    }

    assert bytes_by_tp[8] == bytes_by_tp[1] == 100 * 61 * 576 * 2


@pytest.mark.parametrize("tokens", [1, 8, 64, 4096])
def test_only_touched_experts_are_read(tokens):
    model, gpu = load_model("qwen3-235b-a22b"), load_gpu("h200")
    rates = replace(load_rates(gpu), expert=dict.fromkeys(("bf16", "fp8", "fp4"), 1e12))
    cost = StepCost(model, gpu, Layout(weights="bf16", kv="bf16", tp=8), rates=rates)
    (product,) = [p for p in cost._products if p.experts]
    touched = 128 * (1 - (1 - 8 / 128) ** tokens)
    moved = 3 * tokens * 8 * product.row_elements * 2
    expected_s = 94 * (touched * product.params * 2 + moved) / (4.8e12 * rates.memory)

    assert float(cost._experts_s(product, tokens)) == pytest.approx(expected_s, rel=1e-6)


def test_a_collective_waits_for_the_slowest_link():
    payload = 1e8
    nvlink, pcie = (
        collective_s(load_gpu(name), gpus=8, payload_bytes=payload) for name in ("h100-sxm", "l40s")
    )

    assert collective_s(load_gpu("h100-sxm"), gpus=1, payload_bytes=payload) == 0
    assert nvlink > 2 * 7 / 8 * payload / load_gpu("h100-sxm").scale_up.bytes_per_s
    assert pcie > 5 * nvlink


def test_a_scaled_law_scales_every_step():
    cost = COSTS["windows"]
    slow = cost.scaled(1.25).scaled(2)

    assert slow.step_s(7, 9e3, 300, 1e5) == pytest.approx(2.5 * cost.step_s(7, 9e3, 300, 1e5))
    assert slow.decode_run_s(7, 900, 50) == pytest.approx(2.5 * cost.decode_run_s(7, 900, 50))
    assert cost.slowdown == 1.0


@pytest.mark.parametrize(
    ("gpu", "kind", "named"),
    [
        ("h100-sxm", "fitted", "h100-sxm"),
        ("gh200", "fitted", "hopper"),
        ("mi300x", "datasheet", "generic"),
    ],
)
def test_rates_say_how_well_they_are_known(gpu, kind, named):
    evidence = load_rates(load_gpu(gpu)).evidence

    assert evidence.kind == kind
    assert f"[{named}]" in evidence.source
    assert evidence.low < 1 < evidence.high
