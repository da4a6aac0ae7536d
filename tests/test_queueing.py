"""The queueing oracles are right: tables, special cases, and queues replayed request by request."""

import doctest
import heapq
import math
from random import Random

import pytest

import queueing
from queueing import MMc, erlang_b, erlang_c, md1_wait_s, mg1_wait_s, mm1_wait_s

REQUESTS = 400_000


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(queueing)

    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize(
    ("offered", "servers", "blocked", "waits"),
    [
        (0.5, 1, 1 / 3, 0.5),  # one server: the load
        (1.0, 2, 0.2, 1 / 3),  # two: 2 rho^2 / (1 + rho)
        (2.0, 3, 4 / 19, 4 / 9),
        (8.0, 10, 0.1217, 0.4092),  # published tables
        (20.0, 25, 0.0501, 0.2087),
        (90.0, 100, 0.0270, 0.2171),
    ],
)
def test_erlang_tables(offered: float, servers: int, blocked: float, waits: float) -> None:
    assert erlang_b(offered, servers=servers) == pytest.approx(blocked, abs=2e-4)
    assert erlang_c(offered, servers=servers) == pytest.approx(waits, abs=2e-3)


@pytest.mark.parametrize("offered", [0.5, 3.7, 19.0])
@pytest.mark.parametrize("servers", [20, 31])
def test_erlang_c_is_the_sum_of_its_definition(offered: float, servers: int) -> None:
    load = offered / servers
    terms = [offered**n / math.factorial(n) for n in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - load)

    assert erlang_c(offered, servers=servers) == pytest.approx(last / (sum(terms) + last))


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_special_cases_agree(load: float) -> None:
    one = MMc(rate=load, service_s=1.0, servers=1)

    assert one.wait_s == pytest.approx(mm1_wait_s(load, service_s=1.0))
    assert md1_wait_s(load, service_s=1.0) == pytest.approx(mm1_wait_s(load, service_s=1.0) / 2)
    assert one.wait_quantile_s(1 - one.waits) == pytest.approx(0, abs=1e-12)
    assert one.queued == pytest.approx(load * load / (1 - load))


def test_a_queue_that_grows_without_end_is_refused() -> None:
    with pytest.raises(AssertionError, match="without end"):
        md1_wait_s(1.0, service_s=1.0)
    with pytest.raises(AssertionError, match="without end"):
        MMc(rate=4.0, service_s=1.0, servers=4).wait_s  # noqa: B018


def waits_s(*, rate: float, servers: int, constant: bool) -> list[float]:
    """Waits of requests served in order of arrival, mean service one second."""
    random = Random(11)
    free_s = [0.0] * servers
    now_s, waits = 0.0, []
    for _ in range(REQUESTS):
        now_s += random.expovariate(rate)
        begins_s = max(now_s, free_s[0])
        service_s = 1.0 if constant else random.expovariate(1.0)
        heapq.heapreplace(free_s, begins_s + service_s)
        waits.append(begins_s - now_s)
    return waits


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_of_constant_service(load: float) -> None:
    """With the other law as control."""
    found_s = sum(waits_s(rate=load, servers=1, constant=True)) / REQUESTS

    assert found_s == pytest.approx(md1_wait_s(load, service_s=1.0), rel=0.05)
    assert found_s != pytest.approx(mg1_wait_s(load, service_s=1.0, service_cv2=1.0), rel=0.4)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.6), (4, 0.7), (16, 0.85)])
def test_several_servers_of_exponential_service(servers: int, load: float) -> None:
    """With one faster server as control: pooling is not the same."""
    law = MMc(rate=servers * load, service_s=1.0, servers=servers)
    found = sorted(waits_s(rate=law.rate, servers=servers, constant=False))

    assert sum(found) / REQUESTS == pytest.approx(law.wait_s, rel=0.06)
    assert sum(w > 0 for w in found) / REQUESTS == pytest.approx(law.waits, rel=0.04)
    assert found[int(0.95 * REQUESTS)] == pytest.approx(law.wait_quantile_s(0.95), rel=0.08)
    if servers > 1:
        faster_s = mm1_wait_s(law.rate, service_s=1 / servers)
        assert sum(found) / REQUESTS != pytest.approx(faster_s, rel=0.08)
