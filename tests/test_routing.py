"""A request goes to the replica that its policy would choose if it saw everything it may see,
and the fleet may change under it."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.clock import FOREVER_PS
from tierline.catalog.deployment import ROUTINGS
from tierline.scheduling import routing
from tierline.scheduling.routing import ADAPTER_TOKENS, REQUEST_TOKENS, ROUTERS, PrefixHash
from tierline.scheduling.sequence import Sequence

SETTINGS = {"seed": 7, "block_tokens": 512}


@dataclass(kw_only=True)
class Standing:
    """A replica as it stands: a candidate that is plain data."""

    number: int
    accepting: bool = True
    requests_outstanding: int = 0
    prompt_tokens_queued: int = 0
    speed_permille: int = 1000
    cached: int = 0
    adapters: Collection[str] = ()
    ttft_ps: int = 0
    asked: list[int] = field(default_factory=list)

    def cached_tokens(self, sequence: Sequence) -> int:
        self.asked.append(sequence.id)
        return min(self.cached, sequence.prompt_tokens - 1)

    def has_adapter(self, name: str) -> bool:
        return name in self.adapters

    def predicted_ttft_ps(self, sequence: Sequence) -> int:
        return self.ttft_ps


def request(number: int = 0, *, prompt_tokens: int = 4000, **fields: object) -> Sequence:
    return Sequence(
        number,
        **{"arrival_ps": 0, "prompt_tokens": prompt_tokens, "output_max_tokens": 100, **fields},
    )


def fleet(count: int, **fields: object) -> list[Standing]:
    return [Standing(number=number, **fields) for number in range(count)]


def standings(**fields: st.SearchStrategy) -> st.SearchStrategy[list[Standing]]:
    drawn = st.builds(
        Standing,
        number=st.just(0),
        **{
            "accepting": st.booleans(),
            "requests_outstanding": st.integers(0, 20),
            "prompt_tokens_queued": st.integers(0, 9000),
            "speed_permille": st.sampled_from([500, 1000, 1600]),
            "cached": st.integers(0, 5000),
            "adapters": st.sampled_from([(), ("a@1",)]),
            "ttft_ps": st.integers(0, 9),
            **fields,
        },
    )
    return st.lists(drawn, max_size=6).map(
        lambda drawn: [replace(r, number=3 * i, asked=[]) for i, r in enumerate(drawn)]
    )


requests = st.builds(
    request,
    st.integers(0, 99),
    prompt_tokens=st.integers(1, 6000),
    adapter=st.sampled_from(["", "a@1"]),
    due_ps=st.integers(0, 9) | st.just(FOREVER_PS),
    chain=st.none() | st.lists(st.integers(0, 2**64 - 1), max_size=5),
)


def test_every_name_of_a_deployment_has_a_router() -> None:
    assert set(ROUTERS) == set(ROUTINGS)


@given(standings(), requests, st.sampled_from(sorted(ROUTERS)))
def test_only_who_accepts_is_chosen(
    replicas: list[Standing], sequence: Sequence, name: str
) -> None:
    route = ROUTERS[name](replicas, **SETTINGS)
    accepting = {r.number for r in replicas if r.accepting}

    for _ in range(3):
        assert route(sequence, 0) in (accepting or {None})
    for replica in replicas:  # the fleet changes under a route that exists
        replica.accepting = not replica.accepting
    replicas.append(Standing(number=99))
    assert route(sequence, 0) in {r.number for r in replicas if r.accepting}


# --- the price ------------------------------------------------------------------------------


def work(replica: Standing) -> int:
    tokens = replica.prompt_tokens_queued + REQUEST_TOKENS * replica.requests_outstanding
    return tokens * 1000 // replica.speed_permille


def until_computed(replica: Standing, sequence: Sequence, adapter_tokens: int) -> int:
    tokens = replica.prompt_tokens_queued + REQUEST_TOKENS * replica.requests_outstanding
    tokens += sequence.prompt_tokens - replica.cached_tokens(sequence)
    if sequence.adapter and not replica.has_adapter(sequence.adapter):
        tokens += adapter_tokens
    return tokens * 1000 // replica.speed_permille


def promised(replica: Standing, sequence: Sequence) -> tuple[int, ...]:
    if replica.ttft_ps <= sequence.due_ps:
        return (0, until_computed(replica, sequence, ADAPTER_TOKENS))
    return (1, replica.ttft_ps)


PRICES: dict[str, Callable[[Standing, Sequence], object]] = {
    "least-outstanding": lambda r, s: work(r),
    "prefix-aware": lambda r, s: until_computed(r, s, 0),
    "adapter-aware": lambda r, s: until_computed(r, s, ADAPTER_TOKENS),
    "slo-aware": promised,
}


def least(replicas: list[Standing], sequence: Sequence, name: str) -> int | None:
    """The least price by looking at everybody, ties to the lowest number."""
    prices = [(PRICES[name](r, sequence), r.number) for r in replicas if r.accepting]
    return min(prices)[1] if prices else None


@given(standings(), requests, st.sampled_from(sorted(PRICES)))
def test_the_least_price_is_chosen(replicas: list[Standing], sequence: Sequence, name: str) -> None:
    assert ROUTERS[name](replicas, **SETTINGS)(sequence, 0) == least(replicas, sequence, name)


def test_the_price_check_tells_policies_apart() -> None:
    """Negative control: a policy judged by the price of another is found out."""
    replicas = fleet(3)
    replicas[0].prompt_tokens_queued = 1000
    replicas[0].cached, replicas[0].ttft_ps = 3000, 5
    replicas[1].adapters, replicas[1].prompt_tokens_queued = ["a@1"], 100
    replicas[1].cached, replicas[1].ttft_ps = 1600, 5
    replicas[2].ttft_ps = 1
    sequence = request(adapter="a@1", due_ps=2)
    chosen = {name: ROUTERS[name](replicas, **SETTINGS)(sequence, 0) for name in PRICES}

    assert chosen == {
        "least-outstanding": 2,
        "prefix-aware": 0,
        "adapter-aware": 1,
        "slo-aware": 2,
    }
    assert chosen["prefix-aware"] != least(replicas, sequence, "least-outstanding")
    assert chosen["adapter-aware"] != least(replicas, sequence, "prefix-aware")
    assert chosen["slo-aware"] != least(replicas, sequence, "adapter-aware")


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, 0),  # ties to the lowest number
        ({"cached": [0, 3000, 2000]}, 1),
        ({"cached": [0, 3000, 2000], "prompt_tokens_queued": [0, 3001, 0]}, 2),  # waiting costs
        ({"cached": [0, 3000, 2000], "accepting": [True, False, False]}, 0),
        ({"speed_permille": [500, 1000, 2000], "prompt_tokens_queued": [0, 0, 3000]}, 2),
        ({"requests_outstanding": [2, 1, 3]}, 1),
    ],
)
def test_where_a_prefix_goes(changes: dict[str, list[int]], chosen: int) -> None:
    replicas = fleet(3)
    for name, values in changes.items():
        for replica, value in zip(replicas, values, strict=True):
            setattr(replica, name, value)

    assert ROUTERS["prefix-aware"](replicas, **SETTINGS)(request(), 0) == chosen


def test_a_replica_that_loses_even_with_a_full_hit_is_not_asked() -> None:
    replicas = fleet(8, prompt_tokens_queued=9000)
    replicas[0].prompt_tokens_queued = 0
    ROUTERS["prefix-aware"](replicas, **SETTINGS)(request(), 0)

    assert [len(r.asked) for r in replicas] == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("now_ps", "due_ps", "chosen"),
    [
        (0, FOREVER_PS, 2),  # no promise: the cheapest, and that is the one with the hit
        (0, 9, 2),
        (0, 5, 1),  # too slow there: the cheapest that keeps it
        (4, 9, 1),  # the same slack, later
        (0, 1, 0),  # nobody keeps it: the earliest
    ],
)
def test_a_promise_goes_before_a_hit(now_ps: int, due_ps: int, chosen: int) -> None:
    replicas = fleet(3)
    for replica, cached, ttft_ps in zip(replicas, (0, 1000, 3000), (2, 4, 8), strict=True):
        replica.cached, replica.ttft_ps = cached, ttft_ps

    assert ROUTERS["slo-aware"](replicas, **SETTINGS)(request(due_ps=due_ps), now_ps) == chosen


# --- turns and draws ------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 50), st.data())
def test_turns_are_shared_evenly(count: int, turns: int, data: st.DataObject) -> None:
    replicas = fleet(count)
    for number in data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1)):
        replicas[number].accepting = False
    route = ROUTERS["round-robin"](replicas, **SETTINGS)
    taken = Counter(route(request(), 0) for _ in range(turns))
    shares = [taken[r.number] for r in replicas if r.accepting]

    assert max(shares) - min(shares) <= 1
    assert sum(shares) == turns


def fullest_after(draws: int, *, choose: str) -> int:
    """Balls into bins: requests that stay, over 64 replicas."""
    replicas = fleet(64)
    route = ROUTERS["power-of-two"](replicas, seed=3, block_tokens=16)
    for _ in range(draws):
        if choose == "one":  # the same draws, and the load is not looked at
            for replica in replicas:
                replica.prompt_tokens_queued = 0
        number = route(request(), 0)
        assert number is not None
        replicas[number].requests_outstanding += 1
        if choose == "one":
            replicas[number].requests_outstanding -= 1
            replicas[number].cached += 1
    return max(r.cached if choose == "one" else r.requests_outstanding for r in replicas)


def test_two_choices_keep_the_fullest_near_the_average() -> None:
    """Average 64; the control draws as often and does not look at the load."""
    assert fullest_after(4096, choose="two") <= 67
    assert fullest_after(4096, choose="one") > 75


def test_draws_are_a_function_of_the_seed() -> None:
    def draws(seed: int) -> list[int | None]:
        route = ROUTERS["power-of-two"](fleet(50), seed=seed, block_tokens=16)
        return [route(request(), 0) for _ in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


# --- the ring -------------------------------------------------------------------------------

KEYS = 4000


def homes(replicas: list[Standing]) -> list[int | None]:
    """Where each of many prefixes belongs while nobody is loaded."""
    route = ROUTERS["prefix-hash"](replicas, **SETTINGS)
    return [route(request(chain=[7, key, key + KEYS]), 0) for key in range(KEYS)]


def moves(before: list[int | None], after: list[int | None]) -> list[int | None]:
    """New homes of the prefixes that moved."""
    return [new for old, new in zip(before, after, strict=True) if old != new]


@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_a_new_replica_takes_its_share_and_nobody_else_moves(count: int) -> None:
    moved = moves(homes(fleet(count)), homes(fleet(count + 1)))

    assert set(moved) == {count}
    assert len(moved) / KEYS == pytest.approx(1 / (count + 1), rel=0.25)


def test_the_moving_check_can_fail() -> None:
    """Negative control: a hash modulo the replicas moves nearly everything, everywhere."""
    keys = [routing.mix(key) for key in range(KEYS)]
    moved = moves([key % 8 for key in keys], [key % 9 for key in keys])

    assert set(moved) == set(range(9))
    assert len(moved) / KEYS == pytest.approx(8 / 9, rel=0.05)


def test_small_numbers_are_spread_over_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `mix` is for: chains of small integers, as traces have, would all lie in one place."""
    assert len(set(homes(fleet(8)))) == 8

    monkeypatch.setattr(routing, "mix", lambda value: value & (1 << 64) - 1)
    assert len(set(homes(fleet(8)))) < 8


