"""A deployment in the words of three engines: their settings, and what they cannot say.

Each function returns settings under the engine's own names and a list of gaps: parts of the
deployment that the engine has no word for, each saying what to do about it. `export` writes
the settings as commands and manifests; nothing here knows a file format.

Names are checked against the argument parsers of vLLM 0.32 and SGLang 0.5.23 themselves
(tests/test_export_proof.py); those of trtllm-serve were read in its source and manual.
"""

from typing import Any

from tierline.catalog.deployment import Deployment, Speculation
from tierline.catalog.gpu import GpuSpec

Settings = dict[str, Any]

VLLM_VERSION = "0.32.0"

_VLLM_ORDER = "it orders by the request field `priority`, smallest first: send ours negated"
_SGLANG_ORDER = "it orders by the request field `priority`, largest first"
_TRTLLM_ORDER = "it serves first come, first served"
_FROM_CHECKPOINT = "the engine reads this format from a checkpoint that is already in it"
_VLLM_KV = {"bf16": "auto", "fp8": "fp8", "int8": "int8_per_token_head", "nvfp4": "nvfp4"}
_VLLM_DRAFTS = {"draft-model": "draft_model"}
_SGLANG_KV = {"bf16": "bf16", "fp8": "fp8_e4m3", "nvfp4": "nvfp4"}
_SGLANG_WEIGHTS = {"fp8": "fp8", "int8": "w8a8_int8"}
_SGLANG_DRAFTS = {"draft-model": "STANDALONE", "eagle": "EAGLE", "eagle3": "EAGLE3"}
_SGLANG_DRAFTS |= {"mtp": "NEXTN", "ngram": "NGRAM"}
_TRTLLM_KV = {"bf16": "auto", "fp8": "fp8", "nvfp4": "nvfp4"}
_TRTLLM_DRAFTS = {"draft-model": "Draft_Target", "eagle3": "Eagle3", "mtp": "MTP", "ngram": "NGram"}
_DRAFT_HAS_WEIGHTS = ("draft-model", "eagle", "eagle3", "medusa")


def vllm_settings(d: Deployment) -> tuple[Settings, list[str]]:
    """Engine arguments of vLLM by their Python names (flags: dashes), and the gaps.

    With attention data parallelism every rank is an engine of its own, so limits and host
    memory of the instance are divided among them.
    """
    gaps = _service_level_gaps(d, order=_VLLM_ORDER) + _tier_gaps(d, expressed=("device", "dram"))
    settings: Settings = {
        "tensor_parallel_size": d.parallel.tp,
        "pipeline_parallel_size": d.parallel.pp,
    }
    if d.parallel.dp > 1:
        settings["data_parallel_size"] = d.parallel.dp
    if d.parallel.ep > 1:
        settings["enable_expert_parallel"] = True
        gaps += _expert_gap(d)
    settings |= {
        "max_model_len": d.limits.context_tokens_max,
        "max_num_seqs": _share(d.limits.sequences_max, d.parallel.dp),
        "max_num_batched_tokens": _step_tokens(d),
        "gpu_memory_utilization": d.gpu_memory_utilization,
        "block_size": d.kv_block_tokens,
        "kv_cache_dtype": _VLLM_KV[d.kv_format],
        "enable_prefix_caching": d.policies.prefix_cache,
        "enable_chunked_prefill": d.policies.chunked_prefill,
        "scheduling_policy": "fcfs" if d.policies.scheduler == "fcfs" else "priority",
    }
    longest = min(settings["max_num_batched_tokens"], d.limits.context_tokens_max)
    if d.policies.chunked_prefill and d.policies.chunk_tokens < longest:
        settings["long_prefill_token_threshold"] = d.policies.chunk_tokens
    if d.weight_format in ("fp8", "fp8-block"):
        settings["quantization"] = "fp8"
    elif d.weight_format == "fp32":
        settings["dtype"] = "float32"
    gaps += _weight_gap(d, expressed=("fp8", "fp8-block", "fp32"))
    if d.model.revision:
        settings["revision"] = d.model.revision
    if dram_bytes := _dram_bytes(d):
        settings["kv_offloading_size"] = round(dram_bytes / d.parallel.dp / 2**30, 3)
        settings["kv_offloading_backend"] = "native"
    if d.policies.speculation:
        speculation, missing = _vllm_speculation(d.policies.speculation)
        settings["speculative_config"] = speculation
        gaps += missing
    return settings, gaps


