"""What many tests share: where the reference data lies, and reproducible property tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

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
