"""Policies by name: our own, the baselines, and how other engines decide.

A profile imitates the decisions of one version of an engine, so that a fleet that runs it
can be predicted.  It is data: what differs from ours is a field of `Policy`.
"""

from dataclasses import dataclass

from tierline.scheduling.policy import (
    BASELINES,
    FCFS,
    TIERLINE,
    Policy,
    by_cached_prefix,
    fewest_outputs,
)

VLLM_V1 = Policy(name="vllm-v1")
SGLANG = Policy(
    name="sglang",
    key=by_cached_prefix,
    victim=fewest_outputs,
    mixes=False,
    reserves_output=0.3,
    longest_prefix_first_below=128,
)
TRTLLM_NO_EVICT = Policy(name="trtllm-no-evict", reserves_output=1.0)
TRTLLM_MAX_UTILIZATION = Policy(name="trtllm-max-utilization")
STATIC = Policy(name="static", mixes=False, reserves_output=1.0, gathers=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An engine as far as its decisions can be imitated."""

    policy: Policy
    engine: str  # name of its `perf` engine profile: host time and batch tokens
    imitates: str  # version, and what was read to say so


PROFILES = {
    "vllm-v1": Profile(
        policy=VLLM_V1,
        engine="vllm",
        imitates="vLLM 0.11-0.19, V1 scheduler: running requests first, then arrival order, one "
        "token budget, prefix cache, preemption of the youngest by recompute",
    ),
    "sglang": Profile(
        policy=SGLANG,
        engine="sglang",
        imitates="SGLang 0.5: prompts in steps of their own, longest cached prefix first below 128 "
        "waiting, a share of the output reserved, retraction of the fewest outputs",
    ),
    "trtllm-no-evict": Profile(
        policy=TRTLLM_NO_EVICT,
        engine="trtllm",
        imitates="TensorRT-LLM 1.0, GUARANTEED_NO_EVICT: admits what can run to its limit",
    ),
    "trtllm-max-utilization": Profile(
        policy=TRTLLM_MAX_UTILIZATION,
        engine="trtllm",
        imitates="TensorRT-LLM 1.0, MAX_UTILIZATION: packs, and pauses when memory is short",
    ),
    "static": Profile(
        policy=STATIC,
        engine="vllm",
        imitates="static batching: a batch is gathered, computed to its last token, and padded",
    ),
}
POLICIES: dict[str, Policy] = {p.name: p for p in (TIERLINE, *BASELINES)} | {
    name: profile.policy for name, profile in PROFILES.items()
}
assert FCFS.name in POLICIES
