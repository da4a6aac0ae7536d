"""Steps priced from kernels that were timed one by one on the accelerator.

`perf.step` has a few constants for each accelerator, fitted to whole runs; it ranks models,
accelerators and layouts. Here a step is the list of products, passes and collectives that an
engine launches, each priced by the law of its own kernel (`perf.kernels`), so that any model
can be priced on an accelerator whose kernels were timed. What those laws lack comes from
`data/kernel_steps.toml`, which `tools/fit_kernel_steps.py` writes. Both kinds of cost hand
over `StepTerms`: schedulers and simulators see no difference. Replays of measured runs
(`planner.per_request`) use this one where they can.

What a whole step shows and a single kernel does not:

    mixed batch     one launch serves prompts and decodes. Query heads that share a KV head are
                    then not packed, so each reads the cache by itself; and every sequence is
                    given as many blocks of threads as the longest prompt needs, most of them
                    idle
    data parallel   ranks step together: decodes are spread over them, but a step's prompt is
                    on one rank, whose rows and messages the others wait for

Between kernels nothing runs for a moment, and prompts are not launched as one graph. How
long that takes depends on the engine: the two scalars of `perf.line.Calibration` that count
kernels and layers.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from tierline.base.errors import SpecError
from tierline.catalog.formats import kv_format, weight_format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.model import AttentionGroup, FfnGroup, ModelSpec
from tierline.perf.evidence import Evidence
from tierline.perf.kernels import Kernels, load_kernels, touched_experts
from tierline.perf.step import SEQUENCES_MAX, Layout, StepCost, StepTerms

GATED_MATRICES = 3
ATTENTION_KERNELS = 7  # norm, QKV, rotary, cache write, attention and its reduction, output
DENSE_KERNELS = 4  # norm, gate and up, activation, down
EXPERT_KERNELS = 10  # norm, router, top-k, sort (2), gate and up, activation, down, sum, copy
CONTEXT_TYPICAL = 1024  # where the law of decode attention, which bends, is made a line
WEIGHTY = ("decode", "mixed", "experts")  # fits that whole steps hang on
CHUNKS_TYPICAL = (512, 2048)  # between these, so is the law of prompt attention


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What whole steps need beside the laws of `perf.kernels`; of one accelerator."""

    decode_start_us: float  # decode attention: a launch
    decode_small_gb_per_s: float  # reading a cache too small to fill the accelerator
    decode_ramp_us: float  # a launch, when reading a large one
    decode_gb_per_s: float
    unpacked_gb_per_s: float  # reading it once for each query head, beside prompts
    unpacked_head_ns: float  # for each query head of each sequence
    unpacked_block_ns: float  # and for each prompt token in the same step
    pass_us: float  # an element-wise kernel
    pass_gb_per_s: float
    pass_resident_mb: float  # what the L2 cache holds between two kernels
    pass_beyond_gb_per_s: float  # more for the rest
    sampler_us: float
    sampler_ns_per_element: float  # of the logits of one sequence
    errors: Mapping[str, Sequence[float]]  # p50 and p90 of each fit, relative
    source: str
    expert_us: float = 0.0  # routed experts of one layer; 0: the law of `perf.kernels`
    expert_gb_per_s: float = 0.0
    expert_tflops: float = 0.0
    expert_sharpness: float = 1.0


@cache
def _file() -> dict[str, Any]:
    text = resources.files("tierline.perf").joinpath("data/kernel_steps.toml").read_text("utf-8")
    return tomllib.loads(text)


def timed_gpus() -> list[str]:
    """Accelerators whose steps can be priced by their kernels."""
    return sorted(_file())


def step_facts(gpu: GpuSpec) -> StepFacts:
    """The facts of `gpu`; raises `SpecError` where nobody timed them."""
    if gpu.name not in _file():
        raise SpecError(
            f"kernels of whole steps were not timed on {gpu.name}",
            hint=f"they were on: {', '.join(timed_gpus())}",
        )
    return StepFacts(**_file()[gpu.name])


