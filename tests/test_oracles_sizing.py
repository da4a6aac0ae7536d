"""The sizing laws reproduce every published figure that is right, and none that is wrong."""

import hashlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from oracle_table import ARITHMETIC, CATALOGUE, PERCENT, Oracle, agrees, contradicts_source, ids
from shapes import r70
from tierline.base.units import GB
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf import cost, curve, limits, memory, parallel, quantization, roofline, transfer
from tierline.perf.speculation import speedup, tokens_per_pass
from tierline.perf.step import load_rates
from tierline.workload.profile import WindowRates

BF16, FP8, NVFP4 = (KV_FORMATS[n] for n in ("bf16", "fp8", "nvfp4"))
W = WEIGHT_FORMATS
P70, P8 = 70e9, 8e9
GPU = 80e9
H100 = SimpleNamespace(flops=989e12, bandwidth=3.35e12)
LAYERS_70B = 80
QV = [(8192, 8192), (8192, 1024)]
QKVO = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192)]
ALL_LINEAR = [*QKVO, (8192, 28_672), (8192, 28_672), (28_672, 8192)]


def kv_gb(sequences, tokens, fmt=BF16, kv_heads=8):
    return sequences * memory.kv_bytes(r70(kv_heads), tokens, fmt) / GB


def floor(weights_gb, kv, act_gb, overhead_gb=15.0):
    return memory.memory_floor(
        weights_bytes=weights_gb * GB,
        kv_bytes=kv * GB,
        activations_bytes=act_gb * GB,
        overhead_total_bytes=overhead_gb * GB,
        gpu_memory_bytes=GPU,
    )


def sized(weights_gb, kv, act_gb):
    f = floor(weights_gb, kv, act_gb)
    return (f.total_bytes / GB, f.gpus_min)


def weights_gb(fmt, params=P70):
    return memory.nominal_weight_bytes(params, W[fmt]) / GB


def adapter_mb(shapes):
    return memory.lora_bytes(shapes, rank=16, layers=LAYERS_70B) / 1e6


def decode(weight_bytes, tp=1, bandwidth=H100.bandwidth):
    return roofline.decode_ceiling_tokens_per_s(weight_bytes, bytes_per_s=bandwidth, tp=tp)


def prefill_16k(tp):
    flops = roofline.prefill_flops(r70(), 16_384, params=P70)
    return roofline.prefill_s(flops, flops_per_s=tp * H100.flops)


def pd_ratio(inputs, outputs):
    return transfer.prefill_decode_ratio(
        input_tokens=inputs,
        output_tokens=outputs,
        prefill_tokens_per_s=6537,
        decode_tokens_per_s=2787,
    )


def fleet(peak, safety, tp=4):
    return cost.instances_needed(peak, usable_rps=12, safety=safety) * tp


def usd(u, capacity=31_200.0):
    return cost.usd_per_million_tokens(52 * 2.5, capacity_tokens_per_s=capacity, utilization=u)


def bubble(m):
    return parallel.bubble_share(4, m)


def depth(wait_s, rps, prefill_s=0.0):
    d = limits.shed_depth(wait_s=wait_s, drain_rps=rps, prefill_p99_s=prefill_s)
    return (d.limit, d.trip_low, d.trip_high)


def share(profile_in, profile_out):
    return roofline.archetype(
        input_tokens=profile_in,
        output_tokens=profile_out,
        prefill_tokens_per_s=6537,
        decode_tokens_per_s=2787,
    ).name


def over_mean(mean, **rates):
    return WindowRates(window_s=60, **rates).scaled(1 / mean)


def score_entries(tokens):
    """Entries of one head's score matrix; a causal prompt computes half of them."""
    heads_flops = LAYERS_70B * 64 * 2 * (128 + 128)
    return 2 * roofline.attention_flops(r70(), tokens) / heads_flops


def gain_of_shorter_prompts(prefill_share):
    faster = 1 / (1 - 0.30)
    return roofline.hardware_score(prefill_share, flops_ratio=faster, bandwidth_ratio=1) - 1


def bf16_tflops(name):
    return load_gpu(name).flops_per_s["bf16"] / 1e12


def mi300x_over_h100(mi300x=1.0, h100=1.0):
    ratio = bf16_tflops("mi300x") * mi300x / (bf16_tflops("h100-sxm") * h100)
    return roofline.hardware_score(1.0, flops_ratio=ratio, bandwidth_ratio=1)


def experts_of(name):
    group = next(g for g in load_model(name).ffn if g.experts)
    shared = group.shared_params_per_layer / group.params_per_expert
    return (group.experts_active, shared, group.experts)


def golden_tp(headroom):
    """The golden scenario: 122.4 GB in FP8 with FP8 KV."""
    total = floor(70, kv_gb(48, 1200, FP8), 28).total_bytes
    return parallel.lowest_tp(
        r70(), total_bytes=headroom * total, gpu_memory_bytes=GPU, gpus_per_node=8
    )


def best_concurrency(**limits_s):
    """`C_max` of a sweep whose ITL breaks before its TTFT."""
    points = tuple(
        curve.CurvePoint(
            concurrency=c, rps=c / 4, ttft_p50_s=0.5, ttft_p99_s=ttft, itl_p50_s=0.01, itl_p99_s=itl
        )
        for c, ttft, itl in ((16, 1.0, 0.02), (32, 1.5, 0.04), (48, 2.0, 0.06))
    )
    return curve.c_max(curve.Curve(points=points, source="benchmark"), **limits_s).concurrency


def resize(**values):
    return bool(limits.resize_reasons(**values))


OPENING = [
    Oracle(
        id="E2",
        formula="routing is asked of fleets of 8, 9 GPUs with a skew",
        law=lambda: tuple(
            int(cost.evaluate_routing(fleet_gpus_=n, skew_measured=True)) for n in (8, 9)
        ),
        want=(0, 1),
        erratum="8-10 elsewhere",
    ),
    Oracle(
        id="E8",
        formula="inference $2.3B over training $100M and $78M",
        law=lambda: (2.3e9 / 100e6, 2.3e9 / 78e6),
        want=(23.0, 29.487),
        relative=0.001,
        source_said=(15, 23),
        erratum="15-23 times",
        basis=ARITHMETIC,
    ),
    Oracle(
        id="E9",
        formula="relative cost: (1 / 0.4) / (1 / 0.7)",
        law=lambda: cost.relative_cost(0.4) / cost.relative_cost(0.7),
        want=1.75,
        source_said=2.5,
        erratum="2.5 is against 100 %",
    ),
    Oracle(
        id="E10",
        formula="KV at twice the context over KV at the context",
        law=lambda: kv_gb(1, 64_000) / kv_gb(1, 32_000),
        want=2.0,
        source_said=4,
        erratum="KV is linear in context",
    ),
]

