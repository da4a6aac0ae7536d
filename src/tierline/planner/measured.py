"""One published end-to-end measurement, as something that the laws can be asked about.

`measured_files` reads rows from files, `accuracy` compares predictions with them, and
`tools/fit_rates.py` fits the constants of the step law to them. A row that a rule calls
unreliable stays a row and carries the rule in `doubt`, so that every result can be shown
with it and without it.
"""

import functools
import math
from dataclasses import dataclass, replace

from tierline.catalog.gpu import GpuSpec
from tierline.catalog.model import ModelSpec
from tierline.catalog.models import known_models
from tierline.perf.step import EngineProfile, Layout, Rates, StepCost, load_rates
from tierline.planner.load import Demand, Instance, OperatingPoint, at_concurrency
from tierline.planner.recipes import Launch

LENGTH_QUANTILES = 8
MEMORY_USABLE = 0.95
MEMORY_RESERVED_BYTES = 2e9  # activations, graphs, communication buffers
OFFLINE_BATCH_MAX = 2048
SEQUENCES_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What ran, under which load, and what came out (None: not measured)."""

    source: str  # inferencex, trtllm, mlperf
    where: str  # file and line
    model: ModelSpec
    gpu: GpuSpec
    engine: EngineProfile
    version: str
    layout: Layout
    input_tokens: int
    output_tokens: int
    uniform: bool  # lengths spread over [0.8 L, L]; otherwise all alike
    clients: int  # closed loop; 0: as many as the KV cache holds
    launch: Launch
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None
    replicas: int = 1
    scenario: str = ""
    doubt: str = ""

    @property
    def group(self) -> str:
        """What a held-out fold holds out whole."""
        return f"{architecture_of(self.model)} | {self.gpu.name} | {self.engine.name}"

    @property
    def stack(self) -> str:
        """What one speed factor stands for: a group in one version, precision and drafting."""
        drafts = f" | drafts {self.launch.draft_tokens}" if self.launch.draft_tokens else ""
        return f"{self.group} | {self.version} | {self.layout.weights}{drafts}"

    @property
    def config(self) -> str:
        """Rows of one configuration are repeats and stay in one fold."""
        load = f"{self.input_tokens}/{self.output_tokens}@{self.clients}"
        return f"{self.stack} | {self.layout} | {load}"

    @property
    def demand(self) -> Demand:
        """The lengths that the benchmark's client sent."""
        return Demand(
            input_tokens=_lengths(self.input_tokens, spread=self.uniform),
            output_tokens=_lengths(self.output_tokens, spread=self.uniform),
        )

    def cost(self, rates: Rates | None = None) -> StepCost:
        """The law of the instance; `rates` replaces the shipped constants."""
        rates = rates or load_rates(self.gpu)
        if self.launch.fused_experts:
            rates = replace(rates, layer_moe_us=rates.layer_fused_us)
        return StepCost(self.model, self.gpu, self.layout, rates=rates)

    def instance(self, rates: Rates | None = None, engine: EngineProfile | None = None) -> Instance:
        """The instance that was measured; `rates` and `engine` replace the shipped ones."""
        cost = self.cost(rates)
        context = self.input_tokens + self.output_tokens // 2
        pool = self.gpu.memory_bytes * MEMORY_USABLE - MEMORY_RESERVED_BYTES
        pool -= cost.weights_bytes_per_gpu
        tokens = pool / cost.kv_bytes_per_gpu(context) * context
        return Instance(
            cost=cost,
            engine=engine or self.engine,
            # A pool with no room contradicts a run that took place: the label's memory is wrong.
            kv_tokens=tokens if tokens > 2 * context else 1e9,
            sequences_max=SEQUENCES_MAX,
            chunk_tokens=self.launch.batch_tokens,
        )

    def offline_point(
        self, rates: Rates | None = None, engine: EngineProfile | None = None
    ) -> OperatingPoint | None:
        """The state of an offline run: as many sequences as the KV cache holds, always full."""
        instance = self.instance(rates, engine)
        need = self.input_tokens + self.output_tokens / 2
        clients = self.clients or max(min(int(instance.kv_tokens / need), OFFLINE_BATCH_MAX), 1)
        return at_concurrency(replace(instance, kv_tokens=math.inf), self.demand, clients)


def architecture_of(model: ModelSpec) -> str:
    """One name for all checkpoints of the same shape: the shortest in the catalogue.

    >>> from tierline.catalog.models import load_model
    >>> architecture_of(load_model("deepseek-v3"))
    'deepseek-r1'
    """
    return _names_by_shape().get(_shape(model), model.name)


@functools.cache
def _names_by_shape() -> dict[object, str]:
    names = sorted(known_models(), key=lambda name: (len(name), name), reverse=True)
    return {_shape(known_models()[name]): name for name in names}


def _shape(model: ModelSpec) -> object:
    return (model.hidden, model.vocabulary, model.attention, model.ffn)


def _lengths(tokens: int, *, spread: bool) -> tuple[float, ...]:
    if not spread:
        return (float(tokens),)
    shares = ((i + 0.5) / LENGTH_QUANTILES for i in range(LENGTH_QUANTILES))
    return tuple(tokens * (0.8 + 0.2 * share) for share in shares)
