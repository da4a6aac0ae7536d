"""One OpenTelemetry span a request, made at its end from plain values.

`server/recorder.py` calls `record_request` when a request has its outcome: every time in it was
measured by then, so nothing is opened, carried along and closed.  Only the API is used: without
an SDK (docs/guides/observe.md says how to start with one) a call makes nothing and takes 9 us,
with one 60 us.  The caller's W3C `traceparent` is continued.

Names are those of OpenTelemetry's conventions for generative AI where they have one, vLLM's
(`gen_ai.latency.*`) where it has one, else ours.  The conventions are still in development; both
of their names for the provider are given, since tools read one or the other.

    INV-SRV-23  A span carries the attributes and events of the tables here and nothing else;
                none of them holds text of a prompt or of an answer.
"""

from collections.abc import Iterable, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Value = str | bool | int | float | tuple[str, ...]
Event = tuple[str, int, Mapping[str, Value]]  # of EVENTS; Unix nanoseconds; of EVENT_FACTS

OPERATIONS = {  # by endpoint
    "chat": "chat",
    "completions": "text_completion",
    "responses": "chat",
    "embeddings": "embeddings",
}
FACTS = {  # what the caller calls it, and the attribute
    "response_id": "gen_ai.response.id",
    "response_model": "gen_ai.response.model",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "answers": "gen_ai.request.choice.count",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "stream": "gen_ai.request.stream",
    "output_type": "gen_ai.output.type",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "queue_s": "gen_ai.latency.time_in_queue",
    "ttft_s": "gen_ai.latency.time_to_first_token",
    "prefill_s": "gen_ai.latency.time_in_model_prefill",
    "decode_s": "gen_ai.latency.time_in_model_decode",
    "e2e_s": "gen_ai.latency.e2e",
    "level": "tierline.class",
    "tier": "tierline.prefix_tier",
    "outcome": "tierline.outcome",
    "preemptions": "tierline.preemptions",
}
EVENTS = (
    *("queued", "blocked", "stepped back", "loading", "admitted", "prefill", "preempted"),
    *("first token", "finished"),
)
EVENT_FACTS = {
    "tokens": "tierline.tokens",
    "duration_s": "tierline.duration",
    "why": "tierline.reason",
}
_W3C = TraceContextTextMapPropagator()


def request_tracer(version: str) -> Tracer:
    """The tracer of the SDK that the process was started with; without one it makes nothing."""
    return trace.get_tracer("tierline", version)


def trace_id_of(traceparent: str) -> str:
    """The trace that a `traceparent` header names, 32 hexadecimal digits, or "" for none."""
    return _trace_id(trace.get_current_span(_caller(traceparent, "")))


def record_request(
    tracer: Tracer,
    *,
    endpoint: str,
    model: str,
    start_ns: int,
    end_ns: int,
    facts: Mapping[str, Value | None],
    events: Iterable[Event] = (),
    traceparent: str = "",
    tracestate: str = "",
    error: str = "",
) -> str:
    """Record a request from `start_ns` to `end_ns`, in Unix nanoseconds.

    `facts` are named as in `FACTS`; None leaves one out.  `error` is the type of the error that
    the request ended with, if it did.  Returns the id of its trace, "" when it is in none.
    """
    operation = OPERATIONS[endpoint]
    span = tracer.start_span(
        f"{operation} {model}",
        context=_caller(traceparent, tracestate),
        kind=SpanKind.SERVER,
        start_time=start_ns,
    )
    if span.is_recording():
        span.set_attribute("gen_ai.operation.name", operation)
        span.set_attribute("gen_ai.provider.name", "tierline")
        span.set_attribute("gen_ai.system", "tierline")
        span.set_attribute("gen_ai.request.model", model)
        span.set_attributes({FACTS[k]: v for k, v in facts.items() if v is not None})
        for name, at_ns, about in events:
            assert name in EVENTS, name
            span.add_event(name, {EVENT_FACTS[k]: v for k, v in about.items()}, timestamp=at_ns)
        if error:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR))
    span.end(end_ns)
    return _trace_id(span)


def _caller(traceparent: str, tracestate: str) -> Context:
    """The caller's context, or an empty one; never that of whatever runs around us."""
    if not traceparent:
        return Context()
    carrier = {"traceparent": traceparent, "tracestate": tracestate}
    return _W3C.extract(carrier, Context())


def _trace_id(span: Span) -> str:
    context = span.get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else ""
