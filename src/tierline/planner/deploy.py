"""From the chosen candidate to the deployment file that exports and servers read."""

from importlib.metadata import version

from tierline.catalog.deployment import (
    Deployment,
    Limits,
    ModelRef,
    Parallel,
    Planned,
    Policies,
    SloClass,
    Tier,
)
from tierline.planner.replay import OURS, routing_of
from tierline.planner.steps import View


def deployment_of(view: View) -> Deployment:
    """The deployment that the plan recommends, sized at the pessimistic edge."""
    best, question = view.best, view.question
    layout, edge = best.layout, best.pessimistic
    model = question.model
    device_bytes = round(best.memory.kv_bytes * layout.gpus)
    tiers = [Tier(name="device", capacity_bytes=device_bytes)]
    tiers += [
        Tier(name=tier.name, capacity_bytes=tier.bytes_per_instance) for tier in best.lower_tiers
    ]
    return Deployment(
        model=ModelRef(
            name=model.name,
            hf_id=question.hf_id or model.hf_id,
            config=question.config_path,
        ),
        gpu=question.gpu_files.get(best.gpu.name, best.gpu.name),
        replicas=edge.instances,
        weight_format=layout.weights,
        kv_format=layout.kv,
        gpu_memory_utilization=round(1 - best.memory.overhead_bytes / best.gpu.memory_bytes, 4),
        parallel=Parallel(tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.ep),
        limits=Limits(
            batch_tokens_max=max(best.instance.chunk_tokens, best.instance.sequences_max),
            sequences_max=best.instance.sequences_max,
            context_tokens_max=view.load.longest_tokens,
        ),
        policies=Policies(
            scheduler=view.survival.deciding.policy if view.survival else OURS,
            chunked_prefill=True,
            chunk_tokens=best.instance.chunk_tokens,
            prefix_cache=True,
            routing=routing_of(best),
        ),
        tiers=tuple(tiers),
        slo=tuple(
            SloClass(
                name=level.name,
                priority=level.priority,
                targets=tuple(target.text for target in level.targets),
            )
            for level in question.levels
        ),
        planned=Planned(
            offered_rps=view.load.rate_rps,
            usable_rps_per_instance=edge.usable_rps,
            growth=question.growth,
            safety=question.safety,
            created_by=f"tierline {version('tierline')}",
        ),
    )
