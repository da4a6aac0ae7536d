"""How fast is a model ready, and what does it cost beside its weights and its cache?

Question   seconds from the constructor to the first token; resident memory that is neither
           weights nor cache, at its peak and after serving.
Budget     300 MB beside weights and cache; ready in 5 s.
Baseline   copying the same file out of the page cache with one thread, in the same run.
Method     a fresh process for each sample, with the kernels built before.  After it is ready it
           serves a prompt of 1,024 tokens and 16 requests at once, which touches whatever
           buffers serving needs.  Of the cache only what lies in memory counts; pages of the
           file that are still mapped count as ours, although the system may take them back.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from engine_models import Model, demo_model, random_model
from engine_process import Worker, status_bytes
from tierline.engine import native
from tierline.engine.demo import find_demo

ROUNDS = 3
LIMIT_S = 120
BESIDE_ASKED_MB, READY_ASKED_S = 300, 5.0
SERVED = ({"count": 1, "tokens": 1024, "output_tokens": 2}, {"count": 16, "tokens": 128})


def copy_s(path: Path) -> float:
    """Seconds to read a file that lies in the page cache."""
    buffer = bytearray(16 << 20)
    start_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start_s


def sample(model: Model, folder: Path) -> dict[str, float]:
    """One process: opened, asked, looked at."""
    file = model.own if model.own.is_file() else model.own / "model.safetensors"
    copy_s(file)  # into the page cache
    copied_s = copy_s(file)
    worker = Worker("tierline", sys.executable, env={}, log=folder / "load.log")
    try:
        ready = worker.ask(
            LIMIT_S,
            do="open",
            own=str(model.own),
            kernels=str(folder / "kernels"),
            vocabulary=model.vocabulary,
        )
        pid = worker.process.pid
        peak_open = status_bytes(pid, "VmHWM")
        for served in SERVED:
            command = {"output_tokens": 16, "shared": 0, "seed": 1, **served}
            worker.ask(LIMIT_S, do="generate", **command)
        facts = worker.ask(LIMIT_S, do="facts")
        now, peak = status_bytes(pid, "VmRSS"), status_bytes(pid, "VmHWM")
    finally:
        worker.end()
    weights, cache = facts["weight_bytes"], facts["kv_bytes"]
    return {
        "imported_s": ready["imported_s"],
        "opened_s": ready["opened_s"],
        "ready_s": ready["ready_s"],
        "opened_per_copy": ready["opened_s"] / copied_s,
        "copy_gb_per_s": file.stat().st_size / copied_s / 1e9,
        "weights_mb": weights / 1e6,
        "peak_while_opening_beside_weights_mb": (peak_open - weights) / 1e6,
        "peak_beside_mb": (peak - weights - cache) / 1e6,
        "serving_beside_mb": (now - weights - cache) / 1e6,
    }


def main() -> None:
    """One JSON line a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--demo", type=Path, help="SmolLM2's GGUF; found where it was fetched to")
    parser.add_argument("--folder", type=Path, help="for models and kernels; kept")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.gettempdir()) / "tierline-bench-engine"
    folder.mkdir(parents=True, exist_ok=True)
    native.load(folder / "kernels")
    models = [random_model(folder)]
    if demo := asked.demo or find_demo():
        models.append(demo_model(folder, demo))
    for model in models:
        samples = [sample(model, folder) for _ in range(ROUNDS)]
        figures = {key: statistics.median(s[key] for s in samples) for key in samples[0]}
        within = {
            "memory": figures["serving_beside_mb"] <= BESIDE_ASKED_MB,
            "ready": figures["ready_s"] <= READY_ASKED_S,
        }
        rounded = {key: round(value, 2) for key, value in figures.items()}
        print(
            json.dumps({"benchmark": "engine_load", "model": model.title, **rounded, "met": within})
        )


if __name__ == "__main__":
    main()
