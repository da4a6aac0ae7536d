"""A fleet grows with its load, is paid for from the decision on, drains before it shrinks, and
comes back from nothing."""

from dataclasses import replace
from random import Random

import pytest

from fleets import BLOCK_TOKENS, small_instance, small_workload
from tierline.base.clock import PS_PER_S
from tierline.base.errors import InputError
from tierline.scheduling.scaling import Scaling
from tierline.sim.api import simulate
from tierline.sim.audit import audit
from tierline.sim.faults import parse_fault
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance
from tierline.sim.record import FINISHED, Run
from tierline.sim.replica import Replica
from tierline.sim.scaler import cold_start_of
from tierline.workload.request import Request

INSTANCE = small_instance(blocks=200)
LEAD_S, LOOK_S, IDLE_S, DOWN_S = 20, 2, 60, 30


def scaling(**other: object) -> Scaling:
    chosen: dict[str, object] = {
        "replicas_min": 1,
        "replicas_max": 6,
        "standby": 0,
        "up_window_ps": 4 * PS_PER_S,
        "down_window_ps": DOWN_S * PS_PER_S,
        "idle_ps": IDLE_S * PS_PER_S,
        "lead_ps": LEAD_S * PS_PER_S,
        "rps_per_replica": 2.0,
        "forecasting": False,
        "look_ps": LOOK_S * PS_PER_S,
        "bucket_ps": 10 * PS_PER_S,
        "season_buckets": 30,
    }
    return Scaling(**(chosen | other))  # type: ignore[arg-type]


def steady(rate_rps: float, seconds: float, *, start_s: float = 0, seed: int = 1) -> list[Request]:
    rng, at_s, requests = Random(seed), start_s, []
    while (at_s := at_s + rng.expovariate(rate_rps)) < start_s + seconds:
        requests.append(
            Request(
                arrival_ns=int(at_s * 1e9),
                input_tokens=rng.randint(300, 900),
                output_tokens=rng.randint(40, 120),
            )
        )
    return requests


def run(
    requests: list[Request],
    chosen: Scaling | None,
    *faults: str,
    replicas: int = 1,
    instance: Instance = INSTANCE,
    **options: object,
) -> Run:
    """Simulated, and audited at the end."""
    fleets: list[Fleet] = []
    options.setdefault("prepare", fleets.append)
    done = simulate(
        instance,
        requests,
        levels=(),
        replicas=replicas,
        trace_block_tokens=BLOCK_TOKENS,
        scaling=chosen,
        faults=[parse_fault(text) for text in faults],
        **options,  # type: ignore[arg-type]
    )
    assert not any(audit(fleet) for fleet in fleets)
    return done


def mean_ttft_s(run: Run, first: int = 0) -> float:
    r = run.requests
    waited = [r.first_ps[i] - r.arrival_ps[i] for i in range(first, len(r))]
    return sum(waited) / len(waited) / PS_PER_S


RUSH = [*steady(2, 60), *steady(24, 90, start_s=60, seed=2), *steady(2, 120, start_s=150, seed=3)]


def test_a_fleet_follows_its_load_and_pays_for_what_it_asked_for() -> None:
    scaled, alone = run(RUSH, scaling()), run(RUSH, None)
    up_s = [r.up_ps / PS_PER_S for r in scaled.replicas]
    served = [scaled.requests.replica.tolist().count(n) for n in range(len(up_s))]

    assert scaled.requests.outcome.count(FINISHED) == len(RUSH)
    assert 2 <= len(up_s) <= 6 + 4
    assert mean_ttft_s(scaled) < mean_ttft_s(alone) / 2
    assert sum(up_s) < 0.8 * len(up_s) * scaled.duration_s, "it shrank again"
    assert all(count > 0 for count, up in zip(served, up_s, strict=True) if up > LEAD_S + 10)
    grown = [m for m in scaled.faults if m.what == "scaled"]
    assert grown[0].at_ps >= 60 * PS_PER_S


