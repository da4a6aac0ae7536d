"""Values that several property tests draw."""

from hypothesis import strategies as st

from tierline.catalog.deployment import (
    ROUTINGS,
    SCHEDULERS,
    SPECULATION_METHODS,
    TIERS,
    Deployment,
    Disaggregation,
    Limits,
    ModelRef,
    Parallel,
    Planned,
    Policies,
    SloClass,
    Speculation,
    Tier,
)
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS

# What people put into TOML strings: quotes, escapes, other scripts; never blank.
letters = st.characters(codec="utf-8").filter(str.isprintable)
words = st.text(letters, min_size=1, max_size=12).filter(str.strip)
powers_of_two = st.sampled_from([1, 2, 4, 8])
rates = st.floats(min_value=0, max_value=1e9) | st.integers(0, 10**9)
factors = st.floats(min_value=1e-3, max_value=1e3) | st.integers(1, 9)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """Any deployment that does not contradict itself."""
    tp, dp = draw(powers_of_two), draw(powers_of_two)
    split = draw(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
    context_tokens_max = draw(st.integers(1, 10**6))
    others = draw(st.lists(st.sampled_from(TIERS[1:]), unique=True))
    return Deployment(
        model=draw(
            st.builds(
                ModelRef,
                name=words,
                hf_id=st.none() | words,
                config=st.none() | words,
                revision=st.none() | words,
            )
        ),
        gpu=draw(st.sampled_from(["h100-sxm", "mi300x", "b200", "l40s"])),
        replicas=sum(split) if split else draw(st.integers(1, 999)),
        weight_format=draw(st.sampled_from(sorted(WEIGHT_FORMATS))),
        kv_format=draw(st.sampled_from(sorted(KV_FORMATS))),
        kv_block_tokens=draw(st.sampled_from([1, 16, 64, 128])),
        gpu_memory_utilization=draw(st.floats(min_value=0.01, max_value=1)),
        parallel=Parallel(
            tp=tp, dp=dp, pp=draw(powers_of_two), ep=draw(st.sampled_from([1, tp, tp * dp]))
        ),
        limits=Limits(
            batch_tokens_max=context_tokens_max + draw(st.integers(0, 10**6)),
            sequences_max=draw(st.integers(1, 4096)),
            context_tokens_max=context_tokens_max,
        ),
        policies=draw(
            st.builds(
                Policies,
                scheduler=st.sampled_from(SCHEDULERS),
                chunked_prefill=st.booleans(),
                chunk_tokens=st.integers(1, 10**6),
                prefix_cache=st.booleans(),
                routing=st.sampled_from(ROUTINGS),
                speculation=st.none()
                | st.builds(
                    Speculation,
                    method=st.sampled_from(SPECULATION_METHODS),
                    draft_tokens=st.integers(1, 16),
                    acceptance=st.floats(min_value=0, max_value=1),
                    draft_model=st.none() | words,
                ),
                disaggregation=st.just(
                    Disaggregation(prefill_instances=split[0], decode_instances=split[1])
                    if split
                    else None
                ),
            )
        ),
        tiers=(
            Tier(name="device", capacity_bytes=draw(st.integers(0, 10**13))),
            *(
                Tier(name=name, capacity_bytes=draw(st.integers(0, 10**14)), enabled=bool(i % 2))
                for i, name in enumerate(others)
            ),
        ),
        slo=tuple(
            SloClass(name=name, priority=i * 10 - 5, targets=("ttft_p99=2s", "itl_p99=50ms"))
            for i, name in enumerate(draw(st.lists(words, unique=True, max_size=3)))
        ),
        planned=draw(
            st.none()
            | st.builds(
                Planned,
                offered_rps=rates,
                usable_rps_per_instance=rates,
                growth=factors,
                safety=factors,
                created_by=words,
                created=st.none() | st.just("2026-11-21"),
            )
        ),
    )
