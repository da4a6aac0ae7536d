"""One answer being generated, and what a caller is told of it.

A request for n answers is n generations that share their prompt's blocks.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tierline.engine.sampling import SamplingParams
from tierline.scheduling.sequence import Sequence


class Matcher(Protocol):
    """Where one answer is in its grammar (`grammar.Matcher`)."""

    def mask(self, left_tokens: int) -> torch.Tensor:
        """[vocabulary] of booleans: what may come next, with `left_tokens` to go, it included."""
        ...

    def accept(self, token: int) -> None:
        """The token that was taken."""
        ...

    @property
    def over(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        ...


class Grammar(Protocol):
    """What answers must look like (`grammar.Grammar`)."""

    def matcher(self) -> Matcher:
        """The start of one answer."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Generation:
    """The state of one answer: its tokens, and who turns them into text."""

    request_id: int
    index: int  # of the answer among the n of its request
    sequence: Sequence
    params: SamplingParams
    tokens: list[int]  # prompt and output
    prompt_tokens: int
    output_max_tokens: int
    row: Any  # the sampler's state
    detokenizer: Any  # None: nobody wants text
    stops: Any  # None: no stop strings
    matcher: Matcher | None = None  # None: free text
    mask: "Future[torch.Tensor] | None" = None  # of its next token, made beside the step
    siblings: list["Generation"] = field(default_factory=list)  # that wait for its prompt
    text: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A chosen token, and the most likely ones where the request asked for them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)  # frozen, each would cost 1.4 us more: a tenth of a token
class Delta:
    """What one step added to one answer: a value, though not frozen."""

    request_id: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    embedding: NDArray[np.float32] | None = None  # [hidden], of length 1: of a pooled request
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    stop: str | int | None = None  # the string or token that ended it
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    loaded_tokens: int = 0  # of those, brought up from a tier below the device
    at_ps: int = 0
