"""Writes docs/reference/oracles.md from the test tables; a test compares the two."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "oracles.md"
HEAD = """# Oracles

Every closed law with the value it must give. The rows are the tables that the tests run
(`tests/test_oracles_sizing.py`, `tests/test_oracles_serving.py`); `tools/oracles.py` writes
this page. Where a published source prints another figure, it stands beside ours with the
reason, and a test asserts that the law does not reproduce it. In a row with several values the
printed figure belongs to the first.

Ids: O, E and T rows follow the chapters of the sizing rules, S rows the serving techniques.

"""


def render() -> str:
    """The page."""
    sys.path.insert(0, str(ROOT / "tests"))
    import oracle_table
    import test_oracles_serving as serving
    import test_oracles_sizing as sizing

    groups = sizing.GROUPS | serving.GROUPS
    return HEAD + "\n".join(oracle_table.markdown(name, rows) for name, rows in groups.items())


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