WORKLOAD = [
    Oracle(
        id="O1.1-input",
        formula="50 x 200 x 327,680 B, GB",
        law=lambda: kv_gb(50, 200),
        want=3.28,
        relative=PERCENT,
    ),
    Oracle(
        id="O1.1-both",
        formula="50 x 3,200 x 327,680 B, GB (E5)",
        law=lambda: kv_gb(50, 3200),
        want=52.43,
        relative=PERCENT,
        source_said=3.28,
        erratum="outputs occupy cache too",
    ),
    Oracle(
        id="O1.1-ratio",
        formula="in + out over in",
        law=lambda: kv_gb(50, 3200) / kv_gb(50, 200),
        want=16.0,
    ),
    Oracle(
        id="O1.2",
        formula="P95 / mean, P99 / mean",
        law=lambda: (
            over_mean(65, p50=65, p95=160, p99=180, max=180).p95,
            over_mean(65, p50=65, p95=160, p99=180, max=180).p99,
        ),
        want=(2.46, 2.77),
        relative=PERCENT,
    ),
    Oracle(
        id="O1.3",
        formula="0.7 x 0.1 + 0.3 x 1",
        law=lambda: cost.blended_cost([0.7, 0.3], [0.1, 1.0]),
        want=0.37,
    ),
    Oracle(
        id="O1.4",
        formula="cascade 0.1 + e, e = 0.2 and 0.4",
        law=lambda: (
            cost.cascade_cost(0.2, small_cost=0.1),
            cost.cascade_cost(0.4, small_cost=0.1),
        ),
        want=(0.3, 0.5),
    ),
    Oracle(
        id="O1.5",
        formula="router 20 ms in a 150 ms budget fits",
        law=lambda: cost.routing_fits(router_s=0.020, ttft_budget_s=0.150),
        want=False,
    ),
    Oracle(
        id="O1.5-fits",
        formula="router 15 ms in a 150 ms budget fits",
        law=lambda: cost.routing_fits(router_s=0.015, ttft_budget_s=0.150),
        want=True,
    ),
    Oracle(
        id="E54-rag",
        formula="archetype of 4,000 in / 200 out",
        law=lambda: share(4000, 200),
        want="prefill-heavy",
    ),
    Oracle(
        id="E54-code",
        formula="archetype of 100 in / 3,000 out",
        law=lambda: share(100, 3000),
        want="decode-heavy",
    ),
    Oracle(
        id="E54-chat",
        formula="archetype of 500 in / 500 out",
        law=lambda: share(500, 500),
        want="balanced",
    ),
    Oracle(
        id="E54-itl",
        formula="C_max under TTFT 2 s; and ITL 50 ms",
        law=lambda: (
            best_concurrency(ttft_p99_s=2.0),
            best_concurrency(ttft_p99_s=2.0, itl_p99_s=0.05),
        ),
        want=(48, 32),
        erratum="C_max ignores the ITL limit",
    ),
]

