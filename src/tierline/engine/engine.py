"""Real answers from the one scheduler: requests go in, tokens come out, a step at a time.

Nothing here waits or runs by itself.  Whoever owns an engine (`llm`, `async_engine`, a test
with a virtual clock) calls `step` for as long as it is not idle, from one thread.

A step: the scheduler decides, the executor computes, the sampler chooses, and then every
token is accounted: to its text, to its stop conditions, to the scheduler.

Invariants
    INV-ENG-1  every request that was added ends in exactly one finish for each answer
    INV-ENG-2  once idle, no sequence holds a block
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.base.errors import OverloadedError, RequestError, TierlineError
from tierline.base.rng import stream_seed
from tierline.engine.conversation import Chat
from tierline.engine.executor import Executor
from tierline.engine.generation import Delta, Generation, Grammar, TokenLogprob
from tierline.engine.observation import Note, StepSample
from tierline.engine.sampling import Sampled, Sampler, SamplingParams
from tierline.engine.stops import StopChecker
from tierline.engine.tokenizer import Detokenizer, Tokenizer
from tierline.kv.chain import chain_of, salt
from tierline.kv.transfer import DEVICE
from tierline.scheduling.admission import Admission, Refuse
from tierline.scheduling.scheduler import Limits, Scheduler
from tierline.scheduling.sequence import DONE
from tierline.scheduling.sequence import Sequence as Scheduled
from tierline.scheduling.step import Step

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
Chunks = tuple[tuple[int, int, int], ...]
BATCH_TOKENS_LEAST = 64  # a step that does not fit even so fails somebody


class Clock(Protocol):
    """Where instants come from."""

    def now_ps(self) -> int:
        """Picoseconds since some start."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was chosen, for whoever wants to print it."""

    model: str
    architecture: str
    dtype: str
    device: str
    kernels: str  # which, or why not the native ones
    weight_bytes: int
    kv_bytes: int
    kv_tokens: int
    positions_max: int
    limits: Limits
    policy: str


