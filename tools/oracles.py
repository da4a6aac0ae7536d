"""Writes docs/reference/oracles.md from the test tables; a test compares the two."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "oracles.md"
HEAD = """# Oracles

Every closed law with the value it must give. The rows are the tables that the tests run
(`tests/test_oracles_sizing.py`, `tests/test_oracles_serving.py`); `tools/oracles.py` writes
this page. Where a published source prints another figure, it stands beside ours with the
reason, and a test asserts that the law does not reproduce it; in a row with several values it
prints as many, `-` where the source is right or silent. The last column says what stands behind
a value: a law of `tierline`, a fact of its catalogue, or the source's own arithmetic alone.

Ids: O, E and T rows follow the chapters of the sizing rules, S rows the serving techniques.

"""


def render() -> str:
    """The page."""
    sys.path.insert(0, str(ROOT / "tests"))
    import oracle_table
    import test_oracles_serving as serving
    import test_oracles_sizing as sizing

    groups = sizing.GROUPS | serving.GROUPS
    tables = [oracle_table.markdown(name, rows) for name, rows in groups.items()]
    listed = "".join(f"- {name}: {why}.\n" for name, why in sizing.NO_NUMBER.items())
    return HEAD + "\n".join([*tables, f"## No number to assert\n\n{listed}"])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
