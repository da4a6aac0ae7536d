"""A run measured request by request calibrates the law, and the law then predicts another run.

The controls: without the scalars the same predictions miss, and scalars found on times that
were stretched are stretched too.
"""

import math
from dataclasses import replace

import pytest

from tierline.planner.accuracy import report
from tierline.planner.measured_files import read_measured
from tierline.planner.measured_runs import (
    calibrate_and_predict,
    calibrated,
    simulated,
    tpot_mean_s,
    ttft_mean_s,
)

FILE = "measured_vllm_per_request.jsonl.gz"


@pytest.fixture(scope="module")
def runs(data_dir):
    return read_measured(data_dir / FILE).runs


@pytest.mark.slow
def test_the_first_run_calibrates_and_the_other_is_predicted(runs):
    (first_law, first), (other_law, other) = calibrate_and_predict(runs)

    assert abs(other.ttft - 1) <= 0.06
    assert abs(other.tpot - 1) <= 0.05
    assert abs(first.ttft - 1) <= 0.06
    assert abs(first.tpot - 1) <= 0.05
    assert min(abs(o.ttft - 1) for o in (first_law, other_law)) > 0.06  # the control
    assert other.calibration == first.calibration


@pytest.mark.slow
def test_the_report_counts_runs_and_takes_no_credit_for_the_fitted_one(data_dir, runs):
    found = report([data_dir / FILE])

    assert (found["rows"], found["coverage"]) == (2, 1.0)
    assert [run["fitted"] for run in found["runs"]] == [True, False]
    assert found["tpot_median"] == pytest.approx(abs(found["runs"][1]["calibrated"]["tpot"]))
    assert found["by_model"]["llama-3.1-8b"]["tpot_median"] is None


def test_measured_means_are_over_requests(runs):
    assert ttft_mean_s(runs[0]) == pytest.approx(7.097, abs=1e-3)
    assert tpot_mean_s(runs[1]) == pytest.approx(0.04729, abs=1e-5)


@pytest.mark.slow
def test_scalars_of_a_slower_run_are_larger(runs):
    run = replace(runs[0], requests=runs[0].requests[:100])
    law = simulated(run)
    slow = replace(
        run,
        requests=tuple(
            replace(
                r,
                first_s=r.arrival_s + 1.3 * (r.first_s - r.arrival_s),
                last_s=r.arrival_s + 1.3 * (r.last_s - r.arrival_s),
            )
            for r in run.requests
        ),
    )
    usual, slower = calibrated(run), calibrated(slow)

    assert law.calibration.layers == 1
    assert math.log(slower.cache * slower.layers) > math.log(usual.cache * usual.layers) + 0.1


def test_a_run_that_its_instance_cannot_hold_is_a_problem_and_no_traceback(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(
        '{"type": "run", "run": "a", "model": "meta-llama/Llama-3.1-70B", "gpu": "L40S",'
        ' "vllm": "0.19.0"}\n{"run": "a", "arrival_s": 0, "first_s": 1, "last_s": 2,'
        ' "input": 9, "output": 9}\n',
        encoding="utf-8",
    )
    found = report([path])

    assert found["coverage"] == 0
    assert "needs" in found["not_predicted"][0]["reason"]
