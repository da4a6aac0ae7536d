"""A request is one span, named as the conventions say, in its caller's trace, without its text."""

import timeit
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import error_attributes, gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from tierline.telemetry.spans import FACTS, record_request, request_tracer, trace_id_of

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
START_NS = 1_790_000_000_000_000_000
MS = 1_000_000
# vLLM's, which the conventions do not have: vllm/tracing, class SpanAttributes.
OF_VLLM = {
    "gen_ai.latency.time_in_queue",
    "gen_ai.latency.time_to_first_token",
    "gen_ai.latency.time_in_model_prefill",
    "gen_ai.latency.time_in_model_decode",
    "gen_ai.latency.e2e",
}
REQUEST: dict[str, Any] = {
    "endpoint": "chat",
    "model": "tiny",
    "start_ns": START_NS,
    "end_ns": START_NS + 1200 * MS,
    "facts": {
        "response_id": "chatcmpl-1",
        "finish_reasons": ("stop",),
        "max_tokens": 128,
        "temperature": 0.0,
        "seed": None,
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "output_tokens": 90,
        "queue_s": 0.1,
        "ttft_s": 0.3,
        "outcome": "stop",
    },
    "events": [
        ("queued", START_NS, {}),
        ("admitted", START_NS + 100 * MS, {"why": "room for 7 blocks"}),
        ("prefill", START_NS + 100 * MS, {"tokens": 36, "duration_s": 0.2}),
        ("first token", START_NS + 300 * MS, {}),
    ],
}


def sdk() -> tuple[Tracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("tierline"), exporter


def test_a_request_is_one_span() -> None:
    tracer, exporter = sdk()
    trace_id = record_request(tracer, **REQUEST)
    (span,) = exporter.get_finished_spans()

    assert span.name == "chat tiny"
    assert span.kind is SpanKind.SERVER
    assert (span.start_time, span.end_time) == (START_NS, START_NS + 1200 * MS)
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is None
    assert trace_id == f"{span.context.trace_id:032x}"
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tierline",
        "gen_ai.system": "tierline",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.request.max_tokens": 128,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.cache_read.input_tokens": 64,
        "gen_ai.usage.output_tokens": 90,
        "gen_ai.latency.time_in_queue": 0.1,
        "gen_ai.latency.time_to_first_token": 0.3,
        "tierline.outcome": "stop",
    }
    assert [(e.name, e.timestamp - START_NS, dict(e.attributes or {})) for e in span.events] == [
        ("queued", 0, {}),
        ("admitted", 100 * MS, {"tierline.reason": "room for 7 blocks"}),
        ("prefill", 100 * MS, {"tierline.tokens": 36, "tierline.duration": 0.2}),
        ("first token", 300 * MS, {}),
    ]


def test_names_are_the_conventions_or_vllms_or_ours() -> None:
    known = {v for k, v in vars(gen_ai_attributes).items() if k.startswith("GEN_AI_")}
    named = {name for name in FACTS.values() if not name.startswith("tierline.")}

    assert named - known == OF_VLLM
    assert len(set(FACTS.values())) == len(FACTS)


def test_a_request_that_failed_says_so() -> None:
    tracer, exporter = sdk()
    record_request(tracer, **REQUEST, error="overloaded")
    (span,) = exporter.get_finished_spans()

    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})[error_attributes.ERROR_TYPE] == "overloaded"


def test_the_callers_trace_is_continued() -> None:
    tracer, exporter = sdk()
    trace_id = record_request(tracer, **REQUEST, traceparent=TRACEPARENT, tracestate="a=b")
    (span,) = exporter.get_finished_spans()

    assert trace_id == TRACE_ID == trace_id_of(TRACEPARENT)
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert span.context.trace_state["a"] == "b"


def test_a_caller_that_does_not_sample_is_followed() -> None:
    tracer, exporter = sdk()
    record_request(tracer, **REQUEST, traceparent=TRACEPARENT[:-1] + "0")

    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    "traceparent", ["", "bogus", "00-" + "0" * 32 + "-" + PARENT_ID + "-01", "\n", "ff" * 10_000]
)
def test_a_bent_traceparent_begins_a_trace(traceparent: str) -> None:
    tracer, exporter = sdk()
    trace_id = record_request(tracer, **REQUEST, traceparent=traceparent)
    (span,) = exporter.get_finished_spans()

    assert span.parent is None
    assert len(trace_id) == 32
    assert trace_id_of(traceparent) == ""


def test_it_is_no_child_of_what_runs_around_it() -> None:
    tracer, exporter = sdk()
    with tracer.start_as_current_span("around"):
        record_request(tracer, **REQUEST)
    spans = {span.name: span for span in exporter.get_finished_spans()}

    assert spans["chat tiny"].parent is None
    assert spans["around"].context.trace_id != spans["chat tiny"].context.trace_id


def test_without_an_sdk_nothing_is_made() -> None:
    tracer = request_tracer("1.2.3")

    assert record_request(tracer, **REQUEST) == ""
    assert record_request(tracer, **REQUEST, traceparent=TRACEPARENT) == TRACE_ID


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": {"prompt": "a secret"}},
        {"events": [("prompt", START_NS, {})]},
        {"events": [("queued", START_NS, {"prompt": "a secret"})]},
    ],
)
def test_what_is_in_no_table_is_our_bug(changes: dict[str, Any]) -> None:
    tracer, _ = sdk()

    with pytest.raises((KeyError, AssertionError)):
        record_request(tracer, **{**REQUEST, **changes})


def test_a_prompt_in_a_table_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    monkeypatch.setitem(FACTS, "prompt", "gen_ai.prompt")
    tracer, exporter = sdk()
    record_request(tracer, **{**REQUEST, "facts": {"prompt": "a secret"}})
    (span,) = exporter.get_finished_spans()

    assert "a secret" in span.to_json()


def test_the_servers_events_and_endpoints_are_known() -> None:
    from tierline.server.life import EVENT_KINDS
    from tierline.telemetry.spans import EVENTS

    assert set(EVENT_KINDS) == set(EVENTS)


if __name__ == "__main__":  # what it costs; the figures are in the module's docstring
    for name, its_tracer in (("no SDK", request_tracer("1")), ("SDK", sdk()[0])):
        cost_s = min(
            timeit.repeat(
                lambda t=its_tracer: record_request(t, **REQUEST, traceparent=TRACEPARENT),
                number=2000,
                repeat=5,
            )
        )
        print(f"{name}: {cost_s / 2000 * 1e6:.1f} us")  # noqa: T201
