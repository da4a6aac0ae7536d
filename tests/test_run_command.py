"""`tierline run` keeps the contract: the answer on stdout, the rest on stderr, status 2 or 130.

Every test is a real process; they are few, because each imports torch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_checkpoints import tiny_checkpoint

PLAIN = ["--dtype", "fp32", "--device", "cpu", "--kernels", "torch", "--kv-bytes", "2MB"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
# What a machine without the extra has: importing torch fails as if it were not there.
WITHOUT_TORCH = """
import sys
class Blocks:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Blocks())
from tierline.cli import run
run()
"""
TIERLINE = ["-c", "from tierline.cli import run; run()"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint("qwen2", tmp_path_factory.mktemp("run"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def tierline(
    *arguments: str | Path, code: list[str] = TIERLINE, said: str | bytes | None = ""
) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a process; none ends in a traceback."""
    done = subprocess.run(
        [sys.executable, *code, *map(str, arguments)],
        input=said.encode() if isinstance(said, str) else said,
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err, err
    return done.returncode, out, err


def test_an_answer_is_on_stdout_and_its_figures_on_stderr(checkpoint):
    asked = (checkpoint, "Hello", "--max-tokens", "12", *PLAIN)
    code, out, err = tierline("run", *asked)
    code_json, as_json, err_json = tierline("run", *asked, "--json")
    told = json.loads(as_json)

    assert (code, code_json) == (0, 0)
    assert out == told["text"] + "\n"
    assert "fp32 on cpu, kernels torch (asked for)" in err
    assert "tokens/s, TTFT" in err
    assert "tokens/s, TTFT" not in err_json
    assert told.keys() == {
        *("text", "finish_reason", "prompt_tokens", "cached_tokens", "output_tokens"),
        *("ttft_s", "tokens_per_s"),
    }
    assert told["prompt_tokens"] == len("user: Hello\nassistant:")
    assert told["output_tokens"] <= 12
    assert told["ttft_s"] > 0


@pytest.mark.slow
def test_a_conversation_goes_on_from_what_was_said(checkpoint):
    first, second = "a" * 40, "b"
    code, out, err = tierline(
        "run", checkpoint, "--max-tokens", "5", *PLAIN, said=f"{first}\n\n{second}\n"
    )
    figures = [line for line in err.splitlines() if "tokens/s" in line]
    turn = len(f"user: {first}\nassistant:")

    assert code == 0
    assert out.count("\n") >= 2
    assert len(figures) == 2
    assert f"prompt of {turn}, 0 cached" in figures[0]
    assert f"{turn // 16 * 16} cached" in figures[1]


def test_mistakes_end_with_status_2_and_a_hint(checkpoint, tmp_path):
    """One process each; the first does not even import torch's kernels."""
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments, error, hint in (
        (("dmo", "Hi"), "error: unknown checkpoint 'dmo'", "hint: known: demo"),
        ((broken, "Hi"), "model.safetensors", ""),
    ):
        code, out, err = tierline("run", *arguments)

        assert (code, out) == (2, "")
        assert "error:" in err
        assert error in err
        assert hint in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said", "error"),
    [
        (["Hi", "--max-tokens", "0"], "", "max_tokens is 0"),
        (["x" * 600], "", "tokens; the model takes 512"),
        (["Hi", "--temperature", "-1"], "", "temperature is -1.0"),
        (["Hi", "--kernels", "native", "--dtype", "fp64"], "", "unknown dtype 'fp64'"),
        (["Hi", "--kv-bytes", "much"], "", "much"),
        (["--json"], "", "--json answers one prompt"),
        ([], b"caf\xe9\n", "what was typed is not valid text"),
    ],
)
def test_more_mistakes(checkpoint, arguments, said, error):
    code, out, err = tierline("run", checkpoint, *PLAIN, *arguments, said=said)

    assert (code, out) == (2, "")
    assert error in err


def test_without_torch_the_extra_is_named(checkpoint):
    code, out, err = tierline("run", checkpoint, "Hi", code=["-c", WITHOUT_TORCH])

    assert (code, out) == (2, "")
    assert "needs the package torch" in err
    assert "pip install 'tierline[engine]'" in err
    code, out, _ = tierline("run", "--help", code=["-c", WITHOUT_TORCH])
    assert code == 0
    assert "tierline run demo" in out


def test_ctrl_c_ends_an_answer_cleanly(checkpoint):
    with subprocess.Popen(
        [sys.executable, *TIERLINE, "run", checkpoint, "Hi", "--max-tokens", "400", *PLAIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        # A job in the background ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it has begun to answer
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"interrupted" in err
