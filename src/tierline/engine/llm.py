"""Answers in one call: what a notebook or a script wants.

    llm = LLM("demo")
    for answer in llm.generate(["The capital of France is"], SamplingParams(max_tokens=20)):
        print(answer.outputs[0].text)

All prompts of a call share the engine, so they are batched and share prefixes; streams may be
read in turns.  One thread at a time: a server uses `async_engine`.

Ctrl-C takes effect between steps: after half a step the books of the engine would be wrong.
"""

import operator
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from tierline.base.clock import PS_PER_S
from tierline.base.errors import InputError, RequestError
from tierline.base.names import reject_unknown_keys
from tierline.base.progress import progress_bar
from tierline.engine.build import EngineOptions, open_engine
from tierline.engine.demo import models_folder, resolve_model
from tierline.engine.engine import Engine, Facts
from tierline.engine.generation import Delta, TokenLogprob
from tierline.engine.sampling import SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclass(slots=True, kw_only=True)
class Output:
    """One answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    stop: str | int | None = None  # the string or token that ended it
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one prompt."""

    prompt_token_ids: list[int]
    outputs: list[Output]
    cached_tokens: int = 0  # of the prompt, found in the cache
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class _Open:
    """A request in the engine: who is told of it, and how many of its answers go on."""

    tell: Callable[[Delta], None]
    left: int


