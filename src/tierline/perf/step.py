"""What one step of an instance costs, in seconds: the law that everything else calls.

The planner prices candidates with it, the simulator prices every step, and admission
control predicts a first token. There is no second cost model.

One step advances n decoding sequences by a token each (their cached tokens sum to S) and
computes c prompt tokens. With N = n + c tokens, an instance of TP x PP x DP accelerators
takes

    T = layers(N) + sequences(n) + cache(S, n) + prefill(c, pairs)

    layers     attention projections, dense and shared FFN, routed experts: each a soft
               roofline R(flops, bytes; p) = (x^p + y^p)^(1/p) of computing and of reading
               weights; collectives; activation traffic; fixed time per layer and step, more in
               a layer that first picks the tokens it attends to
    sequences  the LM head and the host's work for every sequence
    cache      reading the KV cache, windows and recurrent states included
    prefill    attention among prompt tokens: `pairs` is the sum over chunks of
               chunk x (past + chunk / 2), the query-key pairs that must be scored; and a fixed
               time per layer, because prompts run as single kernels and not as one graph

`layers` depends on N alone and `sequences` on n alone, so both are tables; the rest is
linear in S. One step is two list look-ups and a few products, and k decode steps in a row
have a closed form (`decode_run_s`), which is what lets a simulator skip ahead. The whole
formula, without tables, is `formula_s`.

Experts: N tokens that pick k of E experts touch E (1 - (1 - k/E)^N) of them, and only
those are read. Grouped products overlap poorly, so computing, reading weights, and moving
the rows that were gathered for the experts add up: one rate then serves 8 large experts
and 500 small ones, and few rows per expert run slowly without a constant that says so.

Sources: roofline, touched experts and collectives are textbook forms; the constants in
`data/rates.toml` come from fits that `tools/fit_rates.py` repeats. Left out because the
measurements do not resolve them: overlap of communication with math, and kernel choice.
"""

import copy
import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from statistics import NormalDist
from typing import Any

from tierline.catalog.formats import (
    ATTENTION_STAYS_16_BIT_UNDER_BITS,
    Format,
    kv_format,
    weight_format,
)
from tierline.catalog.gpu import GpuSpec, Reached
from tierline.catalog.gpus import math_flops_per_s
from tierline.catalog.model import AttentionGroup, FfnGroup, ModelSpec
from tierline.perf.evidence import Evidence
from tierline.perf.memory import kv_bytes_per_gpu

DENSE_P = 1.5  # sharpness of the soft roofline of dense products
EXPERT_MOVES = 3  # gather, activate, scatter: how often a row of an expert crosses memory
ACTIVATION_BYTES_PER_HIDDEN = 12  # read and written between the kernels of one layer
TOKENS_MAX = 32_768  # of one step
SEQUENCES_MAX = 4_096
FINE_TOKENS = 512  # the table holds every count up to here, and one in COARSE above
COARSE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one instance is cut over accelerators and in which formats it holds its numbers."""

    weights: str  # weight format
    kv: str  # KV-cache format
    tp: int = 1
    pp: int = 1
    dp: int = 1  # attention data parallelism inside the instance (experts stay shared)
    ep: int = 1  # ranks over which whole experts are spread; 1: experts are cut by TP

    @property
    def gpus(self) -> int:
        """Accelerators of one instance."""
        return self.tp * self.dp * self.pp

    def __str__(self) -> str:
        parts = [f"TP{self.tp}"]
        parts += [f"PP{self.pp}"] if self.pp > 1 else []
        parts += [f"DP{self.dp}"] if self.dp > 1 else []
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        return f"{'·'.join(parts)} {self.weights}/{self.kv}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What an accelerator reaches of its datasheet, and what a step costs beside the math."""

    memory: float  # of the memory rate, reading weights
    cache: float  # of the memory rate, reading KV
    dense: Mapping[str, float]  # of the math rate, by math format
    expert: Mapping[str, float]  # the same of expert products, by weight or math format
    attention: float  # of the bf16 rate, scoring prompt tokens
    layer_dense_us: float  # fixed time of one layer: launches, norms, gaps
    layer_moe_us: float
    layer_mla_us: float
    collective: float  # multiplies the collective's time
    step_ms: float
    sequence_us: float
    prefill_ms: float
    evidence: Evidence
    layer_fused_us: float = 0.0  # of a MoE layer whose routing and products are few kernels
    layer_sparse_us: float = 0.0  # more in a layer that picks the tokens it attends to
    prefill_layer_us: float = 0.0  # of a step with prompt tokens: kernels launched one by one
    prefill_mla_us: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """How an engine spends time outside the step: which version this imitates is in `source`."""

    name: str
    host_s: float  # added to every first token: tokenise, schedule, stream
    wait_steps: float  # a request is seen after U(0, wait_steps) steps
    mixes_prefill: bool  # prompt chunks share a step with decodes
    batch_tokens: int  # tokens of one step
    source: str


