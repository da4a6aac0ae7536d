"""What the planner says and why: findings, candidates and the plan. Plain frozen data.

Everything that is printed (text, JSON, HTML) is read from these; nothing is computed
while printing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tierline.catalog.deployment import Deployment
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.model import ModelSpec
from tierline.perf.curve import Curve
from tierline.perf.evidence import Evidence, Value
from tierline.perf.step import Layout
from tierline.planner.load import Demand, Instance, OperatingPoint
from tierline.workload.slo import ServiceLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """Something that was considered and turned down, with the number that decided it."""

    what: str
    why: str
    over: float | None = None  # worst latency over its limit, for a lone request
    within: str = ""  # the limits that it could keep then
    missing_bytes: float | None = None  # on each GPU, where the weights do not fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One step of the method with its whole working."""

    step: int  # 1..13 of the method; 14 is the replay
    title: str
    answer: str  # a sentence with numbers
    inputs: Mapping[str, str]  # name -> value with unit, as they went into the formula
    formula: str  # with names
    substituted: str  # with the numbers put in
    result: Value
    rule: str = ""  # what the rule of thumb says ...
    computed: str = ""  # ... and what the computation says, where the two differ
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on one accelerator of an instance, by component."""

    weights_bytes: float
    activations_bytes: float
    overhead_bytes: float
    kv_bytes: float  # the pool: what is left
    total_bytes: float  # the accelerator's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A candidate at one edge of the evidence band."""

    name: str  # pessimistic, expected, optimistic
    slowdown: float  # on every step
    usable_rps: float  # of one instance
    instances: int
    gpus: int
    usd_per_hour: float | None  # None: the accelerator has no price
    usd_per_year: float | None
    usd_per_million_tokens: float | None  # input and output tokens, at average load
    point: OperatingPoint  # one instance at its share of the peak rate


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerTier:
    """Memory below the device that holds cached prefixes."""

    name: str  # dram, nvme
    bytes_per_instance: int
    tokens: int  # of the whole fleet

    @property
    def label(self) -> str:
        """As people write it."""
        return {"dram": "DRAM", "nvme": "NVMe"}[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration that fits and keeps its promises, with what it takes."""

    gpu: GpuSpec
    layout: Layout
    memory: MemoryUse
    instance: Instance
    demand: Demand  # prefix hits applied
    kv_tokens: int  # pool of one instance
    lower_tiers: tuple[LowerTier, ...]  # below the device, nearest first
    hit_rate: float
    evidence: Evidence  # of the step law on this accelerator
    pessimistic: Edge
    optimistic: Edge
    expected: Edge
    needs_quality_test: str  # "" or what must be tested before this is used

    @property
    def name(self) -> str:
        """How tables call it."""
        lower = "".join(f" +{tier.label}" for tier in self.lower_tiers)
        instances = self.pessimistic.instances
        return f"{instances} x {self.layout.gpus} {self.gpu.name} {self.layout}{lower}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """One point of a predicted load curve of one instance, with its band. Seconds."""

    rate_rps: float
    concurrency: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    ttft_p99_low_s: float  # at the optimistic edge
    ttft_p99_high_s: float | None  # at the pessimistic edge; None: it cannot keep up
    itl_p99_low_s: float
    itl_p99_high_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What changes the answer: one input moved, everything planned again."""

    what: str  # "price of h100-sxm", "growth", "prompt length", "hit rate"
    change: str  # "+25 %"
    gpus: int | None
    usd_per_year: float | None
    recommended: str  # the candidate that wins then
    changes_choice: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCurve:
    """A benchmark of one instance that takes the place of the predicted curve."""

    gpu: str
    layout: Layout
    curve: Curve
    usable_rps: float  # at the last concurrency that keeps every promise


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One promise to one class, and what a replay made of it."""

    level: str
    target: str  # as a person types it: ttft_p99=2s
    value_s: float | None  # None: too many never got so far
    met_share: float
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A fleet under the production scheduler, with the requests of the trace."""

    instances: int
    policy: str
    lower_tiers: tuple[LowerTier, ...]
    stretch: str  # which requests
    requests: int
    slowdown: float  # of every step, against the law
    kept: bool
    outcomes: tuple[Outcome, ...]  # empty: given up before its end
    gave_up: str = ""  # what was broken by then
    ttft_s: tuple[float, ...] = ()  # at 0 %, 1 % ... 100 % of the requests that got a token
    hit_share: float = 0.0  # of prompt tokens, found cached
    loaded_share: float = 0.0  # of prompt tokens, brought from below the device
    utilization: float = 0.0
    preemptions: int = 0

    @property
    def broken(self) -> str:
        """What broke, in words; empty when nothing did."""
        if self.kept:
            return ""
        if self.gave_up:
            return self.gave_up
        return "; ".join(
            f"{o.target} for {o.level} holds for {o.met_share:.1%} of it"
            for o in self.outcomes
            if not o.kept
        )

    def ttft_percentile_s(self, percent: int) -> float | None:
        """Of the requests that got a token; None when none did."""
        return self.ttft_s[percent] if self.ttft_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """The smallest fleet of the chosen instance with one thing changed, by replay."""

    label: str  # "no tier below the device", "DRAM 410 GB", "fcfs"
    policy: str
    lower_tiers: tuple[LowerTier, ...]
    instances: int | None  # None: no fleet that was tried keeps the promises
    gpus: int | None
    usd_per_year: float | None  # None: no fleet, or no price
    ttft_p99_s: float | None
    hit_share: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A candidate that was replayed: what the closed form said, and what became of it."""

    name: str
    closed_form_instances: int
    instances: int | None  # the fewest found; None: it cannot cost less than what was chosen
    tried_instances: int  # the most of those that broke a promise; 0: none did
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """How the replay came to the recommended fleet."""

    closed_form_instances: int
    deciding: Replay  # the fleet at the slow edge, at the load that it is sized for
    everyday: Replay  # the same fleet by the law itself, at the load that is expected
    smaller: Replay | None  # one instance less: what breaks; None: there is no smaller fleet
    checked: tuple[Checked, ...]
    tiers: tuple[Worth, ...]  # below the device, from none to all
    policies: tuple[Worth, ...]
    replays: int  # that it took
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was asked, with everything that a plan is a function of."""

    model: ModelSpec
    levels: tuple[ServiceLevel, ...]
    gpus: tuple[GpuSpec, ...]
    workload_name: str
    growth: float = 1.0
    safety: float = 1.5
    budget_usd_per_year: float | None = None
    quality: str = "negligible"  # the worst quality class that may be recommended
    engine: str = "vllm"
    peak_rps: float | None = None  # of a busy minute; None: the trace's own
    average_load: float | None = None  # mean over peak; None: the trace's own
    api_usd_per_million: tuple[float, float] | None = None  # hosted price, input and output
    measured: MeasuredCurve | None = None
    hf_id: str | None = None  # the name an engine loads the weights by
    config_path: str | None = None  # of a model outside the catalogue
    gpu_files: Mapping[str, str] = field(default_factory=dict)  # name -> path of a user's own
    replay: bool = True  # False: the closed form decides, in a fraction of the time
    bounds: tuple[ServiceLevel, ...] = ()  # what the closed form asks of all; empty: every level


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer: the recommended deployment, its alternatives, and the working."""

    question: Question
    headline: str
    caveats: tuple[str, ...]  # what could be wrong, one line each
    recommended: Candidate
    alternatives: tuple[Candidate, ...]  # best first, the recommended one left out
    pareto: tuple[str, ...]  # names of candidates that no other beats in all of cost, p99, headroom
    rejected: tuple[Rejected, ...]
    findings: tuple[Finding, ...]  # thirteen, in order, and what survived the replay
    curve: tuple[LoadPoint, ...]  # of one recommended instance
    cost_by_load: tuple[Mapping[str, float], ...]  # offered load share, usd per million tokens
    sensitivities: tuple[Sensitivity, ...]
    mixed_fleet: Mapping[str, Any] | None  # two kinds of accelerator where they beat one
    profile: Any  # workload.profile.Profile
    demand_rps: float  # that the fleet is sized for, growth applied
    deployment: Deployment
    survival: Survival | None = None  # None: nothing was replayed
    facts: Mapping[str, Value] = field(default_factory=dict)  # every other number, by name
