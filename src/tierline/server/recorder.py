"""Who is here, who was, and what the last steps did: the server's memory of itself.

`service` begins and ends lives, the engine's watcher brings samples of steps; metrics, spans and
logs are fed from here and nowhere else.  Everything is touched on the event loop only.

Invariants
    INV-SRV-1  every life that begins ends with exactly one outcome
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence

from opentelemetry.trace import Tracer

from tierline.base.clock import PS_PER_S
from tierline.engine.generation import Delta
from tierline.server.life import OUTCOMES, Event, Life, Note, StepSample
from tierline.telemetry.metrics import Metrics
from tierline.telemetry.spans import record_request
from tierline.telemetry.window import Quantiles

PAST_MAX = 2_000  # lives that are remembered after their end
STEPS_MAX = 6_000
WINDOW_S = 300.0  # what "recent" means on every page
EVENTS_MAX = 512  # of one life: a long prompt in small chunks says no more after that

log = logging.getLogger("tierline.requests")


class Recorder:
    """Owner of all lives and of the samples of recent steps."""

    def __init__(
        self, metrics: Metrics, tracer: Tracer, *, levels: Sequence[str], pages_per_block: int
    ) -> None:
        self.metrics, self._tracer = metrics, tracer
        self.gaps = {level: Quantiles(window_s=WINDOW_S) for level in levels}  # seconds, recent
        self.live: dict[str, Life] = {}
        self.past: deque[Life] = deque(maxlen=PAST_MAX)
        self.steps: deque[StepSample] = deque(maxlen=STEPS_MAX)
        self.accepted = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self._pages_per_block = pages_per_block
        self._by_engine_id: dict[int, Life] = {}
        self._last_ps: dict[tuple[str, int], int] = {}  # when an answer's last token came

    # --- lives ------------------------------------------------------------------------------

    def begin(self, life: Life) -> None:
        """Somebody has come, and asks for something that can be asked for."""
        assert life.id not in self.live, life.id
        self.live[life.id] = life
        self.accepted += 1
        life.events.append(Event("queued", life.arrival_ps, life.arrival_ps))

    def named(self, life: Life, engine_id: int, chain: Sequence[int]) -> None:
        """The engine knows it by this number, or by one more; `chain` names its blocks."""
        life.engine_ids = (*life.engine_ids, engine_id)
        life.chain = life.chain or chain
        self._by_engine_id[engine_id] = life

    def tokens(self, life: Life, choice: int, delta: Delta) -> None:
        """What one step added to one of its answers."""
        at_ps, tokens = delta.at_ps, len(delta.token_ids)
        if not tokens and delta.embedding is None:
            return
        life.output_tokens += tokens
        place = (life.id, choice)
        before_ps = self._last_ps.get(place)
        self._last_ps[place] = life.last_ps = at_ps
        if before_ps is not None:
            gap_ps = at_ps - before_ps
            life.gaps += 1
            life.gaps_ps += gap_ps
            life.gap_longest_ps = max(life.gap_longest_ps, gap_ps)
            gap_s = gap_ps / PS_PER_S
            self.metrics.token_gap(life.level, gap_s, tokens=tokens)
            self.gaps[life.level].add(at_ps / PS_PER_S, (gap_s,))
            return
        if life.first_ps is None:
            life.first_ps = at_ps
        ttft_s = (at_ps - life.arrival_ps) / PS_PER_S
        self.metrics.first_token(life.level, ttft_s, tokens=tokens)

    def cached(self, life: Life, delta: Delta) -> None:
        """The first that is heard of an answer: what of its prompt was there."""
        life.cached_tokens += delta.cached_tokens
        if delta.cached_tokens and not life.tier:
            life.tier = "device"
        if delta.loaded_tokens:
            life.tier = "dram"
        self.metrics.admitted(
            prompt_tokens=delta.prompt_tokens, cached_tokens=delta.cached_tokens, tier=life.tier
        )

    def end(self, life: Life, outcome: str, now_ps: int, error: str = "") -> None:
        """Its one outcome (INV-SRV-1)."""
        assert outcome in self.outcomes, outcome
        assert not life.outcome, f"{life.id} has ended as {life.outcome}, now {outcome}"
        life.outcome, life.error, life.finished_ps = outcome, error, now_ps
        life.events.append(Event("finished", now_ps, now_ps, life.output_tokens, outcome))
        self.outcomes[outcome] += 1
        del self.live[life.id]
        for engine_id in life.engine_ids:
            self._by_engine_id.pop(engine_id, None)
        for choice in range(life.answers):
            self._last_ps.pop((life.id, choice), None)
        self.past.append(life)
        self._tell(life)

    def _tell(self, life: Life) -> None:
        e2e_s = life.e2e_s or 0.0
        self.metrics.finished(
            level=life.level,
            endpoint=life.endpoint,
            outcome=life.outcome,
            e2e_s=e2e_s,
            queue_s=life.queue_s,
            prefill_s=_between_s(life.admitted_ps, life.first_ps),
            decode_s=_between_s(life.first_ps, life.last_ps),
            tpot_s=life.tpot_s,
            prompt_tokens=life.prompt_tokens,
            output_tokens=life.output_tokens,
            answers=life.answers,
            max_tokens=life.output_tokens_max,
            kept=kept(life),
        )
        self._trace(life, round(life.arrived_s * 1e9))
        if log.isEnabledFor(logging.INFO):
            log.info("request ended", extra={"fields": summary(life)})

    def _trace(self, life: Life, start_ns: int) -> None:
        """One span, on the wall clock; the engine's clock says how long everything took."""

        def at_ns(at_ps: int) -> int:
            return start_ns + (at_ps - life.arrival_ps) // 1000

        assert life.finished_ps is not None
        bad = life.outcome in ("error", "late")
        life.trace_id = record_request(
            self._tracer,
            endpoint=life.endpoint,
            model=life.model,
            start_ns=start_ns,
            end_ns=at_ns(life.finished_ps),
            facts={
                "response_id": life.id,
                "response_model": life.model,
                "finish_reasons": (life.outcome,),
                "max_tokens": life.output_tokens_max,
                "temperature": life.temperature,
                "answers": life.answers,
                "stream": life.stream,
                "prompt_tokens": life.prompt_tokens,
                "output_tokens": life.output_tokens,
                "cached_tokens": life.cached_tokens,
                "queue_s": life.queue_s,
                "ttft_s": life.ttft_s,
                "e2e_s": life.e2e_s,
                "level": life.level,
                "tier": life.tier or None,
                "outcome": life.outcome,
                "preemptions": life.preemptions,
            },
            events=[
                (event.kind, at_ns(event.at_ps), {"tokens": event.tokens, "why": event.why})
                for event in life.events
            ],
            traceparent=life.traceparent,
            error=life.outcome if bad else "",
        )

    # --- steps ------------------------------------------------------------------------------

    def step(self, sample: StepSample) -> None:
        """The engine has computed a step; its deltas come after this."""
        self.steps.append(sample)
        for note in sample.notes:
            self._noted(note)
        for engine_id, tokens, before in sample.chunks:
            life = self._by_engine_id.get(engine_id)
            if life is not None:
                why = (
                    f"of {life.prompt_tokens:,}, after {before:,}; beside {sample.decodes} decodes"
                )
                event = Event("prefill", sample.start_ps, sample.end_ps, tokens, why)
                _add(life, event)
        for engine_id in sample.preempted:
            life = self._by_engine_id.get(engine_id)
            if life is not None:
                life.preemptions += 1
        self._measure(sample)

    def _noted(self, note: Note) -> None:
        life = self._by_engine_id.get(note.request_id)
        if life is None or note.what == "finished":
            return
        if note.what == "admitted" and life.admitted_ps is None:
            life.admitted_ps = note.at_ps
        last = life.events[-1]
        if (last.kind, last.why) != (note.what, note.why):
            _add(life, Event(note.what, note.at_ps, note.at_ps, why=note.why))

    def _measure(self, sample: StepSample) -> None:
        self.metrics.step(
            seconds=(sample.end_ps - sample.start_ps) / PS_PER_S,
            decodes=sample.decodes,
            prefill_tokens=sample.prefill_tokens,
            preempted=len(sample.preempted),
            running=sample.running,
            waiting=sample.waiting,
            waiting_by_level=self.waiting_by_level() if sample.waiting else {},
        )
        block = self._pages_per_block
        used = sample.kv_pages - sample.kv_pages_free - sample.kv_pages_cached
        self.metrics.kv(
            "device",
            used=used // block,
            cached=sample.kv_pages_cached // block,
            free=sample.kv_pages_free // block,
            evicted=sample.kv_evicted_blocks,
        )

    def waiting_by_level(self) -> Mapping[str, int]:
        """How many of each class wait for their first chunk."""
        counts: dict[str, int] = {}
        for life in self.live.values():
            if life.admitted_ps is None:
                counts[life.level] = counts.get(life.level, 0) + 1
        return counts


