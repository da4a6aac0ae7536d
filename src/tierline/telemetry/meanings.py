"""What each metric means: the table from which metrics are made and documented.

`metrics` exposes exactly these, and docs/reference/metrics.md is written from them.  A metric
has vLLM's name (`vllm:...`) and vLLM's labels where it counts the same thing, so that
dashboards, alerts and routers made for vLLM read it; what vLLM does not have is `tierline:...`.
Names, labels and buckets are those of vLLM's `PrometheusStatLogger` (vllm/v1/metrics/loggers.py).

    INV-SRV-20  Every metric exposed is in MEANINGS, and every one of MEANINGS is exposed.
    INV-SRV-21  Label values come from the configuration and from the sets here, never from a
                request: the number of series is fixed when the server starts.
"""

from dataclasses import dataclass

MODEL_LABELS = ("model_name", "engine")  # of every metric with vLLM's name; one engine: "0"
OTHER = "other"  # the label value for what nobody configured

# How a request ends, and what vLLM calls that; None: vLLM would not have seen it.
FINISHED_REASONS: dict[str, str | None] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "stop",
    "cancelled": "abort",
    "stalled": "abort",
    "late": "abort",
    "error": "error",
    "refused": None,
}
ENDPOINTS = ("chat", "completions", "responses", "embeddings", OTHER)
STATUSES = (
    *("400", "401", "402", "403", "404", "405", "408", "409", "413", "415", "422", "429", "499"),
    *("500", "501", "503", "504", OTHER),
)
KV_STATES = ("used", "cached", "free")

# vLLM's, in seconds and in tokens.
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ANSWERS_BUCKETS = (1, 2, 5, 10, 20)
# Ours: small models decode in less than vLLM's first bucket.
FINE_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, *ITL_BUCKETS)
STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """One metric: what it is called, what it counts, and in which unit."""

    name: str  # as exposed; of a histogram, without _bucket, _sum, _count
    kind: str  # counter, gauge, histogram
    text: str
    unit: str = ""
    labels: tuple[str, ...] = ()  # beside MODEL_LABELS, which all but the process's have
    buckets: tuple[float, ...] = ()  # empty for a histogram: 1, 2, 5, 10... up to the positions

    @property
    def as_vllm(self) -> bool:
        """Whether this is vLLM's metric, by name and by what it counts."""
        return self.name.startswith("vllm:")

    @property
    def of_process(self) -> bool:
        """Whether prometheus-client's own collector reads it from the operating system."""
        return self.name.startswith("process_")


def _counter(name: str, text: str, unit: str, labels: tuple[str, ...] = ()) -> Meaning:
    return Meaning(name=name, kind="counter", text=text, unit=unit, labels=labels)


def _gauge(name: str, text: str, unit: str = "", labels: tuple[str, ...] = ()) -> Meaning:
    return Meaning(name=name, kind="gauge", text=text, unit=unit, labels=labels)


def _histogram(
    name: str,
    text: str,
    unit: str,
    buckets: tuple[float, ...] = (),
    labels: tuple[str, ...] = (),
) -> Meaning:
    return Meaning(
        name=name, kind="histogram", text=text, unit=unit, labels=labels, buckets=buckets
    )