MEMORY = [
    Oracle(
        id="O2.1",
        formula="70e9 x bits / 8 at 16, 8, 4; 8e9 at 16, GB",
        law=lambda: (
            weights_gb("bf16"),
            weights_gb("fp8"),
            weights_gb("int4-g128"),
            weights_gb("bf16", P8),
        ),
        want=(140.0, 70.0, 35.0, 16.0),
    ),
    Oracle(
        id="O2.2",
        formula="2 x 80 x 8 x 128 x bytes: BF16, FP8; MHA-64 BF16",
        law=lambda: (
            memory.kv_bytes_per_token(r70(), BF16),
            memory.kv_bytes_per_token(r70(), FP8),
            memory.kv_bytes_per_token(r70(64), BF16),
        ),
        want=(327_680, 163_840, 2_621_440),
    ),
    Oracle(
        id="O2.3",
        formula="50 x 8,000, GB",
        law=lambda: kv_gb(50, 8000),
        want=131.07,
        relative=PERCENT,
    ),
    Oracle(
        id="O2.4",
        formula="50 x 32,000, GB; over 140 GB",
        law=lambda: (kv_gb(50, 32_000), kv_gb(50, 32_000) / 140),
        want=(524.3, 3.74),
        relative=PERCENT,
    ),
    Oracle(
        id="O2.5",
        formula="sequences over 140 GB at 32K, 128K",
        law=lambda: tuple(
            memory.sequences_to_outweigh(140e9, sequence_bytes=kv_gb(1, n) * GB)
            for n in (32_000, 128_000)
        ),
        want=(14, 4),
    ),
    Oracle(
        id="E1-32K",
        formula="50 x 32,000, GB",
        law=lambda: kv_gb(50, 32_000),
        want=524.288,
        source_said=416,
        erratum="0.26 MB a token; 0.32768 is right",
    ),
    Oracle(
        id="E1-crossover",
        formula="sequences over 140 GB at 32K",
        law=lambda: memory.sequences_to_outweigh(140e9, sequence_bytes=kv_gb(1, 32_000) * GB),
        want=14,
        source_said=16,
        erratum="same",
    ),
    Oracle(
        id="O2.6",
        formula="140 + 104 + 28 + 15, GPUs of 80 GB",
        law=lambda: sized(140, 104, 28),
        want=(287.0, 4),
    ),
    Oracle(
        id="O2.7",
        formula="140 + KV(50 x 8,000) + 28 + 15",
        law=lambda: sized(140, kv_gb(50, 8000), 28),
        want=(314.07, 4),
        relative=PERCENT,
        source_said=(287, None),
        erratum="E1: stale KV",
    ),
    Oracle(id="O2.8", formula="70 + 52 + 28 + 15", law=lambda: sized(70, 52, 28), want=(165.0, 3)),
    Oracle(
        id="E11",
        formula="GPUs of 80 GB for 165 GB",
        law=lambda: floor(70, 52, 28).gpus_min,
        want=3,
        source_said=2,
        erratum="2 hold 160 GB",
    ),
    Oracle(
        id="O2.9",
        formula="70 + KV FP8(50 x 8,000) + 28 + 15",
        law=lambda: sized(70, kv_gb(50, 8000, FP8), 28),
        want=(178.5, 3),
        relative=PERCENT,
    ),
    Oracle(
        id="O2.10-28",
        formula="70 + KV BF16 + 28 + 15",
        law=lambda: sized(70, kv_gb(50, 8000), 28),
        want=(244.07, 4),
        relative=PERCENT,
    ),
    Oracle(
        id="O2.10-14",
        formula="70 + KV BF16 + 14 + 15",
        law=lambda: sized(70, kv_gb(50, 8000), 14),
        want=(230.07, 3),
        relative=PERCENT,
    ),
    Oracle(
        id="O2.11-4",
        formula="ceil(4 x 1.3), ceil(4 x 1.5)",
        law=lambda: tuple(memory.gpus_with_headroom(4, headroom=h) for h in (1.3, 1.5)),
        want=(6, 6),
    ),
    Oracle(
        id="O2.11-3",
        formula="ceil(3 x 1.3), ceil(3 x 1.5)",
        law=lambda: tuple(memory.gpus_with_headroom(3, headroom=h) for h in (1.3, 1.5)),
        want=(4, 5),
    ),
    Oracle(
        id="E12",
        formula="ceil(3 x 1.5)",
        law=lambda: memory.gpus_with_headroom(3, headroom=1.5),
        want=5,
        source_said=4,
        erratum="4 is the low end alone",
    ),
    Oracle(
        id="O2.12",
        formula="8 adapters of 100 MB add to the floor, GB",
        law=lambda: (
            memory.memory_floor(
                weights_bytes=0,
                kv_bytes=0,
                activations_bytes=0,
                adapters_bytes=8 * 100e6,
                overhead_total_bytes=0,
                gpu_memory_bytes=GPU,
            ).total_bytes
            / GB
        ),
        want=0.8,
    ),
    Oracle(
        id="O2.13",
        formula="3 % and 8 % of 140 GB",
        law=lambda: tuple(memory.padded_weight_bytes(140e9, share=s) / GB for s in (0.03, 0.08)),
        want=(4.2, 11.2),
    ),
    Oracle(
        id="O2.14-nvme",
        formula="70, 140, 35 GB over 12.5 GB/s, s",
        law=lambda: tuple(
            transfer.cold_start(g * GB, bytes_per_s=12.5e9, init_s=0).transfer_s
            for g in (70, 140, 35)
        ),
        want=(5.6, 11.2, 2.8),
    ),
    Oracle(
        id="O2.14-10gbe",
        formula="70, 140 GB over 1.1 GB/s, s",
        law=lambda: tuple(
            transfer.cold_start(g * GB, bytes_per_s=1.1e9, init_s=0).transfer_s for g in (70, 140)
        ),
        want=(63.6, 127),
        relative=PERCENT,
    ),
    Oracle(
        id="O2.15",
        formula="N^2 at 8K, 32K",
        law=lambda: (score_entries(8192), score_entries(32_768)),
        want=(67_108_864, 1_073_741_824),
    ),
    Oracle(
        id="E13",
        formula="20 % of 140 GB, at any weight format, GB",
        law=lambda: memory.nominal_activation_bytes(P70) / GB,
        want=28.0,
        source_said=14,
        erratum="14 follows stored weights; activations stay 16-bit",
    ),
    Oracle(
        id="E14",
        formula="7.5 % of 80 GB, GB; floor 2 GB on 16 GB",
        law=lambda: (memory.overhead_bytes(80e9) / GB, memory.overhead_bytes(16e9) / GB),
        want=(6.0, 2.0),
    ),
    Oracle(
        id="E15-qv",
        formula="LoRA r=16 on q, v; MB",
        law=lambda: adapter_mb(QV),
        want=65.5,
        relative=PERCENT,
    ),
    Oracle(
        id="E15-qkvo",
        formula="on q, k, v, o; MB",
        law=lambda: adapter_mb(QKVO),
        want=131,
        relative=PERCENT,
    ),
    Oracle(
        id="E15-all",
        formula="on all linear layers; MB",
        law=lambda: adapter_mb(ALL_LINEAR),
        want=414,
        relative=PERCENT,
        source_said=1400,
        erratum="1-5 % of the base",
    ),
    Oracle(
        id="E16",
        formula="70 GB over one Gen4 drive, 7 GB/s, + 30 s init",
        law=lambda: transfer.cold_start(70e9, bytes_per_s=7e9, init_s=30).total_s,
        want=40.0,
        source_said=5.6,
        erratum="12.5 GB/s exceeds one drive, init left out",
    ),
    Oracle(
        id="E17",
        formula="GPUs of 80 GB for 140 GB",
        law=lambda: floor(140, 0, 0, 0).gpus_min,
        want=2,
        source_said=8,
        erratum="not a full node",
    ),
]