class Engine:
    """One model, one scheduler, one executor."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        *,
        clock: Clock,
        vocabulary: int,
        positions_max: int,
        revision: str,
        facts: Facts,
        eos_ids: frozenset[int] = frozenset(),
        tokenizer: Tokenizer | None = None,
        chat: Chat | None = None,
        prefix_cache: bool = True,
        seed: int = 0,
    ) -> None:
        """`positions_max` bounds prompt and output together; `revision` names the weights."""
        self.executor, self.scheduler, self.clock = executor, scheduler, clock
        self.vocabulary, self.positions_max = vocabulary, positions_max
        self.tokenizer, self.eos_ids, self.facts = tokenizer, eos_ids, facts
        self.chat, self._prefix_cache = chat, prefix_cache
        self.admission = Admission(scheduler)
        self._watch: Callable[[StepSample], None] | None = None
        self._notes: list[Note] = []
        self._masks: ThreadPoolExecutor | None = None  # computes masks while a step computes
        device = executor.arena.data.device
        self.sampler = Sampler(vocabulary, device=device, eos_ids=sorted(eos_ids))
        self._revision, self._seed = revision, seed
        self._requests = self._sequences = 0
        self._generations: dict[int, Generation] = {}  # by sequence
        self._texts: dict[int, list[int]] = {}
        self._pooled: set[int] = set()  # sequences whose states are summed, not sampled from
        self._open: dict[int, list[Generation]] = {}  # by request, answers that go on

    # --- requests ---------------------------------------------------------------------------

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        rank: int = 0,
        ttft_s: float | None = None,
        itl_s: float | None = None,
        tenant: str = "",
        arrival_ps: int | None = None,
        grammar: Grammar | None = None,
        refuses: bool = False,
        pooled: bool = False,
    ) -> int:
        """Take a request in; the answer is the number that its deltas carry.

        One that is `pooled` generates nothing: its only delta has the `embedding`, the mean of
        the last layer's normed states over all tokens of the prompt, at length 1.

        A lower `rank` is a more urgent class; `ttft_s` and `itl_s` are promises that the scheduler
        keeps if it can, from `arrival_ps` (now) on; tenants share no cached prefixes.  Every
        answer is one of `grammar`.  Raises `RequestError` for what no engine could serve,
        `DoesNotFitError` for what this one's memory can not, and with `refuses`
        `OverloadedError` for what would be too late, with when to come again.
        """
        self._require(prompt)
        if params.max_tokens == 0:
            raise RequestError("max_tokens is 0: nothing to generate", hint="ask for one at least")
        assert not pooled or (params.n == 1 and grammar is None)
        now_ps = self.clock.now_ps() if arrival_ps is None else arrival_ps
        room = self.positions_max - len(prompt)
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        if pooled:
            most = 1  # which is not sampled; the scheduler knows no answers without a token
        chain = None if pooled else self._chain(prompt, tenant)  # cached tokens have no states
        request_id = self._requests
        generations = []
        for index in range(params.n):
            sequence = Scheduled(
                self._sequences + index,
                arrival_ps=now_ps,
                prompt_tokens=len(prompt),
                output_max_tokens=most,
                rank=rank,
                due_ps=FOREVER_PS if ttft_s is None else now_ps + round(ttft_s * PS_PER_S),
                itl_ps=FOREVER_PS if itl_s is None else round(itl_s * PS_PER_S),
                tenant=tenant,
                chain=chain,
            )
            generations.append(self._generation(request_id, index, sequence, params, prompt))
        first = generations[0]
        self._foresee(first.sequence, refuses=refuses)
        self.scheduler.add(first.sequence)  # may raise: nothing was entered yet
        for g in generations if grammar else ():
            assert grammar is not None
            g.matcher = grammar.matcher()
            self._begin_mask(g)
        first.siblings = generations[1:]
        self._requests += 1
        self._sequences += params.n
        self._open[request_id] = generations
        self._enter(first)
        if pooled:
            self._pooled.add(first.sequence.id)
        return request_id

    def chain(self, request_id: int) -> Sequence[int]:
        """Names of the blocks of its prompt that may be shared, while it is here."""
        return self._open[request_id][0].sequence.chain or ()

    def predicted_ttft_s(self, prompt_tokens: int, *, rank: int = 0) -> float:
        """Seconds until a first token, for a prompt of which nothing is cached that came now."""
        now_ps = self.clock.now_ps()
        asks = Scheduled(
            -1, arrival_ps=now_ps, prompt_tokens=prompt_tokens, output_max_tokens=1, rank=rank
        )
        answer = self.admission.answer(asks, now_ps)
        self.admission.forget(asks)
        return answer.ttft_ps / PS_PER_S

    def _foresee(self, s: Scheduled, *, refuses: bool) -> None:
        """Predict its first token, to learn from what comes of it; and refuse it if asked to."""
        self.scheduler.require_fit(s)
        answer = self.admission.answer(s, self.clock.now_ps())
        if not (refuses and isinstance(answer, Refuse)):
            return
        self.admission.forget(s)
        if answer.retry_after_ps == FOREVER_PS:
            raise RequestError(
                f"the first token would take {answer.ttft_ps / PS_PER_S:.3g} s even if nobody else"
                " were here, and was asked for sooner",
                hint="ask for it later, or shorten the prompt",
            )
        raise OverloadedError(
            "the server, for an answer in time,", retry_after_ns=answer.retry_after_ps // 1000 + 1
        )

    def watch(self, watcher: Callable[[StepSample], None]) -> None:
        """Have `watcher` told of every step from now on, on the thread that calls `step`."""
        self._watch = watcher
        self.scheduler.note = self._note

    def _note(self, at_ps: int, s: Scheduled, what: str, why: str) -> None:
        g = self._generations.get(s.id)
        if g is not None:
            self._notes.append(Note(at_ps, g.request_id, what, why))

    def cancel(self, request_id: int) -> list[Delta]:
        """Nobody wants the answers any more; to be called between steps."""
        deltas = []
        for g in list(self._open.get(request_id, ())):
            self._drop(g)
            deltas.append(self._ended(g, "cancelled"))
        return deltas

    @property
    def idle(self) -> bool:
        """Whether every request has ended."""
        return not self._open

    def require_idle(self) -> None:
        """INV-ENG-2: nobody is here, and nobody holds a block."""
        scheduler, index = self.scheduler, self.scheduler.index
        scheduler.check()
        assert scheduler.idle
        assert not self._open
        assert not self._generations
        cached = index.device_blocks * scheduler.layout.pages_per_block
        assert scheduler.pages.free + cached == scheduler.pages.total
        pool = self.executor.names.pool
        assert pool.blocks_free == scheduler.pages.free
        self.executor.names.check()

    def _require(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise RequestError("the prompt is empty", hint="give at least one token")
        if len(prompt) >= self.positions_max:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; the model takes {self.positions_max}"
                " with the answer",
                hint="shorten the prompt",
            )
        if min(prompt) < 0 or max(prompt) >= self.vocabulary:
            wrong = next(t for t in prompt if not 0 <= t < self.vocabulary)
            raise RequestError(
                f"token {wrong} is not in the vocabulary of {self.vocabulary}",
                hint="was the prompt encoded with another model's tokenizer?",
            )

    def _generation(
        self,
        request_id: int,
        index: int,
        sequence: Scheduled,
        params: SamplingParams,
        prompt: Sequence[int],
    ) -> Generation:
        seed = stream_seed(self._seed, f"request {request_id}")
        tokenizer = self.tokenizer
        return Generation(
            request_id=request_id,
            index=index,
            sequence=sequence,
            params=params,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            output_max_tokens=sequence.output_max_tokens,
            row=self.sampler.open(params, prompt=prompt, seed=seed, child=index),
            detokenizer=tokenizer
            and Detokenizer(tokenizer, skip_special=params.skip_special_tokens),
            stops=_stop_checker(params) if tokenizer else None,
        )

    def _chain(self, tokens: Sequence[int], tenant: str) -> list[int] | None:
        """Names of the blocks that may be shared."""
        if not self._prefix_cache:
            return None
        start = salt(model_revision=self._revision, tenant=tenant)
        return chain_of(tokens, block_tokens=self.scheduler.layout.block_tokens, start=start)

    def _enter(self, g: Generation) -> None:
        self._generations[g.sequence.id] = g
        self._texts[g.sequence.id] = g.tokens

    # --- what an operator asks for, between steps ---------------------------------------------

    def reset_cache(self) -> int:
        """Forget every cached block that nobody holds; how many they were."""
        return self.scheduler.reset_cache()

    def resize_kv(self, kv_bytes: int) -> int:
        """Use so many bytes for the cache from now on, whole pages of them: the answer.

        Up to what was allocated; less keeps the rest unused.  Nobody is preempted.  Raises
        `DoesNotFitError`, and changes nothing, where who is here would not fit any more.
        """
        layout = self.scheduler.layout
        pages = kv_bytes // layout.page_bytes
        self.scheduler.resize(pages)
        self.facts = replace(
            self.facts,
            kv_bytes=pages * layout.page_bytes,
            kv_tokens=pages // layout.pages_per_block * layout.block_tokens,
        )
        return self.facts.kv_bytes

    # --- a step -----------------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Compute one step, if there is anything to compute; what it added, in batch order."""
        scheduler = self.scheduler
        start_ps = self.clock.now_ps()
        step = scheduler.next_step(start_ps, 1)
        for s in step.preempted:
            self.executor.leave(s)
        if step.empty:
            return []
        try:
            computed = self.executor.compute(step, self._texts, self._pooled)
            sampled, generations = self._sample(*computed)
        except OUT_OF_MEMORY:
            return self._out_of_memory(step)
        now_ps = self.clock.now_ps()
        deltas = [self._push(g, sampled, at, now_ps) for at, g in enumerate(generations)]
        if self._pooled:
            whole = self._pooled_by(step)
            deltas += [self._embedded(g, now_ps) for g in whole]
            generations += whole
        chunks, preempted = self._moved(step) if self._watch else ((), ())
        self._account(step, deltas, generations, now_ps)
        if self._watch:
            self._watch(self._sample_of(step, start_ps, now_ps, chunks, preempted))
        return deltas

    def _moved(self, step: Step) -> tuple[Chunks, tuple[int, ...]]:
        """Chunks of the step and requests that gave way; to be asked before it is accounted."""
        requests = self._generations
        chunks = tuple((requests[s.id].request_id, n, s.cached_tokens) for s, n in step.chunks)
        return chunks, tuple(requests[s.id].request_id for s in step.preempted)

    def _sample_of(
        self, step: Step, start_ps: int, end_ps: int, chunks: Chunks, preempted: tuple[int, ...]
    ) -> StepSample:
        scheduler = self.scheduler
        pages, index = scheduler.pages, scheduler.index
        notes, self._notes = self._notes, []
        return StepSample(
            number=step.number,
            start_ps=start_ps,
            end_ps=end_ps,
            decodes=step.decodes,
            context_tokens=step.context_tokens,
            prefill_tokens=step.prefill_tokens,
            chunks=chunks,
            preempted=preempted,
            notes=tuple(notes),
            running=scheduler.running,
            waiting=scheduler.queue.waiting,
            kv_pages=pages.total,
            kv_pages_free=pages.free,
            kv_pages_cached=index.evictable_blocks * scheduler.layout.pages_per_block,
            kv_evicted_blocks=index.tiers[DEVICE].evicted_blocks,
        )

    def _sample(
        self, sampling: list[Scheduled], logits: torch.Tensor
    ) -> tuple[Sampled, list[Generation]]:
        """One token for everybody who reached an end; answers that share a prompt share a row."""
        generations: list[Generation] = []
        rows: list[int] = []
        for row, s in enumerate(sampling):
            g = self._generations[s.id]
            generations += [g, *g.siblings]
            rows += [row] * (1 + len(g.siblings))
        if len(rows) > len(sampling):
            logits = logits[rows]
        masks: dict[int, torch.Tensor] = {}
        errors: dict[int, TierlineError] = {}
        for at, g in enumerate(generations):
            if g.mask is not None:
                try:
                    masks[at] = g.mask.result()
                except TierlineError as error:
                    errors[at] = error
        sampled = self.sampler.sample(logits, [g.row for g in generations], masks=masks)
        if errors:
            sampled = replace(sampled, errors={**sampled.errors, **errors})
        return sampled, generations

    def _begin_mask(self, g: Generation) -> None:
        """What may come next in a grammar is found while the step before it computes."""
        if self._masks is None:
            self._masks = ThreadPoolExecutor(1, thread_name_prefix="masks")
        assert g.matcher is not None
        g.mask = self._masks.submit(g.matcher.mask, g.output_max_tokens - g.output_tokens)

    def _pooled_by(self, step: Step) -> list[Generation]:
        """Whose states are all summed once the step is accounted."""
        return [
            self._generations[s.id]
            for s, count in step.chunks
            if s.id in self._pooled and s.cached_tokens + count == s.target_tokens
        ]

    def _embedded(self, g: Generation, now_ps: int) -> Delta:
        """The only delta of a pooled request."""
        self.admission.first_token(g.sequence, now_ps)
        mean = self.executor.mean(g.sequence)
        embedding = (mean / mean.norm()).cpu().numpy()
        if not np.isfinite(embedding).all():
            error = "the embedding is not finite"
            return self._delta(g, now_ps, finish_reason="error", error=error)
        return self._delta(g, now_ps, embedding=embedding, finish_reason="stop")

    def _push(self, g: Generation, sampled: Sampled, at: int, now_ps: int) -> Delta:
        """One token of one answer: its text, and whether it was the last."""
        if at in sampled.errors:
            error = str(sampled.errors[at])
            return self._delta(g, now_ps, text=self._rest(g), finish_reason="error", error=error)
        token, logprob = sampled.tokens[at], sampled.logprobs[at]
        if g.output_tokens == 0:
            self.admission.first_token(g.sequence, now_ps)
        g.tokens.append(token)
        g.row.append(token)
        logprobs: tuple[TokenLogprob, ...] = ()
        if logprob is not None:
            top = tuple(sampled.top_logprobs[at] or ())
            logprobs = (TokenLogprob(token=token, logprob=logprob, top=top),)
        text, reason, stop = self._advance(g, token)
        return self._delta(
            g,
            now_ps,
            token_ids=(token,),
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            stop=stop,
        )

    def _advance(self, g: Generation, token: int) -> tuple[str, str | None, str | int | None]:
        """(text that is certain now, finish reason, what stopped it)."""
        params = g.params
        enough = g.output_tokens >= params.min_tokens
        ends = token in params.stop_token_ids or (token in self.eos_ids and not params.ignore_eos)
        if ends and enough:
            return self._rest(g), "stop", token
        if g.matcher is not None:
            g.matcher.accept(token)
        text = g.detokenizer.push(token) if g.detokenizer else ""
        if g.stops is not None and enough:
            text = g.stops.feed(text)
            if g.stops.stopped is not None:
                return text, "stop", g.stops.stopped
        if g.matcher is not None and g.matcher.over:
            return text + self._rest(g), "stop", None
        if g.output_tokens >= g.output_max_tokens:
            return text + self._rest(g), "length", None
        if g.matcher is not None:
            self._begin_mask(g)
        return text, None, None

    def _rest(self, g: Generation) -> str:
        """Text that was held back and is certain at the end."""
        text: str = g.detokenizer.flush() if g.detokenizer else ""
        if g.stops is None:
            return text
        text = g.stops.feed(text)
        return text + g.stops.flush() if g.stops.stopped is None else text

    def _account(
        self, step: Step, deltas: list[Delta], generations: list[Generation], now_ps: int
    ) -> None:
        """Tell the scheduler, and let answers that share a prompt begin."""
        scheduler, names = self.scheduler, self.executor.names
        over = [g for g, d in zip(generations, deltas, strict=True) if d.finish_reason is not None]
        finished = [g.sequence for g in over if g.sequence.id in self._generations]
        parents = [g for g in generations if g.siblings]
        scheduler.complete(step, 1, finished, now_ps)
        for s in finished:
            self.executor.leave(s)
        if scheduler.layout.windowed:
            for i in scheduler.decoding:
                names.slide(i)
        for parent in parents:
            self._split(parent, over)
        for g in over:
            self._close(g)

    def _split(self, parent: Generation, over: list[Generation]) -> None:
        """The prompt is computed: the other answers go on from it, each in its own blocks."""
        for child in parent.siblings:
            if child in over:
                continue
            self._enter(child)
            if parent not in over and self._fork(parent.sequence, child.sequence):
                continue
            # No room beside the parent, or it has ended already: the child comes as a request
            # of its own, with its first token at the end of its prompt.
            self.scheduler.add(self._anew(child))
        parent.siblings = []

    def _fork(self, parent: Scheduled, child: Scheduled) -> bool:
        return parent.chain is not None and self.scheduler.fork(parent, child)

    def _anew(self, g: Generation) -> Scheduled:
        s = g.sequence
        g.sequence = Scheduled(
            s.id,
            arrival_ps=s.arrival_ps,
            prompt_tokens=len(g.tokens),
            output_max_tokens=g.output_max_tokens - g.output_tokens,
            rank=s.rank,
            due_ps=s.due_ps,
            itl_ps=s.itl_ps,
            tenant=s.tenant,
            chain=self._chain(g.tokens, s.tenant),
        )
        return g.sequence

    # --- ends -------------------------------------------------------------------------------

    def _drop(self, g: Generation) -> None:
        """Take an answer out of the scheduler between steps."""
        self.admission.forget(g.sequence)
        if g.sequence.id in self._generations and g.sequence.state != DONE:
            self.scheduler.cancel(g.sequence)
            self.executor.leave(g.sequence)

    def _ended(self, g: Generation, reason: str, error: str | None = None) -> Delta:
        delta = self._delta(
            g, self.clock.now_ps(), text=self._rest(g), finish_reason=reason, error=error
        )
        self._close(g)
        return delta

    def _close(self, g: Generation) -> None:
        self._generations.pop(g.sequence.id, None)
        self._texts.pop(g.sequence.id, None)
        self._pooled.discard(g.sequence.id)
        others = self._open.get(g.request_id, [])
        if g in others:
            others.remove(g)
        if not others:
            self._open.pop(g.request_id, None)

    def _out_of_memory(self, step: Step) -> list[Delta]:
        """The step did not fit: smaller ones from now on, or the last to come gives up."""
        self.executor.undo(step)
        limits = self.scheduler.limits
        if limits.batch_tokens > BATCH_TOKENS_LEAST:
            self.scheduler.limits = replace(
                limits,
                batch_tokens=max(limits.batch_tokens // 2, BATCH_TOKENS_LEAST),
                chunk_tokens=max(limits.chunk_tokens // 2, BATCH_TOKENS_LEAST),
            )
            return []
        last = step.chunks[-1][0] if step.chunks else list(step.decoding.values())[-1]
        g = self._generations[last.id]
        self._drop(g)
        return [self._ended(lost, "error", "out of memory") for lost in (g, *g.siblings)]

    def _delta(
        self,
        g: Generation,
        now_ps: int,
        *,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        **others: Any,
    ) -> Delta:
        g.text += text
        return Delta(
            request_id=g.request_id,
            index=g.index,
            token_ids=token_ids,
            text=text,
            prompt_tokens=g.prompt_tokens,
            cached_tokens=g.sequence.hit_tokens,
            loaded_tokens=g.sequence.loaded_tokens,
            at_ps=now_ps,
            **others,
        )


def _stop_checker(params: SamplingParams) -> StopChecker | None:
    if not params.stop:
        return None
    return StopChecker(params.stop, include=params.include_stop_str_in_output)