MEANINGS = (
    # Now
    _gauge("vllm:num_requests_running", "Sequences that hold KV memory and are computed.", "1"),
    _gauge("vllm:num_requests_waiting", "Sequences that wait to be computed.", "1"),
    _gauge("vllm:kv_cache_usage_perc", "Used part of the KV blocks, 0 to 1.", "1"),
    _gauge(
        "vllm:cache_config_info",
        "Always 1; the labels say the tokens of a KV block and how many blocks there are.",
        labels=("block_size", "num_gpu_blocks"),
    ),
    _gauge("tierline:queue_requests", "Sequences that wait, by class of service.", "1", ("class",)),
    _gauge(
        "tierline:kv_blocks",
        "KV blocks by tier: used, cached (held by nobody, kept for reuse) and free.",
        "blocks",
        ("tier", "state"),
    ),
    _gauge("tierline:streams_open", "Answers that are being streamed.", "1"),
    _gauge("tierline:usage_records_pending", "Usage records not yet safe on the disk.", "1"),
    _gauge("tierline:ready", "1 while requests are taken, 0 while draining or starting.", "1"),
    _gauge("tierline:build_info", "Always 1; the label says the version.", labels=("version",)),
    # Tokens and steps
    _counter("vllm:prompt_tokens_total", "Tokens of prompts, cached ones included.", "tokens"),
    _counter("vllm:generation_tokens_total", "Tokens generated.", "tokens"),
    _counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the cache.", "tokens"),
    _counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.", "tokens"),
    _counter("vllm:num_preemptions_total", "Sequences that gave their memory back.", "1"),
    _histogram(
        "vllm:iteration_tokens_total", "Tokens computed in a step.", "tokens", STEP_TOKENS_BUCKETS
    ),
    _histogram("tierline:step_seconds", "Duration of a step of the engine.", "s", STEP_BUCKETS),
    _counter("tierline:prefill_tokens_total", "Prompt tokens computed, not cached.", "tokens"),
    _counter(
        "tierline:prefix_hit_tokens_total",
        "Prompt tokens found in the cache, by the lowest tier that the prefix came from.",
        "tokens",
        ("tier",),
    ),
    _counter(
        "tierline:kv_evicted_blocks_total", "KV blocks dropped from a tier.", "blocks", ("tier",)
    ),
    # Requests, as vLLM counts them
    _histogram(
        "vllm:time_to_first_token_seconds",
        "From the arrival to the first token (TTFT).",
        "s",
        TTFT_BUCKETS,
    ),
    _histogram(
        "vllm:inter_token_latency_seconds",
        "Between two tokens of an answer (ITL).",
        "s",
        ITL_BUCKETS,
    ),
    _histogram(
        "vllm:request_time_per_output_token_seconds",
        "Mean of a request's gaps between tokens (TPOT).",
        "s",
        ITL_BUCKETS,
    ),
    _histogram(
        "vllm:e2e_request_latency_seconds",
        "From the arrival to the end.",
        "s",
        LATENCY_BUCKETS,
    ),
    _histogram(
        "vllm:request_queue_time_seconds",
        "From the arrival until the prompt was begun.",
        "s",
        LATENCY_BUCKETS,
    ),
    _histogram(
        "vllm:request_prefill_time_seconds",
        "From there to the first token.",
        "s",
        LATENCY_BUCKETS,
    ),
    _histogram(
        "vllm:request_decode_time_seconds",
        "From the first token to the last.",
        "s",
        LATENCY_BUCKETS,
    ),
    _histogram(
        "vllm:request_inference_time_seconds",
        "Prefill and decode together.",
        "s",
        LATENCY_BUCKETS,
    ),
    _histogram("vllm:request_prompt_tokens", "Tokens of a request's prompt.", "tokens"),
    _histogram("vllm:request_generation_tokens", "Tokens generated for a request.", "tokens"),
    _histogram("vllm:request_params_n", "Answers a request asked for.", "1", ANSWERS_BUCKETS),
    _histogram("vllm:request_params_max_tokens", "max_tokens of a request.", "tokens"),
    _counter(
        "vllm:request_success_total",
        "Requests that ended, by vLLM's word for how: stop, length, abort, error.",
        "1",
        ("finished_reason",),
    ),
    # Requests, by class of service
    _counter(
        "tierline:requests_total",
        "Requests by their one outcome.",
        "1",
        ("class", "endpoint", "outcome"),
    ),
    _counter(
        "tierline:refusals_total", "Requests answered with an error status.", "1", ("status",)
    ),
    _histogram(
        "tierline:time_to_first_token_seconds", "TTFT by class.", "s", TTFT_BUCKETS, ("class",)
    ),
    _histogram(
        "tierline:inter_token_latency_seconds",
        "ITL by class, with finer buckets.",
        "s",
        FINE_ITL_BUCKETS,
        ("class",),
    ),
    _counter(
        "tierline:slo_requests_total", "Requests of a class that promises limits.", "1", ("class",)
    ),
    _counter(
        "tierline:slo_kept_total",
        "Those of them that were answered within the limits: goodput.",
        "1",
        ("class",),
    ),
    # The process, as every Prometheus client names it
    _gauge("process_resident_memory_bytes", "Memory resident.", "bytes"),
    _gauge("process_virtual_memory_bytes", "Memory mapped.", "bytes"),
    _counter("process_cpu_seconds_total", "Processor time.", "s"),
    _gauge("process_start_time_seconds", "When the process started, Unix time.", "s"),
    _gauge("process_open_fds", "Open files and sockets.", "1"),
    _gauge("process_max_fds", "How many may be open.", "1"),
)
