"""How long and how much memory the profile of a million requests takes.

    python benchmarks/bench_profile.py [--requests N] [--blocks]

Writes a seeded trace to a temporary folder in a process of its own, profiles it, and prints one
JSON line: seconds and peak resident memory of the profile alone.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tierline.workload.archetypes import workload_profile
from tierline.workload.profile import profile_trace
from tierline.workload.synthesis import write_synthetic

SECONDS_MAX = 30.0
BYTES_MAX = 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--blocks", action="store_true", help="with prefix blocks")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        source = workload_profile("agent" if args.blocks else "chat", rps=20)
        write_synthetic(source, args.write, seed=1, requests=args.requests, arrivals="poisson")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        subprocess.run([sys.executable, *sys.argv, "--write", str(path)], check=True)
        file_bytes = path.stat().st_size
        start = time.perf_counter()
        profile = profile_trace(path)
        seconds = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    passed = seconds < SECONDS_MAX and peak_bytes < BYTES_MAX
    facts = {
        "benchmark": "profile",
        "requests": profile.requests,
        "block_accesses": profile.reuse.accesses if profile.reuse else 0,
        "sample_rate": profile.reuse.sample_rate if profile.reuse else None,
        "file_bytes": file_bytes,
        "seconds": round(seconds, 2),
        "peak_rss_bytes": peak_bytes,
        "passed": passed,
    }
    print(json.dumps(facts))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
