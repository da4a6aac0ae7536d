"""From logits to tokens: one pass for a batch in which every request wants something else.

`executor` opens a `Row` a sequence, calls `Sampler.sample` once a step, and tells each row the
token it got (`Row.append`).  The order is that of vLLM and transformers: repetition, frequency
and presence penalties, logit bias, bans, mask; then temperature, top-k, top-p, min-p; then one
draw.  Log-probabilities are those of the model: before penalties, temperature and truncation.

Truncation never sorts a vocabulary.  The maximum of every 64 logits is taken first; the k
largest logits lie in the k chunks with the largest maxima, so only those are looked into.
Ties go to the lowest token id, so that top-k 1 is greedy.

The draw is an inverse CDF over the kept tokens in the order of their ids, which a change of a
logit in its last bits moves by as little.  Its uniform number is a hash of the request's seed and
the position of the token, and no number of a row depends on the shape of the batch.

Invariants
    INV-ENG-20  a row's tokens depend on its logits, parameters and seed, and on no companion
    INV-ENG-21  a banned token or sequence never appears
    INV-ENG-22  a row that cannot be sampled fails alone
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tierline.base.errors import DependencyError, RequestError, TierlineError

CHUNK = 64  # logits under one maximum
WEIGHTS_AT_ONCE = 1 << 20  # of rows that are drawn: 4 MB, so that they stay in the cache
COLDEST = 1e-30  # a colder draw is greedy: float32 would divide by nothing
CANDIDATES = 128  # tokens that usually hold a row's top-p mass
STOPS_MAX = 10_000
STOP_CHARACTERS_MAX = 4_096
STOPS = f"up to {STOPS_MAX} texts of 1 to {STOP_CHARACTERS_MAX} characters"
LOGPROBS_MAX = 20
N_MAX = 128
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1

Ints = NDArray[np.int64]
Counted = tuple[Ints, NDArray[np.float32]]  # tokens, and a number for each
NOTHING: Counted = (np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request wants its tokens chosen, and when it is done.

    `temperature` 0 is greedy.  `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off.  The repetition
    penalty looks at prompt and output, the other two at the output.  A banned sequence is
    looked for across the end of the prompt, too.  `n` outputs share one prompt.  `max_tokens`
    None: as many as the model has positions.  `logprobs` k: the k likeliest beside the chosen.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: Sequence[int] = ()
    banned_sequences: Sequence[Sequence[int]] = ()
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _real(self, "temperature", low=0.0, high=1e6)
        _real(self, "top_p", low=0.0, high=1.0, open_low=True)
        _real(self, "min_p", low=0.0, high=1.0)
        _real(self, "repetition_penalty", low=1e-3, high=1e6)  # 1e-40 makes a logit infinite
        _real(self, "frequency_penalty", low=-100.0, high=100.0)
        _real(self, "presence_penalty", low=-100.0, high=100.0)
        _whole(self, "top_k", low=-1, high=2**31 - 1)
        _whole(self, "n", low=1, high=N_MAX)
        _whole(self, "min_tokens", low=0, high=2**31 - 1)
        for name, low, high in (
            ("seed", -(2**63), 2**64 - 1),
            ("max_tokens", 0, 2**31 - 1),
            ("logprobs", 0, LOGPROBS_MAX),
        ):
            if getattr(self, name) is not None:
                _whole(self, name, low=low, high=high)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        for name in ("banned_tokens", "stop_token_ids"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        object.__setattr__(self, "banned_sequences", _sequences(self.banned_sequences))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < COLDEST or self.top_k == 1

    def warnings(self) -> list[str]:
        """What is allowed and hardly meant."""
        truncated = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        if self.temperature > 1 and not truncated:
            return [
                f"temperature {self.temperature:g} without top_k, top_p or min_p gives most of the "
                "probability to the long tail of the vocabulary"
            ]
        return []


def _wrong(name: str, value: object, wanted: str) -> RequestError:
    return RequestError(f"{name} is {value!r}", hint=f"{name} has to be {wanted}")


def _real(
    params: SamplingParams, name: str, *, low: float, high: float, open_low: bool = False
) -> None:
    """Check a number; an integer will do, a NaN will not."""
    value = getattr(params, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (low < value <= high or (value == low and not open_low)):
        return
    wanted = f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}"
    raise _wrong(name, value, wanted if number else f"a number {wanted}")


def _whole(params: SamplingParams, name: str, *, low: int, high: int) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(name, value, f"a whole number from {low} to {high}")


def _listed(name: str, value: object, wanted: str) -> list[Any]:
    """The items of a list-like value; a string or a number is none."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise _wrong(name, value, wanted)
    return list(value)


