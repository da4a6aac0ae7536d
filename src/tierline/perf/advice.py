"""What an advisor's rule says: a verdict, why, and what must be measured before believing it.

Rules of thumb and laws sometimes disagree (a TP floor, an acceptance threshold, a ratio of
prompt to output). Both are kept: `verdict` rests on the law, and `rule` says what the rule
of thumb would have said, so that a report can print them side by side.
"""

from dataclasses import dataclass

from tierline.base.names import lookup
from tierline.catalog.model import ModelSpec

CONTEXT_PARALLEL_TOKENS = 32_768
OCCUPANCY_MAX = 0.90
PAGE_TOKENS_MIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A verdict with its reasons, best reason first."""

    verdict: str
    reasons: tuple[str, ...]
    rule: str = ""  # what the rule of thumb says, where one exists
    gates: tuple[str, ...] = ()  # evaluations to pass first

    @property
    def rule_disagrees(self) -> bool:
        """Whether the rule of thumb says something else."""
        return bool(self.rule) and self.rule != self.verdict


# Tasks that read a whole document at once, which a window cannot.
WHOLE_DOCUMENT_TASKS = ("long-document", "cross-document")
WINDOW_TASKS = ("chat", "support", "code")


def window_advice(task: str, *, window_tokens: int, context_tokens: int) -> Advice:
    """Whether sliding-window attention suits the task, and the length to size KV for."""
    if task in WHOLE_DOCUMENT_TASKS:
        return Advice(
            verdict="refuse",
            reasons=(f"{task} needs tokens further back than {window_tokens:,}",),
        )
    sized = min(window_tokens, context_tokens)
    reasons = (f"size KV for min(window, context) = {sized:,} tokens",)
    return Advice(verdict="use" if task in WINDOW_TASKS else "test", reasons=reasons)


def head_sharing_advice(
    model: ModelSpec, *, multi_step_reasoning: bool, long_context: bool
) -> Advice:
    """What MHA, GQA and MQA mean for this use."""
    kv = min(g.kv_heads for g in model.attention if g.kv_elements_per_token)
    shared = all(g.kv_heads < g.query_heads or g.latent for g in model.attention)
    latent = any(g.latent for g in model.attention)
    if kv == 1 and not latent and multi_step_reasoning:
        reasons = ("one KV head for all queries loses quality on multi-step reasoning",)
        return Advice(verdict="warn", reasons=reasons, gates=("multi-step reasoning",))
    if not shared and long_context:
        reasons = ("every query head has its own KV, so decode reads it all: buy bandwidth",)
        return Advice(verdict="raise bandwidth", reasons=reasons)
    return Advice(verdict="fine", reasons=("KV heads are shared or contexts are short",))


def context_parallel_advice(context_tokens: int) -> Advice:
    """Whether splitting one sequence over accelerators is worth its ring of messages."""
    if context_tokens <= CONTEXT_PARALLEL_TOKENS:
        return Advice(verdict="no", reasons=(f"{context_tokens:,} tokens fit TP alone",))
    return Advice(verdict="consider", reasons=(f"over {CONTEXT_PARALLEL_TOKENS:,} tokens",))


def host_kv_advice(*, interactive: bool, read_s: float, itl_limit_s: float | None) -> Advice:
    """Whether KV may live in host memory and be read in every decode step."""
    if not interactive:
        return Advice(verdict="allow", reasons=("nobody waits for the next token",))
    over = itl_limit_s is None or read_s > itl_limit_s
    reason = f"reading it adds {read_s * 1e3:.1f} ms to every token"
    options = "share KV heads, quantise KV, or add device memory; move KV only between steps"
    return Advice(verdict="reject" if over else "warn", reasons=(reason, options))


def paging_advice(*, concurrency: int, mixed_lengths: bool, parallel_samples: bool) -> Advice:
    """Whether block allocation matters."""
    if concurrency <= 1:
        return Advice(verdict="adds little", reasons=("one sequence cannot fragment a pool",))
    if mixed_lengths or parallel_samples or concurrency >= 24:
        return Advice(verdict="require", reasons=("lengths differ or samples share a prompt",))
    return Advice(verdict="use", reasons=("it costs nothing",))


def occupancy_advice(occupancy: float) -> Advice:
    """What a KV pool that is regularly this full calls for."""
    if occupancy >= OCCUPANCY_MAX:
        return Advice(verdict="scale out or shed", reasons=("one long prompt runs out of memory",))
    return Advice(verdict="fine", reasons=(f"{1 - occupancy:.0%} of the pool is free",))


SYMPTOMS = {
    "TTFT high": ("prompt work", ("chunk prompts", "prefix cache", "raise TP", "shorter prompts")),
    "later turns slow": ("KV bandwidth", ("share KV heads", "quantise KV")),
    "stalls when others join": ("prefill interference", ("chunk prompts",)),
    "out of memory with memory free": ("fragmentation", ("paging",)),
    "host swaps": ("KV pool too small", ("more memory", "quantise KV", "swapping last")),
    "GPU use falls while queue and TTFT rise": ("KV cascade", ("read the eviction rate",)),
    "TTFT p99 breached, p50 fine": ("queueing or interference", ("chunk prompts", "grow fleet")),
    "TTFT p50 and p99 breached": ("undersized or shifted traffic", ("size again",)),
    "ITL high at every percentile": ("decode batch or bandwidth", ("smaller batch", "bandwidth")),
    "ITL high, low concurrency, compute idle": ("memory-bound decode", ("speculation",)),
    "RPS per GPU falls as TP rises": ("all-reduce", ("lower TP", "more replicas")),
    "TTFT and ITL cannot both hold": ("interference", ("split prefill and decode",)),
}


def diagnose(symptom: str) -> Advice:
    """The usual cause of a symptom and the levers in the order to pull them."""
    cause, levers = lookup("symptom", symptom, SYMPTOMS)
    return Advice(verdict=cause, reasons=levers)


def autoscale_signal(signal: str) -> Advice:
    """Whether to scale on a signal: KV occupancy and queues lead, compute load misleads."""
    if signal in ("kv occupancy", "queue depth", "concurrency"):
        return Advice(verdict="use", reasons=("it rises before latency does",))
    return Advice(verdict="reject", reasons=("compute load stays high or falls when KV runs out",))


def benchmark_advice(prompt_tokens_median: float, *, traffic_tokens_median: float) -> Advice:
    """Whether a benchmark's prompts say anything about this traffic."""
    if prompt_tokens_median < 0.25 * traffic_tokens_median:
        reasons = (
            f"prompts of {prompt_tokens_median:g} tokens against {traffic_tokens_median:g}: "
            "prefill and KV are hardly exercised",
        )
        return Advice(verdict="discard", reasons=reasons)
    return Advice(verdict="keep", reasons=("prompt lengths are alike",))
