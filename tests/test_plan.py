"""A plan is what its inputs say: legal, priced, feasible at the slow edge, and repeatable."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tierline.base.errors import InfeasibleError, InputError
from tierline.catalog.deployment import parse_deployment
from tierline.catalog.gpus import load_gpu, load_gpus
from tierline.catalog.models import load_model
from tierline.planner.api import default_safety, plan
from tierline.planner.candidates import (
    CHUNKS,
    Load,
    best_chunk,
    evaluate,
    pareto,
    search,
    slow_instance,
)
from tierline.planner.finding import Candidate, Plan, Question, Rejected
from tierline.planner.layouts import layouts, memory_use, weight_choices
from tierline.planner.load import operating_point, usable_rate
from tierline.planner.plan import bins, fleet_load
from tierline.workload.archetypes import workload_profile
from tierline.workload.profile import profile_trace
from tierline.workload.slo import parse_service_levels
from tierline.workload.trace import read_trace

GPUS = ("h100-sxm", "h200", "l40s", "a100-80")
SLO = "ttft_p99=2s,itl_p99=60ms"
CURVE = """\
concurrency,rps,ttft_p50_s,ttft_p99_s,itl_p50_s,itl_p99_s,e2e_mean_s
1,0.27,0.15,0.2,0.016,0.018,3.7
24,7,0.3,0.8,0.0165,0.02,3.43
48,12,0.5,1.9,0.0175,0.03,4.0
96,18,1.5,4.5,0.02,0.05,5.3
"""


@pytest.fixture(scope="module")
def answer() -> Plan:
    """One real plan that many tests look at."""
    return plan("llama-3.1-8b", workload="chat", rps=40, slo=SLO, gpus=GPUS)


@pytest.fixture(scope="module")
def believed() -> Plan:
    """The same plan by the closed form alone."""
    return plan("llama-3.1-8b", workload="chat", rps=40, slo=SLO, gpus=GPUS, replay=False)


def question(
    model: str = "llama-3.1-8b", *, slo: str = SLO, gpus: tuple[str, ...] = GPUS
) -> Question:
    return Question(
        model=load_model(model),
        levels=parse_service_levels([slo]),
        gpus=tuple(load_gpus(gpus)),
        workload_name="test",
        peak_rps=40.0,
    )


def load_of(asked: Question) -> Load:
    return fleet_load(asked, workload_profile("chat"))


# --- the answer -----------------------------------------------------------------------------


def test_findings_in_order_with_their_working(answer: Plan) -> None:
    assert [finding.step for finding in answer.findings] == list(range(1, 15))
    for finding in answer.findings:
        assert finding.answer
        assert finding.formula
        assert finding.substituted
        assert finding.inputs
        assert finding.result.evidence.source


def test_recommendation_keeps_every_promise_at_the_slow_edge(believed: Plan) -> None:
    """INV-PLAN-1, by the closed form; that the replay keeps them is INV-PLAN-5."""
    answer = believed
    best = answer.recommended
    slow = replace(best.instance, cost=best.instance.cost.scaled(best.evidence.high))
    kept = usable_rate(slow, best.demand, answer.question.levels)

    assert best.evidence.high > 1
    assert kept is not None
    carried = best.pessimistic.instances * kept.rate_rps
    assert carried >= answer.demand_rps * answer.question.safety * 0.98
    assert best.pessimistic.point.meets(answer.question.levels)


def test_the_slow_edge_check_can_fail(believed: Plan) -> None:
    """Negative control: a fleet of half the instances breaks the same check."""
    answer = believed
    best = answer.recommended
    slow = replace(best.instance, cost=best.instance.cost.scaled(best.evidence.high))
    kept = usable_rate(slow, best.demand, answer.question.levels)
    assert kept is not None

    carried = best.pessimistic.instances / 2 * kept.rate_rps

    assert carried < answer.demand_rps * answer.question.safety


def test_edges_are_ordered(answer: Plan) -> None:
    for candidate in (answer.recommended, *answer.alternatives):
        low, mid, high = candidate.pessimistic, candidate.expected, candidate.optimistic
        assert low.usable_rps <= mid.usable_rps * 1.011 <= high.usable_rps * 1.03
        assert low.gpus >= mid.gpus >= high.gpus


def test_no_allowed_alternative_is_cheaper(answer: Plan) -> None:
    cost = answer.recommended.pessimistic.usd_per_year
    assert cost is not None
    cheaper = [
        c.name
        for c in answer.alternatives
        if not c.needs_quality_test and (c.pessimistic.usd_per_year or math.inf) < cost
    ]

    assert cheaper == []


def test_pareto_keeps_exactly_what_nothing_beats(answer: Plan) -> None:
    candidates = [answer.recommended, *answer.alternatives]
    kept = set(answer.pareto)

    def scores(c: Candidate) -> tuple[float, float, float]:
        edge = c.pessimistic
        return (edge.usd_per_year or math.inf, edge.point.ttft_s(99), edge.point.saturation)

    for candidate in candidates:
        beaten = any(
            all(o <= s for o, s in zip(scores(other), scores(candidate), strict=True))
            and scores(other) != scores(candidate)
            for other in candidates
        )
        assert (candidate.name in kept) == (not beaten)
    assert pareto([]) == []


def test_deployment_says_what_was_recommended(answer: Plan) -> None:
    best, deployed = answer.recommended, answer.deployment

    assert deployed.replicas == best.pessimistic.instances
    assert deployed.gpus == best.pessimistic.gpus
    assert (deployed.weight_format, deployed.kv_format) == (best.layout.weights, best.layout.kv)
    assert deployed.policies.chunk_tokens == best.instance.chunk_tokens
    assert deployed.slo[0].targets == ("ttft_p99=2s", "itl_p99=60ms")
    assert parse_deployment(deployed.to_toml(), where="test") == deployed


def test_memory_components_fill_the_accelerator(answer: Plan) -> None:
    for candidate in (answer.recommended, *answer.alternatives):
        use = candidate.memory
        parts = use.weights_bytes + use.activations_bytes + use.overhead_bytes + use.kv_bytes
        assert parts == pytest.approx(use.total_bytes)
        assert use.kv_bytes > 0


def test_low_load_is_paid_for(answer: Plan) -> None:
    penalties = [row["penalty"] for row in answer.cost_by_load]

    assert penalties == sorted(penalties, reverse=True)
    assert penalties[-1] == 1.0
    assert penalties[0] == 50.0


def test_more_demand_never_needs_fewer_gpus() -> None:
    gpus = [
        plan(
            "llama-3.1-8b",
            workload="chat",
            rps=40,
            growth=g,
            slo=SLO,
            gpus=["h100-sxm"],
            replay=False,
        ).recommended.pessimistic.gpus
        for g in (1.0, 2.0, 4.0)
    ]

    assert gpus == sorted(gpus)
    assert gpus[-1] > gpus[0]


def test_a_tighter_promise_never_costs_less() -> None:
    costs = [
        plan(
            "llama-3.1-8b", workload="chat", rps=80, slo=slo, gpus=["h100-sxm"], replay=False
        ).recommended.pessimistic.usd_per_year
        for slo in ("ttft_p99=4s,itl_p99=100ms", "ttft_p99=1s,itl_p99=20ms")
    ]

    assert costs[0] is not None
    assert costs[1] is not None
    assert costs[0] <= costs[1]


def test_a_price_can_change_the_choice() -> None:
    def chosen(prices: dict[str, float]) -> str:
        answered = plan(
            "llama-3.1-8b",
            workload="chat",
            rps=40,
            slo=SLO,
            gpus=["h100-sxm", "h200"],
            prices=prices,
            replay=False,
        )
        return answered.recommended.gpu.name

    assert chosen({"h100": 1.0, "h200": 50.0}) == "h100-sxm"
    assert chosen({"h100": 50.0, "h200": 1.0}) == "h200"


def test_quality_limit_keeps_four_bits_out_until_asked() -> None:
    def weights(quality: str) -> str:
        answered = plan(
            "llama-3.1-70b",
            workload="chat",
            rps=5,
            slo="ttft_p99=8s",
            gpus=["a100-80"],
            quality=quality,
            replay=False,
        )
        return answered.recommended.layout.weights

    assert weights("none") == "bf16"
    assert weights("negligible") in ("bf16", "int8-g128")
    assert weights("moderate") in ("int8", "int4-g128")


def test_prefix_reuse_and_dram_are_worth_gpus(data_dir: Path) -> None:
    """Without the reuse curve the same trace needs more: the control of the KV strategy."""
    asked = question("llama-3.1-8b", slo="ttft_p99=30s,itl_p99=100ms", gpus=("h100-sxm",))
    profile = profile_trace(read_trace(data_dir / "traces" / "mooncake_conversation.jsonl.gz"))
    load = fleet_load(replace(asked, peak_rps=40.0), profile)
    with_reuse = search(asked, load).candidates
    without = search(asked, replace(load, hit_rate=None)).candidates

    assert with_reuse[0].hit_rate > 0.1
    tiers = {tuple(tier.name for tier in c.lower_tiers) for c in with_reuse}
    assert ("dram",) in tiers
    assert tiers <= {(), ("dram",), ("dram", "nvme")}
    assert without[0].hit_rate == 0.0
    assert with_reuse[0].pessimistic.gpus < without[0].pessimistic.gpus


def test_a_tier_must_be_worth_running(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier stays only where it saves money or clearly time; with the bar removed more stay."""
    asked = question("llama-3.1-8b", slo="ttft_p99=30s,itl_p99=100ms", gpus=("h100-sxm",))
    profile = profile_trace(read_trace(data_dir / "traces" / "mooncake_conversation.jsonl.gz"))
    load = fleet_load(replace(asked, peak_rps=4.0), profile)

    def tiered() -> dict[tuple[object, ...], Candidate]:
        found = search(asked, load).candidates
        return {(c.layout, len(c.lower_tiers)): c for c in found}

    kept = tiered()
    for (layout, depth), candidate in kept.items():
        if depth:
            beside = kept.get((layout, depth - 1)) or kept[layout, 0]
            price, other = (c.pessimistic.usd_per_year or 0.0 for c in (candidate, beside))
            ttft, other_ttft = (c.pessimistic.point.ttft_s(99) for c in (candidate, beside))
            assert price < other or (price == other and ttft < 0.95 * other_ttft)
    monkeypatch.setattr("tierline.planner.candidates._clearly_better", lambda *_edges: True)

    assert len(tiered()) > len(kept)


