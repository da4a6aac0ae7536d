"""A trace of several classes, drawn from real ones: whose lengths, how many, how urgent.

`tierline synthesize --mix` and the policy benchmark call this.  Arrivals are Poisson and every
request draws its class by share and its lengths from one request of that class's own trace,
prompt and output together.  Prefixes are not kept: which requests share one, and how long after
each other they come, is a fact of the trace they were taken from and not of the mix.
"""

from bisect import bisect
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from tierline.base.errors import InputError
from tierline.base.rng import stream_seed
from tierline.workload.request import Request
from tierline.workload.trace import read_trace

NS_PER_S = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One class of a mix."""

    name: str
    priority: int  # larger is more urgent
    share: float  # of all requests, relative to the other parts
    lengths: Seq[tuple[int, int]]  # (prompt, output) tokens to draw from


def lengths_of(requests: Iterable[Request], *, below_tokens: int = 1 << 40) -> Seq[tuple[int, int]]:
    """What a `Part` draws from: lengths of the requests with prompts below a length."""
    return [
        (max(r.input_tokens, 1), max(r.output_tokens, 1))
        for r in requests
        if r.input_tokens < below_tokens
    ]


def read_part(text: str) -> Part:
    """A class from 'NAME[@PRIORITY]:SHARE=TRACE'; raises `InputError`, or what reading raises."""
    head, equals, path = text.partition("=")
    label, colon, share = head.rpartition(":")
    name, at, priority = label.partition("@")
    try:
        weight, urgency = float(share), int(priority) if at else 0
    except ValueError:
        weight, urgency = 0.0, 0
    if not (equals and colon and name and path and weight > 0):
        raise InputError(
            f"class {text!r} is not NAME@PRIORITY:SHARE=TRACE",
            hint="for example chat@2:0.7=chat.csv.gz batch@0:0.3=batch.jsonl.gz",
        )
    lengths = lengths_of(read_trace(Path(path)))
    return Part(name=name, priority=urgency, share=weight, lengths=lengths)


def mixed(parts: Seq[Part], *, rate_rps: float, seed: int) -> Iterator[Request]:
    """Requests of all parts in order of arrival, without end.

    Raises `InputError` for a part with nothing to draw from, no share or no rate.
    """
    for part in parts:
        if not part.lengths:
            raise InputError(
                f"nothing to draw requests of class {part.name!r} from",
                hint="its trace holds no request of that length",
            )
        if part.share <= 0:
            raise InputError(
                f"class {part.name!r} has a share of {part.share:g}",
                hint="give every class a share above 0",
            )
    if not parts or rate_rps <= 0:
        raise InputError(
            f"{len(parts)} classes at {rate_rps:g} requests/s make no trace",
            hint="name at least one class and a rate above 0",
        )
    return _draw(parts, rate_rps, Random(stream_seed(seed, "mix")))


def _draw(parts: Seq[Part], rate_rps: float, rng: Random) -> Iterator[Request]:
    edges = list(accumulate(part.share for part in parts))
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate_rps)
        part = parts[min(bisect(edges, rng.random() * edges[-1]), len(parts) - 1)]
        prompt_tokens, output_tokens = part.lengths[rng.randrange(len(part.lengths))]
        yield Request(
            arrival_ns=round(at_s * NS_PER_S),
            input_tokens=prompt_tokens,
            output_tokens=output_tokens,
            priority=part.priority,
        )
