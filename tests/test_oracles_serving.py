"""The serving laws reproduce what the techniques' oracles say, and the advisors their rules."""

import pytest

from oracle_table import PERCENT, Oracle, agrees, contradicts_source, ids
from shapes import m7, r70
from tierline.base.units import GB, GIB
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS
from tierline.perf import advice, memory, parallel, quantization, roofline, speculation, transfer

BF16 = KV_FORMATS["bf16"]
KV_TOKEN = 327_680
KV_4K = 4096 * KV_TOKEN
H100, A100 = 3.35e12, 2.0e12
P70 = 70e9
LENGTHS = (4096, 32_768, 131_072)
FIGURE = ((0.03, 0.01, 0.09), (0.02, 15.2, 0.04), (0.05, 0.02, 0.01))
TENSOR = [value for row in FIGURE for value in row]
ALPHAS = (0, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
FIGURE_4K = {"wide_bytes": 140e9, "kv_sequence_bytes": KV_4K}


def kv(model, tokens, tp=1):
    return memory.kv_bytes(model, tokens, BF16, tp=tp)


def kv_row(model):
    return (memory.kv_bytes_per_token(model, BF16), *(kv(model, n) / GB for n in LENGTHS))


def fits(tokens, pool=180e9):
    return memory.sequences_that_fit(r70(), BF16, pool_bytes=pool, sequence_tokens=tokens)


def tokens_in(pool_bytes):
    return memory.kv_pool_tokens(pool_bytes, bytes_per_token=KV_TOKEN)


def decode_ms(batch):
    return 1e3 * roofline.decode_step_s(
        weights_bytes=140e9, kv_sequence_bytes=KV_4K, batch=batch, bytes_per_s=4 * H100
    )


def speedups(draft_cost):
    return tuple(speculation.speedup(a, 5, draft_cost=draft_cost) for a in ALPHAS)


def sent_ms(gigabits):
    rate = transfer.line_rate_bytes_per_s(gigabits)
    return 1e3 * transfer.transfer_s(kv(r70(), 4000), bytes_per_s=rate)


def packed_over_half():
    """What INT8 in flight adds to half the bytes; a scale for the 128 elements of a head."""
    whole = kv(r70(), 4000)
    packed = quantization.packed_bits(8, group=128)
    sent = transfer.in_flight_bytes(whole, kv_bits=16, wire_bits=packed)
    return (sent / whole, sent_ms(10) * sent / whole)


def piped(prefill_s, sent_s):
    return transfer.pipelined_s(prefill_s, sent_s, layers=80)


def packed_gb(bits, group, zero_bits=0):
    return P70 * quantization.packed_bits(bits, group=group, zero_bits=zero_bits) / 8 / GB


def gains(narrow_gb):
    return tuple(
        quantization.end_to_end_speedup(narrow_bytes=narrow_gb * GB, batch=b, **FIGURE_4K)
        for b in (1, 32, 64)
    )


def batch_of(gain, narrow_gb=35):
    return quantization.batch_at_speedup(gain, narrow_bytes=narrow_gb * GB, **FIGURE_4K)


def ceiling_ms(bandwidth):
    return tuple(
        1e3 / roofline.decode_ceiling_tokens_per_s(g * GB, bytes_per_s=bandwidth)
        for g in (140, 70, 35)
    )


def scale_and_error(values, bits=4):
    code = quantization.quantize(values, bits=bits)
    return (code.scale, quantization.error_max(values, code))


def pools():
    prefill = 4000 / roofline.nominal_prefill_s(P70, 4000, flops_per_s=4 * 989e12, mfu=0.5)
    step_s = decode_ms(64) / 1e3
    return transfer.pools(
        rps=10,
        input_tokens=4000,
        output_tokens=300,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=64 / step_s,
        step_s=step_s,
    )


def blocks(tokens):
    return memory.blocks_of(tokens, block_tokens=16)


ATTENTION = [
    Oracle(
        id="S1-MHA",
        formula="2 x 80 x 64 x 128 x 2; GB at 4K, 32K, 128K",
        law=lambda: kv_row(r70(64)),
        want=(2_621_440, 10.737, 85.90, 343.6),
        relative=0.001,
    ),
    Oracle(
        id="S1-GQA",
        formula="8 KV heads",
        law=lambda: kv_row(r70()),
        want=(327_680, 1.342, 10.74, 42.95),
        relative=0.001,
    ),
    Oracle(
        id="S1-MQA",
        formula="1 KV head",
        law=lambda: kv_row(r70(1)),
        want=(40_960, 0.1678, 1.342, 5.37),
        relative=0.001,
    ),
    Oracle(
        id="S1-M7",
        formula="2 x 32 x 8 x 128 x 2, no window; GiB at 4K, 32K, 128K",
        law=lambda: (
            memory.kv_bytes_per_token(m7(None), BF16),
            *(kv(m7(None), n) / GIB for n in LENGTHS),
        ),
        want=(131_072, 0.5, 4, 16),
    ),
    Oracle(
        id="S1-window",
        formula="min(W, n) tokens, W = 4,096; MiB",
        law=lambda: tuple(kv(m7(), n) / 2**20 for n in LENGTHS),
        want=(512, 512, 512),
    ),
    Oracle(
        id="S1-50-users",
        formula="50 x MHA at 32K, TB",
        law=lambda: 50 * kv(r70(64), 32_768) / 1e12,
        want=4.295,
        relative=0.001,
    ),
    Oracle(
        id="S1-TP8-TP16",
        formula="B/token on a GPU at TP8, TP16; of the group at TP16",
        law=lambda: (
            memory.kv_bytes_per_gpu(r70(), 1, BF16, tp=8),
            memory.kv_bytes_per_gpu(r70(), 1, BF16, tp=16),
            kv(r70(), 1, tp=16),
        ),
        want=(40_960, 40_960, 655_360),
    ),
    Oracle(
        id="S1-legal",
        formula="copies of a KV head, 64 / 8 heads, TP 2, 8, 16, 3",
        law=lambda: " ".join(str(parallel.kv_copies(64, 8, t)) for t in (2, 8, 16, 3)),
        want="1 1 2 None",
    ),
    Oracle(
        id="S1-ERR-min-8",
        formula="lowest clean TP of 64 / 8 heads",
        law=lambda: r70().legal_tp(8)[0],
        want=1,
        source_said=8,
        erratum="KV heads are the most ranks without copies, not the fewest",
    ),
    Oracle(
        id="S1-ERR-64-MHA",
        formula="lowest TP of MHA that fits 140 GB on 80 GB",
        law=lambda: parallel.lowest_tp(
            r70(64), total_bytes=140e9, gpu_memory_bytes=80e9, gpus_per_node=8
        ),
        want=2,
        source_said=64,
        erratum="same",
    ),
    Oracle(
        id="S1-host-GQA",
        formula="R70 4K over 32, 64 GB/s, ms",
        law=lambda: tuple(1e3 * roofline.kv_read_s(KV_4K, bytes_per_s=b) for b in (32e9, 64e9)),
        want=(41.9, 21.0),
        relative=0.002,
    ),
    Oracle(
        id="S1-host-32K",
        formula="R70 32K, MHA 4K over 32 GB/s, ms",
        law=lambda: (
            1e3 * roofline.kv_read_s(kv(r70(), 32_768), bytes_per_s=32e9),
            1e3 * roofline.kv_read_s(kv(r70(64), 4096), bytes_per_s=32e9),
        ),
        want=(335.5, 335.5),
        relative=0.001,
    ),
    Oracle(
        id="S1-equal-weights",
        formula="tokens of one request whose KV is 140e9 B: MHA, GQA",
        law=lambda: tuple(
            roofline.batch_where_kv_equals_weights(weights_bytes=140e9, kv_sequence_bytes=b)
            for b in (2_621_440, KV_TOKEN)
        ),
        want=(53_406, 427_246),
        relative=1e-5,
    ),
    Oracle(
        id="S1-ERR-128K",
        formula="GQA requests of 128K over 140 GB",
        law=lambda: memory.sequences_to_outweigh(140e9, sequence_bytes=kv(r70(), 131_072)),
        want=4,
        source_said=1,
        erratum="one is enough for MHA alone",
    ),
]

CACHE = [
    Oracle(
        id="S2-128K",
        formula="131,072 tokens, GiB; of 80 GiB",
        law=lambda: (kv(r70(), 131_072) / GIB, kv(r70(), 131_072) / (80 * GIB)),
        want=(40.0, 0.5),
    ),
    Oracle(
        id="S2-ERR-half",
        formula="of 80e9 bytes",
        law=lambda: kv(r70(), 131_072) / 80e9,
        want=0.537,
        relative=0.001,
        source_said=0.5,
        erratum="half of 80 GiB, not of 80 GB",
    ),
    Oracle(
        id="S2-admits",
        formula="4 x 80 - 140 GB at 4K, 8K, 16K, 32K",
        law=lambda: tuple(fits(n) for n in (4096, 8192, 16_384, 32_768)),
        want=(134, 67, 33, 16),
    ),
    Oracle(
        id="S2-pool",
        formula="45 GB, 20 GB in tokens",
        law=lambda: (tokens_in(45e9), tokens_in(20e9)),
        want=(137_329, 61_035),
    ),
]

PAGING = [
    Oracle(
        id="S3-150",
        formula="blocks, wasted slots of 150 tokens",
        law=lambda: (blocks(150), memory.block_waste_tokens(150, block_tokens=16)),
        want=(10, 10),
    ),
    Oracle(
        id="S3-block",
        formula="16 tokens of R70, M7, MiB",
        law=lambda: (kv(r70(), 16) / 2**20, kv(m7(), 16) / 2**20),
        want=(5, 2),
    ),
    Oracle(
        id="S3-shared",
        formula="5 samples of 500 + 100: apart, shared full blocks",
        law=lambda: (5 * blocks(600), 500 // 16 + 5 * (blocks(600) - 500 // 16)),
        want=(190, 66),
    ),
    Oracle(
        id="S3-table",
        formula="131,072 tokens in blocks of 16, 4",
        law=lambda: (blocks(131_072), memory.blocks_of(131_072, block_tokens=4)),
        want=(8192, 32_768),
    ),
]

PHASES = [
    Oracle(
        id="S4-prefill",
        formula="2 x 70e9 x 4,000 / (4 x 989e12 x .5), ms",
        law=lambda: 1e3 * roofline.nominal_prefill_s(P70, 4000, flops_per_s=4 * 989e12, mfu=0.5),
        want=283,
        relative=0.002,
    ),
    Oracle(
        id="S4-pages",
        formula="50 pages of 500 words at .75 a token on 4 x A100, s",
        law=lambda: roofline.nominal_prefill_s(P70, 33_333, flops_per_s=4 * 312e12, mfu=0.5),
        want=7.5,
        relative=PERCENT,
    ),
    Oracle(
        id="S4-step",
        formula="(140 GB + n KV) / 4 H100, n = 1, 32, 64, 128, ms",
        law=lambda: tuple(decode_ms(n) for n in (1, 32, 64, 128)),
        want=(10.55, 13.65, 16.86, 23.27),
        relative=0.001,
    ),
    Oracle(
        id="S4-rate",
        formula="n / step, tokens/s",
        law=lambda: tuple(1e3 * n / decode_ms(n) for n in (1, 32, 64, 128)),
        want=(95, 2344, 3796, 5501),
        relative=0.003,
    ),
    Oracle(
        id="S4-104",
        formula="140 GB / KV at 4K",
        law=lambda: roofline.batch_where_kv_equals_weights(
            weights_bytes=140e9, kv_sequence_bytes=KV_4K
        ),
        want=104,
        relative=0.005,
    ),
    Oracle(
        id="S4-ERR-split",
        formula="step at batch 32 over step at batch 1",
        law=lambda: decode_ms(32) / decode_ms(1),
        want=1.294,
        relative=0.001,
        source_said=32,
        erratum="a batch shares the weight reads",
    ),
]

SPECULATION = [
    Oracle(
        id="S5-E",
        formula="(1 - a^6) / (1 - a), a = 0 ... 1",
        law=lambda: tuple(speculation.tokens_per_pass(a, 5) for a in ALPHAS),
        want=(1, 1.2499, 1.4275, 1.9688, 2.3834, 2.9412, 3.6893, 4.6856, 6),
        relative=1e-4,
    ),
    Oracle(
        id="S5-c05",
        formula="E / (1 + 5 x .05)",
        law=lambda: speedups(0.05),
        want=(0.80, 1.00, 1.142, 1.575, 1.907, 2.353, 2.951, 3.749, 4.80),
        relative=0.001,
    ),
    Oracle(
        id="S5-c10",
        formula="E / (1 + 5 x .1)",
        law=lambda: speedups(0.1),
        want=(0.667, 0.833, 0.952, 1.313, 1.589, 1.961, 2.460, 3.124, 4.00),
        relative=0.001,
    ),
    Oracle(
        id="S5-ERR-115",
        formula="100 + 5 x 5 ms; 3 tokens, with the correction 4",
        law=lambda: tuple(
            speculation.speedup_by_ratio(accepted / 5, 5, draft_cost=0.05) for accepted in (2, 3)
        ),
        want=(2.4, 3.2),
        source_said=(3 * 100 / 115, None),
        erratum="five drafts cost 125 ms",
    ),
    Oracle(
        id="S5-ERR-ratio",
        formula="(1 + .2 x 5) / (1 + 5 x .05)",
        law=lambda: speculation.speedup_by_ratio(0.2, 5, draft_cost=0.05),
        want=1.6,
        source_said=1.0,
        erratum="acceptance .2 breaks even for independent positions alone",
    ),
    Oracle(
        id="S5-ratio-even",
        formula="(1 + c K) / (1 + K c)",
        law=lambda: speculation.speedup_by_ratio(0.05, 5, draft_cost=0.05),
        want=1.0,
    ),
    Oracle(
        id="S5-even",
        formula="a where E = 1 + K c",
        law=lambda: speculation.break_even_acceptance(5, draft_cost=0.05),
        want=0.20005,
        relative=1e-4,
    ),
    Oracle(
        id="S5-int4",
        formula="a = .95, c = .25",
        law=lambda: speculation.speedup(0.95, 5, draft_cost=0.25),
        want=2.355,
        relative=0.001,
    ),
    Oracle(
        id="S5-best",
        formula="best K at a = .2, .5, .6, .8, .9",
        law=lambda: tuple(
            speculation.best_draft_tokens(a, draft_cost=0.05) for a in (0.2, 0.5, 0.6, 0.8, 0.9)
        ),
        want=(1, 3, 4, 8, 13),
    ),
    Oracle(
        id="S5-best-gain",
        formula="its speedup at a = .2, .5, .8, .9",
        law=lambda: tuple(
            speculation.speedup(a, k, draft_cost=0.05)
            for a, k in ((0.2, 1), (0.5, 3), (0.8, 8), (0.9, 13))
        ),
        want=(1.143, 1.630, 3.092, 4.674),
        relative=0.001,
    ),
    Oracle(
        id="S5-batch",
        formula="ridge / (K + 1): H100, A100",
        law=lambda: (
            speculation.batch_crossover(5, flops_per_s=989e12, bytes_per_s=H100),
            speculation.batch_crossover(5, flops_per_s=312e12, bytes_per_s=A100),
        ),
        want=(49, 26),
    ),
    Oracle(
        id="S5-vram",
        formula="35 GB, 2 GB in KV tokens",
        law=lambda: tuple(
            speculation.draft_kv_tokens(b, kv_bytes_per_token=KV_TOKEN) for b in (35e9, 2e9)
        ),
        want=(106_811, 6_103),
    ),
]

DISAGGREGATION = [
    Oracle(
        id="S6-kv",
        formula="4,000 tokens GQA, MHA, GB",
        law=lambda: (kv(r70(), 4000) / GB, kv(r70(64), 4000) / GB),
        want=(1.311, 10.486),
        relative=0.001,
    ),
    Oracle(
        id="S6-links",
        formula="1.311 GB over 10, 25, 100, 400 Gb/s, 450 GB/s, ms",
        law=lambda: tuple(sent_ms(g) for g in (10, 25, 100, 400, 3600)),
        want=(1049, 419, 104.9, 26.2, 2.9),
        relative=0.005,
    ),
    Oracle(
        id="S6-int8",
        formula="INT8 in flight: share of the bytes, over 10 Gb/s, ms",
        law=packed_over_half,
        want=(0.5078, 532.5),
        relative=0.001,
    ),
    Oracle(
        id="S6-pipeline",
        formula="p + x + 79 max(p, x), s",
        law=lambda: (piped(0.400, 0.105), piped(0.400, 0.419), piped(0.283, 1.049)),
        want=(0.4013, 0.424, 1.052),
        relative=0.001,
    ),
    Oracle(
        id="S6-exposed",
        formula="total - prefill, ms",
        law=lambda: 1e3 * transfer.exposed_s(0.400, 0.105, layers=80),
        want=1.3,
        relative=PERCENT,
    ),
    Oracle(
        id="S6-pools",
        formula="10 rps, 4,000 / 300: prefill, decode, decoding",
        law=lambda: (pools().prefill, pools().decode, pools().decoding),
        want=(2.83, 0.79, 50.6),
        relative=0.005,
    ),
    Oracle(
        id="S6-instances",
        formula="whole instances",
        law=lambda: (pools().prefill_instances, pools().decode_instances),
        want=(3, 1),
    ),
    Oracle(
        id="S6-restore",
        formula="a token over 25, 12.5, 5 GB/s, us",
        law=lambda: tuple(
            1e6 * transfer.restore_s_per_token(KV_TOKEN, bytes_per_s=b) for b in (25e9, 12.5e9, 5e9)
        ),
        want=(13.1, 26.2, 65.5),
        relative=0.002,
    ),
    Oracle(
        id="S6-recompute",
        formula="2 x 70e9 / (4 x 989e12 x .5), us",
        law=lambda: 1e6 * transfer.recompute_s_per_token(P70, flops_per_s=4 * 989e12, mfu=0.5),
        want=70.8,
        relative=0.001,
    ),
]

QUANTIZATION = [
    Oracle(
        id="S8-70B",
        formula="bits / 8 x 70e9 at 16, 8, 4, GB",
        law=lambda: tuple(
            memory.nominal_weight_bytes(P70, WEIGHT_FORMATS[f]) / GB
            for f in ("bf16", "int8", "int4-g128")
        ),
        want=(140, 70, 35),
    ),
    Oracle(
        id="S8-groups",
        formula="4 bits g128, g64, with zeros both; 8 bits g128, GB",
        law=lambda: (
            packed_gb(4, 128),
            packed_gb(4, 64),
            packed_gb(4, 128, 4),
            packed_gb(4, 64, 4),
            packed_gb(8, 128),
        ),
        want=(36.09, 37.19, 36.37, 37.73, 71.09),
        relative=0.001,
    ),
    Oracle(
        id="S8-ERR-45",
        formula="80 - 4.125 bits, in KV tokens",
        law=lambda: tokens_in(80e9 - packed_gb(4, 128) * GB),
        want=133_972,
        relative=2e-4,
        source_said=137_329,
        erratum="scales left out",
    ),
    Oracle(
        id="S8-TP2",
        formula="2 x 80 x .9 - 140 GB; requests of 4K",
        law=lambda: ((0.9 * 160e9 - 140e9) / GB, fits(4096, 0.9 * 160e9 - 140e9)),
        want=(4.0, 2),
    ),
    Oracle(
        id="S8-TP4",
        formula="4 x 80 x .9 - 140 GB, requests of 4K",
        law=lambda: fits(4096, 0.9 * 320e9 - 140e9),
        want=110,
    ),
    Oracle(
        id="S8-H100",
        formula="140, 70, 35 GB over 3.35 TB/s, ms",
        law=lambda: ceiling_ms(H100),
        want=(41.8, 20.9, 10.4),
        relative=0.005,
    ),
    Oracle(
        id="S8-A100", formula="over 2.0 TB/s, ms", law=lambda: ceiling_ms(A100), want=(70, 35, 17.5)
    ),
    Oracle(
        id="S8-W4",
        formula="(140 + n KV) / (35 + n KV), n = 1, 32, 64",
        law=lambda: gains(35),
        want=(3.89, 2.35, 1.87),
        relative=0.002,
    ),
    Oracle(
        id="S8-W8",
        formula="(140 + n KV) / (70 + n KV)",
        law=lambda: gains(70),
        want=(1.98, 1.62, 1.45),
        relative=0.003,
    ),
    Oracle(
        id="S8-batch-W4",
        formula="batch where W4 gives 2.5x",
        law=lambda: batch_of(2.5),
        want=26,
        relative=0.02,
    ),
    Oracle(
        id="S8-batch-W8",
        formula="batch where W8 gives 1.5x",
        law=lambda: batch_of(1.5, 70),
        want=52,
        relative=0.02,
    ),
    Oracle(
        id="S8-tensor",
        formula="INT4 of the figure, one scale: scale, error",
        law=lambda: scale_and_error(TENSOR),
        want=(1.01267, 0.08),
        relative=1e-5,
    ),
    Oracle(
        id="S8-rows",
        formula="a scale a row: scales, errors",
        law=lambda: tuple(x for row in FIGURE for x in scale_and_error(row)),
        want=(0.005333, 0.00133, 1.012, 0.02, 0.002667, 0.00067),
        relative=0.006,
    ),
    Oracle(
        id="S8-zeros",
        formula="codes of everything but the outlier",
        law=lambda: sum(quantization.quantize(TENSOR, bits=4).codes),
        want=15,
    ),
    Oracle(
        id="S8-int8",
        formula="INT8 scale of the figure",
        law=lambda: scale_and_error(TENSOR, bits=8)[0],
        want=0.05957,
        relative=1e-4,
    ),
]

GROUPS = {
    "Attention": ATTENTION,
    "KV cache (serving)": CACHE,
    "Paged attention": PAGING,
    "Prefill and decode": PHASES,
    "Speculative decoding": SPECULATION,
    "Disaggregated inference": DISAGGREGATION,
    "Quantization": QUANTIZATION,
}
ORACLES = [oracle for group in GROUPS.values() for oracle in group]
KNOWN_BAD = [oracle for oracle in ORACLES if oracle.source_said is not None]


@pytest.mark.parametrize("oracle", ORACLES, ids=ids(ORACLES))
def test_oracle(oracle):
    assert agrees(oracle), (oracle.formula, oracle.law(), oracle.want)


@pytest.mark.parametrize("oracle", KNOWN_BAD, ids=ids(KNOWN_BAD))
def test_known_bad_figure_is_not_reproduced(oracle):
    assert contradicts_source(oracle), (oracle.law(), oracle.source_said)


def test_forgetting_replication_is_caught(monkeypatch):
    monkeypatch.setattr(memory, "kv_bytes", lambda m, n, f, *, tp=1: n * KV_TOKEN)
    caught = [o.id for o in ATTENTION if not agrees(o)]

    assert {"S1-TP8-TP16", "S1-window", "S1-M7"} <= set(caught)


def split(**changes):
    facts = {
        "models": 1,
        "concurrency": 200,
        "input_tokens": 4000,
        "output_tokens": 300,
        "exposed_transfer_s": 0.0013,
        "ttft_slack_s": 0.5,
        "interference_share": 0.8,
        "fast_fabric": True,
    }
    return transfer.disaggregation_advice(**(facts | changes))


def drafted(**changes):
    facts = {"acceptance": 0.7, "draft_tokens": 5, "draft_cost": 0.05, "batch": 8, "crossover": 49}
    return speculation.speculation_advice(**(facts | changes))


def shared(model, *, reasoning=False, long=False):
    return advice.head_sharing_advice(model, multi_step_reasoning=reasoning, long_context=long)


def window(task):
    return advice.window_advice(task, window_tokens=4096, context_tokens=32_768)


def host(interactive):
    return advice.host_kv_advice(interactive=interactive, read_s=0.0419, itl_limit_s=0.03)


def paging(concurrency, *, mixed):
    return advice.paging_advice(
        concurrency=concurrency, mixed_lengths=mixed, parallel_samples=False
    )


def precision(situation, generation="Hopper"):
    return quantization.precision_advice(situation, generation=generation)


def method(use, generation="Hopper", tasks=()):
    return quantization.method_advice(use, generation=generation, tasks=tasks)


DECISIONS = {
    "S1-window-chat": (lambda: window("chat"), "use"),
    "S1-window-documents": (lambda: window("cross-document"), "refuse"),
    "S1-mqa-reasoning": (lambda: shared(r70(1), reasoning=True), "warn"),
    "S1-mha-long": (lambda: shared(r70(64), long=True), "raise bandwidth"),
    "S1-gqa": (lambda: shared(r70(), reasoning=True, long=True), "fine"),
    "S1-context-32K": (lambda: advice.context_parallel_advice(32_768), "no"),
    "S1-context-128K": (lambda: advice.context_parallel_advice(131_072), "consider"),
    "S1-host-kv-chat": (lambda: host(interactive=True), "reject"),
    "S1-host-kv-batch": (lambda: host(interactive=False), "allow"),
    "S2-occupancy-90": (lambda: advice.occupancy_advice(0.90), "scale out or shed"),
    "S2-occupancy-80": (lambda: advice.occupancy_advice(0.80), "fine"),
    "S3-one-user": (lambda: paging(1, mixed=True), "adds little"),
    "S3-many-users": (lambda: paging(36, mixed=True), "require"),
    "S4-ttft": (lambda: advice.diagnose("TTFT high"), "prompt work"),
    "S4-joins": (lambda: advice.diagnose("stalls when others join"), "prefill interference"),
    "S4-autoscale-kv": (lambda: advice.autoscale_signal("kv occupancy"), "use"),
    "S4-autoscale-gpu": (lambda: advice.autoscale_signal("gpu load"), "reject"),
    "S4-tiny-prompts": (
        lambda: advice.benchmark_advice(10, traffic_tokens_median=1000),
        "discard",
    ),
    "S5-good": (lambda: drafted(), "on"),
    "S5-poor": (lambda: drafted(acceptance=0.1), "off"),
    "S5-batch-128": (lambda: drafted(batch=128), "off"),
    "S6-three-users": (lambda: split(concurrency=3), "overkill"),
    "S6-interference": (lambda: split(), "split"),
    "S6-short-prompts": (lambda: split(input_tokens=200), "colocate"),
    "S6-slow-link": (lambda: split(exposed_transfer_s=0.769, ttft_slack_s=0.5), "colocate"),
    "S8-hopper": (lambda: precision("standard"), "FP8 weights + FP8 KV"),
    "S8-ampere": (lambda: precision("standard", "Ampere"), "INT8 weights + INT8 KV"),
    "S8-long-blackwell": (lambda: precision("long-context", "Blackwell"), "NVFP4 KV"),
    "S8-long-hopper": (lambda: precision("long-context"), "FP8 KV"),
    "S8-quality": (lambda: precision("quality-first"), "BF16"),
    "S8-chat": (lambda: method("latency-chat"), "W4A16"),
    "S8-medical": (lambda: method("medical"), "fp16"),
    "S8-batch-ampere": (lambda: method("batch-summarization", "Ampere"), "W8A8"),
    "S8-batch-ada": (lambda: method("batch-summarization", "Ada"), "FP8"),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_decision(name):
    decide, verdict = DECISIONS[name]
    said = decide()

    assert said.verdict == verdict
    assert all(said.reasons)


def test_threshold_and_law_stand_side_by_side():
    """Acceptance .3 gains 14 % by the law, and the usual threshold would turn it off."""
    said = drafted(acceptance=0.3)

    assert (said.verdict, said.rule) == ("on", "off")
    assert said.rule_disagrees


def test_hysteresis_keeps_what_runs():
    assert drafted(acceptance=0.55, running=True).rule == "on"
    assert drafted(acceptance=0.55, running=False).rule == "off"


def test_ratio_rule_is_printed_beside_the_measured_interference():
    assert split().rule == "overkill"
    assert split(input_tokens=600, output_tokens=3000, interference_share=0.2).rule == "split"
    assert split(input_tokens=600, output_tokens=3000, interference_share=0.2).rule_disagrees


def test_every_precision_but_the_widest_asks_for_a_long_context_evaluation():
    for situation in quantization.SITUATIONS:
        gates = precision(situation).gates

        assert (quantization.LONG_CONTEXT_GATE in gates) == (situation != "quality-first")


def test_strict_tasks_on_four_bits_ask_for_task_tests():
    assert "code" in method("latency-chat", tasks=["code"]).gates[0]
    assert method("latency-chat", tasks=["chat"]).gates == ()