class LLM:
    """A model, ready to answer."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        """`model` is a path (folder or GGUF file) or a name (`demo`); `options` are those of
        `EngineOptions`.  Raises what `open_engine` raises."""
        known = {f.name for f in fields(EngineOptions)}
        reject_unknown_keys("LLM", options, known)
        options.setdefault("kernels_folder", models_folder().parent / "kernels")
        self.engine: Engine = open_engine(resolve_model(str(model)), EngineOptions(**options))
        self.tokenizer = self.engine.tokenizer
        self._open: dict[int, _Open] = {}

    @property
    def facts(self) -> Facts:
        """What was chosen: types, kernels, sizes."""
        return self.engine.facts

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, as the model wants to see it begin."""
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.tokenizer is None:
            raise InputError(
                "this checkpoint has no tokenizer",
                hint="give token ids, or put tokenizer.json beside the weights",
            )
        return self.tokenizer.encode(prompt, special=True)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Answer]:
        """An answer for every prompt, in their order.

        A prompt is text or token ids; `params` are one for all, or one each.  Raises
        `RequestError` for a prompt that cannot be served, before anything is computed.
        """
        listed = _prompts(prompts)
        each = _params(params, len(listed))
        encoded = [self.encode(prompt) for prompt in listed]
        start_ps = self.engine.clock.now_ps()
        answers: dict[int, Answer] = {}
        try:
            with _undivided():
                for tokens, own in zip(encoded, each, strict=True):
                    outputs = [Output(index=i) for i in range(own.n)]
                    answer = Answer(prompt_token_ids=tokens, outputs=outputs)
                    answers[self._add(tokens, own, partial(_extend, answer, start_ps))] = answer
            with progress_bar(len(listed), what="answers", show=progress) as done:
                left = answers.keys() & self._open
                while left:
                    self._step()
                    before, left = left, left & self._open.keys()
                    if done is not None:
                        done(len(before) - len(left))
        finally:  # an error or Ctrl-C leaves nobody in the engine
            self._leave(answers)
        return list(answers.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """What each step adds to the answer; leaving the loop early cancels it."""
        tokens, (own,) = self.encode(prompt), _params(params, 1)
        coming: deque[Delta] = deque()
        added: list[int] = []
        try:
            with _undivided():
                added.append(self._add(tokens, own, coming.append))
            while coming or added[0] in self._open:
                if coming:
                    yield coming.popleft()
                else:
                    self._step()
        finally:
            self._leave(added)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Answer:
        """The model's next turn of one conversation."""
        return self.generate([self.chat_prompt(messages, tools=tools)], params)[0]

    def chat_prompt(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The tokens of a conversation under the model's own template."""
        if self.engine.chat is None:
            raise InputError(
                f"model {self.facts.model!r} has no chat template", hint="use generate"
            )
        return self.engine.chat.encode(messages, tools=tools, now=datetime.now())

    def _add(
        self, tokens: Sequence[int], params: SamplingParams, tell: Callable[[Delta], None]
    ) -> int:
        request_id = self.engine.add(tokens, params)
        self._open[request_id] = _Open(tell, params.n)
        return request_id

    def _step(self) -> None:
        """One step for everybody who is here; each is told of its own."""
        with _undivided():
            assert not self.engine.idle, "somebody else took the requests out of the engine"
            for delta in self.engine.step():
                request = self._open[delta.request_id]
                request.tell(delta)
                request.left -= delta.finish_reason is not None
                if not request.left:
                    del self._open[delta.request_id]

    def _leave(self, request_ids: Iterable[int]) -> None:
        """What has not ended is not wanted any more."""
        with _undivided():
            for request_id in request_ids:
                if self._open.pop(request_id, None) is not None:
                    self.engine.cancel(request_id)


@contextmanager
def _undivided() -> Iterator[None]:
    """Ctrl-C waits for the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *seen: pressed.append(seen))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[-1])


class Tally:
    """One answer as it comes, and how fast: what a terminal shows."""

    __slots__ = (
        "_start_ps",
        "cached_tokens",
        "error",
        "first_ps",
        "last_ps",
        "prompt_tokens",
        "reason",
        "text",
        "tokens",
    )

    def __init__(self, start_ps: int) -> None:
        self._start_ps = self.first_ps = self.last_ps = start_ps
        self.text, self.tokens, self.prompt_tokens, self.cached_tokens = "", 0, 0, 0
        self.reason: str | None = None
        self.error: str | None = None

    def add(self, delta: Delta) -> None:
        """What one step added."""
        self.last_ps = delta.at_ps
        if not self.tokens:
            self.first_ps = delta.at_ps
        self.text += delta.text
        self.tokens += len(delta.token_ids)
        self.prompt_tokens, self.cached_tokens = delta.prompt_tokens, delta.cached_tokens
        self.reason, self.error = delta.finish_reason, delta.error

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return (self.first_ps - self._start_ps) / PS_PER_S

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second after the first one; 0 for a single token."""
        span_s = (self.last_ps - self.first_ps) / PS_PER_S
        return (self.tokens - 1) / span_s if span_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "text": self.text,
            "finish_reason": self.reason,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.tokens,
            "ttft_s": self.ttft_s,
            "tokens_per_s": self.tokens_per_s,
        }

    def __str__(self) -> str:
        return (
            f"[{self.tokens} tokens, {self.tokens_per_s:.1f} tokens/s, TTFT "
            f"{self.ttft_s * 1e3:.0f} ms; prompt of {self.prompt_tokens}, "
            f"{self.cached_tokens} cached]"
        )


def _extend(answer: Answer, start_ps: int, delta: Delta) -> None:
    output = answer.outputs[delta.index]
    output.text += delta.text
    output.token_ids += delta.token_ids
    output.logprobs += delta.logprobs
    output.finish_reason, output.stop = delta.finish_reason, delta.stop
    output.error = delta.error
    answer.cached_tokens = delta.cached_tokens
    answer.total_s = (delta.at_ps - start_ps) / PS_PER_S
    answer.ttft_s = answer.ttft_s or answer.total_s


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = _listed(prompts)
    return [listed] if listed and all(map(_is_token, listed)) else listed


def _token_ids(prompt: Iterable[Any]) -> list[int]:
    listed = _listed(prompt)
    try:
        return [operator.index(token) for token in listed]  # also of numpy and torch
    except TypeError:
        raise _no_prompt(prompt) from None


def _listed(items: Any) -> list[Any]:
    if isinstance(items, (bytes, Mapping)) or not isinstance(items, Iterable):
        raise _no_prompt(items)
    return list(items)


def _is_token(item: Any) -> bool:
    """Whether it is one whole number; arrays of one number are lists."""
    return hasattr(item, "__index__") and not getattr(item, "shape", ())


def _no_prompt(found: Any) -> RequestError:
    return RequestError(
        f"a prompt is text or a list of token ids; found {type(found).__name__} {found!r:.40}",
        hint="give a text, a list of ids, or a list of these",
    )


def _params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    each = [params] * count if isinstance(params, SamplingParams) else list(params)
    for own in each:
        if not isinstance(own, SamplingParams):
            raise InputError(f"params are SamplingParams; found {type(own).__name__} {own!r:.40}")
    if len(each) != count:
        raise InputError(f"{len(each)} sampling parameters for {count} prompts")
    return each
