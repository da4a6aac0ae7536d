"""A simulation from files: a folder that is whole, that says what it was made from, and from
which the same run comes again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_watch import DEPLOYMENT, crowd
from tierline.base.errors import InputError
from tierline.cli import main
from tierline.planner.simulation import (
    command_of,
    explain_request,
    load,
    read_replay,
    replay_of,
    run_all,
    run_policy,
    write_simulation,
)
from tierline.sim.measure import summary
from tierline.sim.table import read_requests
from tierline.workload.request import Request
from tierline.workload.trace import write_trace


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a deployment and a trace."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "deployment.toml").write_text(DEPLOYMENT)
    write_trace(folder / "crowd.jsonl", crowd(120))
    return folder


@pytest.fixture(scope="module")
def made(inputs: Path) -> Path:
    """The folder of a simulation of two policies."""
    replay = replay_of(
        inputs / "deployment.toml", trace=inputs / "crowd.jsonl", policies=["fcfs", "tierline"]
    )
    write_simulation(run_all(replay, watched=True), inputs / "out")
    return inputs / "out"


def run_cli(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


# --- the folder -----------------------------------------------------------------------------


def test_the_folder_holds_the_same_run_in_every_file(made: Path) -> None:
    told = json.loads((made / "summary.json").read_text())["policies"]
    kept = json.loads((made / "run.json").read_text())
    page = (made / "page.html").read_text()

    assert sorted(p.name for p in made.iterdir()) == [
        "page.html",
        f"requests-{told[1]['policy']}.csv",
        "requests.csv",
        "run.json",
        "summary.json",
        "trace.json.gz",
    ]
    assert {p["policy"]: p["hash"] for p in told} == kept["hashes"]
    assert read_requests(made / "requests.csv").hash() == told[0]["hash"]
    assert told[0]["hash"] in page
    assert told[0]["all"]["good_share"] >= told[1]["all"]["good_share"]
    assert kept["trace_sha256"] in page or kept["trace_sha256"][:16] in page


def test_what_is_read_back_runs_to_the_same_hash(made: Path) -> None:
    """INV-SIM-25."""
    replay, hashes = read_replay(made)
    loaded = load(replay)

    assert {name: run_policy(loaded, name).hash() for name in hashes} == hashes


def test_another_trace_does_not_run_to_that_hash(made: Path, inputs: Path, tmp_path: Path) -> None:
    """Negative control: one token more is another run, and is refused."""
    requests = crowd(120)
    longer = Request(
        arrival_ns=requests[7].arrival_ns,
        input_tokens=requests[7].input_tokens,
        output_tokens=requests[7].output_tokens + 1,
        prefix_blocks=requests[7].prefix_blocks,
        tenant=requests[7].tenant,
    )
    write_trace(tmp_path / "crowd.jsonl", [*requests[:7], longer, *requests[8:]])
    kept = json.loads((made / "run.json").read_text()) | {"trace": str(tmp_path / "crowd.jsonl")}
    (tmp_path / "run.json").write_text(json.dumps(kept))

    replay, hashes = read_replay(tmp_path)
    assert run_policy(load(replay), "fcfs").hash() != hashes["fcfs"]
    with pytest.raises(InputError, match="has changed"):
        explain_request(tmp_path, "5")


def test_a_run_of_another_version_is_refused(made: Path, tmp_path: Path) -> None:
    kept = json.loads((made / "run.json").read_text())
    kept["hashes"] = dict.fromkeys(kept["hashes"], "0123456789abcdef")
    (tmp_path / "run.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match="0123456789abcdef"):
        explain_request(tmp_path, "5")

    for broken in ("[]", "{}", "words", json.dumps(kept | {"tierline_run": 2})):
        (tmp_path / "run.json").write_text(broken)
        with pytest.raises(InputError, match="not a run"):
            read_replay(tmp_path)


def test_equal_inputs_are_equal_folders_under_any_hash_seed(made: Path, inputs: Path) -> None:
    words = ["sim", "deployment.toml", "--trace", "crowd.jsonl", "--compare", "fcfs,tierline"]
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "tierline", *words, "-o", f"seed{seed}/out"],
            cwd=inputs,
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    one, two = inputs / "seed1" / "out", inputs / "seed2" / "out"
    names = sorted(p.name for p in made.iterdir())

    for name in names:
        first, second = (one / name).read_bytes(), (two / name).read_bytes()
        assert first.replace(b"seed1", b"seed2") == second, name
    assert (one / "requests.csv").read_bytes() == (made / "requests.csv").read_bytes()


# --- inputs ---------------------------------------------------------------------------------


def test_the_deployment_says_the_policy_and_the_promises(inputs: Path) -> None:
    replay = replay_of(inputs / "deployment.toml", trace=inputs / "crowd.jsonl")
    loaded = load(replay)

    assert replay.policies == ("fcfs",)
    assert [level.name for level in loaded.levels] == ["default"]
    assert str(loaded.levels[0]) == "ttft_p99 <= 1.00 s, itl_p99 <= 80.0 ms"
    assert "--compare fcfs" in command_of(replay, Path("out"))


def test_a_trace_that_names_only_shared_blocks_shares_only_those(inputs: Path) -> None:
    """The rest of each prompt is its own; with no block named nothing is found."""
    hits = []
    for kept in (1, 0):
        requests = [
            Request(
                arrival_ns=i * 10**9,
                input_tokens=2000,
                output_tokens=10,
                prefix_blocks=(5,) * kept,
            )
            for i in range(40)
        ]
        write_trace(inputs / f"kept{kept}.jsonl", requests)
        replay = replay_of(inputs / "deployment.toml", trace=inputs / f"kept{kept}.jsonl")
        (told,) = run_all(replay).runs
        hits.append(sum(told.requests.cached_tokens))

    assert hits == [512 * 39, 0]  # all but the first


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--trace", "none.jsonl"], "none.jsonl"),
        (["--trace", "crowd.jsonl", "--compare", "tierlin"], "did you mean: tierline"),
        (["--trace", "crowd.jsonl", "--fault", "dyes:replica=0"], "unknown fault"),
        (["--trace", "crowd.jsonl", "--fault", "dies:replica=9,at=1s"], "9"),
        (["--trace", "crowd.jsonl", "--table", "xls", "-o", "x"], "csv.gz"),
        (["--trace", "crowd.jsonl", "--request", "120", "-o", "x"], "0 to 119"),
        (["--trace", "lengths.csv"], "no arrival times"),
        (["--trace", "empty.csv"], "no rows"),
    ],
)
def test_mistakes_end_with_two_and_a_way_out(
    capsys: pytest.CaptureFixture[str],
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(inputs)
    (inputs / "lengths.csv").write_text("input_tokens,output_tokens\n" + "100,10\n" * 50)
    (inputs / "empty.csv").write_text("t_s,input_tokens,output_tokens\n")
    code, out, err = run_cli(capsys, "sim", "deployment.toml", *argv)

    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert not (inputs / "x").exists()


def test_faults_are_inputs_like_any_other(inputs: Path, tmp_path: Path) -> None:
    """They change the run, are on the page, and come back with the folder."""
    words = "dies:replica=0,at=1s,back=4s"
    plain, faulty = (
        replay_of(inputs / "deployment.toml", trace=inputs / "crowd.jsonl", faults=faults)
        for faults in ((), (words,))
    )
    done = run_all(faulty, watched=True)
    write_simulation(done, tmp_path)

    assert done.summaries[0].hash != run_all(plain).summaries[0].hash
    assert done.summaries[0].fleet_events == 2  # broken and mended
    assert "replica 0 dies" in (tmp_path / "page.html").read_text()
    assert read_replay(tmp_path)[0].faults == (words,)
    assert f"--fault {words}" in command_of(faulty, tmp_path)
    lost = [i for i in range(120) if done.runs[0].requests.arrival_ps[i] < 10**12]
    told = [explain_request(tmp_path, str(i)) for i in lost[:6]]
    assert any(h.what == "lost" for one in told for h in one.happenings)
    for one in told:
        assert sum(part.for_s for part in one.parts) == pytest.approx(one.total_s)


# --- commands -------------------------------------------------------------------------------


def test_sim_prints_a_summary_or_json(
    capsys: pytest.CaptureFixture[str], inputs: Path, made: Path
) -> None:
    words = ("sim", str(inputs / "deployment.toml"), "--trace", str(inputs / "crowd.jsonl"))
    code, out, err = run_cli(capsys, *words, "--compare", "fcfs,tierline")
    assert code == 0
    assert "Policies" in out
    assert "Promises" in out
    assert err == ""

    code, out, _ = run_cli(capsys, *words, "--compare", "fcfs,tierline", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((made / "summary.json").read_text())


def test_explain_tells_the_slowest_and_any_other(
    capsys: pytest.CaptureFixture[str], made: Path
) -> None:
    code, out, err = run_cli(capsys, "explain", "slowest", str(made))
    assert code == 0
    assert err == ""
    assert "Waits" in out
    assert "served meanwhile" in out

    code, out, _ = run_cli(capsys, "explain", "7", str(made), "--policy", "fcfs", "--json")
    told = json.loads(out)
    run = read_requests(made / "requests.csv")
    assert code == 0
    assert told["request"] == 7
    assert told["input_tokens"] == run.requests.input_tokens[7]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["120"], "0 to 119"),
        (["-1"], "not the number of a request"),
        (["seven"], "requests.csv"),
        (["7", "--policy", "edf"], "policy of this run"),
    ],
)
def test_explain_names_what_is_wrong(
    capsys: pytest.CaptureFixture[str], made: Path, argv: list[str], said: str
) -> None:
    code, out, err = run_cli(capsys, "explain", *argv[1:], "--", argv[0], str(made))

    assert code == 2
    assert out == ""
    assert said in err


def test_explain_without_a_simulation_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = run_cli(capsys, "explain", "7", str(tmp_path))

    assert code == 2
    assert "holds no simulation" in err
    assert "tierline sim" in err


def test_the_best_policy_is_the_one_with_most_good_requests(made: Path, inputs: Path) -> None:
    replay, hashes = read_replay(made)
    loaded = load(replay)
    shares = {name: summary(run_policy(loaded, name)).all.good_share for name in hashes}

    assert next(iter(hashes)) == max(sorted(shares), key=lambda name: shares[name])
