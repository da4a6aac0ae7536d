"""A run measured request by request calibrates prices, and they then predict another run.

The controls: without the scalars the same predictions miss, without what attention costs
beside prompts they miss as well, and scalars found on times that were stretched are larger.
"""

from dataclasses import replace

import pytest

from tierline.catalog.gpus import load_gpu
from tierline.perf.kernel_cost import KernelCost
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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["forth", "back"])
def test_one_run_calibrates_and_the_other_is_predicted(runs, order):
    (plain, itself), (other_plain, other) = calibrate_and_predict([runs[i] for i in order])

    assert plain.priced_by == other.priced_by == "kernels"
    for found in (itself, other):
        assert abs(found.ttft - 1) <= 0.06
        assert abs(found.tpot - 1) <= 0.05
    assert min(abs(o.ttft - 1) for o in (plain, other_plain)) > 0.06  # the control
    assert other.calibration == itself.calibration


def test_requests_fare_as_they_were_measured_one_by_one(runs):
    _, (plain, other) = calibrate_and_predict(runs)

    assert other.tpot_spread < 0.03 < plain.tpot_spread


@pytest.mark.parametrize("missing", ["unpacked", "messages"])
def test_mechanisms_of_whole_steps_are_needed(runs, missing, monkeypatch):
    if missing == "unpacked":  # query heads packed beside prompts, too
        packed = KernelCost._reads_s
        monkeypatch.setattr(KernelCost, "_reads_s", lambda c, g: (packed(c, g)[0],) * 2)
    else:  # a prompt of data-parallel ranks is shared by them
        monkeypatch.setattr(KernelCost, "_prompt_token_s", lambda c: 0.0)
    _, (_, other) = calibrate_and_predict(runs)

    assert abs(other.ttft - 1) > 0.06 or abs(other.tpot - 1) > 0.05


def test_a_run_on_an_accelerator_without_timings_is_priced_by_the_law(runs):
    elsewhere = replace(runs[0], gpu=load_gpu("h100-sxm"))
    found = calibrate_and_predict([runs[0], elsewhere])

    assert [plain.priced_by for plain, _ in found] == ["kernels", "law"]
    assert found[1][1] is None  # whose scalars are of another kind


def test_the_report_counts_runs_and_takes_no_credit_for_the_fitted_one(data_dir, runs):
    found = report([data_dir / FILE])

    assert (found["rows"], found["coverage"]) == (2, 1.0)
    assert [run["fitted"] for run in found["runs"]] == [True, False]
    assert found["tpot_median"] == pytest.approx(abs(found["runs"][1]["calibrated"]["tpot"]))
    assert found["by_model"]["llama-3.1-8b"]["tpot_median"] is None


def test_measured_means_are_over_requests(runs):
    assert ttft_mean_s(runs[0]) == pytest.approx(7.097, abs=1e-3)
    assert tpot_mean_s(runs[1]) == pytest.approx(0.04729, abs=1e-5)


def test_scalars_of_a_slower_run_are_larger(runs):
    run = replace(runs[0], requests=runs[0].requests[:100])
    plain = simulated(run)
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

    assert plain.calibration.kernel_s == 0
    assert slower.kernel_s + slower.prompt_layer_s / 50 > usual.kernel_s + 2e-6


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
