"""The real 135M model for tests that need real text: skipped where it is absent, except in CI."""

import os
from pathlib import Path

import pytest

from tierline.engine.demo import fetch_demo, find_demo


def demo_model() -> Path:
    """Where the demo model lies; CI fetches it, and fails when it cannot."""
    if os.environ.get("CI") == "true":
        return fetch_demo()
    found = find_demo()
    if found is None:
        pytest.skip("no demo model here; tierline models fetch demo")
    return found