ROOFLINE = [
    Oracle(
        id="O3.1",
        formula="989e12 / 3.35e12",
        law=lambda: roofline.ridge_flops_per_byte(H100.flops, H100.bandwidth),
        want=295.2,
        relative=0.001,
    ),
    Oracle(
        id="O3.2",
        formula="989 / 312",
        law=lambda: roofline.hardware_score(1.0, flops_ratio=989 / 312, bandwidth_ratio=1),
        want=3.17,
        relative=PERCENT,
    ),
    Oracle(
        id="O3.3",
        formula="5.3 / 3.35",
        law=lambda: roofline.hardware_score(0.0, flops_ratio=1, bandwidth_ratio=5.3 / 3.35),
        want=1.582,
        relative=0.001,
    ),
    Oracle(
        id="O3.4",
        formula="TP x 3.35e12 / 70e9, TP = 1, 2",
        law=lambda: (decode(70e9), decode(70e9, tp=2)),
        want=(47.9, 95.7),
        relative=0.002,
    ),
    Oracle(
        id="E18",
        formula="3.35e12 / 70e9, tokens/s",
        law=lambda: decode(70e9),
        want=47.857,
        relative=0.001,
        source_said=80,
        erratum="over the roofline of one GPU",
    ),
    Oracle(
        id="O3.5",
        formula="4,700 / 80 and 4,510 / 80",
        law=lambda: (4700 / 80, 4510 / 80),
        want=(58.8, 56.4),
        relative=0.002,
        basis=ARITHMETIC,
    ),
    Oracle(
        id="O3.6",
        formula="idle share at 2 FLOP/byte",
        law=lambda: roofline.idle_share(2, flops_per_s=H100.flops, bytes_per_s=H100.bandwidth),
        want=0.993,
        relative=0.001,
    ),
    Oracle(
        id="E19",
        formula="busy share at 2 FLOP/byte",
        law=lambda: 1 - roofline.idle_share(2, flops_per_s=H100.flops, bytes_per_s=H100.bandwidth),
        want=0.00677,
        relative=0.01,
        source_said=0.02,
        erratum="98 % idle",
    ),
    Oracle(
        id="O3.7-flops",
        formula="2 x 70e9 x 16,384 + attention",
        law=lambda: roofline.prefill_flops(r70(), 16_384, params=P70),
        want=2.65e15,
        relative=PERCENT,
    ),
    Oracle(
        id="O3.7-tp1",
        formula="over 989e12, s",
        law=lambda: prefill_16k(1),
        want=2.68,
        relative=PERCENT,
        source_said=0.4,
        erratum="E20: 300-500 ms needs TP=8 at full MFU",
    ),
    Oracle(
        id="O3.7-tp8",
        formula="over 8 x 989e12, s",
        law=lambda: prefill_16k(8),
        want=0.335,
        relative=PERCENT,
    ),
    Oracle(
        id="E22",
        formula="FP8 ridge 1979 / 3.35, tokens at 2 FLOP per byte",
        law=lambda: roofline.ridge_flops_per_byte(1979e12, 3.35e12) / 2,
        want=295.4,
        relative=0.001,
    ),
    Oracle(
        id="E24",
        formula="prefill of W8A8 and W4A16 over 16 bit",
        law=lambda: (quantization.METHODS["FP8"].prefill, quantization.METHODS["W4A16"].prefill),
        want=(1.8, 0.8),
        source_said=(1.0, None),
        erratum="true for weight-only formats alone",
    ),
    Oracle(
        id="E21",
        formula="H100 SXM, A100: dense BF16 of the catalogue, TFLOPS",
        law=lambda: (bf16_tflops("h100-sxm"), bf16_tflops("a100-80")),
        want=(989, 312),
        erratum="989 is labelled TF32, which reaches it with sparsity alone",
        basis=CATALOGUE,
    ),
    Oracle(
        id="E23",
        formula="BF16 of MI300X over H100: 1307 / 989",
        law=mi300x_over_h100,
        want=1.3215,
        relative=0.001,
        erratum="on paper it is the reverse",
        basis=CATALOGUE,
    ),
    Oracle(
        id="E23-derated",
        formula="the same at a sustained 45 % and 93 %",
        law=lambda: mi300x_over_h100(0.45, 0.93),
        want=0.6394,
        relative=0.001,
    ),
    Oracle(
        id="E25",
        formula="KV precision alone asks for a long-context evaluation",
        law=lambda: (
            quantization.LONG_CONTEXT_GATE
            in quantization.precision_advice("long-context", generation="Hopper").gates
        ),
        want=True,
        erratum="no validation needed",
    ),
    Oracle(
        id="E27",
        formula="TP of 140 GB in a node of 8 x 80 GB",
        law=lambda: parallel.lowest_tp(
            r70(), total_bytes=140e9, gpu_memory_bytes=GPU, gpus_per_node=8
        ),
        want=2,
        erratum="INT4 does not avoid a second node; there is none",
    ),
]

PARALLEL = [
    Oracle(
        id="O5.1",
        formula="140 GB / TP4",
        law=lambda: parallel.weights_bytes_per_gpu(140e9, tp=4) / GB,
        want=35.0,
    ),
    Oracle(
        id="E28",
        formula="FP16 / TP4, GB",
        law=lambda: parallel.weights_bytes_per_gpu(weights_gb("bf16"), tp=4),
        want=35.0,
        source_said=17.5,
        erratum="17.5 is FP8",
    ),
    Oracle(
        id="O5.2",
        formula="3 / (m + 3), m = 1, 4",
        law=lambda: (bubble(1), bubble(4)),
        want=(0.75, 0.4286),
        relative=0.001,
    ),
    Oracle(
        id="O5.3",
        formula="m' = 2 m + PP - 1; its bubble over half of the first",
        law=lambda: (
            parallel.microbatches_to_halve(4, 4),
            bubble(parallel.microbatches_to_halve(4, 4)) / (bubble(4) / 2),
        ),
        want=(11, 1.0),
    ),
    Oracle(
        id="E29",
        formula="microbatches that halve the bubble of PP4, m = 4",
        law=lambda: parallel.microbatches_to_halve(4, 4),
        want=11,
        source_said=8,
        erratum="doubling m gives 27.3 %",
    ),
    Oracle(
        id="E29-double",
        formula="bubble at m = 8",
        law=lambda: bubble(8),
        want=0.2727,
        relative=0.001,
        source_said=0.214,
        erratum="not half of 42.9 %",
    ),
    Oracle(
        id="O5.4",
        formula="replicas of TP4, TP8 in a node of 8",
        law=lambda: (parallel.replicas_per_node(8, tp=4), parallel.replicas_per_node(8, tp=8)),
        want=(2, 1),
    ),
    Oracle(
        id="O5.5",
        formula="mean / max = 1 / 3",
        law=lambda: parallel.expert_throughput_share(load_max=3, load_mean=1),
        want=1 / 3,
    ),
    Oracle(
        id="O5.6",
        formula="seconds over 128 GB/s and over 900",
        law=lambda: (
            transfer.transfer_s(1e9, bytes_per_s=128e9)
            / transfer.transfer_s(1e9, bytes_per_s=900e9)
        ),
        want=7.03,
        relative=0.001,
    ),
    Oracle(
        id="E30",
        formula="DeepSeek-V3: routed, shared, of how many experts",
        law=lambda: experts_of("deepseek-v3"),
        want=(8, 1, 256),
        source_said=(2, None, None),
        erratum="top-2",
        basis=CATALOGUE,
    ),
    Oracle(
        id="E30-params",
        formula="its parameters, and those of one token; 1e9",
        law=lambda: (
            load_model("deepseek-v3").params / 1e9,
            load_model("deepseek-v3").params_active / 1e9,
        ),
        want=(671, 37),
        relative=0.02,
        basis=CATALOGUE,
    ),
    Oracle(
        id="E7",
        formula="legal TP for 6 GPUs of a 70B",
        law=lambda: parallel.round_up_tp(6, r70(), gpus_max=8),
        want=8,
        source_said=6,
        erratum="6 divides neither head count",
    ),
    Oracle(
        id="E31",
        formula="405e9 at FP8, GB",
        law=lambda: weights_gb("fp8", 405e9),
        want=405.0,
        source_said=200,
        erratum="understated",
    ),
]