class KernelCost:
    """Prices the steps of one instance by the kernels it launches."""

    def __init__(
        self, model: ModelSpec, gpu: GpuSpec, layout: Layout, *, facts: StepFacts | None = None
    ) -> None:
        """Raises `SpecError` for an accelerator or an attention that was not timed."""
        if layout.pp > 1 or any(
            g.latent or g.state_elements or g.window_tokens or g.sparse_topk_tokens
            for g in model.attention
        ):
            raise SpecError(
                f"{model.name} as {layout} is not priced by kernels",
                hint="full attention with grouped heads, one pipeline stage",
            )
        self.model, self.gpu, self.layout = model, gpu, layout
        self.facts = facts or step_facts(gpu)
        self._kernels: Kernels = load_kernels(gpu)
        self._law = StepCost(model, gpu, layout)

    @property
    def weights_bytes_per_gpu(self) -> float:
        """Bytes of weights on one accelerator."""
        return self._law.weights_bytes_per_gpu

    @property
    def evidence(self) -> Evidence:
        """How the facts were come by, and how well they fit the timings."""
        spread = max(p90 for name, (_, p90) in self.facts.errors.items() if name in WEIGHTY)
        return Evidence(kind="fitted", source=self.facts.source, low=1 - spread, high=1 + spread)

    def terms(self, tokens_max: int) -> StepTerms:
        """The coefficients of a step with up to `tokens_max` tokens."""
        import numpy as np

        layout = self.layout
        tokens = np.maximum(np.arange(tokens_max + 1), 1.0)
        sequences = np.maximum(np.arange(SEQUENCES_MAX + 1) / layout.dp, 1.0)
        tokens_s = self._rows_s(tokens / layout.dp) + self._shared_s(tokens)
        groups = [(g, self._heads(g)) for g in self.model.attention]
        read = [(g.layers, *self._reads_s(g)) for g in self.model.attention]
        pairs = [(g.layers, *self._prompt_s(g)) for g in self.model.attention]
        facts, ranks = self.facts, layout.dp
        heads = sum(g.layers * query for g, (query, _) in groups) / ranks
        return StepTerms(
            tokens_s=tokens_s.tolist(),
            sequences_s=self._sequences_s(sequences).tolist(),
            cache_s_per_token=sum(n * packed for n, packed, _ in read) / ranks,
            state_s=0.0,
            bounded=[],
            pair_s=sum(n * pair for n, pair, _ in pairs),
            bounded_pairs=[],
            prefill_s=sum(n * start for n, _, start in pairs),
            slowdown=1.0,
            kernels=self._kernels_launched(),
            prompt_token_s=self._prompt_token_s(),
            mixed_cache_s_per_token=sum(n * (bare - packed) for n, packed, bare in read) / ranks,
            mixed_sequence_s=heads * facts.unpacked_head_ns * 1e-9,
            mixed_pair_s=heads * facts.unpacked_block_ns * 1e-9,
        )

    # --- attention ------------------------------------------------------------------------

    def _heads(self, group: AttentionGroup) -> tuple[int, int]:
        """Query and KV heads on one rank."""
        return group.query_heads // self.layout.tp, group.kv_heads_per_rank(self.layout.tp)

    def _reads_s(self, group: AttentionGroup) -> tuple[float, float]:
        """Seconds per cached token of one layer: heads packed, and each by itself."""
        query, kv = self._heads(group)
        head_bytes = 2 * group.head_dim * kv_format(self.layout.kv).bytes_per_element
        packed = kv * head_bytes / (self.facts.decode_gb_per_s * 1e9)
        return packed, max(query * head_bytes / (self.facts.unpacked_gb_per_s * 1e9), packed)

    def _decode_start_s(self, group: AttentionGroup, sequences: Any) -> Any:
        """Decode attention of one layer without what is linear in the context."""
        import numpy as np

        facts = self.facts
        packed_s, _ = self._reads_s(group)
        read_us = 1e6 * packed_s * CONTEXT_TYPICAL * sequences
        small_us = read_us * facts.decode_gb_per_s / facts.decode_small_gb_per_s
        bent = np.minimum(facts.decode_start_us + small_us, facts.decode_ramp_us + read_us)
        return (bent - read_us) * 1e-6

    def _prompt_s(self, group: AttentionGroup) -> tuple[float, float]:
        """Attention among prompt tokens in one layer: seconds a pair, and a launch."""
        query, kv = self._heads(group)
        few, many = CHUNKS_TYPICAL
        first_s, second_s = (
            float(
                self._kernels.prefill_attention_s(
                    new=new,
                    heads=query,
                    kv_heads=kv,
                    head_dim=group.head_dim,
                    kv_fmt=self.layout.kv,
                )
            )
            for new in CHUNKS_TYPICAL
        )
        pair_s = (second_s - first_s) / ((many**2 - few**2) / 2)
        return pair_s, max(first_s - pair_s * few**2 / 2, 0.0)

    # --- products and passes --------------------------------------------------------------

    def _gemm_s(self, rows: Any, n: float, k: float, *, fmt: str = "") -> Any:
        return self._kernels.gemm_s(rows, int(n), int(k), fmt=fmt or self.layout.weights)

    def _pass_s(self, rows: Any, elements: float) -> Any:
        """One element-wise kernel that moves so many elements a row."""
        import numpy as np

        facts, moved_bytes = self.facts, rows * elements * 2
        beyond_bytes = np.maximum(moved_bytes - facts.pass_resident_mb * 1e6, 0.0)
        spilled_s = beyond_bytes / (facts.pass_beyond_gb_per_s * 1e9)
        return facts.pass_us * 1e-6 + moved_bytes / (facts.pass_gb_per_s * 1e9) + spilled_s

    def _rows_s(self, rows: Any) -> Any:
        """What a rank computes for its own tokens: attention but for the cache."""
        hidden = self.model.hidden
        total = 0.0
        for group in self.model.attention:
            query, kv = (heads * group.head_dim for heads in self._heads(group))
            layer_s = self._gemm_s(rows, query + 2 * kv, hidden)
            layer_s = layer_s + self._gemm_s(rows, hidden, query)
            layer_s = layer_s + 2 * self._pass_s(rows, 4 * hidden)  # both norms of a layer
            layer_s = layer_s + self._pass_s(rows, 2 * (query + kv))  # rotary
            layer_s = layer_s + self._pass_s(rows, 4 * kv)  # into the cache
            total = total + group.layers * layer_s
        return total

    def _shared_s(self, tokens: Any) -> Any:
        """What all ranks compute together: feed-forward, and the messages for it."""
        total = self._messages_s(tokens)
        for group in self.model.ffn:
            if group.experts:
                layer_s = self._experts_s(group, tokens)
                router = group.router_params_per_layer / self.model.hidden
                rows = tokens / self.layout.dp
                layer_s = layer_s + self._gemm_s(rows, router, self.model.hidden, fmt="bf16")
                layer_s = layer_s + self._dense_s(group.shared_params_per_layer, tokens)
            else:
                layer_s = self._dense_s(group.dense_params_per_layer, tokens)
            total = total + group.layers * layer_s
        return total

    def _dense_s(self, params: float, tokens: Any) -> Any:
        """A gated FFN of so many parameters, cut over all ranks; nothing where there is none."""
        hidden = self.model.hidden
        inner = params / (GATED_MATRICES * hidden) / (self.layout.tp * self.layout.dp)
        if not inner:
            return 0.0
        products_s = self._gemm_s(tokens, 2 * inner, hidden) + self._gemm_s(tokens, hidden, inner)
        return products_s + self._pass_s(tokens, GATED_MATRICES * inner)

    def _experts_s(self, group: FfnGroup, tokens: Any) -> Any:
        """Routed experts of one layer on one rank, for the tokens of all of them."""
        layout, facts, hidden = self.layout, self.facts, self.model.hidden
        cut = layout.tp * layout.dp // layout.ep
        active, experts = group.experts_active, group.experts
        if not facts.expert_tflops or layout.weights != "bf16":
            inner = group.params_per_expert // (GATED_MATRICES * hidden)
            return self._kernels.moe_s(
                tokens,
                hidden=hidden,
                inter=inner,
                topk=active,
                experts=experts,
                fmt=layout.weights,
                tp=cut,
                ep=layout.ep,
            )
        params = group.params_per_expert / cut
        touched = touched_experts(tokens, topk=active, experts=experts) / layout.ep
        bytes_each = params * weight_format(layout.weights).bytes_per_element
        read_s = touched * bytes_each / (facts.expert_gb_per_s * 1e9)
        math_s = tokens * active / layout.ep * 2 * params / (facts.expert_tflops * 1e12)
        p = facts.expert_sharpness
        return facts.expert_us * 1e-6 + (read_s**p + math_s**p) ** (1 / p)

    def _sequences_s(self, sequences: Any) -> Any:
        """The head, the sampler and the start of decode attention, for a rank's sequences."""
        model, facts = self.model, self.facts
        total = self._gemm_s(sequences, model.vocabulary / self.layout.tp, model.hidden, fmt="bf16")
        sampled = sequences * model.vocabulary * facts.sampler_ns_per_element * 1e-9
        total = total + facts.sampler_us * 1e-6 + sampled
        for group in model.attention:
            total = total + group.layers * self._decode_start_s(group, sequences)
        return total

    # --- several ranks --------------------------------------------------------------------

    def _messages_s(self, tokens: Any) -> Any:
        """All-reduces of tensor parallelism; gather and scatter of data parallelism."""
        layout = self.layout
        payload = tokens * self.model.hidden * 2
        total: Any = 0.0
        if layout.tp > 1:
            total = total + 2 * self._kernels.all_reduce_s(payload, gpus=layout.tp)
        if layout.dp > 1:
            ranks = layout.dp * layout.tp
            gather_s = self._kernels.all_reduce_s(payload, gpus=ranks, op="nccl-all-gather")
            total = total + 2 * gather_s
        return self.model.layers * total

    def _prompt_token_s(self) -> float:
        """What a prompt token costs more where one rank has the whole prompt.

        Its rows and its message are that rank's, and not a share of them.
        """
        import numpy as np

        ranks = self.layout.dp
        if ranks == 1:
            return 0.0
        few, many = 1024.0, 2048.0
        rows_s = self._rows_s(np.array([few, many]))
        row_s = float(rows_s[1] - rows_s[0]) / (many - few)
        wire_s = self._messages_s(np.array([few, many]))
        # A gather moves (G - 1) / G of the payload where all bring alike, here all of it.
        whole_s = float(wire_s[1] - wire_s[0]) / (many - few) / (ranks - 1)
        return row_s * (1 - 1 / ranks) + whole_s

    def _kernels_launched(self) -> int:
        """Kernels that run one after the other in a step."""
        messages = 2 if self.layout.tp * self.layout.dp > 1 else 0
        count = self.model.layers * (ATTENTION_KERNELS + messages)
        for group in self.model.ffn:
            count += group.layers * (EXPERT_KERNELS if group.experts else DENSE_KERNELS)
        return count