def soft_roofline(x: Any, y: Any, p: float) -> Any:
    """(x^p + y^p)^(1/p): near max(x, y), with overlap lost where the two are alike."""
    return (x**p + y**p) ** (1 / p)


@functools.cache
def _rates_file() -> Mapping[str, Any]:
    text = resources.files("tierline.perf").joinpath("data/rates.toml").read_text("utf-8")
    return tomllib.loads(text)


def load_rates(gpu: GpuSpec) -> Rates:
    """Rates of `gpu`: measured by itself, else its own fit, else its generation's, else generic
    ones over the datasheet."""
    table = _rates_file()
    if gpu.reached is not None:
        return _rates_reached(gpu.reached)
    entry = dict(table["generic"])
    chosen = "generic"
    for key in (gpu.generation.casefold(), gpu.name):
        if key in table["rates"]:
            entry |= table["rates"][key]
            chosen = key
    band = table["band"][entry.pop("band")]
    evidence = Evidence(
        kind=band["kind"],
        source=f"rates.toml [{chosen}]: {entry.pop('source')}",
        low=band["low"],
        high=band["high"],
    )
    return Rates(**entry, evidence=evidence)


def _rates_reached(reached: Reached) -> Rates:
    """Rates of a machine that measured itself: every kind of layer has the one fixed time."""
    layer_us = reached.layer_us
    return Rates(
        memory=reached.memory,
        cache=reached.cache,
        dense=reached.dense,
        expert=reached.dense,
        attention=reached.attention,
        layer_dense_us=layer_us,
        layer_moe_us=layer_us,
        layer_mla_us=layer_us,
        layer_fused_us=layer_us,
        collective=_rates_file()["generic"]["collective"],
        step_ms=reached.step_us * 1e-3,
        sequence_us=reached.sequence_us,
        prefill_ms=reached.prompt_us * 1e-3,
        prefill_layer_us=reached.prompt_layer_us,
        prefill_mla_us=reached.prompt_layer_us,
        evidence=Evidence(kind="fitted", source=reached.source, low=reached.low, high=reached.high),
    )


def load_engine(name: str) -> EngineProfile:
    """The profile of an engine; raises `KeyError` for a name that is not in `engine_names`."""
    return EngineProfile(name=name, **_rates_file()["engine"][name])


def fitted_groups() -> frozenset[str]:
    """Architecture | accelerator | engine of everything that the constants were fitted to."""
    return frozenset(_rates_file()["fitted"]["groups"])


def engine_names() -> list[str]:
    """Engines that have a profile."""
    return sorted(_rates_file()["engine"])


def collective_s(gpu: GpuSpec, *, gpus: int, payload_bytes: float, factor: float = 1.0) -> float:
    """Seconds of one all-reduce of `payload_bytes` over `gpus` accelerators of one domain.

    A latency that grows with the ring plus 2 (G-1)/G of the payload over the link at 75 %
    of its rate. Two accelerators of a full mesh see one link, not all of them.
    """
    if gpus <= 1:
        return 0.0
    up = gpu.scale_up
    inside = gpus <= up.domain_gpus
    if not inside:
        link, latency_s = gpu.network.read_bytes_per_s, 20e-6 + 2e-6 * gpus
    elif up.kind == "pcie" or up.kind == "none":
        link, latency_s = up.bytes_per_s * 0.6, 8e-6 + 3e-6 * gpus  # no peer access: host bounce
    else:
        link = min(up.bytes_per_s, up.pair_bytes_per_s * (gpus - 1))
        latency_s = (3e-6 + 0.8e-6 * gpus) * (1.3 if up.bytes_per_s > 600e9 else 1.0)
    return factor * (latency_s + 2 * (gpus - 1) / gpus * payload_bytes / (0.75 * link))