def sglang_settings(d: Deployment) -> tuple[Settings, list[str]]:
    """Server arguments of SGLang by their Python names, and the gaps."""
    gaps = _service_level_gaps(d, order=_SGLANG_ORDER) + _tier_gaps(d, expressed=("device", "dram"))
    ranks = d.parallel.tp * d.parallel.dp
    settings: Settings = {"tensor_parallel_size": ranks, "pipeline_parallel_size": d.parallel.pp}
    if d.parallel.dp > 1:
        settings["attn_dp_size"] = d.parallel.dp
    if d.parallel.ep > 1:
        settings["expert_parallel_size"] = d.parallel.ep
    chunk = min(d.policies.chunk_tokens, d.limits.batch_tokens_max)
    settings |= {
        "context_length": d.limits.context_tokens_max,
        "max_running_requests": d.limits.sequences_max,
        "max_prefill_tokens": d.limits.batch_tokens_max,
        "chunked_prefill_size": chunk if d.policies.chunked_prefill else -1,
        "mem_fraction_static": d.gpu_memory_utilization,
        "page_size": d.kv_block_tokens,
        "kv_cache_dtype": _SGLANG_KV.get(d.kv_format, "auto"),
        "schedule_policy": "fcfs",
        "host": "0.0.0.0",  # its default is this machine only
        "port": 8000,
    }
    gaps.append(
        f"gpu_memory_utilization {d.gpu_memory_utilization:g}: mem_fraction_static counts weights"
        " and KV cache only; lower it when activations run out of memory"
    )
    if d.kv_format not in _SGLANG_KV:
        gaps.append(f"KV format {d.kv_format}: SGLang has none; the model's own is used")
    if d.weight_format in _SGLANG_WEIGHTS:
        settings["quantization"] = _SGLANG_WEIGHTS[d.weight_format]
    elif d.weight_format == "fp32":
        settings["dtype"] = "float32"
    gaps += _weight_gap(d, expressed=("fp8", "fp32"))
    if not d.policies.prefix_cache:
        settings["disable_radix_cache"] = True
    if d.policies.scheduler != "fcfs":
        settings["enable_priority_scheduling"] = True
    if d.model.revision:
        settings["revision"] = d.model.revision
    if dram_bytes := _dram_bytes(d):
        settings["enable_hierarchical_cache"] = True
        settings["hicache_size"] = max(round(dram_bytes / d.gpus_per_instance / 1e9), 1)
    if d.policies.speculation:
        speculation, missing = _sglang_speculation(d.policies.speculation)
        settings |= speculation
        gaps += missing
    return settings, gaps


def trtllm_settings(d: Deployment) -> tuple[Settings, Settings, list[str]]:
    """Options of `trtllm-serve`, the tables of its configuration file, and the gaps."""
    gaps = _service_level_gaps(d, order=_TRTLLM_ORDER) + _tier_gaps(d, expressed=("device", "dram"))
    ranks = d.parallel.tp * d.parallel.dp
    options: Settings = {
        "host": "0.0.0.0",  # its default is this machine only
        "backend": "pytorch",
        "tp_size": ranks,
        "pp_size": d.parallel.pp,
        "max_batch_size": _share(d.limits.sequences_max, d.parallel.dp),
        "max_num_tokens": _step_tokens(d),
        "max_seq_len": d.limits.context_tokens_max,
    }
    if d.parallel.ep > 1:
        options["ep_size"] = d.parallel.ep
    if d.model.revision:
        options["revision"] = d.model.revision
    cache: Settings = {
        "dtype": _TRTLLM_KV.get(d.kv_format, "auto"),
        "enable_block_reuse": d.policies.prefix_cache,
        "free_gpu_memory_fraction": d.gpu_memory_utilization,
        "tokens_per_block": d.kv_block_tokens,
    }
    if dram_bytes := _dram_bytes(d):
        cache["host_cache_size"] = dram_bytes // d.gpus_per_instance
    tables: Settings = {
        "kv_cache_config": cache,
        "enable_chunked_prefill": d.policies.chunked_prefill,
    }
    gaps += [
        f"gpu_memory_utilization {d.gpu_memory_utilization:g}: free_gpu_memory_fraction is taken"
        " of what is free after the weights, so the KV cache comes out smaller",
        f"chunk of {d.policies.chunk_tokens} tokens: chunks are bounded by max_num_tokens only",
    ]
    if d.kv_format not in _TRTLLM_KV:
        gaps.append(f"KV format {d.kv_format}: not offered; the model's own is used")
    gaps += _weight_gap(d, expressed=())
    if d.parallel.dp > 1 and d.parallel.tp == 1:
        tables["enable_attention_dp"] = True
    elif d.parallel.dp > 1:
        gaps.append(
            f"attention data parallelism {d.parallel.dp} with TP {d.parallel.tp}: attention is"
            " either cut by all ranks, as written, or by none of them (enable_attention_dp)"
        )
    if d.policies.speculation:
        speculation, missing = _trtllm_speculation(d.policies.speculation)
        tables |= speculation
        gaps += missing
    return options, tables, gaps


def fleet_gaps(d: Deployment) -> list[str]:
    """What the command of one instance cannot say about the fleet."""
    gaps = []
    if d.replicas > 1:
        gaps.append(f"{d.replicas} replicas: start this on each instance")
        gaps.append(f"routing {d.policies.routing}: put a router in front of the instances")
    if split := d.policies.disaggregation:
        gaps.append(
            f"disaggregation, {split.prefill_instances} prefill and {split.decode_instances}"
            " decode instances: needs the engine's KV connector and a proxy that knows the roles"
        )
    return gaps