def test_loading_cached_prefixes_delays_the_first_token() -> None:
    """Bytes from DRAM are not free: the same hits cost more over a slower link."""
    asked = question(gpus=("h100-sxm",))
    load = load_of(asked)
    cost = next(iter(layouts(asked.model, asked.gpus[0], None, [])))[1]
    instance = replace(slow_instance(asked, cost, load), chunk_tokens=1024)
    ttfts = []
    for reload_s in (0.0, 1e-5, 1e-4):
        demand = replace(load.demand, hit_rate=0.5, reload_s_per_token=reload_s)
        point = operating_point(instance, demand, 0.5)
        assert point is not None
        ttfts.append(point.ttft_s(99))

    assert ttfts[0] < ttfts[1] < ttfts[2]


@pytest.fixture
def bimodal(tmp_path: Path) -> Path:
    """Many short prompts and a few very long ones."""
    draw = Random(1)
    rows, now = [], 0.0
    for _ in range(6000):
        now += draw.expovariate(20)
        long = draw.random() >= 0.93
        tokens = draw.randint(28_000, 32_000) if long else draw.randint(300, 900)
        rows.append(f"{now:.3f},{tokens},{draw.randint(100, 300)}")
    path = tmp_path / "bimodal.csv"
    path.write_text("t_s,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return path


def test_two_kinds_of_accelerator_where_they_beat_one(bimodal: Path) -> None:
    answered = plan(
        "llama-3.1-8b", trace=bimodal, slo="ttft_p99=20s", gpus=["rtx4090", "h200"], replay=False
    )
    mixed, single = answered.mixed_fleet, answered.recommended.pessimistic.usd_per_year

    assert mixed is not None
    assert single is not None
    assert mixed["usd_per_year"] < single
    assert mixed["short"].gpu.name != mixed["long"].gpu.name
    for part in (mixed["short"], mixed["long"]):
        assert part.pessimistic.point.meets(answered.question.levels)


def test_no_mixed_fleet_where_one_kind_is_given_or_wins(bimodal: Path, answer: Plan) -> None:
    alone = plan("llama-3.1-8b", trace=bimodal, slo="ttft_p99=20s", gpus=["h200"], replay=False)

    assert alone.mixed_fleet is None
    if answer.mixed_fleet is not None:
        cost = answer.recommended.pessimistic.usd_per_year
        assert cost is not None
        assert answer.mixed_fleet["usd_per_year"] < cost


def test_golden_scenario_from_a_measured_curve(tmp_path: Path) -> None:
    """120 requests/s over 12 usable an instance at TP4 with safety 1.3: 13 instances, 52 GPUs."""
    (tmp_path / "curve.csv").write_text(CURVE)

    answered = plan(
        "llama-3.1-70b",
        workload="chat",
        rps=120,
        slo="ttft_p99=2s",
        gpus=["h100-sxm"],
        prices={"h100-sxm": 2.5},
        safety=1.3,
        curve=tmp_path / "curve.csv",
        instance={"tp": "4", "weights": "fp8", "kv": "fp8"},
    )
    edge = answered.recommended.pessimistic

    assert (edge.instances, edge.gpus) == (13, 52)
    assert edge.usd_per_year == 1_138_800
    assert answered.recommended.evidence.kind == "measured"


def test_classes_share_the_strictest_promise_and_the_plan_says_so() -> None:
    def answered(slo: list[str]) -> Plan:
        return plan(
            "llama-3.1-8b", workload="chat", rps=40, slo=slo, gpus=["h100-sxm"], replay=False
        )

    both = answered(["chat@10:ttft_p99=1s,itl_p99=20ms", "batch:e2e_p95=120s"])
    strict = answered(["chat@10:ttft_p99=1s,itl_p99=20ms"])

    assert both.recommended.name == strict.recommended.name
    assert any("strictest promise" in line for line in both.caveats)
    assert not any("strictest promise" in line for line in strict.caveats)
    assert [(s.name, s.priority) for s in both.deployment.slo] == [("chat", 10), ("batch", 0)]


def test_safety_follows_the_traffic(data_dir: Path) -> None:
    steady = profile_trace(read_trace(data_dir / "traces" / "azure2023_conv.csv.gz"))
    bursty = profile_trace(read_trace(data_dir / "traces" / "azure2023_code.csv.gz"))

    assert default_safety(steady) == 1.2
    assert default_safety(bursty) == 1.5


# --- the search -----------------------------------------------------------------------------


def test_bins_keep_the_mean_and_the_limit() -> None:
    lengths = workload_profile("chat").input
    values = bins(lengths, limit=1e9)

    assert sum(values) / len(values) == pytest.approx(lengths.mean, rel=0.02)
    assert list(values) == sorted(values)
    assert max(bins(lengths, limit=100)) == 100


def test_formats_are_never_wider_than_native() -> None:
    assert [f.name for f in weight_choices(load_model("gpt-oss-20b"))] == ["mxfp4"]
    names = [f.name for f in weight_choices(load_model("deepseek-r1"))]
    assert names == ["fp8-block", "int4-g128", "nvfp4"]


def test_every_layout_is_legal_and_leaves_room_for_kv() -> None:
    asked = question("llama-3.1-70b")
    for gpu in asked.gpus:
        rejected: list[Rejected] = []
        for layout, cost in layouts(asked.model, gpu, None, rejected):
            assert layout.tp in asked.model.legal_tp(16)
            assert memory_use(cost).kv_bytes > 0
        assert all(r.why for r in rejected)
        assert rejected, "70B in bf16 does not fit one of these"


def test_chunk_climb_finds_the_best_chunk() -> None:
    """The climb agrees with trying every chunk size."""
    asked = question()
    load = load_of(asked)
    for layout, cost in layouts(asked.model, load_gpu("h100-sxm"), None, []):
        instance = slow_instance(asked, cost, load)
        climbed = best_chunk(asked, instance, load)
        rates = {}
        for chunk in CHUNKS:
            point = usable_rate(replace(instance, chunk_tokens=chunk), load.demand, asked.levels)
            rates[chunk] = point.rate_rps if point else 0.0
        if climbed is None:
            assert max(rates.values()) == 0.0
        else:
            assert rates[climbed.chunk_tokens] >= max(rates.values()) * 0.97, (layout, rates)


def test_pruning_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bound switched off the winner is the same."""
    asked = question()
    load = load_of(asked)
    pruned = search(asked, load).candidates[0]
    monkeypatch.setattr("tierline.planner.candidates.outpriced", lambda *_args, **_kwargs: None)

    exhaustive = search(asked, load).candidates[0]

    assert (pruned.gpu.name, pruned.layout) == (exhaustive.gpu.name, exhaustive.layout)
    assert pruned.pessimistic.usd_per_year == exhaustive.pessimistic.usd_per_year


def test_evaluate_names_the_promise_that_breaks() -> None:
    asked = question("llama-3.1-70b", slo="itl_p99=3ms")
    layout, cost = next(iter(layouts(asked.model, load_gpu("h200"), None, [])))
    outcome = evaluate(asked, cost, load_of(asked))

    assert isinstance(outcome, Rejected), layout
    assert "itl p99" in outcome.why
    assert outcome.over is not None
    assert outcome.over > 1
    assert outcome.within.startswith("itl_p99=")


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"slo": "ttft_p99=1ms"}, InfeasibleError, "ttft p99"),
        ({"model": "deepseek-r1", "gpus": ["a10g"]}, InfeasibleError, "fits on none"),
        ({"model": "lama-3.1-8b"}, InputError, "unknown model"),
        ({"gpus": ["h100-smx"]}, InputError, "unknown gpu"),
        ({"engine": "vlm"}, InputError, "unknown engine"),
        ({"quality": "good"}, InputError, "unknown quality"),
        ({"growth": -1.0}, InputError, "growth is -1"),
        ({"rps": 0.0}, InputError, "rps is 0"),
        ({"rps": None}, InputError, "no demand"),
        ({"rps": None, "users": 10}, InputError, "users without sessions"),
        ({"slo": "ttft=2s"}, InputError, "METRIC_pNN"),
        ({"slo": []}, InputError, "no service level"),
        ({"workload": "chats"}, InputError, "unknown"),
        ({"prices": {"b200": 1.0}}, InputError, "not among the GPUs"),
        ({"instance": {"tp": "4"}}, InputError, "without a curve"),
    ],
)
def test_bad_input_says_what_to_change(
    arguments: dict[str, object], error: type[Exception], said: str
) -> None:
    good = {"model": "llama-3.1-8b", "workload": "chat", "rps": 5.0, "slo": SLO, "gpus": ["l40s"]}

    with pytest.raises(error, match=said) as raised:
        plan(**{**good, **arguments})  # type: ignore[arg-type]

    assert getattr(raised.value, "hint", "")


def test_the_way_out_of_an_impossible_promise_works() -> None:
    """The limit that the hint offers is one that can be kept."""
    with pytest.raises(InfeasibleError) as raised:
        plan("llama-3.1-8b", workload="chat", rps=5, slo="itl_p99=1ms", gpus=["l40s"])
    offered = raised.value.hint.split("it would keep ")[1].split(";")[0]

    answered = plan("llama-3.1-8b", workload="chat", rps=0.5, slo=offered, gpus=["l40s"])

    assert answered.recommended.gpu.name == "l40s"


# --- determinism ----------------------------------------------------------------------------


def test_equal_under_any_hash_seed() -> None:
    script = (
        "from tierline.planner.api import plan\n"
        "p = plan('llama-3.1-8b', workload='chat', rps=40, slo='ttft_p99=2s', gpus=['l40s'])\n"
        "print(p.headline, p.deployment.to_toml(), [c.name for c in p.alternatives], p.rejected)\n"
        "print(p.survival)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }

    assert len(outputs) == 1
    assert json.dumps(outputs.pop())
