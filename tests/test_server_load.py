"""Under load, with clients that leave at any instant, the server's books agree: every request that
was taken in has exactly one outcome, in the database, the log and the metrics, and afterwards
nothing runs and no block is held.

The clients and the comparison are the soak's (benchmarks/bench_server_soak.py).
"""

import asyncio
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from demo_model import demo_model
from server_process import serving
from tiny_checkpoints import tiny_chat_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from bench_server_soak import SLOPE_MAX_MB_PER_MIN, clients, never_ended, slope, told_by, wrong

NAME = "tiny-llama"  # as a server calls what lies in this folder
FEW_BLOCKS = ("--device=cpu", "--kernels=torch", "--kv-bytes=2MB")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_checkpoint(tmp_path_factory.mktemp("load"), max_position_embeddings=1024)


def loaded(
    path: Path,
    tmp_path: Path,
    *options: str,
    model: str = NAME,
    count: int,
    seconds: float,
    stay_s: float,
    first: str = "",
) -> tuple[dict[str, int], list[str]]:
    """How many requests ended how, and what does not agree afterwards."""
    data = tmp_path / "data"
    options = (*options, f"--data={data}", "--drain=5")
    with serving(path, *options, log=tmp_path / "log", first=first) as server:
        seen = asyncio.run(clients(server.port, count, seconds, seed=1, model=model, stay_s=stay_s))
        told = told_by(server, data)
        status = server.end()
        told["never_ended"] = never_ended(server)

    assert status == 0
    return told["metrics"], wrong(seen, told)


def test_books_agree_when_clients_leave(tiny: Path, tmp_path: Path) -> None:
    """INV-SRV-1 and INV-SRV-3, in small."""
    outcomes, failures = loaded(tiny, tmp_path, *FEW_BLOCKS, count=24, seconds=2, stay_s=0.2)

    assert not failures
    assert outcomes["length"] > 10
    assert outcomes["cancelled"] > 3


@pytest.mark.slow
def test_books_agree_after_a_real_model_served_sixty(tmp_path: Path) -> None:
    """INV-SRV-1 and INV-SRV-3 on the demo model."""
    demo_model()
    outcomes, failures = loaded(
        Path("demo"), tmp_path, "--kv-bytes=150MB", model="demo", count=60, seconds=20, stay_s=10
    )

    assert not failures
    assert outcomes["length"] > 10
    assert outcomes["cancelled"] > 3


FORGETS = """
from tierline.server.state import State
record, asked = State.record, []
def some(self, usage):
    asked.append(1)
    if len(asked) % 7:
        return record(self, usage)
    import asyncio
    kept = asyncio.get_running_loop().create_future()
    kept.set_result(True)
    return kept
State.record = some
"""
COUNTS_TWICE = """
from tierline.server.recorder import Recorder
end, ended = Recorder.end, []
def twice(self, life, *how):
    end(self, life, *how)
    ended.append(1)
    if len(ended) == 5:
        self._tell(life)
Recorder.end = twice
"""
NO_END = """
from tierline.server.service import Service
end = Service.end
def mostly(self, life, outcome, error=""):
    if outcome != "cancelled":
        return end(self, life, outcome, error)
    life.outcome = outcome
Service.end = mostly
"""
LEAKS = """
from tierline.scheduling.scheduler import Scheduler
give_back, given = Scheduler._give_back, []
def most(self, s):
    give_back(self, s)
    if self.names is not None:  # not a simulated one, which forecasts
        given.append(1)
    if len(given) == 9:
        self.pages.free -= 2
Scheduler._give_back = most
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(FORGETS, "are not recorded as served", id="forgets"),
        pytest.param(COUNTS_TWICE, "metrics say", id="counts twice"),
        pytest.param(NO_END, "[1-9] never ended", id="no end"),
        pytest.param(LEAKS, "[1-9] blocks held", id="leaks"),
    ],
)
def test_books_that_do_not_agree_would_be_seen(
    tiny: Path, tmp_path: Path, fault: str, said: str
) -> None:
    """Negative controls: records are lost, one request counts twice, those that leave never end,
    two pages stay held."""
    _, failures = loaded(tiny, tmp_path, *FEW_BLOCKS, count=24, seconds=1, stay_s=0.2, first=fault)

    assert any(re.search(said, failure) for failure in failures), failures


SEEN: dict[str, Any] = {
    "sent": 3,
    "whole": ["a"],
    "left": ["b"],
    "left_unanswered": 0,
    "broken": {},
}
TOLD: dict[str, Any] = {
    "records": [("a", "stop"), ("b", "cancelled")],
    "logged": [("a", "stop"), ("b", "cancelled")],
    "metrics": {"stop": 1, "cancelled": 1, "refused": 1},
    "never_ended": 0,
    "blocks_held": 0,
    "running": 0,
    "troubles": [],
}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, None),
        ({"records": [*TOLD["records"], ("a", "stop")]}, "recorded twice"),
        ({"records": TOLD["records"][1:], "logged": TOLD["logged"][1:]}, "recorded as served"),
        ({"records": TOLD["records"][:1], "logged": TOLD["logged"][:1]}, "not on record"),
        ({"records": [("a", "error"), ("b", "cancelled")]}, "recorded as served"),
        ({"logged": TOLD["logged"][:1]}, "log and records differ"),
        ({"metrics": {"stop": 2, "cancelled": 1, "refused": 1}}, "metrics say"),
        ({"metrics": {"stop": 1, "cancelled": 1}}, "2 outcomes of 3 sent"),
        ({"never_ended": 1}, "1 never ended"),
        ({"blocks_held": 1}, "1 blocks held"),
        ({"running": 1}, "1 requests running"),
        ({"troubles": [{"level": "warning"}]}, "in the log"),
    ],
)
def test_each_disagreement_is_named(told: dict[str, Any], said: str | None) -> None:
    """Negative controls of the comparison, one for each of its parts."""
    found = wrong(SEEN, TOLD | told)

    if said is None:
        assert not found
    else:
        assert any(said in failure for failure in found), found


def test_a_leak_has_a_slope_and_noise_has_none() -> None:
    """What the soak says of memory: 300 samples, one a second, with 2 MB of noise."""
    draw = random.Random(0)
    flat = [(float(at), 6e8 + draw.gauss(0, 2e6)) for at in range(300)]
    leaks = [(at, rss + at * 4e6 / 60) for at, rss in flat]  # 4 MB a minute

    for samples, grows_mb in ((flat, 0), (leaks, 4)):
        found, error = slope(samples)
        assert abs(found - grows_mb) < 3 * error
        assert (found > SLOPE_MAX_MB_PER_MIN + 2 * error) == bool(grows_mb)