def node_gaps(d: Deployment, gpu: GpuSpec) -> list[str]:
    """What one command cannot say about an instance that spans nodes."""
    if d.gpus_per_instance <= gpu.gpus_per_node:
        return []
    nodes = -(-d.gpus_per_instance // gpu.gpus_per_node)
    return [
        f"an instance of {d.gpus_per_instance} GPUs spans {nodes} nodes: start every node's part"
    ]


def _service_level_gaps(d: Deployment, *, order: str) -> list[str]:
    """Targets and deadlines; `order` says what the engine goes by instead."""
    gaps = [
        f"service level {level.name}, priority {level.priority}: {', '.join(level.targets)}"
        " (engines have no latency targets; watch them)"
        for level in d.slo
    ]
    scheduler = d.policies.scheduler
    if scheduler in ("tierline", "edf"):
        gaps.append(f"{scheduler} scheduling: the engine knows no deadlines, {order}")
    elif scheduler != "fcfs":
        gaps.append(f"{scheduler} scheduling: {order}")
    return gaps


def _tier_gaps(d: Deployment, *, expressed: tuple[str, ...]) -> list[str]:
    return [
        f"tier {tier.name}, {tier.capacity_bytes / 1e9:g} GB: needs a KV store such as LMCache"
        for tier in d.tiers
        if tier.enabled and tier.capacity_bytes and tier.name not in expressed
    ]


def _weight_gap(d: Deployment, *, expressed: tuple[str, ...]) -> list[str]:
    if d.weight_format == "fp8" and "fp8" in expressed:
        return [
            "weights in fp8: made from a 16-bit checkpoint while loading; leave the flag out"
            " for a checkpoint that is FP8 in a scheme of its own"
        ]
    if d.weight_format in (*expressed, "bf16"):
        return []
    return [f"weights in {d.weight_format}: {_FROM_CHECKPOINT}"]


def _expert_gap(d: Deployment) -> list[str]:
    ranks = d.parallel.tp * d.parallel.dp
    if d.parallel.ep == ranks:
        return []
    return [f"expert parallelism {d.parallel.ep}: experts are spread over all {ranks} ranks"]


def _draft_gap(speculation: Speculation) -> list[str]:
    gaps = [f"planned acceptance {speculation.acceptance:g} of drafted tokens: measured, not set"]
    if speculation.method in _DRAFT_HAS_WEIGHTS and not speculation.draft_model:
        gaps.append(f"speculation {speculation.method}: name its draft model before starting")
    return gaps


def _vllm_speculation(speculation: Speculation) -> tuple[Settings, list[str]]:
    method = _VLLM_DRAFTS.get(speculation.method, speculation.method)
    config: Settings = {"method": method, "num_speculative_tokens": speculation.draft_tokens}
    if speculation.draft_model:
        config["model"] = speculation.draft_model
    return config, _draft_gap(speculation)


def _sglang_speculation(speculation: Speculation) -> tuple[Settings, list[str]]:
    algorithm = _SGLANG_DRAFTS.get(speculation.method)
    if algorithm is None:
        return {}, [f"speculation {speculation.method}: SGLang has no such method; it is off"]
    settings: Settings = {"speculative_algorithm": algorithm}
    if algorithm != "NGRAM":  # one chain of drafts, and the verified token beside them
        settings["speculative_num_steps"] = speculation.draft_tokens
        settings["speculative_eagle_topk"] = 1
    settings["speculative_num_draft_tokens"] = speculation.draft_tokens + 1
    if speculation.draft_model:
        settings["speculative_draft_model_path"] = speculation.draft_model
    return settings, _draft_gap(speculation)


def _trtllm_speculation(speculation: Speculation) -> tuple[Settings, list[str]]:
    decoding = _TRTLLM_DRAFTS.get(speculation.method)
    if decoding is None:
        return {}, [f"speculation {speculation.method}: no such method; it is off"]
    config: Settings = {"decoding_type": decoding, "max_draft_len": speculation.draft_tokens}
    if speculation.draft_model:
        config["speculative_model"] = speculation.draft_model
    return {"speculative_config": config}, _draft_gap(speculation)


def _dram_bytes(d: Deployment) -> int:
    return sum(t.capacity_bytes for t in d.tiers if t.name == "dram" and t.enabled)


def _step_tokens(d: Deployment) -> int:
    """Tokens of a step of one attention rank.

    Every running sequence gets its token, and without chunking a whole prompt must fit.
    """
    tokens = _share(max(d.limits.batch_tokens_max, d.limits.sequences_max), d.parallel.dp)
    return tokens if d.policies.chunked_prefill else max(tokens, d.limits.context_tokens_max)


def _share(amount: int, parts: int) -> int:
    return -(-amount // parts)
