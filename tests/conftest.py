"""What many tests share: where the reference data lies, and reproducible property tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tierline.catalog import gpus

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "dev")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of published measurements and traces; `TIERLINE_DATA` overrides it."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("TIERLINE_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        message = f"no reference data at {folder}; set TIERLINE_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def kernels_folder(request: pytest.FixtureRequest) -> Path:
    """Where native kernels are kept between runs: a build is named by what went into it."""
    assert request.config.cache is not None
    return Path(request.config.cache.mkdir("kernels"))


@pytest.fixture(scope="session", params=["avx2", "avx512bf16"])
def kernels(request: pytest.FixtureRequest, kernels_folder: Path) -> Any:
    """The native kernels for each instruction set that this machine has."""
    from tierline.engine import native  # torch stays off the way of tests that need none

    assert request.param in native.ISAS
    loaded = native.load(kernels_folder, isa=request.param)
    if isinstance(loaded, native.Missing):
        assert "could not" not in loaded.reason, loaded.reason
        pytest.skip(loaded.reason)
    return loaded


@pytest.fixture(scope="session", autouse=True)
def nobodys_own_entries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever runs the tests may have measured this machine; what is asserted is of none."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gpus, "own_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def threads_as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whoever asked the kernels for another number of threads asked for itself only."""
    yield
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels").set_threads(0)
