"""A row's tokens depend on its logits, its parameters and its seed, and follow the formulas."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tierline.base.errors import DependencyError, RequestError
from tierline.engine import sampling
from tierline.engine.sampling import Row, Sampler, SamplingParams, largest, uniform

POST = [5.2, 3.8, 3.5, 3.1, 2.9, 2.7575]  # the last stands for the tail of the vocabulary
DRAWS = 50_000


def draw(logits: torch.Tensor, rows: list[Row], **more: Any) -> list[int]:
    """Tokens of one pass; the logits are kept."""
    return Sampler(logits.shape[1]).sample(logits.clone(), rows, **more).tokens


def opened(params: SamplingParams, *, vocabulary: int = 6, seed: int = 0, **more: Any) -> Row:
    return Sampler(vocabulary, eos_ids=more.pop("eos_ids", ())).open(
        params, prompt=more.pop("prompt", []), seed=seed, **more
    )


def counts(params: SamplingParams, logits: list[float]) -> list[int]:
    """How often each token comes: fifty of each of a thousand rows with seeds of their own."""
    rows = [opened(params, vocabulary=len(logits), seed=seed) for seed in range(1000)]
    table = torch.tensor([logits]).repeat(1000, 1)
    found: Counter[int] = Counter()
    for _ in range(DRAWS // 1000):
        tokens = draw(table, rows)
        found.update(tokens)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
    return [found[token] for token in range(len(logits))]


def fits(seen: list[int], probabilities: list[float]) -> bool:
    """Chi-square at 1e-4; what has no probability must not come at all."""
    kept = [i for i, p in enumerate(probabilities) if p > 0]
    if sum(seen[i] for i in kept) != sum(seen):
        return False
    wanted = [probabilities[i] for i in kept]
    total = sum(seen) / sum(wanted)
    found = stats.chisquare([seen[i] for i in kept], [p * total for p in wanted])
    return bool(found.pvalue > 1e-4)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(z / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


def reference(logits: list[float], params: SamplingParams) -> list[float]:
    """The kept distribution, from the definitions, a token at a time."""
    probabilities = softmax(logits, params.temperature)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    mass = sum(probabilities[i] for i in order)
    kept, before = [], 0.0
    for i in order:
        if params.top_p < 1 and before >= params.top_p * mass:
            break
        kept.append(i)
        before += probabilities[i]
    floor = params.min_p * max(probabilities)
    kept = [i for i in kept if probabilities[i] >= floor]
    mass = sum(probabilities[i] for i in kept)
    return [p / mass if i in kept else 0.0 for i, p in enumerate(probabilities)]


def kept_weights(params: SamplingParams, logits: list[float]) -> list[float]:
    """Exact probabilities of the pass: where along [0, 1) its answer changes, by bisection."""
    row = opened(params, vocabulary=len(logits))
    table = torch.tensor([logits])

    def token_at(u: float) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "uniform", lambda stream, index: u)
            return draw(table, [row])[0]

    edges = []
    for token in range(len(logits)):
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if token_at(middle) <= token else (low, middle)
        edges.append(high if token_at(0.0) <= token else 0.0)
    return [b - a for a, b in zip([0.0, *edges[:-1]], edges, strict=True)]


@pytest.mark.parametrize(
    ("settings_given", "probabilities"),
    [
        ({"temperature": 1.0}, [0.5751, 0.1418, 0.1051, 0.0704, 0.0577, 0.0500]),
        ({"temperature": 0.5}, [0.8875, 0.0540, 0.0296, 0.0133, 0.0089, 0.0067]),
        ({"temperature": 2.0}, [0.3466, 0.1721, 0.1481, 0.1213, 0.1097, 0.1022]),
        ({"top_k": 3}, [0.6997, 0.1725, 0.1278, 0, 0, 0]),
    ],
)
def test_the_table_of_temperatures(
    settings_given: dict[str, Any], probabilities: list[float]
) -> None:
    found = kept_weights(SamplingParams(**settings_given), POST)

    assert found == pytest.approx(probabilities, abs=1e-3)


@pytest.mark.parametrize(
    ("temperature", "five"),
    [
        (0.5, [0.8935, 0.0543, 0.0298, 0.0134, 0.0090]),  # the post says .84 .08
        (2.0, [0.386, 0.192, 0.165, 0.135, 0.122]),  # the post says .32 .19
    ],
)
def test_the_corrected_rows_of_five_tokens(temperature: float, five: list[float]) -> None:
    found = kept_weights(SamplingParams(temperature=temperature), POST[:5])

    assert found == pytest.approx(five, abs=1e-3)


@pytest.mark.parametrize(
    ("settings_given", "logits", "kept"),
    [
        ({"top_p": 0.9}, POST, 5),  # .8923 at four
        ({"top_p": 0.9}, POST[:5], 4),
        ({"top_p": 0.9, "temperature": 0.5}, POST, 2),  # top-p before temperature would keep 5
        ({"top_p": 0.9}, [math.log(p) for p in (0.92, 0.05, 0.03)], 1),
        ({"min_p": 0.2}, POST, 2),
        ({"top_k": 4, "top_p": 0.9}, POST, 3),  # .9211 of four at three
        ({"top_k": 6, "min_p": 0.15}, POST, 3),
    ],
)
def test_how_many_tokens_are_kept(
    settings_given: dict[str, Any], logits: list[float], kept: int
) -> None:
    found = kept_weights(SamplingParams(**settings_given), logits)

    assert sum(weight > 1e-6 for weight in found) == kept


def test_a_flat_tail_takes_the_mass_at_a_high_temperature() -> None:
    """128,000 near-equal tokens at T = 2: 97.6% of the probability is theirs."""
    tail = math.log((math.exp(POST[5])) / 127_995)
    logits = torch.tensor([[*POST[:5], *[tail] * 127_995]])
    params = SamplingParams(temperature=2.0)
    rows = [opened(params, vocabulary=128_000, seed=seed) for seed in range(40)]
    tokens = [draw(logits, [row])[0] for row in rows]
    weights = (logits[0].double() / 2).softmax(-1)

    assert weights[5:].sum().item() == pytest.approx(0.976, abs=1e-3)
    assert weights[0].item() == pytest.approx(0.009, abs=1e-3)
    assert sum(token >= 5 for token in tokens) >= 35


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=3, temperature=1.5),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.15),
        SamplingParams(top_k=5, top_p=0.8, min_p=0.1, temperature=1.3),
    ],
    ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_frequencies_of_fifty_thousand_draws(params: SamplingParams) -> None:
    seen = counts(params, POST)

    assert fits(seen, reference(POST, params))


@pytest.mark.parametrize("min_p", [0.0, 0.4])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("coarse", [False, True])
def test_a_broad_nucleus_is_that_of_a_full_sort(top_p: float, min_p: float, coarse: bool) -> None:
    """Over a vocabulary whose mass no few tokens hold: first and last kept token, and a middle."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(2)).mul(0.5)
    logits = logits.bfloat16().float() if coarse else logits
    params = SamplingParams(top_p=top_p, min_p=min_p)
    wanted = torch.tensor(reference(logits.tolist(), params), dtype=torch.float64).cumsum(0)

    def token_at(u: float) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "uniform", lambda stream, index: u)
            return draw(logits[None], [opened(params, vocabulary=2000)])[0]

    for u in torch.rand(60, generator=torch.Generator().manual_seed(4), dtype=torch.float64):
        token = token_at(float(u))
        low = wanted[token - 1] if token else 0.0

        assert low - 1e-6 <= u <= wanted[token] + 1e-6
        assert wanted[token] > low  # it is kept


