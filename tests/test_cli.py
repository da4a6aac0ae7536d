"""The command line keeps its contract: data on stdout, the rest on stderr, exit code 2 and a hint.

The tests read the streams and the files, not the internals.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tierline.catalog.deployment import load_deployment
from tierline.cli import build_parser, main

PLAN = ["plan", "--model", "llama-3.1-8b", "--slo", "ttft_p99=2s,itl_p99=60ms", "--gpus", "l40s"]
ROWS = "t_s,input_tokens,output_tokens\n"


def trace_of(rows: int) -> str:
    return ROWS + "".join(f"{i * 0.1:.3f},{200 + i % 70},{40 + i % 30}\n" for i in range(rows))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(trace_of(2000))
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_writes_three_files_and_says_why(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "made" / "here"
    code, out, err = run(capsys, *PLAN, "--trace", str(trace), "-o", str(out_dir))

    assert code == 0
    assert "NVIDIA L40S" in out
    assert "requests/s" in out
    assert err.count("wrote ") == 3
    assert sorted(p.name for p in out_dir.iterdir()) == [
        "deployment.toml",
        "plan.json",
        "report.html",
    ]
    assert load_deployment(out_dir / "deployment.toml").gpu == "l40s"
    assert len(json.loads((out_dir / "plan.json").read_text())["findings"]) == 14
    assert (out_dir / "report.html").stat().st_size < 1_000_000


def test_json_is_one_value_on_stdout(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    code, out, err = run(capsys, *PLAN, "--trace", str(trace), "--json")

    assert code == 0
    assert err == ""
    assert json.loads(out)["headline"]


def test_equal_inputs_give_equal_files(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        assert run(capsys, *PLAN, "--trace", str(trace), "-o", str(tmp_path / name))[0] == 0

    for file in ("plan.json", "deployment.toml", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("target", ["vllm", "sglang", "trtllm", "ray-serve", "kubernetes"])
def test_export_reads_what_plan_wrote(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path, target: str
) -> None:
    assert run(capsys, *PLAN, "--trace", str(trace), "-o", str(tmp_path))[0] == 0
    code, out, err = run(capsys, "export", str(tmp_path / "deployment.toml"), "--to", target)

    assert code == 0
    assert "llama-3.1-8b" in out
    assert "not expressed" in err


def test_profile_and_lists(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    code, out, _ = run(capsys, "profile", str(trace))
    assert code == 0
    assert "2,000" in out

    code, out, _ = run(capsys, "profile", str(trace), "--json")
    assert code == 0
    assert json.loads(out)["requests"] == 2000

    code, out, _ = run(capsys, "models")
    assert code == 0
    assert len(out.splitlines()) >= 26

    code, out, _ = run(capsys, "gpus", "--json")
    assert code == 0
    assert len(json.loads(out)) == 25


def test_synthesize_is_a_function_of_its_seed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "three.jsonl")]
    for path, seed in zip(paths, ("7", "7", "8"), strict=True):
        argv = ("synthesize", "--workload", "chat", "--rps", "5", "--requests", "300")
        assert run(capsys, *argv, "--seed", seed, "-o", str(path))[0] == 0

    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()
    code, out, _ = run(capsys, "profile", str(paths[0]), "--json")
    assert code == 0
    assert json.loads(out)["requests"] == 300


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.csv", "", "empty"),
        ("header.csv", ROWS, "no rows"),
        ("negative.csv", ROWS + "0.0,-5,10\n" * 50, "broken"),
        ("zero.csv", ROWS + "0.0,5,0\n" * 50, ""),
        ("words.csv", ROWS + "0.0,five,ten\n" * 50, "broken"),
        ("prose.txt", "this is a letter, not a trace\n", ""),
    ],
)
def test_bad_traces_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    code, out, err = run(capsys, *PLAN, "--trace", str(path), "-o", str(tmp_path / "out"))

    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "hint: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_truncated_gzip_is_refused_and_whole_gzip_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = gzip.compress(trace_of(3000).encode())
    (tmp_path / "whole.bin").write_bytes(whole)  # found by content, not by name
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])

    assert run(capsys, "profile", str(tmp_path / "whole.bin"))[0] == 0
    code, _, err = run(capsys, "profile", str(tmp_path / "cut.csv.gz"))
    assert code == 2
    assert "error: " in err


def test_unsorted_trace_is_used_and_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = trace_of(2000).splitlines()
    lines[1], lines[900] = lines[900], lines[1]
    path = tmp_path / "unsorted.csv"
    path.write_text("\n".join(lines) + "\n")

    code, out, _ = run(capsys, *PLAN, "--trace", str(path))

    assert code == 0
    assert "out of order" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["plan", "--model", "lama", "--workload", "chat", "--rps", "1", "--slo", "ttft_p99=1s"],
            "llama",
        ),
        ([*PLAN, "--workload", "chat", "--rps", "1", "--gpus", "h100-smx"], "h100-sxm"),
        ([*PLAN, "--workload", "chat", "--rps", "1", "--price", "l40s"], "NAME=VALUE"),
        ([*PLAN, "--workload", "chat", "--rps", "1", "--price", "l40s=cheap"], "not a number"),
        ([*PLAN, "--workload", "chat", "--rps", "1", "--api-price", "1"], "INPUT,OUTPUT"),
        ([*PLAN, "--trace", "/does/not/exist"], "No such file"),
        (["export", "/does/not/exist", "--to", "vllm"], "No such file"),
        (["gpus", "h100-smx"], "h100-sxm"),
        (["synthesize", "-o", "x"], "--like"),
    ],
)
def test_mistakes_exit_with_two_and_a_way_out(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    code, out, err = run(capsys, *argv)

    assert code == 2
    assert out == ""
    assert said in err


def test_impossible_promise_names_the_bound_and_what_would_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["plan", "--model", "llama-3.1-8b", "--slo", "itl_p99=1ms", "--gpus", "l40s"]
    code, _, err = run(capsys, *argv, "--workload", "chat", "--rps", "1")

    assert code == 2
    assert "itl p99" in err
    assert "it would keep itl_p99=" in err


def test_config_with_missing_fields_names_them_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "hidden_size": 64}')
    argv = ["plan", "--model", str(path), "--slo", "ttft_p99=1s", "--workload", "chat"]
    code, _, err = run(capsys, *argv, "--rps", "1")

    assert code == 2
    assert "num_hidden_layers" in err
    assert "vocab_size" in err


def test_output_that_cannot_be_written_leaves_nothing(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path
) -> None:
    """A file stands where the folder should be: root may write anywhere, but not there."""
    blocker = tmp_path / "blocker"
    blocker.write_text("in the way")
    code, _, err = run(capsys, *PLAN, "--trace", str(trace), "-o", str(blocker))

    assert code == 2
    assert "cannot write" in err
    assert blocker.read_text() == "in the way"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocker", "trace.csv"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_read_only_folder(capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)

    code, _, err = run(capsys, *PLAN, "--trace", str(trace), "-o", str(folder))

    assert code == 2
    assert "cannot write" in err


# --- real processes -------------------------------------------------------------------------


def test_piped_run_has_no_progress_bar(trace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tierline", *PLAN, "--trace", str(trace)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == ""
    assert "GPUs" in done.stdout


def test_interrupt_stops_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text(trace_of(400_000))
    child = subprocess.Popen(
        [sys.executable, "-m", "tierline", "profile", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(0.6)  # past the imports and into the reading; the trace takes seconds
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)

    assert child.returncode == 130
    assert "Traceback" not in err


def test_every_command_has_help_and_json() -> None:
    parser = build_parser()
    commands = next(
        a for a in parser._actions if a.dest != "help" and hasattr(a, "choices") and a.choices
    )

    assert set(commands.choices) == {
        *(
            "plan",
            "sim",
            "explain",
            "profile",
            "synthesize",
            "export",
            "accuracy",
            "models",
            "gpus",
        ),
        *("run", "serve", "calibrate"),
    }
    for name, command in commands.choices.items():
        text = command.format_help()
        assert "--json" in text, name
        assert command.description, name
