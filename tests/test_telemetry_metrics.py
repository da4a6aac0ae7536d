"""What `/metrics` tells is what happened, under names that are written down, in bounded series."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tierline.telemetry.meanings import (
    FINISHED_REASONS,
    MEANINGS,
    OTHER,
    TTFT_BUCKETS,
    Meaning,
)
from tierline.telemetry.metrics import Metrics, one_two_five

# Copied by hand from what vLLM registers: vllm/v1/metrics/loggers.py, class PrometheusStatLogger,
# as of 2026-11 (prometheus_client adds _total to the counters' names there).
OF_VLLM = {
    ("vllm:num_requests_running", "gauge"),
    ("vllm:num_requests_waiting", "gauge"),
    ("vllm:kv_cache_usage_perc", "gauge"),
    ("vllm:cache_config_info", "gauge"),
    ("vllm:prefix_cache_queries_total", "counter"),
    ("vllm:prefix_cache_hits_total", "counter"),
    ("vllm:num_preemptions_total", "counter"),
    ("vllm:prompt_tokens_total", "counter"),
    ("vllm:generation_tokens_total", "counter"),
    ("vllm:request_success_total", "counter"),
    ("vllm:request_prompt_tokens", "histogram"),
    ("vllm:request_generation_tokens", "histogram"),
    ("vllm:iteration_tokens_total", "histogram"),
    ("vllm:request_params_n", "histogram"),
    ("vllm:request_params_max_tokens", "histogram"),
    ("vllm:time_to_first_token_seconds", "histogram"),
    ("vllm:inter_token_latency_seconds", "histogram"),
    ("vllm:request_time_per_output_token_seconds", "histogram"),
    ("vllm:e2e_request_latency_seconds", "histogram"),
    ("vllm:request_queue_time_seconds", "histogram"),
    ("vllm:request_inference_time_seconds", "histogram"),
    ("vllm:request_prefill_time_seconds", "histogram"),
    ("vllm:request_decode_time_seconds", "histogram"),
}
VLLM_ITL_BOUNDS = [
    *("0.01", "0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75"),
    *("1.0", "2.5", "5.0", "7.5", "10.0", "20.0", "40.0", "80.0"),
]
OPENMETRICS = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain"


def new_metrics() -> Metrics:
    return Metrics(
        "tiny",
        levels=("interactive", "batch"),
        tiers=("device", "host"),
        positions_max=2048,
        block_tokens=16,
        kv_blocks=100,
        version="1.2.3",
    )


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(metrics: Metrics, accept: str = "") -> Samples:
    text = metrics.exposition(accept)[0].decode()
    families = parse_openmetrics(text) if accept else parse_text(text)
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def counted(metrics: Metrics, name: str) -> list[float]:
    """The values of a metric that are not zero."""
    return [v for (found, _), v in samples(metrics).items() if v and found == name]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The one sample of that name with those labels beside the model's."""
    wanted = {("model_name", "tiny"), ("engine", "0"), *labels.items()}
    return samples(metrics)[name, frozenset(wanted)]


def finish(metrics: Metrics, **changes: object) -> None:
    facts: dict[str, object] = {
        "level": "interactive",
        "endpoint": "chat",
        "outcome": "stop",
        "e2e_s": 1.2,
        "queue_s": 0.1,
        "prefill_s": 0.2,
        "decode_s": 0.9,
        "tpot_s": 0.01,
        "prompt_tokens": 100,
        "output_tokens": 90,
        "answers": 1,
        "max_tokens": 128,
        "kept": True,
    }
    metrics.finished(**{**facts, **changes})  # type: ignore[arg-type]


# Names


def test_the_names_that_are_vllms() -> None:
    assert {(m.name, m.kind) for m in MEANINGS if m.as_vllm} == OF_VLLM


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_exposed_is_what_is_written_down_and_nothing_else(accept: str) -> None:
    body, content_type = new_metrics().exposition(accept)
    parse = parse_openmetrics if accept else parse_text
    suffix = {"counter": "_total"}
    families = {f.name + suffix.get(f.type, ""): f.type for f in parse(body.decode())}

    assert families == {m.name: m.kind for m in MEANINGS}
    assert content_type.startswith("application/openmetrics-text" if accept else "text/plain")


def test_a_metric_that_nobody_wrote_down_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = Meaning(name="tierline:extra", kind="gauge", text="Extra.")
    monkeypatch.setattr("tierline.telemetry.metrics.MEANINGS", (*MEANINGS, extra))
    families = {f.name for f in parse_text(new_metrics().exposition()[0].decode())}

    assert families - {m.name.removesuffix("_total") for m in MEANINGS if m.kind == "counter"} - {
        m.name for m in MEANINGS
    } == {"tierline:extra"}


