"""What resides where: weights, KV, adapters; and tiers that are not attached, with what for."""

from typing import Any

from tierline.server.dashboard_pictures import memory_bar, memory_strip
from tierline.server.dashboard_seen import Seen
from tierline.server.dashboard_words import Shown, number, sentence, share, size
from tierline.server.running import Running

ABSENT = (
    ("DRAM", "dram_bytes", "8GB"),
    ("NVMe", "nvme_bytes", "64GB"),
)


def models_view(seen: Seen, running: Running) -> dict[str, Any]:
    """Everything that the page of models and tiers shows."""
    step = seen.steps[-1] if seen.steps else None
    room = running.rooms[0]
    total = step.kv_pages if step else 0
    free = step.kv_pages_free if step else total
    cached = step.kv_pages_cached if step else 0
    held = total - free - cached
    page_bytes = room.bytes / total if total else 0.0
    blocks = room.tokens // running.block_tokens
    used = {
        "held": held * page_bytes,
        "cached": cached * page_bytes,
        "free": room.bytes - (held + cached) * page_bytes,
    }
    named = {room.tier for room in running.rooms}
    return {
        "answer": sentence(
            [
                f"{running.model} takes {size(running.weight_bytes).text} for its weights and"
                f" {size(room.bytes).text} for the KV of {room.tokens:,} tokens",
                f"{share(held, total).text} of that is held and {share(cached, total).text} kept"
                " for reuse"
                if total
                else "nothing was computed yet, so all of that is free",
            ]
        ),
        "bar": memory_bar([("weights", float(running.weight_bytes)), *used.items()]),
        "parts": [
            ("weights", size(running.weight_bytes)),
            *((k, size(v)) for k, v in used.items()),
        ],
        "strip": memory_strip(step),
        "model": [
            ("name", Shown(running.model)),
            ("architecture", Shown(running.architecture)),
            ("computed in", Shown(running.dtype)),
            ("weights", size(running.weight_bytes)),
            ("device", Shown(running.device)),
            ("kernels", Shown(running.kernels)),
            ("positions, prompt and answer", number(running.positions_max)),
            ("KV block", Shown(f"{running.block_tokens} tokens")),
            ("KV blocks", number(blocks)),
            ("KV bytes a token", number(round(room.bytes / max(room.tokens, 1)))),
            (
                "blocks dropped for room, since the start",
                number(step.kv_evicted_blocks if step else 0),
            ),
        ],
        "absent": [tier for tier in ABSENT if tier[0].lower() not in named],
    }