BATCHING = [
    Oracle(
        id="O6.1",
        formula="16,384 / 256 chunks",
        law=lambda: memory.blocks_of(16_384, block_tokens=256),
        want=64,
    ),
    Oracle(
        id="O6.2-4000",
        formula="KV FP8 of 4,000 tokens, MB",
        law=lambda: kv_gb(1, 4000, FP8) * 1e3,
        want=655.36,
    ),
    Oracle(
        id="O6.2-4096",
        formula="KV FP8 of 4,096 tokens, MB",
        law=lambda: kv_gb(1, 4096, FP8) * 1e3,
        want=671.09,
        relative=0.001,
    ),
    Oracle(
        id="E33",
        formula="KV FP8 of 4,000 tokens, MB",
        law=lambda: kv_gb(1, 4000, FP8) * 1e3,
        want=655.36,
        source_said=320,
        erratum="K and V: the factor 2 was dropped",
    ),
    Oracle(
        id="E33-time",
        formula="over 50 GB/s, ms",
        law=lambda: transfer.transfer_s(kv_gb(1, 4000, FP8) * GB, bytes_per_s=50e9) * 1e3,
        want=13.1,
        relative=PERCENT,
        source_said=0.8,
        erratum="bits taken for bytes",
    ),
    Oracle(
        id="O6.3",
        formula="KV FP8 of 200 tokens, MB; over 50 GB/s, ms",
        law=lambda: (
            kv_gb(1, 200, FP8) * 1e3,
            transfer.transfer_s(kv_gb(1, 200, FP8) * GB, bytes_per_s=50e9) * 1e3,
        ),
        want=(32.8, 0.66),
        relative=PERCENT,
        source_said=(16, 0.04),
        erratum="E33",
    ),
    Oracle(
        id="O6.4-rag",
        formula="(4,000 / 6,537) / (200 / 2,787)",
        law=lambda: pd_ratio(4000, 200),
        want=8.5,
        relative=PERCENT,
    ),
    Oracle(
        id="E34-rag",
        formula="P:D of 4,000 in / 200 out",
        law=lambda: pd_ratio(4000, 200),
        want=8.527,
        relative=0.001,
        source_said=1 / 3,
        erratum="preset 1:3, the other way",
    ),
    Oracle(
        id="E34-code",
        formula="D:P of 100 in / 3,000 out",
        law=lambda: 1 / pd_ratio(100, 3000),
        want=70,
        relative=PERCENT,
        source_said=6,
        erratum="preset 1:6",
    ),
    Oracle(
        id="O6.4-chat",
        formula="D:P of 500 in / 500 out",
        law=lambda: 1 / pd_ratio(500, 500),
        want=2.3,
        relative=0.025,
    ),
    Oracle(
        id="O6.5",
        formula="3 accepted + the target's own",
        law=lambda: 3 + tokens_per_pass(0, 1),
        want=4.0,
        source_said=3,
        erratum="E35",
    ),
    Oracle(
        id="E36",
        formula="speculation at acceptance .1, 5 drafts of .05",
        law=lambda: speedup(0.1, 5, draft_cost=0.05),
        want=0.8889,
        relative=0.001,
        source_said=1.0,
        erratum="never worse",
    ),
    Oracle(
        id="O6.E",
        formula="(1 - a^6) / (1 - a), a = .7, .6",
        law=lambda: (tokens_per_pass(0.7, 5), tokens_per_pass(0.6, 5)),
        want=(2.94, 2.38),
        relative=0.002,
    ),
]

KV = [
    Oracle(
        id="O7.1",
        formula="1 - 200 / 8,192",
        law=lambda: memory.block_waste_tokens(200, block_tokens=8192) / 8192,
        want=0.976,
        relative=0.001,
    ),
    Oracle(
        id="O7.2",
        formula="waste of 17 tokens in blocks of 16",
        law=lambda: memory.block_waste_tokens(17, block_tokens=16),
        want=15,
    ),
    Oracle(
        id="O7.3",
        formula="share of 12,050 tokens to prefill",
        law=lambda: 50 / (8000 + 4000 + 50),
        want=0.00415,
        relative=0.001,
        basis=ARITHMETIC,
    ),
    Oracle(
        id="O7.4",
        formula="replica of hash 17 of 4, of 5",
        law=lambda: (17 % 4, 17 % 5),
        want=(1, 2),
        basis=ARITHMETIC,
    ),
    Oracle(
        id="O7.4-moved",
        formula="4 to 5 replicas: stay, move by modulo; move by ring",
        law=lambda: (
            1 - parallel.prefixes_moved_share(4, ring=False),
            parallel.prefixes_moved_share(4, ring=False),
            parallel.prefixes_moved_share(4, ring=True),
        ),
        want=(1 / 5, 4 / 5, 1 / 5),
    ),
    Oracle(
        id="E39",
        formula="round robin over 4, 100 requests a prefix: caches that hold a share, all",
        law=lambda: tuple(
            parallel.round_robin_hit_share(4, requests_per_prefix=100, caches_hold_all=every)
            for every in (False, True)
        ),
        want=(0.25, 0.96),
        source_said=(None, 0.25),
        erratum="1 / N is for caches too small for every prefix",
    ),
    Oracle(
        id="O7.5",
        formula="50 x 4,000 in BF16, FP8, NVFP4, GB",
        law=lambda: tuple(kv_gb(50, 4000, f) for f in (BF16, FP8, NVFP4)),
        want=(65.5, 32.8, 18.4),
        relative=PERCENT,
        source_said=(52, 26, 13),
        erratum="E1",
    ),
    Oracle(
        id="E26",
        formula="16 / 4.5 bits; cut against FP8",
        law=lambda: (BF16.bits / NVFP4.bits, 1 - NVFP4.bits / FP8.bits),
        want=(3.56, 0.4375),
        relative=0.002,
        source_said=(4, 0.5),
        erratum="4 bits without scales",
    ),
    Oracle(
        id="O7.6",
        formula="100,000 tokens in BF16, FP8, GB",
        law=lambda: (kv_gb(1, 100_000), kv_gb(1, 100_000, FP8)),
        want=(32.8, 16.4),
        relative=PERCENT,
    ),
    Oracle(
        id="E37",
        formula="100,000 tokens, GB",
        law=lambda: kv_gb(1, 100_000),
        want=32.768,
        source_said=8,
        erratum="a quarter of it",
    ),
    Oracle(
        id="O7.7",
        formula="8 GB over 64 and 7 GB/s, 1 GB over 64; s",
        law=lambda: (
            transfer.transfer_s(8e9, bytes_per_s=64e9),
            transfer.transfer_s(8e9, bytes_per_s=7e9),
            transfer.transfer_s(1e9, bytes_per_s=64e9),
        ),
        want=(0.125, 1.143, 0.0156),
        relative=PERCENT,
    ),
    Oracle(
        id="O7.7-real",
        formula="100,000 tokens over 64 and 7 GB/s, s",
        law=lambda: tuple(
            transfer.transfer_s(kv_gb(1, 100_000) * GB, bytes_per_s=b) for b in (64e9, 7e9)
        ),
        want=(0.51, 4.7),
        relative=PERCENT,
    ),
    Oracle(
        id="E45",
        formula="waste when 20 % and 38 % of the slots are used",
        law=lambda: tuple(
            memory.block_waste_tokens(used, block_tokens=100) / 100 for used in (20, 38)
        ),
        want=(0.80, 0.62),
        source_said=(0.20, 0.38),
        erratum="20-38 % was the used share",
    ),
]

