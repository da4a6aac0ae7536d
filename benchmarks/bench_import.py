"""Does a command answer before one notices?

Question   how long do `import tierline` and `tierline --help` take, in a fresh process?
Budget     300 ms each: above it a command line feels slow.
Baseline   `python -c pass`: what the interpreter alone takes.
Method     median of 15 processes each, taken in turns, after one that warms the disk cache.
"""

import json
import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "baseline": ["-c", "pass"],
    "import": ["-c", "import tierline"],
    "help": ["-c", "from tierline.cli import main; main(['--help'])"],
}
RUNS = 15
BUDGET_MS = 300.0


def elapsed_ms(arguments: list[str]) -> float:
    start_ns = time.perf_counter_ns()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter_ns() - start_ns) / 1e6


def main() -> None:
    for arguments in COMMANDS.values():
        elapsed_ms(arguments)
    rounds = [{name: elapsed_ms(a) for name, a in COMMANDS.items()} for _ in range(RUNS)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in COMMANDS}
    print(
        json.dumps(
            {
                "benchmark": "import",
                **{f"{name}_ms_median": round(ms, 1) for name, ms in medians.items()},
                "budget_ms": BUDGET_MS,
                "within_budget": max(medians["import"], medians["help"]) <= BUDGET_MS,
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