def test_colons_survive_in_openmetrics() -> None:
    """prometheus_client's own choice of escaping writes vllm_... in every sample."""
    body = new_metrics().exposition(OPENMETRICS)[0].decode()

    assert 'vllm:num_requests_running{engine="0",model_name="tiny"}' in body
    assert "vllm_" not in body


def test_both_formats_say_the_same() -> None:
    metrics = new_metrics()
    finish(metrics)
    metrics.token_gaps("batch", [0.003, 0.2])
    plain, other = samples(metrics), samples(metrics, OPENMETRICS)
    for key in [k for k in plain if k[0].startswith("process_")]:
        del plain[key], other[key]

    assert plain == other


def test_two_servers_in_a_process_share_nothing() -> None:
    first, second = new_metrics(), new_metrics()
    finish(first)

    assert value(first, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(second, "vllm:request_success_total", finished_reason="stop") == 0


# Numbers


def test_a_request_from_its_door_to_its_end() -> None:
    metrics = new_metrics()
    metrics.admitted(prompt_tokens=100, cached_tokens=64, tier="host")
    metrics.admitted(prompt_tokens=10, cached_tokens=0, tier="")
    metrics.first_token("interactive", 0.3)
    metrics.token_gaps("interactive", [0.004, 0.02])
    metrics.token_gaps("batch", [0.02])
    finish(metrics)
    found = {
        "prompt": value(metrics, "vllm:prompt_tokens_total"),
        "queries": value(metrics, "vllm:prefix_cache_queries_total"),
        "hits": value(metrics, "vllm:prefix_cache_hits_total"),
        "hits of host": value(metrics, "tierline:prefix_hit_tokens_total", tier="host"),
        "generated": value(metrics, "vllm:generation_tokens_total"),
        "gaps": value(metrics, "vllm:inter_token_latency_seconds_count"),
        "gaps of class": value(
            metrics, "tierline:inter_token_latency_seconds_count", **{"class": "interactive"}
        ),
        "ttft": value(metrics, "vllm:time_to_first_token_seconds_sum"),
        "inference": value(metrics, "vllm:request_inference_time_seconds_sum"),
        "outcome": value(
            metrics,
            "tierline:requests_total",
            **{"class": "interactive", "endpoint": "chat", "outcome": "stop"},
        ),
        "kept": value(metrics, "tierline:slo_kept_total", **{"class": "interactive"}),
    }

    assert found == {
        "prompt": 110,
        "queries": 110,
        "hits": 64,
        "hits of host": 64,
        "generated": 4,
        "gaps": 3,
        "gaps of class": 2,
        "ttft": 0.3,
        "inference": pytest.approx(1.1),
        "outcome": 1,
        "kept": 1,
    }


def test_steps_and_memory() -> None:
    metrics = new_metrics()
    for waiting in (5, 2):
        metrics.step(
            seconds=0.01,
            decodes=20,
            prefill_tokens=100,
            preempted=1,
            running=22,
            waiting=waiting,
            waiting_by_level={"interactive": waiting - 1, "nobody configured this": 1},
        )
    metrics.kv("device", used=30, cached=50, free=20, evicted=7)
    metrics.kv("host", used=1, cached=0, free=0, evicted=0)
    metrics.standing(streams_open=4, usage_records_pending=3, ready=True)

    assert value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:num_requests_running") == 22
    assert value(metrics, "vllm:num_preemptions_total") == 2
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 240
    assert value(metrics, "tierline:queue_requests", **{"class": "interactive"}) == 1
    assert value(metrics, "tierline:queue_requests", **{"class": OTHER}) == 1
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.3
    assert value(metrics, "tierline:kv_blocks", tier="device", state="cached") == 50
    assert value(metrics, "tierline:kv_evicted_blocks_total", tier="device") == 7
    assert value(metrics, "tierline:streams_open") == 4
    assert value(metrics, "tierline:build_info", version="1.2.3") == 1


@pytest.mark.parametrize("outcome", FINISHED_REASONS)
def test_every_outcome_is_counted_once(outcome: str) -> None:
    metrics = new_metrics()
    finish(metrics, outcome=outcome, kept=None)
    of_vllm = [1] if FINISHED_REASONS[outcome] else []

    assert counted(metrics, "tierline:requests_total") == [1]
    assert counted(metrics, "vllm:request_success_total") == of_vllm


def test_a_request_that_never_began_leaves_no_times() -> None:
    metrics = new_metrics()
    finish(metrics, outcome="late", queue_s=None, prefill_s=None, decode_s=None, tpot_s=None)

    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 0
    assert value(metrics, "vllm:request_inference_time_seconds_count") == 0


def test_buckets_are_vllms_and_count_what_does_not_exceed_them() -> None:
    metrics = new_metrics()
    metrics.token_gaps("batch", [0.0005, 0.01, 0.011, 100.0])
    metrics.token_gaps("interactive", [0.005])
    found = {
        dict(labels)["le"]: count
        for (name, labels), count in samples(metrics).items()
        if name == "vllm:inter_token_latency_seconds_bucket"
    }

    assert list(found) == [*VLLM_ITL_BOUNDS, "+Inf"]
    assert (found["0.01"], found["0.025"], found["80.0"], found["+Inf"]) == (3, 4, 4, 5)
    assert one_two_five(2048) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(min_value=0, max_value=1e4), max_size=50))
