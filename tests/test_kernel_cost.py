"""Steps can be priced by the kernels they launch, and such prices move as kernels do."""

import math
import sys
from pathlib import Path

import pytest

from tierline.base.errors import SpecError
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.kernel_cost import KernelCost, step_facts, timed_gpus
from tierline.perf.line import Calibration, StepLine
from tierline.perf.step import Layout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import fit_kernel_steps

DENSE, EXPERTS = "llama-3.1-8b", "qwen3-30b-a3b"


def cost(model=DENSE, gpu="rtxpro6000se", **layout):
    return KernelCost(load_model(model), load_gpu(gpu), Layout(weights="bf16", kv="bf16", **layout))


def line(of=None, **calibration):
    return StepLine(of or cost(), tokens_max=4096, calibration=Calibration(**calibration))


def ms(of, decodes, context, chunks=()):
    return of.line(decodes, context, chunks)[0] / 1e9


@pytest.mark.parametrize("gpu", timed_gpus())
def test_decoding_alone_reads_weights_and_cache_at_about_the_memory_rate(gpu):
    of, model = cost(gpu=gpu), load_model(DENSE)
    n, each = 64, 1024
    weights = of.weights_bytes_per_gpu - 2 * model.embedding_params
    cache = 2 * model.kv_elements(each) * n
    least_ms = 1e3 * (weights + cache) / load_gpu(gpu).memory_bytes_per_s

    assert least_ms < ms(line(of), n, n * each) < 1.5 * least_ms


def test_attention_beside_a_prompt_takes_longer_than_both_apart():
    of = line()
    n, context, chunk = 64, 64 * 1500, [(0, 512)]
    apart = ms(of, n, context) + ms(of, 0, 0, chunk)
    reads_again = ms(of, n, context, chunk) - ms(of, n, 0, chunk)

    assert reads_again > 1.3 * (ms(of, n, context) - ms(of, n, 0))
    assert ms(of, n, context, chunk) < apart  # weights are read once


def test_more_query_heads_a_cache_head_cost_more_beside_a_prompt():
    few = cost().terms(1)
    many = cost(EXPERTS).terms(1)

    assert 1 < 1 + few.mixed_cache_s_per_token / few.cache_s_per_token < 2
    assert 2.5 < 1 + many.mixed_cache_s_per_token / many.cache_s_per_token < 4


def test_a_prompt_of_data_parallel_ranks_is_on_one_of_them():
    alone, two = cost(EXPERTS), cost(EXPERTS, dp=2, ep=2)
    decodes = ms(line(two), 128, 128 * 1000)

    assert alone.terms(1).prompt_token_s == 0
    assert two.terms(1).prompt_token_s > 0
    assert ms(line(two), 64, 64 * 1000) < decodes < ms(line(alone), 128, 128 * 1000)


def test_scalars_count_kernels_and_layers():
    model = load_model(DENSE)
    plain, slow, prompts = line(), line(kernel_s=1e-6), line(prompt_layer_s=1e-4)
    kernels = cost().terms(1).kernels

    assert kernels == 11 * model.layers
    assert ms(slow, 8, 800) - ms(plain, 8, 800) == pytest.approx(kernels * 1e-3)
    assert ms(prompts, 8, 800) == ms(plain, 8, 800)
    added = ms(prompts, 8, 800, [(0, 64)]) - ms(plain, 8, 800, [(0, 64)])
    assert added == pytest.approx(0.1 * model.layers)


@pytest.mark.parametrize("decodes", [1, 32, 128])
def test_chunks_and_rates_agree_with_the_line(decodes):
    of, context = line(cost(EXPERTS, dp=2, ep=2)), 1000 * decodes
    alone = of.line(decodes, context, [(256, 1024)])[0]
    rate = of.prefill_rate(chunk=1024, decodes=decodes, context_tokens=context)
    fits = {"decodes": decodes, "context_tokens": context, "past_tokens": 256, "grain": 16}

    assert rate(1024, 256) == alone
    assert of.chunk_for(alone, tokens_max=2048, **fits) == 1024
    assert of.chunk_for(alone - 1, tokens_max=2048, **fits) == 1008


def test_repeats_are_a_line_beside_prompts_too():
    of = line()
    alpha, beta = of.line(32, 32_000, [(0, 128)])
    later = of.line(32, 32_000 + 3 * 32, [(3 * 128, 128)])[0]

    assert later == alpha + 3 * beta


def test_what_was_not_timed_is_refused_with_a_reason():
    with pytest.raises(SpecError, match="not timed on a100-80"):
        cost(gpu="a100-80")
    with pytest.raises(SpecError, match="not priced by kernels"):
        cost("deepseek-v3")
    with pytest.raises(SpecError, match="not priced by kernels"):
        cost(pp=2)


def test_facts_are_physical_and_say_how_well_they_fit():
    for name in timed_gpus():
        gpu, facts = load_gpu(name), step_facts(load_gpu(name))

        assert facts.decode_gb_per_s * 1e9 < 1.05 * gpu.memory_bytes_per_s
        assert facts.unpacked_gb_per_s > facts.decode_gb_per_s  # the L2 cache serves it
        assert facts.expert_tflops * 1e12 <= gpu.flops_per_s["bf16"]
        assert all(0 < p50 < p90 < 1 for p50, p90 in facts.errors.values())
        assert math.isfinite(cost(gpu=name).evidence.high)


def test_shipped_facts_are_what_the_timings_give(data_dir):
    tables = fit_kernel_steps.read(data_dir / "kernels_llmservingsim.csv.gz")
    for name, layers in tables.items():
        shipped = step_facts(load_gpu(fit_kernel_steps.GPUS[name]))
        for fitted in (fit_kernel_steps.fit_mixed, fit_kernel_steps.fit_sampler):
            for key, value in fitted(layers)[0].items():
                assert getattr(shipped, key) == pytest.approx(value, rel=1e-3), key


def test_decode_attention_agrees_with_timings_of_every_model_and_degree(data_dir):
    layers = fit_kernel_steps.read(data_dir / "kernels_llmservingsim.csv.gz")["RTXPRO6000"]
    of, ratios = step_facts(load_gpu("rtxpro6000se")), []
    for rows, _, kv, size in fit_kernel_steps._shapes(layers):
        for new, _, decodes, cached, us in rows:
            if new == 0 and decodes in (32, 128) and cached in (512, 1024, 2048):
                moved = decodes * cached * kv * 2 * size * 2 / 1e3
                small = of.decode_start_us + moved / of.decode_small_gb_per_s
                ratios.append(min(small, of.decode_ramp_us + moved / of.decode_gb_per_s) / us)

    assert len(ratios) == 36
    assert max(abs(math.log(r)) for r in ratios) < 0.2
    assert sum(abs(math.log(r)) for r in ratios) / len(ratios) < 0.05
