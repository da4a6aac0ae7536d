"""Built-in workloads for who has no trace yet, and a rate from business numbers.

The planner takes the same `Profile` from here as from a trace. Each kind is the lengths of one
published data set (data/archetypes.toml, which names it and its licence), not an average of
several: a mixture has lengths that nobody sends. A kind has arrivals only once a rate is given.
"""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from tierline.base.errors import InputError
from tierline.base.names import lookup
from tierline.workload.profile import Lengths, Profile
from tierline.workload.reuse import ReuseCurve, ReusePoint

REQUESTS_PER_SESSION = 4.0
PEAK_TO_MEAN = 3.0
_DAY_S = 86_400


def known_workloads() -> dict[str, str]:
    """Kind -> the data set its lengths come from."""
    return {kind: facts["source"] for kind, facts in _facts().items()}


def workload_profile(kind: str, rps: float | None = None) -> Profile:
    """The built-in workload `kind`, arriving as a steady Poisson stream at `rps`.

    Without `rps` the profile has no arrivals. Raises `InputError` for an unknown kind.
    """
    facts = lookup(
        "workload", kind, _facts(), way_out="or give a trace of your own, which is always better"
    )
    profile = Profile(
        source=f"{kind}: {facts['source']}, {facts['licence']}",
        requests=facts["requests"],
        input=_lengths(facts["input"]),
        output=_lengths(facts["output"]),
        total=_lengths(facts["total"]),
        length_correlation=facts["length_correlation"],
        arrivals=None,
        sessions=None,
        tenants=None,
        tenant_zipf=None,
        priorities={0: 1.0},
        reuse=_curve(facts["reuse"]) if "reuse" in facts else None,
        notes=(f"the {kind} workload is assumed: lengths of {facts['source']}",),
    )
    return profile if rps is None else profile.at_rate(rps)


def business_rate(
    *,
    users: float,
    sessions_per_day: float,
    requests_per_session: float = REQUESTS_PER_SESSION,
    peak_to_mean: float = PEAK_TO_MEAN,
) -> float:
    """Requests per second in the busiest minute: users x sessions x requests / day x peak.

    The two defaults are assumptions: four turns a session, and a peak of three times the mean
    over the day, as in the most uneven of the multi-day public traces.

    >>> round(business_rate(users=20_000, sessions_per_day=3), 2)
    8.33
    """
    given = {
        "users": users,
        "sessions_per_day": sessions_per_day,
        "requests_per_session": requests_per_session,
    }
    for name, value in given.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}", hint="it is a number above zero")
    if not 1 <= peak_to_mean < float("inf"):
        raise InputError(f"peak_to_mean is {peak_to_mean}", hint="a peak is at least the mean, 1")
    return users * sessions_per_day * requests_per_session / _DAY_S * peak_to_mean


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("data/archetypes.toml").read_text("utf-8"))


def _lengths(facts: dict[str, Any]) -> Lengths:
    return Lengths(
        mean=facts["mean"],
        std=facts["std"],
        quantiles=tuple(facts["quantiles"]),
        p99_9=facts["p99_9"],
    )


def _curve(facts: dict[str, Any]) -> ReuseCurve:
    return ReuseCurve(
        block_tokens=facts["block_tokens"],
        accesses=facts["accesses"],
        distinct_blocks=facts["distinct_blocks"],
        sample_rate=facts["sample_rate"],
        points=tuple(
            ReusePoint(cached_tokens=size, block_hit_rate=blocks, token_hit_rate=tokens)
            for size, blocks, tokens in facts["points"]
        ),
    )