def test_a_histogram_is_what_prometheus_client_makes_of_it(values: list[float]) -> None:
    metrics = new_metrics()
    registry = CollectorRegistry()
    theirs = Histogram("ttft", "theirs", buckets=TTFT_BUCKETS, registry=registry)
    for value in values:
        theirs.observe(value)
        metrics.first_token("batch", value)
    expected = {
        (s.name.removeprefix("ttft"), s.labels.get("le")): s.value
        for family in parse_text(generate_latest(registry).decode())
        for s in family.samples
        if not s.name.endswith("_created")
    }
    name = "vllm:time_to_first_token_seconds"

    assert expected == {
        (found.removeprefix(name), dict(labels).get("le")): v
        for (found, labels), v in samples(metrics).items()
        if found.startswith(name)
    }


# Series are bounded


def test_strangers_make_no_series() -> None:
    metrics = new_metrics()
    before = len(samples(metrics))
    random_source = random.Random(7)
    for _ in range(10_000):
        stranger = f"tenant-{random_source.random()}"
        metrics.admitted(prompt_tokens=3, cached_tokens=1, tier=stranger)
        metrics.first_token(stranger, 0.1)
        metrics.token_gaps(stranger, [0.1])
        metrics.refused(random_source.randrange(100, 1000))
        finish(metrics, level=stranger, endpoint=stranger)
    metrics.kv("a tier of somebody", used=1, cached=1, free=1, evicted=1)

    assert len(samples(metrics)) == before
    assert value(metrics, "tierline:slo_requests_total", **{"class": OTHER}) == 10_000
    assert b"tenant-" not in metrics.exposition()[0]


def test_a_label_from_outside_would_be_noticed() -> None:
    """Control: with each stranger's class configured, the series grow with the strangers."""
    few = Metrics("tiny", levels=("interactive",))
    many = Metrics("tiny", levels=tuple(f"tenant-{n}" for n in range(100)))

    assert len(samples(many)) > len(samples(few)) + 1000


def test_an_outcome_that_nobody_defined_is_our_bug() -> None:
    with pytest.raises(KeyError):
        finish(new_metrics(), outcome="vanished")


def test_the_servers_outcomes_are_these() -> None:
    from tierline.server.life import OUTCOMES

    assert set(OUTCOMES) == set(FINISHED_REASONS)


@pytest.mark.parametrize("name", ['a"b', "a\nvllm:fake 1", "ünï\\code", "a\rb", ""])
def test_a_models_name_cannot_write_lines_of_its_own(name: str) -> None:
    body = Metrics(name).exposition()[0].decode()
    (running,) = [f for f in parse_text(body) if f.name == "vllm:num_requests_running"]

    assert running.samples[0].labels["model_name"] == name
    assert "\nvllm:fake" not in body


def test_memory_of_this_process_is_read() -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("the process's metrics are read from /proc")

    assert samples(new_metrics())["process_resident_memory_bytes", frozenset()] > 1e6


# The guide


def yaml_of_guide() -> list[Any]:
    page = Path(__file__).resolve().parents[1] / "docs/guides/observe.md"
    return [yaml.safe_load(part.split("```")[0]) for part in page.read_text().split("```yaml")[1:]]


def rules_of_guide() -> list[dict[str, Any]]:
    return [rule for part in yaml_of_guide() for g in part.get("groups", []) for rule in g["rules"]]


@pytest.mark.parametrize("rule", rules_of_guide(), ids=lambda rule: str(rule["alert"]))
def test_alerts_read_metrics_that_are_there(rule: dict[str, Any]) -> None:
    exposed = {name for name, _ in samples(new_metrics())}
    read = set(re.findall(r"(?:vllm|tierline):\w+", rule["expr"]))

    assert read
    assert read <= exposed
    assert rule["for"]


def test_values_that_alerts_ask_for_are_there() -> None:
    pairs = {
        pair
        for rule in rules_of_guide()
        for label, values in re.findall(r'(\w+)=~?"([^"]+)"', rule["expr"])
        for pair in ((label, value) for value in values.split("|"))
    }
    there = {pair for _, labels in samples(new_metrics()) for pair in labels}

    assert pairs
    assert pairs <= there