def test_the_frequency_test_notices_a_wrong_temperature() -> None:
    seen = counts(SamplingParams(temperature=1.03), POST)

    assert not fits(seen, reference(POST, SamplingParams()))


def test_draws_of_one_stream_are_uniform_and_independent() -> None:
    numbers = [uniform(12345, index) for index in range(20_000)]
    pairs = Counter(
        (int(a * 8), int(b * 8)) for a, b in zip(numbers[::2], numbers[1::2], strict=True)
    )

    assert all(0 <= number < 1 for number in numbers)
    assert stats.chisquare([pairs[a, b] for a in range(8) for b in range(8)]).pvalue > 1e-4


def test_the_stream_is_splitmix64() -> None:
    """First outputs of the published generator from state 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]

    assert [uniform(1234567, i) for i in range(3)] == [(n >> 11) * 2.0**-53 for n in published]


# Rows among others.

any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 7, 129, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.1]),
    min_p=st.sampled_from([0.0, 0.0, 0.02]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([{}, {3: 4.0, 700: -2.0}]),
    banned_tokens=st.sampled_from([(), (5, 6)]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=100, deadline=None)
@given(
    params=st.lists(any_params, min_size=1, max_size=10),
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([7, 64, 1000, 20_011]),
    peaked=st.sampled_from([0.0, 1.0, 5.0]),
    coarse=st.booleans(),
)
def test_a_row_gets_the_same_alone_and_among_others(
    params: list[SamplingParams], seed: int, vocabulary: int, peaked: float, coarse: bool
) -> None:
    params = [p for p in params if vocabulary > 700 or not p.logit_bias]
    params = [p for p in params if vocabulary > 7 or not p.banned_tokens]
    sampler = Sampler(vocabulary)
    rows = [sampler.open(p, prompt=[1, 2, 1], seed=seed + i) for i, p in enumerate(params)]
    draws = torch.Generator().manual_seed(seed)
    for _ in range(2):
        logits = torch.randn(len(rows), vocabulary, generator=draws) * peaked
        logits = logits.bfloat16().float() if coarse else logits  # coarse logits tie
        together = sampler.sample(logits.clone(), rows)
        backwards = sampler.sample(logits.flip(0), rows[::-1])
        for i, row in enumerate(rows):
            alone = sampler.sample(logits[i : i + 1].clone(), [row])

            assert alone.tokens == [together.tokens[i]] == [backwards.tokens[-1 - i]]
            assert alone.logprobs == [together.logprobs[i]]
            assert alone.top_logprobs == [together.top_logprobs[i]]
        for row, token in zip(rows, together.tokens, strict=True):
            row.append(token)


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_mass_of_a_large_vocabulary_has_the_same_bits_in_any_batch(
    vocabulary: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever splits the work between threads; tokens alone would hide a last bit."""
    params = [SamplingParams(), SamplingParams(min_p=1e-4), SamplingParams(temperature=1.7)] * 4
    logits = torch.randn(12, vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    rows = [opened(p, vocabulary=vocabulary, seed=i) for i, p in enumerate(params)]
    masses: list[torch.Tensor] = []
    inner = sampling._by_id

    def watched(weights: torch.Tensor, sums: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        masses.extend(sums)
        return inner(weights, sums, uniforms)

    monkeypatch.setattr(sampling, "_by_id", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = draw(logits, rows)
        alone = [draw(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    finally:
        torch.set_num_threads(before)

    assert len(masses) == 24
    assert all(torch.equal(a, b) for a, b in zip(masses[:12], masses[12:], strict=True))
    assert together == alone


def test_randomness_tied_to_the_place_in_the_batch_is_noticed() -> None:
    """The control: a generator that is shared by the batch gives other tokens alone."""
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(3))
    rows = [opened(SamplingParams(), vocabulary=500, seed=i) for i in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        place = iter(range(10**6))
        patch.setattr(sampling, "uniform", lambda stream, index: uniform(0, next(place)))
        together = draw(logits, rows)
        alone = [draw(logits[i : i + 1], [rows[i]])[0] for i in reversed(range(8))]

    assert together != alone[::-1]


def test_seeds_repeat_and_differ() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))

    def said(params: SamplingParams, **more: Any) -> list[int]:
        row, tokens = opened(params, vocabulary=1000, **more), []
        for _ in range(10):
            tokens += draw(logits, [row])
            row.append(tokens[-1])
        return tokens

    own = said(SamplingParams(seed=7), seed=1)

    assert own == said(SamplingParams(seed=7), seed=2)  # its own seed, not the engine's
    assert own != said(SamplingParams(seed=8), seed=1)
    assert own != said(SamplingParams(seed=7), seed=1, child=1)
    assert said(SamplingParams(), seed=1) != said(SamplingParams(), seed=2)
    assert len(set(own)) > 5  # a new number every token


# What is changed before the draw.


def penalised(z: float, params: SamplingParams, *, said: int, in_prompt: bool) -> float:
    """The formulas, for one logit."""
    if said or in_prompt:
        theta = params.repetition_penalty
        z = z / theta if z > 0 else z * theta
    z -= params.frequency_penalty * said
    return z - params.presence_penalty * (said > 0)


@settings(max_examples=60, deadline=None)
@given(
    theta=st.sampled_from([1.0, 1.2, 0.8, 2.0]),
    often=st.sampled_from([0.0, 0.5, -0.5]),
    once=st.sampled_from([0.0, 0.7, -1.0]),
    prompt=st.lists(st.integers(0, 29), max_size=40),
    output=st.lists(st.integers(0, 29), max_size=40),
    seed=st.integers(0, 1000),
)
def test_penalties_follow_their_formulas(
    theta: float, often: float, once: float, prompt: list[int], output: list[int], seed: int
) -> None:
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=theta,
        frequency_penalty=often,
        presence_penalty=once,
        logit_bias={4: 0.25, 11: -1.5},
    )
    row = opened(params, vocabulary=30, prompt=prompt)
    for token in output:
        row.append(token)
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
    wanted = [
        penalised(z, params, said=output.count(t), in_prompt=t in prompt)
        + params.logit_bias.get(t, 0.0)
        for t, z in enumerate(logits[1].tolist())
    ]
    x = torch.nn.functional.pad(logits, (0, 34))
    Sampler(30)._edit(x, [opened(SamplingParams(), vocabulary=30), row], {})

    assert x[1, :30].tolist() == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(x[0, :30], logits[0])  # the neighbour is not touched


def test_bans_masks_and_bias_decide_what_may_come() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(4, 1)
    rows = [
        opened(SamplingParams(temperature=0)),
        opened(SamplingParams(temperature=0, banned_tokens=[0, 1])),
        opened(SamplingParams(temperature=0, logit_bias={5: 6})),
        opened(SamplingParams(temperature=0)),
    ]
    allowed = torch.tensor([False, False, False, True, True, False])

    assert draw(logits, rows, masks={3: allowed}) == [0, 2, 5, 3]


@settings(max_examples=30, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=5),
    prompt=st.lists(st.integers(0, 3), max_size=6),
    seed=st.integers(0, 1000),
)
def test_a_banned_sequence_never_appears(
    sequences: list[list[int]], prompt: list[int], seed: int
) -> None:
    """Not in the output, and not across the end of the prompt either."""
    row = opened(SamplingParams(banned_sequences=sequences), vocabulary=5, prompt=prompt, seed=seed)
    said = list(prompt)
    for _ in range(30):
        (token,) = draw(torch.zeros(1, 5), [row])
        row.append(token)
        said.append(token)

    for sequence in sequences:
        length = len(sequence)
        for end in range(len(prompt) + 1, len(said) + 1):
            assert end < length or said[end - length : end] != sequence


def test_without_the_ban_the_sequence_appears() -> None:
    row, said = opened(SamplingParams(), vocabulary=5, seed=1), []
    for _ in range(300):
        said += draw(torch.zeros(1, 5), [row])
        row.append(said[-1])

    assert any(said[i : i + 2] == [1, 2] for i in range(299))


def test_an_output_does_not_end_before_its_least_length() -> None:
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[2])
    row = opened(params, eos_ids=(1,))
    logits, said = torch.tensor([[0.0, 9.0, 8.0, 7.0, 1.0, 1.0]]), []
    for _ in range(4):
        said += draw(logits, [row])
        row.append(said[-1])

    assert said == [3, 3, 3, 1]
    assert row.stop_ids == {1, 2}
    assert opened(SamplingParams(ignore_eos=True), eos_ids=(1,)).stop_ids == set()