FLEET = [
    Oracle(id="O8.1", formula="ceil(120 x 1.3 / 12) x 4", law=lambda: fleet(120, 1.3), want=52),
    Oracle(
        id="O8.2",
        formula="safety 1.2, 1.5",
        law=lambda: (fleet(120, 1.2), fleet(120, 1.5)),
        want=(48, 60),
    ),
    Oracle(
        id="O8.3",
        formula="100 RPS, 1.2: repaired, guide mode",
        law=lambda: (
            fleet(100, 1.2),
            4 * cost.instances_guide_mode(100, usable_rps=12, safety=1.2),
        ),
        want=(40, 44),
    ),
    Oracle(
        id="E6",
        formula="GPUs of 100 RPS, safety 1.2, TP4",
        law=lambda: fleet(100, 1.2),
        want=40,
        source_said=43.2,
        erratum="no whole instances",
    ),
    Oracle(
        id="O8.4",
        formula="48 / 2 s, and over 12",
        law=lambda: (48 / 2.0, curve.guide_gap(concurrency=48, slo_s=2.0, rps=12)),
        want=(24.0, 2.0),
    ),
    Oracle(
        id="O8.4-boundary",
        formula="the guide's test passes at 2.0",
        law=lambda: curve.guide_gap_passes(2.0),
        want=True,
    ),
    Oracle(
        id="E43",
        formula="48 / (12 x (0.5 + 200 x 0.0175))",
        law=lambda: curve.little_ratio(concurrency=48, rps=12, e2e_mean_s=0.5 + 200 * 0.0175),
        want=1.0,
        source_said=2.0,
        erratum="TTFT limit in place of residence",
    ),
    Oracle(
        id="O8.5",
        formula="peak factor 2.5 applied once: 65 x 2.5 = 162.5 RPS",
        law=lambda: cost.instances_needed(65 * 2.5, usable_rps=12, safety=1.0),
        want=14,
    ),
    Oracle(
        id="E44",
        formula="instances for 2.5 x the mean",
        law=lambda: cost.instances_needed(65 * 2.5, usable_rps=12, safety=1.0),
        want=14,
        source_said=34,
        erratum="2.5 applied twice",
    ),
]

TCO = [
    Oracle(
        id="OT.1",
        formula="(1 / 0.4) / (1 / 0.8)",
        law=lambda: cost.relative_cost(0.4) / cost.relative_cost(0.8),
        want=2.0,
    ),
    Oracle(
        id="OT.2",
        formula="1 / 0.4, 1 / 0.3",
        law=lambda: (cost.relative_cost(0.4), cost.relative_cost(0.3)),
        want=(2.5, 3.333),
        relative=0.001,
    ),
    Oracle(
        id="OT.3",
        formula="0.4 / 0.7 - 1",
        law=lambda: cost.relative_cost(0.7) / cost.relative_cost(0.4) - 1,
        want=-0.429,
        relative=0.001,
    ),
    Oracle(
        id="OT.4",
        formula="1 / (1 - 0.3) - 1, cost in proportion to the prompt",
        law=lambda: gain_of_shorter_prompts(1.0),
        want=0.429,
        relative=0.001,
        source_said=0.30,
        erratum="E50: at most, and only then",
    ),
    Oracle(
        id="OT.4-half",
        formula="the same when prompts are half of the time",
        law=lambda: gain_of_shorter_prompts(0.5),
        want=0.1765,
        relative=0.001,
        source_said=0.30,
        erratum="same",
    ),
    Oracle(
        id="OT.5-tokens",
        formula="13 x 12 x 200 tokens/s; $/M at that capacity",
        law=lambda: (
            cost.instances_needed(120, usable_rps=12, safety=1.3) * 12 * 200,
            usd(1.0, cost.instances_needed(120, usable_rps=12, safety=1.3) * 12 * 200),
        ),
        want=(31_200, 1.157),
        relative=0.001,
    ),
    Oracle(
        id="OT.5-usd",
        formula="130 $/h at u = 1, 0.8, 0.4, $/M",
        law=lambda: (usd(1.0), usd(0.8), usd(0.4)),
        want=(1.157, 1.447, 2.894),
        relative=0.001,
    ),
    Oracle(
        id="OT.5-year",
        formula="52 x 2.5 x 8,760",
        law=lambda: cost.usd_per_year(52, usd_per_gpu_hour=2.5),
        want=1_138_800,
    ),
    Oracle(
        id="E49",
        formula="$/M at u = 0.4 from capacity",
        law=lambda: usd(0.4),
        want=2.894,
        relative=0.001,
        source_said=7.23,
        erratum="utilisation counted twice",
    ),
    Oracle(id="OT.6", formula="1 of 8", law=lambda: cost.round_robin_share(1, gpus=8), want=0.125),
    Oracle(
        id="OT.7",
        formula="85 % and 55 %, weights 1:1 and 7:1",
        law=lambda: (
            cost.weighted_utilization([85, 55], [1, 1]),
            cost.weighted_utilization([85, 55], [7, 1]),
        ),
        want=(70.0, 81.25),
    ),
    Oracle(
        id="E51",
        formula="85 % and 55 %, 7:1",
        law=lambda: cost.weighted_utilization([85, 55], [7, 1]),
        want=81.25,
        source_said=70,
        erratum="equal weights",
    ),
    Oracle(
        id="E53",
        formula="1M at $0.01, 60 % moved to $0.0005: $, total cut, cut of what moved",
        law=lambda: (
            1e6 * cost.blended_cost([0.4, 0.6], [0.01, 0.0005]),
            1 - cost.blended_cost([0.4, 0.6], [0.01, 0.0005]) / 0.01,
            1 - cost.blended_cost([0.0, 1.0], [0.01, 0.0005]) / 0.01,
        ),
        want=(4300, 0.57, 0.95),
        source_said=(None, None, 0.57),
        erratum="57 % is of the total",
    ),
]