def expert_skew(assignments: Any, *, ranks: int) -> Any:
    """Load of the fullest of `ranks` over the mean, when assignments fall on them at random.

    Blom's normal score of the largest of `ranks` counts, with the first skewness term;
    within 5 % of simulation from about four assignments a rank, capped at `ranks` below.
    Each count varies by less than its mean and they repel; the two cancel for the largest.
    Real routers are more skewed than chance, so this is a lower bound.
    """
    if ranks == 1:
        return 1.0
    import numpy as np

    score = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    mean = np.maximum(assignments / ranks, 1e-9)
    return np.minimum(1 + score / mean**0.5 + (score**2 - 1) / (6 * mean), ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Products:
    """One kind of weight product inside a layer, per accelerator."""

    layers: int
    params: float  # on one accelerator; of one expert where `experts` > 0
    format: Format
    data_parallel: bool = False  # attention: a DP rank computes its own tokens only
    experts: int = 0
    experts_active: int = 0
    row_elements: float = 0.0  # of one row of one expert: in, out, and between its products


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """The coefficients of one instance's law, in seconds: see `StepCost.step_s`."""

    tokens_s: list[float]  # by tokens of a step
    sequences_s: list[float]  # by decoding sequences
    cache_s_per_token: float
    state_s: float  # per decoding sequence
    bounded: list[tuple[int, float]]  # (window, seconds per cached token inside it)
    pair_s: float
    bounded_pairs: list[tuple[int, float]]
    prefill_s: float  # once a step that has prompt tokens
    slowdown: float
    kernels: int = 0  # that a step launches one after the other, if that is known
    prompt_token_s: float = 0.0  # per prompt token, beside `tokens_s`
    mixed_cache_s_per_token: float = 0.0  # more per cached token in a step with prompt tokens
    mixed_sequence_s: float = 0.0  # and per decoding sequence
    mixed_pair_s: float = 0.0  # and per decoding sequence and prompt token


class StepCost:
    """Prices the steps of one instance. Built once for a model, accelerator and layout."""

    def __init__(
        self, model: ModelSpec, gpu: GpuSpec, layout: Layout, *, rates: Rates | None = None
    ) -> None:
        self.model, self.gpu, self.layout = model, gpu, layout
        self.rates = rates or load_rates(gpu)
        self.slowdown = 1.0
        self._products = _products(model, layout)
        self._set_tables()
        self._set_cache_terms()
        self._set_prefill_terms()
        self.prompt_s = self._prompt_s()

    # --- tables ---------------------------------------------------------------------------

    def _set_tables(self) -> None:
        """Seconds of `layers(N)` and `sequences(n)`; above FINE_TOKENS the law is smooth."""
        import numpy as np

        fine, coarse = np.arange(FINE_TOKENS + 1), np.arange(0, TOKENS_MAX + COARSE + 1, COARSE)
        seconds = self.layers_s(np.concatenate([fine, coarse])).tolist()
        self._fine_s: list[float] = seconds[: len(fine)]
        self._coarse_s: list[float] = seconds[len(fine) :]
        self._sequences_s: list[float] = self.sequences_s(np.arange(SEQUENCES_MAX + 1)).tolist()

    def _tokens_s(self, tokens: int) -> float:
        if tokens <= FINE_TOKENS:
            return self._fine_s[tokens]
        below, rest = divmod(tokens, COARSE)
        low, high = self._coarse_s[below], self._coarse_s[below + 1]
        return low + (high - low) * rest / COARSE

    def layers_s(self, tokens: Any) -> Any:
        """Seconds of all layers for `tokens` of one step, a count or an array of counts.

        Pipeline stages work on one micro-batch each, so a step is one pass of a micro-batch.
        """
        rates, gpu, layout = self.rates, self.gpu, self.layout
        tokens = tokens / layout.pp
        own_tokens = tokens / layout.dp
        total = self._fixed_s()
        for product in self._products:
            if product.experts:
                total = total + self._experts_s(product, tokens)
            else:
                rows = own_tokens if product.data_parallel else tokens
                total = total + product.layers * self._dense_s(product, rows)
        hidden_bytes = ACTIVATION_BYTES_PER_HIDDEN * self.model.hidden * self.model.layers
        total = total + own_tokens * hidden_bytes / (gpu.memory_bytes_per_s * rates.memory)
        return total + self._collectives_s(tokens)

    def _fixed_s(self) -> float:
        rates = self.rates
        per_layer_us = {
            True: rates.layer_mla_us if self.model.attention[0].latent else rates.layer_moe_us,
            False: rates.layer_dense_us,
        }
        fixed_us = sum(g.layers * per_layer_us[g.experts > 0] for g in self.model.ffn)
        sparse_layers = sum(g.layers for g in self.model.attention if g.sparse_topk_tokens)
        fixed_us += sparse_layers * rates.layer_sparse_us
        return fixed_us * 1e-6 + rates.step_ms * 1e-3

    def _prompt_s(self) -> float:
        """Fixed time of a step with prompt tokens: eager kernels, outside any graph."""
        rates, model = self.rates, self.model
        per_layer_us = rates.prefill_mla_us if model.attention[0].latent else rates.prefill_layer_us
        return rates.prefill_ms * 1e-3 + model.layers * per_layer_us * 1e-6

    def _dense_s(self, product: _Products, rows: Any) -> Any:
        """Seconds of one dense product in one layer."""
        compute = math_flops_per_s(self.gpu, product.format) * _of(
            self.rates.dense, self.gpu, product.format
        )
        read = self.gpu.memory_bytes_per_s * self.rates.memory
        return soft_roofline(
            2 * rows * product.params / compute,
            product.params * product.format.bytes_per_element / read,
            DENSE_P,
        )

    def _experts_s(self, product: _Products, tokens: Any) -> Any:
        """Seconds of the routed experts of all their layers."""
        experts, active = product.experts, product.experts_active
        touched = experts * (1 - (1 - active / experts) ** tokens)
        peak = math_flops_per_s(self.gpu, product.format) * _of(
            self.rates.expert, self.gpu, product.format
        )
        compute_s = 2 * tokens * active * product.params / peak
        moved_bytes = touched * product.params * product.format.bytes_per_element
        moved_bytes = moved_bytes + EXPERT_MOVES * tokens * active * product.row_elements * 2
        read_s = moved_bytes / (self.gpu.memory_bytes_per_s * self.rates.memory)
        skew = expert_skew(tokens * active, ranks=self.layout.ep)
        return product.layers * skew * (compute_s + read_s)

    def _collectives_s(self, tokens: Any) -> Any:
        """All-reduces of all layers, and the hand-over between pipeline stages."""
        layout, gpu, model = self.layout, self.gpu, self.model
        ranks = layout.tp * layout.dp
        payload = tokens * model.hidden * 2 * (0.75 if layout.dp > 1 else 1.0)
        latency = collective_s(gpu, gpus=ranks, payload_bytes=0.0, factor=self.rates.collective)
        one_byte = collective_s(gpu, gpus=ranks, payload_bytes=1.0, factor=self.rates.collective)
        total = 2 * model.layers * (latency + payload * (one_byte - latency))
        if layout.pp > 1:
            link = gpu.network.read_bytes_per_s
            total = total + (layout.pp - 1) * (20e-6 + tokens * model.hidden * 2 / link)
        return total

    def sequences_s(self, sequences: Any) -> Any:
        """Seconds of the LM head in bf16 and of the host's work, for a count or an array."""
        gpu, rates, layout = self.gpu, self.rates, self.layout
        head = self.model.vocabulary * self.model.hidden / (layout.tp * layout.dp)
        compute = gpu.flops_per_s["bf16"] * rates.dense["bf16"]
        read_s = 2 * head / (gpu.memory_bytes_per_s * rates.memory)
        host_s = sequences * (rates.sequence_us * 1e-6 / layout.dp)
        return soft_roofline(2 * sequences / layout.pp * head / compute, read_s, DENSE_P) + host_s

    def _set_cache_terms(self) -> None:
        """Seconds per cached token of unbounded groups, and (limit, seconds) of bounded ones."""
        layout, model = self.layout, self.model
        share = self.gpu.memory_bytes_per_s * self.rates.cache * layout.dp * layout.pp
        kv_bytes = kv_format(layout.kv).bytes_per_element
        self._cache_s_per_token = 0.0
        self._state_s = 0.0
        bounded: dict[int, float] = {}
        for group in model.attention:
            per_token_s = group.layers * _kv_elements_per_rank(group, layout.tp) * kv_bytes / share
            index_s = group.layers * group.index_elements_per_token * kv_bytes / share
            self._state_s += 2 * group.layers * group.state_elements * 2 / layout.tp / share
            self._cache_s_per_token += index_s
            limit = group.window_tokens or group.sparse_topk_tokens
            if limit is None:
                self._cache_s_per_token += per_token_s
            else:
                bounded[limit] = bounded.get(limit, 0.0) + per_token_s
        self._bounded = sorted(bounded.items())

    def _set_prefill_terms(self) -> None:
        """Seconds per query-key pair of unbounded groups, and (limit, seconds) of bounded ones."""
        layout = self.layout
        rate = self.gpu.flops_per_s["bf16"] * self.rates.attention * layout.dp * layout.pp
        self._pair_s = 0.0
        bounded: dict[int, float] = {}
        for group in self.model.attention:
            if group.state_elements:
                continue
            heads = group.query_heads / layout.tp
            flops = 2 * heads * (group.head_dim + group.v_head_dim) * group.layers
            limit = group.window_tokens or group.sparse_topk_tokens
            if limit is None:
                self._pair_s += flops / rate
            else:
                bounded[limit] = bounded.get(limit, 0.0) + flops / rate
        self._bounded_pairs = sorted(bounded.items())

    @property
    def evidence(self) -> Evidence:
        """How well the law is known on this accelerator."""
        return self.rates.evidence

    # --- memory ---------------------------------------------------------------------------

    @property
    def weights_bytes_per_gpu(self) -> float:
        """Bytes of weights on one accelerator: products in their formats, the rest in 16 bit."""
        model, layout = self.model, self.layout
        products = sum(
            p.layers * p.params * max(p.experts, 1) * p.format.bytes_per_element
            for p in self._products
        )
        tables = (model.embedding_params + model.head_params) / (layout.tp * layout.dp)
        return (products + 2 * (tables + model.norm_params)) / layout.pp

    def kv_bytes_per_gpu(self, sequence_tokens: int) -> float:
        """Bytes that one cached sequence of that length takes on one accelerator, on average.

        Data-parallel ranks hold different sequences and pipeline stages different layers,
        so an instance divides by both.
        """
        layout = self.layout
        fmt = kv_format(layout.kv)
        on_rank = kv_bytes_per_gpu(self.model, sequence_tokens, fmt, tp=layout.tp)
        return on_rank / (layout.dp * layout.pp)

    # --- pricing --------------------------------------------------------------------------

    def step_s(
        self,
        decodes: int,
        context_tokens: float,
        prefill_tokens: int = 0,
        prefill_pairs: float = 0.0,
    ) -> float:
        """Seconds of one step: `decodes` sequences with `context_tokens` cached in all, and
        `prefill_tokens` prompt tokens that score `prefill_pairs` query-key pairs.

        `prefill_pairs` is the sum over chunks of chunk x (past + chunk / 2).
        """
        seconds = (
            self._tokens_s(decodes + prefill_tokens)
            + self._sequences_s[decodes]
            + self._cache_s_per_token * context_tokens
            + self._state_s * decodes
        )
        for limit, per_token_s in self._bounded:
            seconds += per_token_s * min(context_tokens, limit * decodes)
        if prefill_tokens:
            seconds += self._pair_s * prefill_pairs + self.prompt_s
            for limit, per_pair_s in self._bounded_pairs:
                seconds += per_pair_s * min(prefill_pairs, prefill_tokens * limit)
        return seconds * self.slowdown

    def formula_s(self, decodes: Any, context: Any, prefill_tokens: Any, pairs: Any) -> Any:
        """`step_s` straight from the law, for arrays: what tests and fits compare with."""
        import numpy as np

        seconds = self.layers_s(decodes + prefill_tokens) + self.sequences_s(decodes)
        seconds = seconds + self._cache_s_per_token * context + self._state_s * decodes
        for limit, per_token_s in self._bounded:
            seconds = seconds + per_token_s * np.minimum(context, limit * decodes)
        seconds = seconds + self._pair_s * pairs
        for limit, per_pair_s in self._bounded_pairs:
            seconds = seconds + per_pair_s * np.minimum(pairs, prefill_tokens * limit)
        return (seconds + (prefill_tokens > 0) * self.prompt_s) * self.slowdown

    def decode_run_s(self, decodes: int, context_tokens: float, steps: int) -> float:
        """Seconds of `steps` pure decode steps in a row; every one adds `decodes` tokens.

        Closed form of the sum of `step_s`. Bounded groups saturate on the way, so their
        part is summed in two pieces.
        """
        growth = decodes * steps * (steps - 1) / 2
        seconds = steps * (
            self._tokens_s(decodes) + self._sequences_s[decodes] + self._state_s * decodes
        ) + self._cache_s_per_token * (steps * context_tokens + growth)
        for limit, per_token_s in self._bounded:
            room = limit * decodes - context_tokens
            rising = min(max(math.ceil(room / decodes), 0), steps) if decodes else 0
            below = rising * context_tokens + decodes * rising * (rising - 1) / 2
            seconds += per_token_s * (below + (steps - rising) * limit * decodes)
        return seconds * self.slowdown

    def terms(self, tokens_max: int = TOKENS_MAX) -> StepTerms:
        """The law's coefficients, for whoever prices in other numbers than floats."""
        return StepTerms(
            tokens_s=[self._tokens_s(n) for n in range(tokens_max + 1)],
            sequences_s=self._sequences_s,
            cache_s_per_token=self._cache_s_per_token,
            state_s=self._state_s,
            bounded=self._bounded,
            pair_s=self._pair_s,
            bounded_pairs=self._bounded_pairs,
            prefill_s=self.prompt_s,
            slowdown=self.slowdown,
        )

    def scaled(self, factor: float) -> "StepCost":
        """The same law, every step `factor` times as long: an edge of the evidence band."""
        other = copy.copy(self)
        other.slowdown = self.slowdown * factor
        return other


def _of(efficiencies: Mapping[str, float], gpu: GpuSpec, fmt: Format) -> float:
    """The efficiency of the format's own kernels, or of the math that `gpu` runs it on."""
    if fmt.name in efficiencies and fmt.name != fmt.math:
        return efficiencies[fmt.name]
    return efficiencies[fmt.math if fmt.math in gpu.flops_per_s else "bf16"]


def _kv_elements_per_rank(group: AttentionGroup, tp: int) -> float:
    """Cached elements of one token in one layer on one rank: whole for MLA, split for GQA."""
    return group.kv_elements_per_token * group.kv_replication(tp) / tp


def _products(model: ModelSpec, layout: Layout) -> list[_Products]:
    """Every weight product of the model with its share on one accelerator."""
    weights = weight_format(layout.weights)
    keep_16 = model.is_moe and weights.bits < ATTENTION_STAYS_16_BIT_UNDER_BITS
    dense = weight_format("bf16") if keep_16 else weights
    products = [
        _Products(
            layers=group.layers,
            params=(group.params_per_layer - group.params_replicated_per_layer) / layout.tp
            + group.params_replicated_per_layer,
            format=dense,
            data_parallel=True,
        )
        for group in model.attention
    ]
    for ffn in model.ffn:
        products += _ffn_products(ffn, layout, hidden=model.hidden, dense=dense, weights=weights)
    return products


def _ffn_products(
    ffn: FfnGroup, layout: Layout, *, hidden: int, dense: Format, weights: Format
) -> list[_Products]:
    ranks = layout.tp * layout.dp
    always = ffn.dense_params_per_layer + ffn.shared_params_per_layer
    always += ffn.router_params_per_layer
    parts = []
    if always:
        parts.append(_Products(layers=ffn.layers, params=always / ranks, format=dense))
    if ffn.experts:
        parts.append(
            _Products(
                layers=ffn.layers,
                params=ffn.params_per_expert / ranks,
                format=weights,
                experts=ffn.experts,
                experts_active=ffn.experts_active,
                row_elements=2 * hidden / layout.ep + ffn.params_per_expert / hidden / ranks,
            )
        )
    return parts