def _stops(stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else _listed("stop", stop, STOPS)
    if len(stops) > STOPS_MAX:
        raise RequestError(f"stop has {len(stops)} texts", hint=f"stop has to be {STOPS}")
    for text in stops:
        if not isinstance(text, str) or not text:
            raise _wrong("stop", text, STOPS)
        if len(text) > STOP_CHARACTERS_MAX:
            raise RequestError(f"stop has {len(text)} characters", hint=f"stop has to be {STOPS}")
    return tuple(dict.fromkeys(stops))


def _ids(name: str, value: object) -> tuple[int, ...]:
    wanted = "a list of token ids"
    ids = _listed(name, value, wanted)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise _wrong(name, token, wanted)
    return tuple(dict.fromkeys(ids)) if name != "banned_sequences" else tuple(ids)


def _sequences(value: object) -> tuple[tuple[int, ...], ...]:
    wanted = "a list of lists of token ids, none of them empty"
    sequences = tuple(
        _ids("banned_sequences", sequence)
        for sequence in _listed("banned_sequences", value, wanted)
    )
    if () in sequences:
        raise _wrong("banned_sequences", [], wanted)
    return sequences


def _bias(value: object) -> dict[int, float]:
    wanted = "a mapping from token ids to numbers from -1000 to 1000"
    if not isinstance(value, Mapping):
        raise _wrong("logit_bias", value, wanted)
    _ids("logit_bias", list(value))
    for bias in value.values():
        real = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not real or not -1000 <= bias <= 1000:
            raise _wrong("logit_bias", bias, wanted)
    return {token: float(bias) for token, bias in value.items()}


def _mix(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def uniform(stream: int, index: int) -> float:
    """Number `index` of a stream: the top 53 bits of SplitMix64's output, in [0, 1)."""
    return (_mix((stream + (index + 1) * _GOLDEN) & _WORD) >> 11) * 2.0**-53


class Row:
    """What the sampler has to remember of one output: its stream, and what was said so far.

    It belongs to the request and outlives a preemption, so nothing is drawn twice.  Counted
    tokens lie in two growing arrays, and a new token costs one look-up.
    """

    __slots__ = (
        "_bans",
        "_counts",
        "_edits",
        "_ids",
        "_penalised",
        "_places",
        "_tail",
        "_tail_max",
        "bias",
        "likeliest",
        "params",
        "produced",
        "stop_ids",
        "stream",
    )

    def __init__(
        self, params: SamplingParams, *, prompt: Sequence[int], stop_ids: Sequence[int], stream: int
    ) -> None:
        self.params = params
        self.stream = stream
        self.stop_ids = frozenset(stop_ids)
        self.produced = 0
        self.likeliest = params.greedy and params.logprobs is None  # wants nothing else
        self.bias = _counted(params.logit_bias)
        self._bans = _endings(params)
        self._tail_max = max((length for length, _ in self._bans), default=0)
        self._tail = list(prompt[len(prompt) - self._tail_max :]) if self._tail_max else []
        repeats = params.repetition_penalty != 1
        self._penalised = repeats or bool(params.frequency_penalty or params.presence_penalty)
        self._edits = bool(
            self._penalised or params.logit_bias or params.banned_tokens or self._bans
        )
        seen = dict.fromkeys(prompt) if repeats else {}
        self._places = {token: place for place, token in enumerate(seen)}
        self._ids, self._counts = _counted(dict.fromkeys(seen, 0.0))

    def append(self, token: int) -> None:
        """The token that was taken, from `sample` or from elsewhere."""
        self.produced += 1
        if self._tail_max:
            self._tail = [*self._tail, token][-self._tail_max :]
        if not self._penalised:
            return
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                self._ids = np.resize(self._ids, max(2 * place, 16))
                self._counts = np.resize(self._counts, max(2 * place, 16))
            self._ids[place], self._counts[place] = token, 0
        self._counts[place] += 1

    def counted(self) -> Counted:
        """Tokens that a penalty may touch, and how often each was produced."""
        known = len(self._places)
        return self._ids[:known], self._counts[:known]

    def banned(self) -> list[int]:
        """Tokens that may not come next."""
        banned = list(self.params.banned_tokens)
        if self.produced < self.params.min_tokens:
            banned += sorted(self.stop_ids)
        for length, endings in self._bans:
            banned += endings.get(tuple(self._tail[len(self._tail) - length :]), ())
        return banned

    @property
    def edited(self) -> bool:
        """Whether the logits of this row are changed before the draw."""
        return self._edits or self.produced < self.params.min_tokens


def _counted(numbers: Mapping[int, float]) -> Counted:
    if not numbers:
        return NOTHING
    return np.array([*numbers], np.int64), np.array([*numbers.values()], np.float32)


def _endings(params: SamplingParams) -> list[tuple[int, dict[tuple[int, ...], list[int]]]]:
    """For each length of a banned sequence's beginning: what may not follow it."""
    found: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for sequence in params.banned_sequences:
        begin, last = tuple(sequence[:-1]), sequence[-1]
        found.setdefault(len(begin), {}).setdefault(begin, []).append(last)
    return sorted(found.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What one pass chose, a value a row. A row in `errors` has token -1 and no log-probability."""

    tokens: list[int]
    logprobs: list[float | None]  # of the chosen token, where they were asked for
    top_logprobs: list[list[tuple[int, float]] | None]  # (token, log-probability), likeliest first
    errors: Mapping[int, TierlineError]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """A row of the batch that is drawn, and its uniform number."""

    number: int
    params: SamplingParams
    uniform: float


class Sampler:
    """Chooses tokens. All state is in the rows."""

    def __init__(
        self, vocabulary: int, *, device: torch.device | str = "cpu", eos_ids: Sequence[int] = ()
    ) -> None:
        assert vocabulary > 0
        self.vocabulary = vocabulary
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self.eos_ids = tuple(eos_ids)

    def open(
        self, params: SamplingParams, *, prompt: Sequence[int], seed: int, child: int = 0
    ) -> Row:
        """The state of output `child` of `params.n`.

        `seed` is used when the request has none of its own.  Raises `RequestError` when a token
        id lies outside the vocabulary.
        """
        for name in ("logit_bias", "banned_tokens", "stop_token_ids"):
            self._known(name, getattr(params, name))
        for sequence in params.banned_sequences:
            self._known("banned_sequences", sequence)
        own = seed if params.seed is None else params.seed
        return Row(
            params,
            prompt=prompt,
            stop_ids=(*params.stop_token_ids, *(() if params.ignore_eos else self.eos_ids)),
            stream=_mix((_mix(own & _WORD) + child) & _WORD),
        )

    def _known(self, name: str, ids: Sequence[int]) -> None:
        for token in ids:
            if token >= self.vocabulary:
                raise _wrong(name, token, f"below the model's vocabulary of {self.vocabulary}")

    @torch.inference_mode()  # as the network's logits are, which are changed in place
    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[Row],
        *,
        masks: Mapping[int, torch.Tensor] | None = None,
    ) -> Sampled:
        """Choose the next token of every row.

        `logits` is [R, vocabulary] in float32 and is overwritten; `masks` gives for some rows
        (by their number) a boolean [vocabulary] that is True where a token is allowed.  Rows
        are not changed: the caller says what was taken with `Row.append`.
        """
        assert logits.shape == (len(rows), self.vocabulary)
        if not rows:
            return Sampled(tokens=[], logprobs=[], top_logprobs=[], errors={})
        if self._on_cpu and all(row.likeliest for row in rows):
            return self._likeliest(logits.contiguous(), rows, masks or {})
        x = self._padded(logits.float())
        raw = _raw(x, [i for i, row in enumerate(rows) if row.params.logprobs is not None])
        self._edit(x, rows, masks or {})
        peaks = x.view(len(rows), -1, CHUNK).amax(-1)
        best = peaks.amax(-1)
        errors = _errors(best.tolist())
        tokens = self._first(x, peaks, best).tolist()
        drawn = [
            _Drawn(number=i, params=row.params, uniform=uniform(row.stream, row.produced))
            for i, row in enumerate(rows)
            if not row.params.greedy and i not in errors
        ]
        chosen = self._draw(x, peaks, best, drawn) | dict.fromkeys(errors, -1)
        sampled = Sampled(
            tokens=[chosen.get(i, token) for i, token in enumerate(tokens)],
            logprobs=[None] * len(rows),
            top_logprobs=[None] * len(rows),
            errors=errors,
        )
        if raw is not None:
            raw.report(rows, sampled)
        return sampled

    def _likeliest(
        self, x: torch.Tensor, rows: Sequence[Row], masks: Mapping[int, torch.Tensor]
    ) -> Sampled:
        """Nobody draws and nobody asks for more than a token: numpy's argmax on x [R, vocabulary].

        It takes the lowest id among equals and a NaN before all, as `_first` and `amax` do, in
        three calls instead of a dozen.
        """
        self._edit(x, rows, masks)
        values = x.numpy()
        first = values.argmax(-1)
        tokens = first.tolist()
        errors = _errors(values[np.arange(len(tokens)), first].tolist())
        for i in errors:
            tokens[i] = -1
        return Sampled(
            tokens=tokens,
            logprobs=[None] * len(tokens),
            top_logprobs=[None] * len(tokens),
            errors=errors,
        )

    def _padded(self, logits: torch.Tensor) -> torch.Tensor:
        """Rows of whole chunks; what is added is never chosen."""
        missing = -self.vocabulary % CHUNK
        if missing:
            return torch.nn.functional.pad(logits, (0, missing), value=-math.inf)
        return logits.contiguous()

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _edit(
        self, x: torch.Tensor, rows: Sequence[Row], masks: Mapping[int, torch.Tensor]
    ) -> None:
        """Penalties, bias, bans and masks, in place; columns that nobody named are not touched."""
        edited = [(i, row) for i, row in enumerate(rows) if row.edited]
        if edited:
            self._penalise(x, edited)
            biased = [(i, *row.bias) for i, row in edited if len(row.bias[0])]
            if biased:
                places = self._places(x, [(i, ids) for i, ids, _ in biased])
                added = torch.from_numpy(np.concatenate([bias for _, _, bias in biased]))
                x.view(-1)[places] += added.to(self.device)
            banned = [(i, np.asarray(row.banned(), dtype=np.int64)) for i, row in edited]
            x.view(-1)[self._places(x, banned)] = -math.inf
        for i, mask in masks.items():
            x[i, : self.vocabulary].masked_fill_(~mask.to(self.device), -math.inf)

    def _places(self, x: torch.Tensor, ids: Sequence[tuple[int, Ints]]) -> torch.Tensor:
        """Where tokens of rows lie in the flat logits."""
        flat = np.concatenate([i * x.shape[1] + tokens for i, tokens in ids])
        return torch.from_numpy(flat).to(self.device)

    def _penalise(self, x: torch.Tensor, edited: Sequence[tuple[int, Row]]) -> None:
        """z > 0 ? z / theta : z theta, then z - f count - p [count > 0]."""
        found = [(i, row.params, *row.counted()) for i, row in edited]
        found = [entry for entry in found if len(entry[2])]
        if not found:
            return
        places = self._places(x, [(i, ids) for i, _, ids, _ in found])
        counts = torch.from_numpy(np.concatenate([c for *_, c in found])).to(self.device)
        lengths = self._tensor([len(ids) for _, _, ids, _ in found], torch.int64)
        theta, often, once = (
            self._tensor(
                [getattr(params, name) for _, params, *_ in found], torch.float32
            ).repeat_interleave(lengths)
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        z = x.view(-1)[places]
        z = torch.where(z > 0, z / theta, z * theta)
        x.view(-1)[places] = z - often * counts - once * (counts > 0)

    def _first(self, x: torch.Tensor, peaks: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """The lowest id among the largest logits of each row, [R]; looks into one chunk a row."""
        chunk = (peaks == best[:, None]).to(torch.uint8).argmax(-1)
        inside = x.view(len(x), -1, CHUNK)[torch.arange(len(x), device=self.device), chunk]
        return chunk * CHUNK + (inside == best[:, None]).to(torch.uint8).argmax(-1)

    def _draw(
        self, x: torch.Tensor, peaks: torch.Tensor, best: torch.Tensor, drawn: Sequence[_Drawn]
    ) -> dict[int, int]:
        """The token of each row that is drawn, by the cheapest way to what it keeps."""
        wide: list[_Drawn] = []
        few: list[_Drawn] = []
        many: list[_Drawn] = []
        for row in drawn:
            if not 0 < row.params.top_k < self.vocabulary:
                wide.append(row)
            else:
                (few if row.params.top_k <= CANDIDATES else many).append(row)
        chosen: dict[int, int] = {}
        for ranked in (few, many):
            if ranked:
                k = max(row.params.top_k for row in ranked)
                tokens, _ = _ranked(x, peaks, _columns(ranked, best), k, None)
                chosen |= zip((row.number for row in ranked), tokens.tolist(), strict=True)
        at_once = max(1, WEIGHTS_AT_ONCE // x.shape[1])
        for start in range(0, len(wide), at_once):
            chosen |= self._draw_wide(x, peaks, best, wide[start : start + at_once])
        return chosen

    def _draw_wide(
        self, x: torch.Tensor, peaks: torch.Tensor, best: torch.Tensor, drawn: Sequence[_Drawn]
    ) -> dict[int, int]:
        """Rows without top-k: the weight of the whole vocabulary is needed."""
        columns = _columns(drawn, best)
        weights = x[columns.numbers].sub_(columns.best.float())
        weights = weights.div_(columns.temperature.float()).exp_()
        floors = [row.params.min_p for row in drawn]
        nucleus = [place for place, row in enumerate(drawn) if row.params.top_p < 1]
        whole = [place for place, row in enumerate(drawn) if row.params.top_p == 1]
        if any(floors[place] for place in whole):
            cut = torch.where(columns.top_p < 1, 0.0, columns.min_p).float()
            weights.masked_fill_(weights < cut, 0.0)
        sums = weights.view(len(drawn), -1, CHUNK).sum(-1).double().cumsum(-1)
        chosen: dict[int, int] = {}
        if whole:
            tokens = _by_id(weights, sums, columns.uniform)
            chosen = {drawn[place].number: int(tokens[place]) for place in whole}
        if nucleus:
            rows = [drawn[place] for place in nucleus]
            k = min(CANDIDATES, x.shape[1])
            tokens, reached = _ranked(x, peaks, _columns(rows, best), k, sums[nucleus, -1:])
            for place, token, done in zip(nucleus, tokens.tolist(), reached.tolist(), strict=True):
                row = drawn[place]
                chosen[row.number] = token if done else _broad_nucleus(weights[place], row)
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Settings of r rows, each [r, 1], so that they broadcast over tokens."""

    numbers: torch.Tensor  # [r]
    best: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor


def _columns(drawn: Sequence[_Drawn], best: torch.Tensor) -> _Columns:
    numbers = torch.tensor([row.number for row in drawn], device=best.device)
    settings = torch.tensor(
        [
            (
                row.params.temperature,
                row.params.top_k if row.params.top_k > 0 else 2**31,
                row.params.top_p,
                row.params.min_p,
                row.uniform,
            )
            for row in drawn
        ],
        dtype=torch.float64,
        device=best.device,
    )
    temperature, top_k, top_p, min_p, uniforms = settings[:, None].unbind(-1)
    return _Columns(
        numbers=numbers,
        best=best[numbers, None].double(),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        uniform=uniforms,
    )


def _ranked(
    x: torch.Tensor, peaks: torch.Tensor, rows: _Columns, k: int, masses: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw among the k largest logits: tokens [r], and whether k were enough [r].

    `masses` [r, 1] is the weight of a whole row, where top-p is a share of that; otherwise it
    is a share of the row's top-k.  A token is kept when those before it weigh less than top-p.
    """
    values, ids = largest(x, peaks, rows.numbers, k)
    weights = ((values.double() - rows.best) / rows.temperature).exp()
    ranks = torch.arange(k, device=x.device)
    weights.masked_fill_(ranks >= rows.top_k, 0.0)
    sums = weights.cumsum(-1)
    wanted = rows.top_p * (sums[:, -1:] if masses is None else masses)
    before = torch.nn.functional.pad(sums[:, :-1], (1, 0))
    kept = (rows.top_p == 1) | (before < wanted)
    kept &= weights >= rows.min_p
    reached = (sums[:, -1] >= wanted[:, 0]) | (weights[:, -1] < rows.min_p[:, 0])
    if k == x.shape[1]:
        reached = torch.ones_like(reached)
    ids, order = ids.sort(-1)
    sums = weights.masked_fill_(~kept, 0.0).gather(-1, order).cumsum(-1)
    places = torch.searchsorted(sums, rows.uniform * sums[:, -1:], right=True)
    return ids.gather(-1, places)[:, 0], reached


def _broad_nucleus(weights: torch.Tensor, row: _Drawn) -> int:
    """Top-p that is held by many tokens of one row, without sorting more than a few of them.

    The first twelve bits of a positive float are a bucket, and the buckets are in order: those
    before the one in which the mass reaches top-p are kept, and only that one is sorted.
    """
    buckets = weights.view(torch.int32) >> 19
    held = torch.bincount(buckets, weights.double()).flip(0).cumsum(0)  # heaviest first
    wanted = row.params.top_p * held[-1]
    at = int(torch.searchsorted(held, wanted))
    last = len(held) - 1 - at
    ids = (buckets == last).nonzero()[:, 0]
    values, ids = _unkeyed(_descending(_keyed(weights[ids], ids)[None], len(ids)))
    sums = values[0].double().cumsum(0) + (held[at - 1] if at else 0.0)
    count = int(torch.searchsorted(sums, wanted)) + 1
    kept = buckets > last
    kept[ids[0, :count]] = True
    kept &= weights >= row.params.min_p
    sums = torch.where(kept, weights, 0.0).double().cumsum(0)
    return int(torch.searchsorted(sums, row.uniform * sums[-1], right=True))


def _by_id(weights: torch.Tensor, sums: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF over the whole vocabulary: first the chunk, then the token in it, [r]."""
    target = uniforms * sums[:, -1:]
    chunk = torch.searchsorted(sums, target, right=True)
    above = sums.gather(-1, chunk)
    below = torch.nn.functional.pad(sums[:, :-1], (1, 0)).gather(-1, chunk)
    share = ((target - below) / (above - below)).clamp_(max=1 - 2.0**-53)
    rows = torch.arange(len(weights), device=weights.device)[:, None]
    inside = weights.view(len(weights), -1, CHUNK)[rows, chunk][:, 0].double().cumsum(-1)
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (chunk * CHUNK + place)[:, 0]


def largest(
    x: torch.Tensor, peaks: torch.Tensor, numbers: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of rows `numbers` and their ids, [r, k], ties by the lower id.

    `peaks` [R, chunks] are the maxima of x's chunks.  Each logit and its id make one integer, so
    the order is total and no neighbour in the batch can turn a tie.
    """
    chunks = peaks.shape[1]
    order = torch.arange(chunks, device=x.device)
    if k < chunks // 4:
        _, order = _unkeyed(_descending(_keyed(peaks[numbers], order), k))
    inside = torch.arange(CHUNK, device=x.device)
    order = order.expand(len(numbers), -1)
    values = x.view(len(x), chunks, CHUNK)[numbers[:, None], order].flatten(1)
    ids = (order[:, :, None] * CHUNK + inside).flatten(1)
    return _unkeyed(_descending(_keyed(values, ids), k))


def _keyed(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Integers in the order of (value, lower id first): the bits of a float sort like it."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: minus zero is zero
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) - ids


def _unkeyed(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids of `_keyed`."""
    bits = (keys + 0xFFFFFFFF) >> 32
    values = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
    return values, (bits << 32) - keys


def _descending(keys: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest keys of each row; numpy sorts integers with vector instructions."""
    if k <= 1024:
        return keys.topk(k, -1).values
    if keys.device.type == "cpu":
        return torch.from_numpy(-np.sort(-keys.numpy(), axis=-1)[:, :k])
    return keys.sort(-1, descending=True).values[:, :k]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """The model's own logits of the rows whose log-probabilities are asked for, [r, ...]."""

    numbers: list[int]
    logits: torch.Tensor
    peaks: torch.Tensor

    def report(self, rows: Sequence[Row], sampled: Sampled) -> None:
        """Fill in what was asked for."""
        best = self.peaks.amax(-1, keepdim=True)
        sums = (self.logits - best).exp_().view(*self.peaks.shape, CHUNK).sum(-1).double()
        totals = (best[:, 0].double() + sums.cumsum(-1)[:, -1].log()).tolist()
        chosen = torch.tensor([max(sampled.tokens[i], 0) for i in self.numbers])
        raw = self.logits.gather(1, chosen[:, None].to(self.logits.device))[:, 0].tolist()
        most = max(rows[i].params.logprobs or 0 for i in self.numbers)
        every = torch.arange(len(self.numbers), device=self.logits.device)
        values, ids = largest(self.logits, self.peaks, every, max(most, 1))
        table = [
            list(zip(*pair, strict=True))
            for pair in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        for place, i in enumerate(self.numbers):
            if i not in sampled.errors:
                total, count = totals[place], rows[i].params.logprobs
                sampled.logprobs[i] = raw[place] - total
                sampled.top_logprobs[i] = [(t, value - total) for t, value in table[place][:count]]


def _raw(x: torch.Tensor, numbers: list[int]) -> _Raw | None:
    if not numbers:
        return None
    logits = x[numbers]
    peaks = logits.view(len(numbers), -1, CHUNK).amax(-1)
    return _Raw(numbers=numbers, logits=logits, peaks=peaks)


def _errors(best: Sequence[float]) -> dict[int, TierlineError]:
    """Rows that cannot be sampled. A maximum is NaN where any logit is."""
    errors: dict[int, TierlineError] = {}
    for i, value in enumerate(best):
        if value == -math.inf:
            errors[i] = RequestError(
                "no token is allowed: bans, bias and mask leave an empty set",
                hint="ban fewer tokens, lower min_tokens, or widen the grammar",
            )
        elif not math.isfinite(value):
            errors[i] = DependencyError(
                f"the model produced {'NaN' if math.isnan(value) else 'an infinite logit'}",
                hint="check the checkpoint, or run it in a wider type",
            )
    return errors