MONITORING = [
    Oracle(
        id="OM.1-over",
        formula="TTFT p99 1.31 / 1.0 sizes again",
        law=lambda: resize(ttft_p99_s=1.31, benchmark_ttft_p99_s=1.0),
        want=True,
    ),
    Oracle(
        id="OM.1-on",
        formula="1.30 / 1.0 sizes again",
        law=lambda: resize(ttft_p99_s=1.30, benchmark_ttft_p99_s=1.0),
        want=False,
    ),
    Oracle(
        id="OM.2-over",
        formula="75 to 54 % sizes again",
        law=lambda: resize(utilization_pct=54, benchmark_utilization_pct=75),
        want=True,
    ),
    Oracle(
        id="OM.2-on",
        formula="75 to 55 % sizes again",
        law=lambda: resize(utilization_pct=55, benchmark_utilization_pct=75),
        want=False,
    ),
    Oracle(
        id="OM.3",
        formula="eviction 4.9, 5, 20, 20.1 %",
        law=lambda: " ".join(limits.eviction_state(r) for r in (0.049, 0.05, 0.20, 0.201)),
        want="ok warn warn degraded",
    ),
    Oracle(
        id="E46",
        formula="eviction 4, 7, 15, 21 %",
        law=lambda: " ".join(limits.eviction_state(r) for r in (0.04, 0.07, 0.15, 0.21)),
        want="ok warn warn degraded",
        erratum="warns at 5-10 % in one place, over 10 % in another",
    ),
    Oracle(
        id="E55",
        formula="TP of the golden scenario at headroom 1.3, 1.5",
        law=lambda: (golden_tp(1.3), golden_tp(1.5)),
        want=(2, 4),
        source_said=(4, None),
        erratum="TP=4 without saying why",
    ),
    Oracle(
        id="E56",
        formula="TTFT p99 2.6 s, benchmark 2.0 on the limit: by the ratio, by the limit too",
        law=lambda: tuple(
            int(resize(ttft_p99_s=2.6, benchmark_ttft_p99_s=2.0, ttft_limit_s=limit))
            for limit in (None, 2.0)
        ),
        want=(0, 1),
        source_said=(None, 0),
        erratum="a broken promise raises nothing",
    ),
    Oracle(
        id="OM.4",
        formula="2 s x 50 RPS; 80 %, 90 %",
        law=lambda: depth(2, 50),
        want=(100.0, 80, 90),
    ),
    Oracle(
        id="E48",
        formula="(2 - 0.5) x 156",
        law=lambda: depth(2, 156, 0.5)[0],
        want=234.0,
        source_said=312,
        erratum="prefill is part of the wait",
    ),
    Oracle(
        id="E47",
        formula="131,072 tokens of a 70B; of 8 KV heads x 128 x 32 layers, GB",
        law=lambda: (kv_gb(1, 131_072), 131_072 * 2 * 32 * 8 * 128 * 2 / GB),
        want=(42.9, 17.2),
        relative=PERCENT,
        source_said=(10, 10),
        erratum="128K costs more",
    ),
]

GROUPS = {
    "Opening figures": OPENING,
    "Workload": WORKLOAD,
    "Memory": MEMORY,
    "Roofline": ROOFLINE,
    "Parallelism": PARALLEL,
    "Batching, transfer and speculation": BATCHING,
    "KV cache": KV,
    "Curve and fleet": FLEET,
    "Cost": TCO,
    "Monitoring and guardrails": MONITORING,
}
ORACLES = [oracle for group in GROUPS.values() for oracle in group]
KNOWN_BAD = [oracle for oracle in ORACLES if oracle.source_said is not None]
NO_NUMBER = {
    "E3": "which step sets DP: an order, and the golden scenario walks it",
    "E4": "native and quantized floor are both computed: the golden scenario has both",
    "E32": "losing a sticky route costs recomputation and no context: nothing to compute here",
    "E38": "prefixes match by block, not whole: how an engine hashes, which a replay would show",
    "E40": "block pools under TP empty together: how an engine is built",
    "E41": "preemption recomputes and has no swap threshold: how an engine is built",
    "E42": "who made Mooncake, and when SnapKV selects: attributions",
    "E52": "a canary that forgets quality: rollouts are not planned here",
}
ERRATA = [f"E{n}" for n in range(1, 57)]
CHAPTERS = {"1": 5, "2": 15, "3": 7, "5": 6, "6": 5, "7": 7, "8": 5, "T": 7, "M": 4}
NUMBERED = [f"O{c}.{n}" for c, last in CHAPTERS.items() for n in range(1, last + 1)]
MUST_BE_KNOWN_BAD = ("E1", "E9", "E11", "E18", "E29", "E33", "E34", "E37", "E43", "E49")


@pytest.mark.parametrize("oracle", ORACLES, ids=ids(ORACLES))
def test_oracle(oracle):
    assert agrees(oracle), (oracle.formula, oracle.law(), oracle.want)


@pytest.mark.parametrize("oracle", KNOWN_BAD, ids=ids(KNOWN_BAD))
def test_known_bad_figure_is_not_reproduced(oracle):
    assert contradicts_source(oracle), (oracle.law(), oracle.source_said)