def test_a_cold_start_is_waited_for() -> None:
    """Nobody is served by a replica before it has been up for its cold start."""
    done = run(RUSH, scaling())
    asked = {m.at_ps for m in done.faults if m.what == "scaled"}
    for number in range(1, len(done.replicas)):
        firsts = [
            done.requests.first_ps[i]
            for i in range(len(RUSH))
            if done.requests.replica[i] == number
        ]
        if firsts:
            assert min(firsts) > min(asked) + LEAD_S * PS_PER_S

    warm = run(RUSH, scaling(lead_ps=0))
    assert mean_ttft_s(warm) < mean_ttft_s(done)  # control: the wait is the cold start's


def test_nothing_serves_and_nothing_is_paid_while_nobody_asks() -> None:
    gap_s = 400
    requests = [*steady(4, 30), *steady(4, 30, start_s=30 + gap_s, seed=5)]
    second = sum(r.arrival_ns < 100 * 10**9 for r in requests)
    done = run(requests, scaling(replicas_min=0))
    kept = run(requests, scaling(replicas_min=1))
    paid_s = sum(r.up_ps for r in done.replicas) / PS_PER_S
    first_wait_s = (done.requests.first_ps[second] - done.requests.arrival_ps[second]) / PS_PER_S

    assert done.requests.outcome.count(FINISHED) == len(requests)
    assert paid_s < done.duration_s - gap_s + IDLE_S + LEAD_S + 60
    assert LEAD_S < first_wait_s < LEAD_S + LOOK_S + 2
    assert mean_ttft_s(kept) < 2  # control: whoever keeps one does not wait
    assert sum(r.up_ps for r in kept.replicas) / PS_PER_S > kept.duration_s - 1


def test_a_forecast_starts_replicas_before_they_are_missed() -> None:
    """Load that comes every five minutes: the third time, somebody has started in advance."""
    requests = []
    for wave in range(4):
        requests += steady(1, 240, start_s=300 * wave, seed=10 + wave)
        requests += steady(20, 60, start_s=300 * wave + 240, seed=20 + wave)
    last = sum(r.arrival_ns < (3 * 300 + 240) * 10**9 for r in requests)
    options = {"rps_per_replica": 6.0, "down_window_ps": 20 * PS_PER_S}
    foresees = run(requests, scaling(forecasting=True, **options))
    reacts = run(requests, scaling(forecasting=False, **options))

    assert mean_ttft_s(foresees, last) < 0.7 * mean_ttft_s(reacts, last)


def test_who_drains_finishes_what_it_has_and_gets_no_more() -> None:
    requests = [*steady(24, 60), *steady(0.5, 120, start_s=60, seed=4)]
    drained: list[tuple[int, int, int]] = []

    def listen(fleet: Fleet) -> None:
        real = Replica.die

        def die(self: Replica, now_ps: int) -> list[object]:
            drained.append((self.number, now_ps, len(self.sequences)))
            return real(self, now_ps)  # type: ignore[return-value]

        monkey.setattr(Replica, "die", die)

    with pytest.MonkeyPatch.context() as monkey:
        done = run(requests, scaling(), replicas=4, prepare=listen)

    assert done.requests.outcome.count(FINISHED) == len(requests)
    assert drained
    assert all(left == 0 for _, _, left in drained)
    for number, at_ps, _ in drained:
        assert not any(
            done.requests.replica[i] == number and done.requests.finish_ps[i] > at_ps
            for i in range(len(requests))
        )


def test_at_the_bound_what_is_left_is_routed_anew() -> None:
    long = [Request(arrival_ns=i, input_tokens=300, output_tokens=6000) for i in range(4)]
    late = [
        Request(arrival_ns=(90 + i) * 10**9, input_tokens=300, output_tokens=2) for i in range(60)
    ]
    instance = small_instance(blocks=2000)
    options = {"down_window_ps": 2 * PS_PER_S, "kv_target_permille": 1000}
    bounded = run(
        [*long, *late],
        scaling(drain_ps=5 * PS_PER_S, **options),
        replicas=2,
        instance=instance,
        routing="round-robin",
    )
    patient = run(
        [*long, *late], scaling(**options), replicas=2, instance=instance, routing="round-robin"
    )

    assert bounded.requests.outcome.count(FINISHED) == 64
    served = [set(r.requests.replica.tolist()[:4]) for r in (bounded, patient)]
    assert (len(served[0]), len(served[1])) == (1, 2)
    assert max(bounded.requests.finish_ps[:4]) > max(patient.requests.finish_ps[:4])


