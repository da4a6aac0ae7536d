"""What the search prunes by may only flatter: a bound that overstates would lose the winner."""

import pytest

from tierline.catalog.gpus import load_gpus
from tierline.catalog.models import load_model
from tierline.perf.step import StepCost
from tierline.planner import candidates
from tierline.planner.candidates import Load, search
from tierline.planner.finding import Question
from tierline.planner.plan import fleet_load
from tierline.workload.archetypes import workload_profile
from tierline.workload.slo import parse_service_levels


def test_a_bound_that_overstates_loses_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of `test_pruning_loses_nothing`."""
    asked = Question(
        model=load_model("llama-3.1-8b"),
        levels=parse_service_levels(["ttft_p99=2s,itl_p99=60ms"]),
        gpus=tuple(load_gpus(["h100-sxm", "l40s"])),
        workload_name="test",
        peak_rps=40.0,
    )
    load = fleet_load(asked, workload_profile("chat"))
    right = search(asked, load).candidates[0]
    true_bound = candidates.price_bound

    def overstated(cost: StepCost, load: Load) -> float:
        """The order turned round, and every bound above any price."""
        return 1e15 / true_bound(cost, load)

    monkeypatch.setattr(candidates, "price_bound", overstated)
    wrong = search(asked, load).candidates[0]

    assert right.pessimistic.usd_per_year is not None
    assert wrong.pessimistic.usd_per_year is not None
    assert wrong.pessimistic.usd_per_year > right.pessimistic.usd_per_year
