"""Policies by name: our own, the baselines, and how other engines decide.

A profile imitates the decisions of one version of an engine, so that a fleet that runs it
can be predicted.  It is data: what differs from ours is a field of `Policy`.  What was read
is named with each; what is known not to be imitated, too.
"""

from dataclasses import dataclass

from tierline.scheduling.policy import (
    BASELINES,
    TIERLINE,
    Policy,
    by_cached_prefix,
    fewest_outputs,
)

VLLM_V1 = Policy(name="vllm-v1", prompts_preempt=True)
SGLANG = Policy(
    name="sglang",
    victim=fewest_outputs,
    mixes=False,
    reserves_output=0.1,  # of those that run: 0.7 at the start, 0.098 from 600 steps on
    reserves_max_tokens=4096,
)
SGLANG_LPM = Policy(
    name="sglang-lpm",
    key=by_cached_prefix,
    victim=fewest_outputs,
    mixes=False,
    reserves_output=0.1,
    reserves_max_tokens=4096,
    longest_prefix_first_below=128,
)
TRTLLM_NO_EVICT = Policy(name="trtllm-no-evict", reserves_output=1.0)
TRTLLM_MAX_UTILIZATION = Policy(name="trtllm-max-utilization", prompts_preempt=True)
STATIC = Policy(name="static", mixes=False, reserves_output=1.0, gathers=True)

_SGLANG_READ = (
    "SGLang at commit 00550cd (schedule_policy.py, schedule_batch.py): prompts in steps of their "
    "own and before decodes; room for a tenth of what those that run may still say and for all "
    "that a newcomer may, at most 4,096 tokens each; whoever has said least is retracted. Not "
    "imitated: that share is 0.7 for the first steps and rises after a retraction"
)


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
        imitates="vLLM's V1 scheduler at commit 00024d3 (v1/core/sched/scheduler.py): those that "
        "run go first, in order of arrival, out of one token budget; nobody enters in a step "
        "that preempted; memory is taken from the last that entered, and recomputed",
    ),
    "sglang": Profile(policy=SGLANG, engine="sglang", imitates=_SGLANG_READ + "; first come first"),
    "sglang-lpm": Profile(
        policy=SGLANG_LPM,
        engine="sglang",
        imitates=_SGLANG_READ + ", and that one of several with an equal new prefix goes first; "
        "--schedule-policy lpm: longest cached prefix first while no more than 128 wait",
    ),
    "trtllm-no-evict": Profile(
        policy=TRTLLM_NO_EVICT,
        engine="trtllm",
        imitates="TensorRT-LLM at commit 02a10fe (capacityScheduler.cpp), GUARANTEED_NO_EVICT, its "
        "default: in order of arrival, whoever can run to its limit beside those that do. Not "
        "imitated: a prompt waits a step for a prefix that another one is computing",
    ),
    "trtllm-max-utilization": Profile(
        policy=TRTLLM_MAX_UTILIZATION,
        engine="trtllm",
        imitates="TensorRT-LLM at commit 02a10fe (capacityScheduler.cpp), MAX_UTILIZATION: packs "
        "what fits into the next step, and pauses the last that started when memory is short",
    ),
    "static": Profile(
        policy=STATIC,
        engine="vllm",
        imitates="static batching (TensorRT-LLM's STATIC_BATCH): a batch that can run to its "
        "limits is gathered, computed to its last token, and padded",
    ),
}
POLICIES: dict[str, Policy] = {p.name: p for p in (TIERLINE, *BASELINES)} | {
    name: profile.policy for name, profile in PROFILES.items()
}