# Greedy, ties, log-probabilities, failures.


@pytest.mark.parametrize("vocabulary", [6, 64, 151_936])
def test_greedy_takes_the_lowest_of_equals(vocabulary: int) -> None:
    logits = torch.zeros(3, vocabulary)
    logits[1, [2, 4, vocabulary - 1]] = 1.5
    logits[2, 0], logits[2, 3] = -0.0, 0.0
    rows = [opened(SamplingParams(temperature=0), vocabulary=vocabulary) for _ in range(3)]

    assert draw(logits, rows) == [0, 2, 0]


@given(
    values=st.lists(
        st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0, -math.inf, math.inf, math.nan]),
        min_size=1,
        max_size=200,
    ),
    bias=st.dictionaries(st.integers(0, 199), st.sampled_from([-3.0, 3.5]), max_size=3),
)
def test_a_greedy_row_alone_is_one_among_rows_that_are_drawn(
    values: list[float], bias: dict[int, float]
) -> None:
    near = {token: by for token, by in bias.items() if token < len(values)}
    greedy = SamplingParams(temperature=0, logit_bias=near)
    sampler = Sampler(len(values))
    rows = [opened(params, vocabulary=len(values)) for params in (greedy, SamplingParams())]
    logits = torch.tensor([values, [0.0] * len(values)])
    alone = sampler.sample(logits[:1].clone(), rows[:1])
    among = sampler.sample(logits.clone(), rows)

    assert alone.tokens == among.tokens[:1]
    assert {i: str(e) for i, e in alone.errors.items()} == {
        i: str(e) for i, e in among.errors.items()
    }