def kept(life: Life) -> bool | None:
    """Whether its promises were kept; None: it had none, or its client did not wait for them."""
    if life.outcome in ("cancelled", "stalled", "refused"):
        return None
    if life.ttft_limit_s is None and life.itl_limit_s is None:
        return None
    ttft_s = life.ttft_s
    in_time = life.ttft_limit_s is None or (ttft_s is not None and ttft_s <= life.ttft_limit_s)
    longest_s = life.gap_longest_ps / PS_PER_S
    return in_time and (life.itl_limit_s is None or longest_s <= life.itl_limit_s)


def summary(life: Life) -> dict[str, object]:
    """One line for logs: numbers and names, never text of a prompt or an answer."""
    return {
        "request_id": life.id,
        "endpoint": life.endpoint,
        "model": life.model,
        "tenant": life.tenant,
        "key_id": life.key_id,
        "class": life.level,
        "outcome": life.outcome,
        "error": life.error,
        "prompt_tokens": life.prompt_tokens,
        "cached_tokens": life.cached_tokens,
        "output_tokens": life.output_tokens,
        "queue_s": life.queue_s,
        "ttft_s": life.ttft_s,
        "e2e_s": life.e2e_s,
        "preemptions": life.preemptions,
        "trace_id": life.trace_id,
    }


def _add(life: Life, event: Event) -> None:
    if len(life.events) < EVENTS_MAX:
        life.events.append(event)


def _between_s(start_ps: int | None, end_ps: int | None) -> float | None:
    return None if start_ps is None or end_ps is None else (end_ps - start_ps) / PS_PER_S
