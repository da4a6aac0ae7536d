"""The accuracy figures can fail: comparison, folds, label rules and sums do what they say."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tierline.cli import main
from tierline.perf.stack_factor import shrunk_factor, stack_factor
from tierline.perf.step import fitted_groups, load_rates
from tierline.planner.accuracy import Outcome, few_shot, figures, outcome, report, spearman
from tierline.planner.measured_files import read_measured

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import accuracy  # noqa: E402
import fit_rates  # noqa: E402

COLUMNS = "model,gpu_system,engine,engine_version,isl,osl,concurrency,tp,ttft_ms,tpot_ms"


@pytest.fixture(scope="module")
def closed(data_dir):
    return [r for r in read_measured(data_dir / "measured_inferencex.csv.gz").rows if not r.doubt]


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.csv"
    rows = [
        f"meta-llama/Llama-3.1-70B,h100_sxm,vllm,1,1024,256,{clients},{tp},{90 + clients},{20 - tp}"
        for clients in (4, 8, 16)
        for tp in (4, 8)
    ]
    rows += [
        "acme/Wonder-9T,h100_sxm,vllm,1,1024,256,8,1,55,7",
        "Qwen/Qwen3-8B,h200,vllm,1,99,99,2,1,9,9",
    ]
    path.write_text("\n".join([COLUMNS, *rows]) + "\n", encoding="utf-8")
    return path


# --- the command --------------------------------------------------------------------------


def test_the_report_counts_names_and_slices_every_row(mine):
    found = report([mine])

    assert (found["rows"], found["predicted"], found["coverage"]) == (8, 7, 7 / 8)
    assert found["not_predicted"][0]["name"] == "acme/Wonder-9T, h100-sxm, vllm"
    assert set(found["by_model"]) == {"llama-3.1-70b", "qwen3-8b", "acme/Wonder-9T"}
    assert found["by_model"]["acme/Wonder-9T"]["coverage"] == 0
    assert (found["by_gpu"]["h100-sxm"]["rows"], found["by_gpu"]["h100-sxm"]["predicted"]) == (7, 6)
    assert found["by_engine"]["vllm"]["coverage"] == 7 / 8
    assert found["by_evidence"]["fitted groups"]["rows"] == 6
    assert found["by_evidence"]["unseen groups"]["rows"] == 1
    assert found["with_three_points"]["rows"] == 3
    assert 0 <= found["tpot_median"] <= found["tpot_p90"]
    assert abs(found["ttft_bias"]) <= found["ttft_p90"]


def test_the_command_prints_json_or_a_table_and_leaves_the_rest_to_stderr(capsys, mine):
    assert main(["accuracy", str(mine), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["coverage"] == 7 / 8
    assert err == ""

    assert main(["accuracy", str(mine)]) == 0
    out, _ = capsys.readouterr()
    assert "87.5 %" in out
    assert "mine.csv:8" in out

    assert main(["accuracy", str(mine.with_name("none.csv"))]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "none.csv" in err


def test_nothing_to_sum_up_is_said_and_not_divided(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text(COLUMNS + "\n", encoding="utf-8")
    found = report([path])

    assert (found["rows"], found["coverage"], found["tpot_median"]) == (0, None, None)


def test_a_doubled_time_is_an_error_of_one(closed):
    found = figures([Outcome(row, tpot=2.0, ttft=0.5) for row in closed[:10]], asked=20)

    assert found["coverage"] == 0.5
    assert (found["tpot_median"], found["tpot_bias"]) == (1.0, 1.0)
    assert (found["ttft_median"], found["ttft_bias"]) == (0.5, -0.5)
    assert found["throughput_median"] is None


def test_rank_knows_order_and_ties():
    assert spearman([1, 2, 3], [10, 20, 90]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(0.949, abs=1e-3)


# --- a few points of a stack --------------------------------------------------------------


@pytest.mark.parametrize(("points", "trusted"), [(0, 0.0), (1, 0.588), (3, 0.811), (5, 0.877)])
def test_a_stacks_factor_trusts_its_points_by_their_number(points, trusted):
    assert math.log2(shrunk_factor([2.0] * points)) == pytest.approx(trusted, abs=1e-3)


def test_one_odd_point_does_not_decide_and_the_two_times_are_apart():
    factor = stack_factor(tpot=[1.1, 1.1, 30.0], ttft=[2.0, 2.0, 2.0])

    assert factor.tpot == pytest.approx(1.1 ** (3 / 3.7))
    assert factor.ttft == pytest.approx(2.0 ** (3 / 3.7))
    assert factor.points == 3


def test_points_correct_their_own_stack_only(closed):
    slow = [row for row in closed if row.group.startswith("minimax-m2.5 | h200")]
    even = [row for row in closed if row.group.startswith("llama-3-70b | h100")]
    outcomes = [Outcome(r, tpot=0.5, ttft=0.5) for r in slow]
    outcomes += [Outcome(r, tpot=1.0, ttft=1.0) for r in even]
    rest = few_shot(outcomes, points=3)

    assert {o.tpot for o in rest if o.row in even} == {1.0}
    assert all(o.tpot > 0.85 for o in rest if o.row in slow)
    assert len(rest) < len(outcomes)
    assert all(o.tpot <= 0.5 for o in few_shot(outcomes, points=0) if o.row in slow)


# --- folds, fits and the page ----------------------------------------------------------------


def test_folds_hold_whole_groups_and_never_move(data_dir):
    rows = fit_rates.clean_rows(data_dir)
    by_config = {row.config: fit_rates.fold_of(row.group) for row in rows}

    assert all(by_config[row.config] == fit_rates.fold_of(row.group) for row in rows)
    assert set(by_config.values()) == set(range(fit_rates.FOLDS))
    assert fit_rates.fold_of("llama-3.1-70b | h100-sxm | vllm") == 1


def test_checkpoints_of_one_shape_are_one_group(closed):
    names = {row.model.name for row in closed if row.group.startswith("deepseek-r1 |")}

    assert names == {"deepseek-r1", "deepseek-v3"}


def test_the_shipped_constants_name_the_groups_that_they_saw(data_dir):
    groups = {row.group for row in fit_rates.clean_rows(data_dir)}

    assert groups == fitted_groups()
    assert "qwen3-8b | h200 | vllm" not in fitted_groups()


def test_a_wrong_constant_shows(closed):
    rows = closed[::40]

    def median_error(slowdown: float) -> float:
        found = [outcome(row, load_rates(row.gpu), row.engine) for row in rows]
        slow = [replace(o, tpot=o.tpot * slowdown) for o in found if o is not None]
        median = figures(slow, asked=len(slow))["tpot_median"]
        assert median is not None
        return float(median)

    assert median_error(1.0) < 0.15 < median_error(1.4)


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


GATES = {
    "coverage of aggregated rows": (">=", 95),
    "TPOT, unseen group, median": ("<=", 12),
    "TTFT, unseen group, median": ("<=", 28),
    "TPOT, unseen group and 3 points of the stack": ("<=", 7),
    "TTFT, unseen group and 3 points of the stack": ("<=", 20),
    "offline throughput, unseen group, median": ("<=", 24),
    "offline throughput, rank": (">=", 0.95),
    "models with GPUs by cost per token in order, rank": (">=", 9),
}


@pytest.mark.parametrize(("gate", "asked"), GATES.items())
def test_the_committed_page_keeps_the_gates(gate, asked):
    lines = accuracy.PAGE.read_text(encoding="utf-8").splitlines()
    cells = next(line for line in lines if line.startswith(f"| {gate} ")).split("|")
    here = float(cells[3].split("of")[0].strip(" %"))
    sign, limit = asked

    assert here <= limit if sign == "<=" else here >= limit


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_is_what_the_code_measures(data_dir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--check"])

    assert accuracy.main() == 0