@given(
    values=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0]), min_size=64, max_size=640),
    k=st.integers(1, 64),
)
def test_the_largest_are_those_of_a_full_sort(values: list[float], k: int) -> None:
    x = torch.tensor([values[: len(values) // 64 * 64]])
    found, ids = largest(x, x.view(1, -1, 64).amax(-1), torch.tensor([0]), k)
    order = sorted(range(x.shape[1]), key=lambda i: (-x[0, i].item(), i))[:k]

    assert ids[0].tolist() == order
    assert found[0].tolist() == x[0, order].tolist()


def test_log_probabilities_are_the_models_own() -> None:
    params = SamplingParams(
        temperature=0.2, top_k=2, logprobs=3, presence_penalty=1.0, banned_tokens=[0]
    )
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(5))
    rows = [opened(p, vocabulary=300) for p in (SamplingParams(), params)]
    rows[1].append(17)
    sampled = Sampler(300).sample(logits.clone(), rows)
    wanted = logits[1].double().log_softmax(-1)
    top = wanted.topk(3)

    assert sampled.logprobs[0] is sampled.top_logprobs[0] is None
    assert sampled.logprobs[1] == pytest.approx(wanted[sampled.tokens[1]].item(), abs=1e-5)
    assert [t for t, _ in sampled.top_logprobs[1]] == top.indices.tolist()
    assert [p for _, p in sampled.top_logprobs[1]] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
    params = [SamplingParams(logprobs=1)] * 5
    rows = [opened(p, seed=i) for i, p in enumerate(params)]
    healthy = Sampler(6).sample(logits.clone(), rows)
    sick = logits.clone()
    sick[1, 3], sick[2, 0] = math.nan, math.inf
    sampled = Sampler(6).sample(sick, rows, masks={3: torch.zeros(6, dtype=torch.bool)})

    assert {i: type(e) for i, e in sampled.errors.items()} == {
        1: DependencyError,
        2: DependencyError,
        3: RequestError,
    }
    assert "NaN" in str(sampled.errors[1])
    assert [sampled.tokens[i] for i in (1, 2, 3)] == [-1, -1, -1]
    assert [sampled.tokens[i] for i in (0, 4)] == [healthy.tokens[i] for i in (0, 4)]
    assert [sampled.logprobs[i] for i in (0, 4)] == [healthy.logprobs[i] for i in (0, 4)]


def test_without_the_check_a_nan_would_pass_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_errors", lambda best: {})
    rows = [opened(SamplingParams(temperature=0)) for _ in range(2)]
    sick = torch.tensor([[1.0, math.nan, 0.0, 0.0, 0.0, 0.0], POST])

    assert draw(sick.clone(), rows) == [1, 0]  # without an error


def test_an_impossible_token_is_not_an_error() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf, -math.inf]])
    rows = [opened(SamplingParams(temperature=3.0), seed=seed) for seed in range(200)]

    assert set(draw(logits.repeat(200, 1), rows)) == {1, 3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-9, 1e6])
