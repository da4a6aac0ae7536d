"""Paged attention in Triton: what runs on the device.  `attention_cuda` launches it.

Every number that tells two models apart is a constant of its own compilation; numbers that
change from step to step are arguments, and those that would be specialised on are excepted.

`parts`, `part` and `table_row` find a page: block b of sequence s has its at
`table[s * table_row + b * parts + part]`.  Strides are named after what they step over and
count elements.  Offsets into the cache are 64 bits wide: an arena may exceed 2^31 elements.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("table_row", "part"))
def write(
    k,
    v,
    cache,
    sequences,
    positions,
    table,
    k_token,
    v_token,
    cache_page,
    cache_value,
    cache_token,
    table_row,
    part,
    parts: tl.constexpr,
    block_tokens: tl.constexpr,
    elements: tl.constexpr,
    width: tl.constexpr,
    latent: tl.constexpr,
):
    """One token: what all its heads have in k and v goes into its slot."""
    token = tl.program_id(0)
    position = tl.load(positions + token)
    entry = position // block_tokens * parts + part
    page = tl.load(table + tl.load(sequences + token) * table_row + entry).to(tl.int64)
    slot = cache + page * cache_page + position % block_tokens * cache_token
    element = tl.arange(0, width)
    real = element < elements
    key = tl.load(k + token.to(tl.int64) * k_token + element, mask=real)
    tl.store(slot + element, key, mask=real)
    if not latent:
        value = tl.load(v + token.to(tl.int64) * v_token + element, mask=real)
        tl.store(slot + cache_value + element, value, mask=real)


@triton.jit
def _take_in(best, weight, total, scores, value):
    """More keys for a softmax that is under way (online softmax, arXiv 1805.02867).

    `total` is the sum of values weighted by 2^(score - best), `weight` that of the weights.
    """
    better = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(better == float("-inf"), 0.0, better)  # nothing seen so far
    p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(best - base)
    weight = weight * fade + tl.sum(p, 1)
    total = total * fade[:, None]
    total += tl.dot(p.to(value.dtype), value, input_precision="ieee")
    return better, weight, total


@triton.jit(do_not_specialize=("table_row", "part"))
def attend(
    q,
    cache,
    out,
    sums,
    marks,
    tiles,
    starts,
    lengths,
    table,
    scale,
    q_token,
    q_head,
    cache_page,
    cache_value,
    cache_token,
    cache_head,
    table_row,
    part,
    parts: tl.constexpr,
    block_tokens: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    head_width: tl.constexpr,
    value_width: tl.constexpr,
    rows: tl.constexpr,
    heads: tl.constexpr,
    keys: tl.constexpr,
    split: tl.constexpr,
):
    """A tile of queries over its keys, or over its share of them.

    Row r of the tile is token r // heads and head r % heads.  `scale` includes log2 e.
    """
    tile = tl.program_id(0)
    shares: tl.constexpr = (group + heads - 1) // heads  # tiles that share a KV head
    kv_head = tl.program_id(1) // shares
    tokens: tl.constexpr = rows // heads
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    after = tl.load(starts + sequence + 1)
    length = tl.load(lengths + sequence)

    row = tl.arange(0, rows)
    token = first + row // heads
    in_group = tl.program_id(1) % shares * heads + row % heads
    real = (row < tokens * heads) & (token < after) & (in_group < group)
    head = kv_head * group + in_group
    position = length - after + token
    dim = tl.arange(0, head_width)
    at = token.to(tl.int64) * q_token + head * q_head
    query = tl.load(
        q + at[:, None] + dim[None, :],
        mask=real[:, None] & (dim < head_dim)[None, :],
        other=0.0,
    )

    low = 0
    if window > 0:
        low = tl.maximum(length - after + first - window + 1, 0)
    high = tl.minimum(length - after + first + tokens, length)
    if split:
        share = tl.cdiv(tl.cdiv(high - low, keys), tl.num_programs(2)) * keys
        low += tl.program_id(2) * share
        high = tl.minimum(low + share, high)

    element = tl.arange(0, value_width)
    best = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    total = tl.zeros([rows, value_width], tl.float32)
    for start in range(low, high, keys):
        n = start + tl.arange(0, keys)
        held = n < high
        entry = n // block_tokens * parts + part
        page = tl.load(table + sequence * table_row + entry, mask=held, other=0).to(tl.int64)
        slot = page * cache_page + n % block_tokens * cache_token + kv_head * cache_head
        key = tl.load(
            cache + slot[None, :] + dim[:, None],
            mask=held[None, :] & (dim < head_dim)[:, None],
            other=0.0,
        )
        distance = position[:, None] - n[None, :]
        seen = held[None, :] & (distance >= 0)
        if window > 0:
            seen = seen & (distance < window)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        value = tl.load(
            cache + cache_value + slot[:, None] + element[None, :],
            mask=held[:, None] & (element < value_dim)[None, :],
            other=0.0,
        )
        best, weight, total = _take_in(best, weight, total, scores, value)

    kv_heads = tl.num_programs(1) // shares
    wanted = real[:, None] & (element < value_dim)[None, :]
    if split:  # one token a tile
        at = (tile.to(tl.int64) * kv_heads * group + head) * tl.num_programs(2) + tl.program_id(2)
        tl.store(sums + at[:, None] * value_dim + element[None, :], total, mask=wanted)
        tl.store(marks + at * 2, best, mask=real)
        tl.store(marks + at * 2 + 1, weight, mask=real)
    else:
        at = (token.to(tl.int64) * kv_heads * group + head) * value_dim
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(out + at[:, None] + element[None, :], total, mask=wanted)


@triton.jit(do_not_specialize=("splits",))
def merge(
    sums,
    marks,
    out,
    tiles,
    splits,
    value_dim: tl.constexpr,
    value_width: tl.constexpr,
    splits_width: tl.constexpr,
):
    """One head of one token: the parts of its softmax become one."""
    tile, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(tiles + 2 * tile + 1)
    split, element = tl.arange(0, splits_width), tl.arange(0, value_width)
    real = split < splits
    at = (tile.to(tl.int64) * tl.num_programs(1) + head) * splits + split
    best = tl.load(marks + at * 2, mask=real, other=float("-inf"))
    weight = tl.load(marks + at * 2 + 1, mask=real, other=0.0)
    fade = tl.exp2(best - tl.max(best, 0))  # a token sees itself, so the maximum is finite
    part = tl.load(
        sums + at[:, None] * value_dim + element[None, :],
        mask=real[:, None] & (element < value_dim)[None, :],
        other=0.0,
    )
    total = tl.sum(part * fade[:, None], 0) / tl.sum(weight * fade, 0)
    at = (token.to(tl.int64) * tl.num_programs(1) + head) * value_dim
    tl.store(out + at + element, total, mask=element < value_dim)
