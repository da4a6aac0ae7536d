"""A service level says class, priority, percentile and limit, and each part is checked."""

import pytest

from tierline.base.errors import InputError
from tierline.workload.slo import parse_service_levels, parse_target


@pytest.mark.parametrize(
    ("text", "metric", "percentile", "limit_ns"),
    [
        ("ttft_p99=2s", "ttft", 99.0, 2 * 10**9),
        ("itl_p99.9=50ms", "itl", 99.9, 50 * 10**6),
        ("tpot_p50=25ms", "tpot", 50.0, 25 * 10**6),
        ("e2e_p95=1.5min", "e2e", 95.0, 90 * 10**9),
    ],
)
def test_a_target_is_metric_percentile_and_limit(
    text: str, metric: str, percentile: float, limit_ns: int
) -> None:
    target = parse_target(text)

    assert (target.metric, target.percentile, target.limit_ns) == (metric, percentile, limit_ns)
    assert target.limit_s == limit_ns / 1e9


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("ttft=2s", "METRIC_pNN", "ttft_p99=2s"),
        ("ttft_p99", "METRIC_pNN", "ttft_p99=2s"),
        ("tfft_p99=2s", "tfft", "ttft"),
        ("ttft_p0=2s", "p0", ""),
        ("ttft_p100=2s", "p100", ""),
        ("ttft_pxx=2s", "pxx", ""),
        ("ttft_p99=2", "not a duration", "unit"),
        ("ttft_p99=2parsec", "not a duration", "unit"),
        ("ttft_p99=0s", "not positive", "above zero"),
    ],
)
def test_a_wrong_target_says_which_part_and_what_to_write(
    text: str, message: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse_target(text)

    assert message in str(caught.value) + caught.value.hint
    assert hint in caught.value.hint


def test_classes_carry_their_names_and_priorities() -> None:
    chat, batch, default = parse_service_levels(
        ["chat@10:ttft_p99=1s,itl_p99=50ms", "batch@-5:e2e_p95=10min", "ttft_p50=3s"]
    )

    assert (chat.name, chat.priority, len(chat.targets)) == ("chat", 10, 2)
    assert (batch.name, batch.priority) == ("batch", -5)
    assert (default.name, default.priority) == ("default", 0)
    assert chat.limit_s("itl") == 0.05
    assert chat.limit_s("e2e") is None


def test_the_strictest_of_two_limits_on_one_metric_counts() -> None:
    (level,) = parse_service_levels(["ttft_p50=1s,ttft_p99=2s"])

    assert level.limit_s("ttft") == 1.0


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["chat@high:ttft_p99=1s"], "'high' is not a whole number"),
        (["chat@:ttft_p99=1s"], "not a whole number"),
        (["chat:"], "is empty"),
        ([""], "is empty"),
        (["chat:ttft_p99=1s", "chat:itl_p99=50ms"], "one name"),
        (["ttft_p99=1s", "itl_p99=50ms"], "one name"),
    ],
)
def test_wrong_classes_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_service_levels(texts)

    assert caught.value.hint