def test_who_dies_is_replaced() -> None:
    requests = steady(12, 120)
    done = run(requests, scaling(), "dies:replica=0,at=30s", replicas=2)
    alone = run(requests, None, "dies:replica=0,at=30s", replicas=2)

    assert len(done.replicas) > 2
    assert done.requests.outcome.count(FINISHED) == len(requests)
    assert mean_ttft_s(done) < mean_ttft_s(alone)


def test_a_cold_start_is_the_weights_over_their_way_and_what_follows() -> None:
    spec = INSTANCE.tier_specs[2]
    weights_bytes = INSTANCE.cost.weights_bytes_per_gpu
    expected_s = weights_bytes / (spec.read_bytes_per_s / spec.shared_by_gpus) + 20

    assert cold_start_of(INSTANCE) / PS_PER_S == pytest.approx(expected_s, rel=1e-9)
    assert cold_start_of(INSTANCE, init_s=0) < cold_start_of(INSTANCE)


# --- several models and kinds ---------------------------------------------------------------

SMALL, LARGE = "llama-3.1-8b", "llama-2-13b"


def of_models(requests: list[Request], share: float) -> list[Request]:
    rng = Random(9)
    return [replace(r, model=LARGE if rng.random() < share else SMALL) for r in requests]


def test_a_request_goes_to_a_replica_of_its_model() -> None:
    fleet = [
        small_instance(),
        small_instance(model=LARGE),
        small_instance(gpu="a100-80"),
        small_instance(model=LARGE, gpu="h200"),
    ]
    requests = of_models(small_workload(Random(2), count=80), 0.4)
    done = run(requests, None, instance=fleet)  # type: ignore[arg-type]
    pairs = zip(done.requests.model, done.requests.replica, strict=True)
    served = {(done.models[model], number) for model, number in pairs}

    assert done.models == (SMALL, LARGE)
    assert served == {(SMALL, 0), (SMALL, 2), (LARGE, 1), (LARGE, 3)}


def test_models_are_scaled_apart() -> None:
    fleet = [small_instance(blocks=200), small_instance(blocks=200, model=LARGE)]
    requests = of_models(RUSH, 0.9)
    done = run(requests, {LARGE: scaling()}, instance=fleet)  # type: ignore[arg-type]
    kinds = [r.name for r in done.replicas]

    assert len(kinds) > 2
    models = {done.requests.replica[i]: done.requests.model[i] for i in range(len(requests))}
    assert models.pop(0) == 0
    assert set(models.values()) == {1}


@pytest.mark.parametrize(
    ("model", "said"), [("", "names no model"), ("llama-2-31b", "unknown model of a request")]
)
def test_a_request_for_a_model_that_nobody_serves_is_an_error(model: str, said: str) -> None:
    fleet = [small_instance(), small_instance(model=LARGE)]
    request = Request(arrival_ns=0, input_tokens=10, output_tokens=1, model=model)
    with pytest.raises(InputError, match=said):
        run([request], None, instance=fleet)  # type: ignore[arg-type]


def test_a_request_that_fits_only_on_one_kind_goes_there() -> None:
    fleet = [small_instance(blocks=20), small_instance(blocks=100)]
    requests = [Request(arrival_ns=i, input_tokens=3000, output_tokens=2) for i in range(4)]
    requests.append(Request(arrival_ns=5, input_tokens=90_000, output_tokens=2))
    done = run(requests, None, instance=fleet)  # type: ignore[arg-type]

    assert done.requests.replica.tolist() == [1, 1, 1, 1, -1]
    assert done.requests.outcome.tolist() == [0, 0, 0, 0, 1]