def test_shares_of_the_ring_are_alike() -> None:
    taken = Counter(homes(fleet(8)))

    assert len(taken) == 8
    assert max(taken.values()) < 1.35 * KEYS / 8


def test_turns_of_a_conversation_stay_together_and_conversations_part() -> None:
    """One block at a fixed depth: longer prompts of one beginning have one home."""
    route = ROUTERS["prefix-hash"](fleet(8), **SETTINGS)
    turns = {route(request(chain=[7, 8, *range(100, 100 + n)]), 0) for n in range(9)}
    others = {route(request(chain=[7, 1000 + n, 2000]), 0) for n in range(50)}

    assert len(turns) == 1
    assert len(others) == 8  # although the first block, a system prompt, is common


def test_tenants_part_although_their_blocks_have_the_same_numbers() -> None:
    """A salt takes the bits above 64, and the ring has 64."""
    route = ROUTERS["prefix-hash"](fleet(8), **SETTINGS)
    homes_of_block = {route(request(chain=[(salt << 64) + 5]), 0) for salt in range(50)}

    assert len(homes_of_block) == 8


@pytest.mark.parametrize(("block_tokens", "depth"), [(512, 2), (16, 64), (4096, 1)])
def test_depth_is_in_tokens(block_tokens: int, depth: int) -> None:
    route = PrefixHash(fleet(8), seed=1, block_tokens=block_tokens)
    common = list(range(depth - 1))
    parting = {route(request(chain=[*common, 10_000 + n, 5]), 0) for n in range(50)}
    deeper = {route(request(chain=[*common, 9, 10_000 + n]), 0) for n in range(50)}

    assert len(parting) == 8
    assert len(deeper) == 1