@pytest.mark.parametrize("top_p", [1.0, 1e-9, 0.5])
def test_extreme_temperatures_give_a_token(temperature: float, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p)
    (token,) = draw(torch.tensor([POST]), [opened(params)])

    assert token == 0 if temperature < 1 or top_p < 1e-3 else 0 <= token < 6


# What a request may ask for.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("frequency_penalty", math.inf),
        ("presence_penalty", None),
        ("logit_bias", [1, 2]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("banned_tokens", "12"),
        ("banned_tokens", [-1]),
        ("banned_sequences", [[1], []]),
        ("banned_sequences", [1, 2]),
        ("seed", 1.0),
        ("seed", 2**64),
        ("n", 0),
        ("n", True),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [""]),
        ("stop", 5),
        ("stop", ["a"] * 10_001),
        ("stop", "a" * 5_000),
        ("stop_token_ids", [1, "2"]),
        ("ignore_eos", 1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "no"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as raised:
        SamplingParams(**{name: value})

    assert name in raised.value.hint


def test_right_values_are_taken_as_people_write_them() -> None:
    params = SamplingParams(stop="END", top_k=-1, temperature=1, max_tokens=None, seed=-3)

    assert params.stop == ("END",)
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")
    assert hash(params.stop) is not None
    assert SamplingParams(max_tokens=0).max_tokens == 0


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    for wrong in ({"banned_tokens": [6]}, {"logit_bias": {6: 1}}, {"banned_sequences": [[1, 9]]}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            opened(SamplingParams(**wrong))


def test_a_high_temperature_without_truncation_is_warned_of() -> None:
    assert "tail" in SamplingParams(temperature=1.2).warnings()[0]
    for params in (SamplingParams(), SamplingParams(temperature=1.2, top_p=0.9)):
        assert params.warnings() == []
