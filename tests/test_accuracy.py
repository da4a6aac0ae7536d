"""The accuracy page can fail: its comparison, its folds and its label rules do what they say."""

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import accuracy  # noqa: E402
import fit_rates  # noqa: E402
import measured  # noqa: E402


def test_every_aggregated_row_is_covered(data_dir):
    rows, count = measured.inferencex_rows(data_dir)

    assert len(rows) >= 0.95 * count
    assert {row.engine.name for row in rows} == {"vllm", "sglang", "trtllm"}


@pytest.mark.parametrize(
    ("record", "ranks"),
    [
        ({"tp": "8", "attn_dp": "1", "moe_tp": "1", "moe_ep": "8"}, (8, 1, 8)),
        ({"tp": "64", "attn_dp": "1", "moe_tp": "8", "moe_ep": "8"}, (8, 1, 8)),
        ({"tp": "16", "attn_dp": "1", "moe_tp": "4", "moe_ep": "4"}, (4, 1, 4)),
        ({"tp": "1", "attn_dp": "64", "moe_tp": "8", "moe_ep": "8"}, (1, 8, 8)),
        ({"tp": "4", "attn_dp": "4", "moe_tp": "1", "moe_ep": "16"}, (4, 1, 4)),
        ({"tp": "2", "attn_dp": "", "moe_tp": "", "moe_ep": ""}, (2, 1, 1)),
    ],
)
def test_products_written_as_degrees_are_undone(record, ranks):
    assert measured._ranks(record) == ranks


def test_folds_hold_whole_groups_and_never_move(data_dir):
    rows = fit_rates.clean_rows(data_dir)
    by_config = {row.config: fit_rates.fold_of(row.group) for row in rows}

    assert all(by_config[row.config] == fit_rates.fold_of(row.group) for row in rows)
    assert set(by_config.values()) == set(range(fit_rates.FOLDS))
    assert fit_rates.fold_of("llama-3.1-70b | h100-sxm | vllm") == 1


def test_a_wrong_constant_shows(data_dir):
    rows = [r for r in measured.inferencex_rows(data_dir)[0] if not r.doubt][::40]

    def median_error(slowdown: float) -> float:
        ratios = []
        for row in rows:
            instance = row.instance()
            slow = accuracy.outcome(row, instance.cost.rates, row.engine)
            ratios.append(slow.tpot * slowdown)
        return accuracy._median(ratios)

    assert median_error(1.0) < 15 < median_error(1.4)


def test_an_odd_stack_moves_its_own_factor_and_not_the_constants(data_dir):
    rows = [r for r in fit_rates.clean_rows(data_dir) if r.model.name == "llama-3.1-70b"][::4]
    observed = fit_rates.lines(rows, fit_rates.START)
    odd = rows[0].stack
    bent = [
        fit_rates.Line(o.row, o.kind, o.residual + (0.7 if o.row.stack == odd else 0), o.slopes)
        for o in observed
    ]
    before, after = (fit_rates.fit_lines(lines, fit_rates.START) for lines in (observed, bent))
    gpu = rows[0].gpu

    assert after.stacks[odd] - before.stacks[odd] > 0.35
    assert math.log(after.constant("memory", gpu) / before.constant("memory", gpu)) > -0.05


@pytest.mark.parametrize(
    ("committed", "found"),
    [
        ("| TPOT | 12.0 / 45 / +1.5 |", 0),
        ("| TPOT | 12.3 / 45 / +1.5 |", 0),
        ("| TPOT | 13.0 / 45 / +1.5 |", 1),
        ("| TTFT | 12.0 / 45 / +1.5 |", 1),
    ],
)
def test_the_check_sees_figures_that_moved(committed, found):
    assert len(accuracy.differing_lines(committed, "| TPOT | 12.0 / 45 / +1.5 |")) == found


def test_the_committed_page_keeps_the_gates():
    text = accuracy.PAGE.read_text(encoding="utf-8")
    gates = {
        line.split("|")[1].strip(): float(line.split("|")[3].split("of")[0].strip(" %"))
        for line in text.splitlines()
        if line.count("|") == 5 and ("<=" in line or ">=" in line)
    }

    assert gates["coverage of aggregated rows"] >= 95
    assert gates["TPOT, unseen group, median"] <= 15
    assert gates["TTFT, unseen group, median"] <= 30
    assert gates["offline throughput, rank"] >= 0.9
    assert gates["offline throughput, unseen group, median"] <= 20
    in_order = next(got for what, got in gates.items() if what.startswith("models with GPUs by"))
    assert in_order >= 9


@pytest.mark.slow
def test_the_page_is_what_the_code_measures(data_dir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--check"])

    assert accuracy.main() == 0