@given(standings(), st.integers(0, 2**64 - 1), st.integers(1, 6000))
def test_nobody_over_the_cap_is_chosen(
    replicas: list[Standing], block: int, prompt_tokens: int
) -> None:
    sequence = request(chain=[block], prompt_tokens=prompt_tokens)
    number = ROUTERS["prefix-hash"](replicas, **SETTINGS)(sequence, 0)
    ahead = {r.number: work(r) for r in replicas if r.accepting}

    if number is not None:
        assert ahead[number] <= 1.25 * sum(ahead.values()) / len(ahead) + prompt_tokens


def hottest_share(*, cap_permille: int) -> float:
    """One prefix for everybody, on eight replicas; the share of the most loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "LOAD_CAP_PERMILLE", cap_permille)
        replicas = fleet(8)
        route = ROUTERS["prefix-hash"](replicas, **SETTINGS)
        for _ in range(800):
            number = route(request(chain=[1]), 0)
            assert number is not None
            replicas[number].prompt_tokens_queued += 4000
    return max(r.prompt_tokens_queued for r in replicas) / (800 * 4000)


def test_a_hot_prefix_overflows() -> None:
    """The control has a cap that nobody reaches."""
    assert hottest_share(cap_permille=1250) < 1.3 / 8
    assert hottest_share(cap_permille=10**9) == 1.0


# --- hash seeds -----------------------------------------------------------------------------

PROGRAM = """
import json
from test_routing import ROUTERS, fleet, request
chosen = {}
for name, build in ROUTERS.items():
    replicas = fleet(8)
    route = build(replicas, seed=5, block_tokens=16)
    for i in range(200):
        number = route(request(i, chain=[i % 23, i], adapter=f"a{i % 5}@1"), 0)
        replicas[number].requests_outstanding += 1
        chosen.setdefault(name, []).append(number)
chosen["control"] = [hash(f"a{i}") % 8 for i in range(50)]
print(json.dumps(chosen))
"""


def routes_under(hash_seed: str) -> dict[str, list[int]]:
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": here}
    return json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment))


def test_routes_do_not_depend_on_the_hash_seed() -> None:
    one, other = routes_under("0"), routes_under("1")

    assert one.pop("control") != other.pop("control")  # the seeds would show it
    assert one == other
