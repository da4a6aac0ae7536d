"""The generic shapes that the oracles speak of, built from counts and from no file."""

from tierline.catalog.model import AttentionGroup, FfnGroup, ModelSpec


def decoder(
    name: str,
    *,
    layers: int,
    hidden: int,
    inner: int,
    query_heads: int,
    kv_heads: int,
    vocabulary: int,
    head_dim: int = 128,
    positions_max: int = 131_072,
    window_tokens: int | None = None,
) -> ModelSpec:
    """A dense decoder with gated feed-forward layers and an untied head."""
    projections = hidden * head_dim * (2 * query_heads + 2 * kv_heads)
    return ModelSpec(
        name=name,
        architecture="llama",
        hidden=hidden,
        vocabulary=vocabulary,
        attention=(
            AttentionGroup(
                layers=layers,
                query_heads=query_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                v_head_dim=head_dim,
                kv_elements_per_token=2 * kv_heads * head_dim,
                params_per_layer=projections,
                window_tokens=window_tokens,
            ),
        ),
        ffn=(FfnGroup(layers=layers, dense_params_per_layer=3 * hidden * inner),),
        embedding_params=vocabulary * hidden,
        head_params=vocabulary * hidden,
        norm_params=(2 * layers + 1) * hidden,
        positions_max=positions_max,
        native_format="bf16",
        source="counts of a test",
    )


def r70(kv_heads: int = 8) -> ModelSpec:
    """The 70B shape; 64 KV heads make it MHA and 1 makes it MQA."""
    return decoder(
        f"r70-kv{kv_heads}",
        layers=80,
        hidden=8192,
        inner=28_672,
        query_heads=64,
        kv_heads=kv_heads,
        vocabulary=128_256,
    )


def m7(window_tokens: int | None = 4096) -> ModelSpec:
    """The 7B shape with a sliding window."""
    return decoder(
        "m7",
        layers=32,
        hidden=4096,
        inner=14_336,
        query_heads=32,
        kv_heads=8,
        vocabulary=32_000,
        positions_max=32_768,
        window_tokens=window_tokens,
    )
