"""Fleets and money: instances from a rate, dollars from accelerators, energy from watts.

The planner and the report call these on the chosen candidate; prices are always arguments.

    instances = ceil(peak x safety / usable),   accelerators = instances x TP x PP
    $/token   = $/h / (capacity tokens/h x utilisation)

`capacity` means tokens that the fleet could produce. Passing tokens that it did produce
and a utilisation below 1 counts idleness twice, so the parameter carries its name.
"""

import math
from collections.abc import Sequence

from tierline.base.units import HOURS_PER_YEAR

JOULES_PER_KWH = 3.6e6
ROUTER_TTFT_SHARE_MAX = 0.10
ROUTING_FLEET_GPUS = 8
# A quotient that is whole in decimals may not be in binary: 100 x 1.2 / 12 is 10.
_ROUND_DOWN = 1e-9


# --- fleet ----------------------------------------------------------------------------------


def instances_needed(peak_rps: float, *, usable_rps: float, safety: float) -> int:
    """Whole instances: the safety factor is applied before rounding, and once.

    >>> instances_needed(120, usable_rps=12, safety=1.3)
    13
    """
    return math.ceil(peak_rps * safety / usable_rps - _ROUND_DOWN)


def instances_guide_mode(peak_rps: float, *, usable_rps: float, safety: float) -> int:
    """The older rule, which rounds twice: ceil(ceil(peak / usable) x safety)."""
    instances = math.ceil(peak_rps / usable_rps - _ROUND_DOWN)
    return math.ceil(instances * safety - _ROUND_DOWN)


def fleet_gpus(instances: int, *, tp: int, pp: int = 1) -> int:
    """Accelerators of a fleet."""
    return instances * tp * pp


def nodes_needed(instances: int, *, tp: int, gpus_per_node: int) -> int:
    """Nodes, when no instance is split over two of them."""
    return math.ceil(instances / (gpus_per_node // tp))


# --- money ----------------------------------------------------------------------------------


def usd_per_million_tokens(
    usd_per_hour: float, *, capacity_tokens_per_s: float, utilization: float
) -> float:
    """Dollars per million tokens.

    >>> round(usd_per_million_tokens(130, capacity_tokens_per_s=31_200, utilization=0.4), 3)
    2.894
    """
    return usd_per_hour / (capacity_tokens_per_s * 3600 * utilization) * 1e6


def relative_cost(utilization: float) -> float:
    """Cost of a token over that of a full fleet: 1 / u."""
    return 1 / utilization


def usd_per_million_at(
    offered_tokens_per_s: float, *, usd_per_hour: float, capacity_tokens_per_s: float
) -> float:
    """Dollars per million tokens against offered load: idle accelerators still cost.

    The fleet cannot produce more than its capacity, so the curve is flat from there on.
    """
    produced = min(offered_tokens_per_s, capacity_tokens_per_s)
    return usd_per_hour / (produced * 3600) * 1e6


def usd_per_year(gpus: int, *, usd_per_gpu_hour: float) -> float:
    """Dollars a year, running all of it.

    >>> usd_per_year(52, usd_per_gpu_hour=2.5)
    1138800.0
    """
    return gpus * usd_per_gpu_hour * HOURS_PER_YEAR


def api_usd_per_request(
    *,
    input_tokens: float,
    output_tokens: float,
    usd_per_million_in: float,
    usd_per_million_out: float,
) -> float:
    """What a hosted API charges for one request."""
    return (input_tokens * usd_per_million_in + output_tokens * usd_per_million_out) / 1e6


def break_even_rps(usd_per_hour: float, *, api_usd_per_request_: float) -> float:
    """The mean rate from which a fleet of that price is cheaper than the API.

    The fleet must be able to carry it; compare with its usable rate.
    """
    return usd_per_hour / 3600 / api_usd_per_request_


def joules_per_token(watts: float, *, tokens_per_s: float) -> float:
    """Energy of one token."""
    return watts / tokens_per_s


def kwh_per_million_tokens(watts: float, *, tokens_per_s: float) -> float:
    """Energy of a million tokens.

    >>> round(kwh_per_million_tokens(10_000, tokens_per_s=2_000), 3)
    1.389
    """
    return joules_per_token(watts, tokens_per_s=tokens_per_s) * 1e6 / JOULES_PER_KWH


# --- routing and blends ---------------------------------------------------------------------


def blended_cost(shares: Sequence[float], costs: Sequence[float]) -> float:
    """Cost of a request that is routed once: sum of share x cost.

    >>> round(blended_cost([0.7, 0.3], [0.1, 1.0]), 2)
    0.37
    """
    assert math.isclose(sum(shares), 1.0), "shares of one whole"
    return sum(share * cost for share, cost in zip(shares, costs, strict=True))


def cascade_cost(escalation: float, *, small_cost: float, large_cost: float = 1.0) -> float:
    """Cost of a request that always tries the small model: all of it, and the escalated share.

    >>> round(cascade_cost(0.2, small_cost=0.1), 2)
    0.3
    """
    return small_cost + escalation * large_cost


def routing_fits(*, router_s: float, ttft_budget_s: float) -> bool:
    """Whether the router takes at most a tenth of the budget; asked of budgets under 200 ms."""
    return ttft_budget_s >= 0.2 or router_s <= ROUTER_TTFT_SHARE_MAX * ttft_budget_s


def evaluate_routing(*, fleet_gpus_: int, skew_measured: bool) -> bool:
    """Whether several tiers are worth planning: a large fleet and a measured skew."""
    return fleet_gpus_ > ROUTING_FLEET_GPUS and skew_measured


def weighted_utilization(utilizations: Sequence[float], gpus: Sequence[float]) -> float:
    """Utilisation of a mixed fleet, by its accelerators and not by its tiers."""
    weighted = sum(u * n for u, n in zip(utilizations, gpus, strict=True))
    return weighted / sum(gpus)


def round_robin_share(slow_gpus: int, *, gpus: int) -> float:
    """Share of requests that land on the slow accelerators of an unrouted fleet."""
    return slow_gpus / gpus