@pytest.mark.parametrize("erratum", MUST_BE_KNOWN_BAD)
def test_erratum_has_a_row(erratum):
    assert any(o.id == erratum or o.id.startswith(f"{erratum}-") for o in KNOWN_BAD)


def mentioned(rows):
    """Ids that rows are named after or speak of: OT.4 is the row of E50."""
    said = " ".join(f"{o.id.split('-')[0]} {o.formula} {o.erratum}" for o in rows)
    return set(re.findall(r"\b(?:E\d+|O[\dTM]\.\d+)\b", said))


def test_every_oracle_and_erratum_is_a_row_or_is_listed():
    assert (set(ERRATA) | set(NUMBERED)) - mentioned(ORACLES) == set(NO_NUMBER)


def test_a_missing_row_is_seen():
    rest = [o for o in ORACLES if not o.id.startswith("O7.4")]

    assert set(NUMBERED) - mentioned(rest) == {"O7.4"}


def test_a_wrong_second_figure_is_seen():
    """E26 with the source's cut in place of ours, the first value untouched."""
    row = next(o for o in KV if o.id == "E26")
    first, _ = row.law()

    assert contradicts_source(row)
    assert not contradicts_source(replace(row, law=lambda: (first, 0.5)))


def test_the_plan_derates_both_vendors():
    """E23: neither is planned at its paper rate."""
    shares = [load_rates(load_gpu(name)).dense["bf16"] for name in ("mi300x", "h100-sxm")]

    assert all(0.3 < share < 0.95 for share in shares)


def highest(prefix, replicas):
    """Rendezvous hashing, which moves what a ring moves: the replica that scores highest."""
    return max(range(replicas), key=lambda r: hashlib.blake2s(f"{prefix}/{r}".encode()).digest())


def test_prefixes_move_as_counted():
    """Both shares against prefixes that are placed one by one."""
    prefixes = range(4000)
    by_modulo = sum(p % 4 != p % 5 for p in prefixes) / len(prefixes)
    by_ring = sum(highest(p, 4) != highest(p, 5) for p in prefixes) / len(prefixes)

    assert by_modulo == pytest.approx(parallel.prefixes_moved_share(4, ring=False))
    assert by_ring == pytest.approx(parallel.prefixes_moved_share(4, ring=True), abs=0.02)


def test_a_dropped_k_v_factor_is_caught(monkeypatch):
    whole = memory._group_kv_bytes
    monkeypatch.setattr(memory, "_group_kv_bytes", lambda *a: whole(*a) / 2)
    caught = [o.id for o in ORACLES if not agrees(o)]

    assert {"O2.3", "O2.4", "O2.7", "E33", "E37", "O7.7-real"} <= set(caught)


def test_rounding_before_the_safety_factor_is_caught(monkeypatch):
    monkeypatch.setattr(cost, "instances_needed", cost.instances_guide_mode)

    assert "O8.3" in [o.id for o in FLEET if not agrees(o)]


def test_golden_scenario():
    """The chain of section 9: every step takes what the one before it gave."""
    kv_bytes = 48 * memory.kv_bytes(r70(), 1200, BF16)
    native = floor(140, kv_bytes / GB, 28)
    fp8_kv = 48 * memory.kv_bytes(r70(), 1200, FP8)
    eight = floor(70, fp8_kv / GB, 28)
    mixed = floor(70, kv_bytes / GB, 28)
    tp = parallel.lowest_tp(
        r70(), total_bytes=eight.total_bytes, gpu_memory_bytes=GPU, gpus_per_node=8
    )
    point = curve.CurvePoint(
        concurrency=48,
        rps=12,
        ttft_p50_s=0.5,
        ttft_p99_s=2.0,
        itl_p50_s=0.0175,
        itl_p99_s=0.02,
        e2e_mean_s=4.0,
    )
    over = curve.CurvePoint(
        concurrency=64, rps=18, ttft_p50_s=1, ttft_p99_s=3, itl_p50_s=0.02, itl_p99_s=0.03
    )
    best = curve.c_max(curve.Curve(points=(point, over), source="benchmark"), ttft_p99_s=2.0)
    instances = cost.instances_needed(120, usable_rps=best.rps, safety=1.3)
    calm = cost.instances_needed(120, usable_rps=best.rps, safety=1.2)
    shed = limits.shed_depth(wait_s=2, drain_rps=instances * best.rps, prefill_p99_s=0.5)

    assert kv_bytes / GB == pytest.approx(18.87, rel=PERCENT)
    assert native.total_bytes / GB == pytest.approx(201.9, rel=PERCENT)
    assert native.gpus_min == 3
    assert parallel.round_up_tp(native.gpus_min, r70(), gpus_max=8) == 4
    assert fp8_kv / GB == pytest.approx(9.44, rel=PERCENT)
    assert (eight.total_bytes / GB, eight.gpus_min) == (pytest.approx(122.4, rel=PERCENT), 2)
    assert (mixed.total_bytes / GB, mixed.gpus_min) == (pytest.approx(131.9, rel=PERCENT), 2)
    assert tp == 2
    assert eight.total_bytes / (2 * GPU) == pytest.approx(0.765, rel=PERCENT)
    assert eight.fits(2, headroom=1.3)
    assert not eight.fits(2, headroom=1.5)  # 183.7 GB: forces 4
    assert eight.fits(4, headroom=1.5)
    assert (best.concurrency, best.rps / 4) == (48, 3.0)
    assert instances == 13
    assert cost.fleet_gpus(instances, tp=4) == 52
    nodes = cost.nodes_needed(instances, tp=4, gpus_per_node=8)
    assert (nodes, nodes * 8 - 52) == (7, 4)
    assert (cost.fleet_gpus(calm, tp=4), cost.nodes_needed(calm, tp=4, gpus_per_node=8)) == (48, 6)
    assert not cost.evaluate_routing(fleet_gpus_=52, skew_measured=False)
    assert cost.evaluate_routing(fleet_gpus_=52, skew_measured=True)
    assert resize(ttft_p99_s=2.61, benchmark_ttft_p99_s=2.0)
    assert not resize(ttft_p99_s=2.6, benchmark_ttft_p99_s=2.0)
    assert limits.input_cap_tokens(1000) == (2000, 3000)
    assert (shed.limit, shed.trip_low, shed.trip_high) == (234.0, 187, 210)
