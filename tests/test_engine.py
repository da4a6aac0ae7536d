"""The same tokens whatever else is in the batch, and every request ends in its own clear answer."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engines import answers, finish, generate, greedy, tiny_engine
from tierline.base.errors import DoesNotFitError, InputError, RequestError, SpecError
from tierline.engine.engine import Engine
from tierline.engine.executor import Executor
from tierline.engine.sampling import SamplingParams
from tierline.kv.pool import BlockPool
from tiny_checkpoints import VOCABULARY, tiny_checkpoint

TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("gemma3", tmp_path_factory.mktemp("gemma3"))


def prompts(count: int, *, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = Random(seed)
    return [
        [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, longest))] for _ in range(count)
    ]


def alone(path: Path, listed: list[list[int]], **options: Any) -> list[list[int]]:
    """Each prompt by itself, in one chunk, nothing cached: the tokens to compare with."""
    engine = tiny_engine(path, prefix_cache=False, **options)
    return [generate(engine, [prompt], greedy(TOKENS))[0] for prompt in listed]


@pytest.fixture(scope="module")
def listed() -> list[list[int]]:
    return prompts(8)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, listed: list[list[int]]) -> list[list[int]]:
    said = alone(checkpoint, listed)
    assert len({tuple(tokens) for tokens in said}) == len(said), "prompts tell apart"
    return said


@pytest.mark.parametrize("batch_tokens", [1, 7, 64, 512])
def test_chunks_and_batches_change_no_token(checkpoint, listed, expected, batch_tokens):
    engine = tiny_engine(checkpoint, batch_tokens=batch_tokens, policy="fcfs")

    assert generate(engine, listed, greedy(TOKENS)) == expected


@pytest.mark.parametrize("policy", ["tierline", "shortest", "vllm-v1", "sglang", "static"])
def test_the_policy_changes_no_token(checkpoint, listed, expected, policy):
    engine = tiny_engine(checkpoint, batch_tokens=48, sequences_max=4, policy=policy)

    assert generate(engine, listed, greedy(TOKENS)) == expected


def test_a_cached_prefix_changes_no_token(checkpoint, listed, expected):
    engine = tiny_engine(checkpoint)
    generate(engine, listed, greedy(TOKENS))
    ids = [engine.add(prompt, greedy(TOKENS)) for prompt in listed]
    deltas = finish(engine)

    assert [answers(deltas)[i, 0] for i in ids] == expected
    cached = {d.request_id: d.cached_tokens for d in deltas}
    assert [cached[i] for i in ids] == [(len(p) - 1) // 16 * 16 for p in listed]


@pytest.mark.parametrize("policy", ["fcfs", "edf"])
def test_preemption_changes_no_token(checkpoint, listed, expected, policy):
    engine = tiny_engine(checkpoint, kv_bytes=110_000, policy=policy)

    assert generate(engine, listed, greedy(TOKENS)) == expected
    assert engine.scheduler.preemptions > 0


def test_where_blocks_lie_changes_no_token(checkpoint, listed, expected):
    engine = tiny_engine(checkpoint)
    Random(5).shuffle(engine.executor.names.pool._free)

    assert generate(engine, listed, greedy(TOKENS)) == expected


@pytest.mark.parametrize("kv_bytes", [2_000_000, 210_000])
def test_windows_that_slide_change_no_token(windowed, listed, kv_bytes):
    """Also where a prompt's cached blocks would fill the memory that it needs itself."""
    engine = tiny_engine(windowed, batch_tokens=20, kv_bytes=kv_bytes)

    assert generate(engine, listed, greedy(TOKENS)) == alone(windowed, listed)


@pytest.mark.parametrize("name", ["_batch", "sync"])
def test_a_bent_executor_changes_tokens(checkpoint, listed, expected, monkeypatch, name):
    """Negative control: tokens depend on reading the right blocks, at the right positions."""
    engine = tiny_engine(checkpoint)
    if name == "sync":
        tables = type(engine.executor.tables)
        sync = tables.sync
        monkeypatch.setattr(tables, "sync", lambda *a: sync(*a) and 0)
    else:
        build = Executor._batch

        def shifted(self: Executor, moves: Any, *rest: Any) -> Any:
            batch, sampling = build(self, moves, *rest)
            batch.positions[:] = np.maximum(batch.positions - 1, 0)
            return batch, sampling

        monkeypatch.setattr(Executor, "_batch", shifted)

    assert generate(engine, listed, greedy(TOKENS)) != expected


# Several answers to one prompt


def test_greedy_answers_to_one_prompt_are_equal_and_share_its_blocks(checkpoint, listed, expected):
    engine = tiny_engine(checkpoint)
    request_id = engine.add(listed[0], greedy(TOKENS, n=4))
    deltas = engine.step()
    shared = [engine.executor.names.tables(i)[0].block(0) for i in range(4)]
    said = answers([*deltas, *finish(engine)])

    assert [said[request_id, i] for i in range(4)] == [expected[0]] * 4
    assert shared == [shared[0]] * 4


@pytest.mark.parametrize("kv_bytes", [2_000_000, 60_000])
def test_sampled_answers_differ_and_repeat(checkpoint, listed, kv_bytes):
    """Also where there is no room to fork, and every answer comes as a request of its own."""
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=TOKENS, ignore_eos=True)
    said = []
    for busy in (False, True):
        engine = tiny_engine(checkpoint, kv_bytes=kv_bytes)
        if busy:
            engine.add(listed[1], greedy(9))
        request_id = engine.add(listed[0][:40], params)
        found = answers(finish(engine))
        said.append([found[request_id, i] for i in range(3)])

    assert said[0] == said[1]
    assert len({tuple(tokens) for tokens in said[0]}) == 3
    assert {len(tokens) for tokens in said[0]} == {TOKENS}


def test_a_fork_that_copies_nothing_is_noticed(checkpoint, monkeypatch):
    """Negative control: answers that write into one shared block disturb each other."""
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=TOKENS, ignore_eos=True)

    def said() -> Any:
        engine = tiny_engine(checkpoint)
        engine.add(list(range(40)), params)  # the last block is shared in part
        return answers(finish(engine))

    right = said()
    monkeypatch.setattr("tierline.engine.arena.Arena.copy", lambda *_: None)

    assert said() != right


# The native step


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "qwen3_moe", "deepseek_v2"])
def test_native_kernels_change_no_token_either(tmp_path, kernels_folder, listed, architecture):
    path = tiny_checkpoint(architecture, tmp_path)
    said = alone(path, listed)
    options: dict[str, Any] = {"kernels": "native", "kernels_folder": kernels_folder}
    kv_bytes = {"gemma3": 210_000, "deepseek_v2": 60_000, "qwen3_moe": 90_000}.get(architecture)
    tight = tiny_engine(
        path, kv_bytes=kv_bytes or 120_000, batch_tokens=24, policy="fcfs", **options
    )

    assert generate(tight, listed, greedy(TOKENS)) == said
    assert tight.scheduler.preemptions > 0
    assert "native" in tight.facts.kernels


# Ends


def test_how_answers_end(checkpoint):
    engine = tiny_engine(checkpoint)
    prompt = list(range(40))
    whole = generate(engine, [prompt], greedy(TOKENS))[0]
    stop_at = whole[5]
    first = whole.index(stop_at) + 1

    def ended(**fields: Any) -> tuple[list[int], str | None, Any]:
        request_id = engine.add(prompt, greedy(TOKENS, **fields))
        deltas = [d for d in finish(engine) if d.request_id == request_id]
        tokens = [t for d in deltas for t in d.token_ids]
        return tokens, deltas[-1].finish_reason, deltas[-1].stop

    assert ended() == (whole, "length", None)
    assert ended(stop_token_ids=[stop_at]) == (whole[:first], "stop", stop_at)
    tokens, _, _ = ended(stop_token_ids=[stop_at], min_tokens=12)
    assert stop_at not in tokens[:11]
    assert len(tokens) >= 12


def test_a_stop_string_cuts_the_text(checkpoint):
    engine = tiny_engine(checkpoint)
    prompt = list(range(60, 100))
    request_id = engine.add(prompt, greedy(60))
    text = "".join(d.text for d in finish(engine) if d.request_id == request_id)
    stop = text[7:9]
    engine.add(prompt, greedy(60, stop=stop))
    deltas = finish(engine)

    assert "".join(d.text for d in deltas) == text[: text.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop) == ("stop", stop)


def test_the_models_length_ends_an_answer(checkpoint):
    engine = tiny_engine(checkpoint, positions_max=50)
    request_id = engine.add(list(range(40)), greedy(1000))
    deltas = finish(engine)

    assert len(answers(deltas)[request_id, 0]) == 10
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "fields", "what"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 600, {}, "600 tokens; the model takes 512"),
        ([1, VOCABULARY], {}, f"token {VOCABULARY} is not in the vocabulary"),
        ([1, -3], {}, "token -3 is not in the vocabulary"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
    ],
)
def test_what_cannot_be_served_is_said(checkpoint, prompt, fields, what):
    engine = tiny_engine(checkpoint)

    with pytest.raises(RequestError, match=what):
        engine.add(prompt, SamplingParams(**fields))
    assert engine.idle
    engine.require_idle()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = tiny_checkpoint("llama", tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens(["one more"])
    tokenizer.save(str(path / "tokenizer.json"))

    with pytest.raises(SpecError, match="knows 265 tokens, its network 264"):
        tiny_engine(path)


def test_what_never_fits_is_refused(checkpoint):
    engine = tiny_engine(checkpoint, kv_bytes=30_000)

    with pytest.raises(DoesNotFitError, match="a prompt of 200 tokens"):
        engine.add([1] * 200, greedy(100))
    engine.require_idle()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp8"},
        {"device": "tpu"},
        {"device": "cuda:7"},
        {"kernels": "magic"},
        {"policy": "fair"},
        {"sequences_max": 0},
        {"block_tokens": 20},
        {"kv_bytes": 100},
        {"kv_bytes": 10**15},
        {"kernels": "native"},
        {"dtype": torch.bfloat16},
        {"block_tokens": "16"},
        {"kv_bytes": "2GB"},
        {"sequences_max": 1.5},
        {"seed": "x"},
        {"prefix_cache": "no"},
    ],
)
def test_options_that_cannot_be_are_said(checkpoint, options):
    if options.get("device") == "cuda:7" and torch.cuda.is_available():
        pytest.skip("there is a GPU")

    with pytest.raises((InputError, DoesNotFitError)):
        tiny_engine(checkpoint, **options)


def test_logits_that_are_no_numbers_end_their_own_answer_only(checkpoint, listed, expected):
    engine = tiny_engine(checkpoint)
    network = engine.executor.network
    poisoned = engine.add(listed[0], greedy(TOKENS))
    other = engine.add(listed[1], greedy(TOKENS))

    class Poisons:
        calls = 0

        def logits(self, batch: Any, arena: Any) -> torch.Tensor:
            logits = network.logits(batch, arena)
            self.calls += 1
            if self.calls == 3:
                logits[0] = float("nan")
            return logits

    engine.executor.network = Poisons()
    deltas = finish(engine)
    (last,) = [d for d in deltas if d.request_id == poisoned and d.finish_reason]

    assert last.finish_reason == "error"
    assert "NaN" in (last.error or "")
    assert answers(deltas)[other, 0] == expected[1]


def starved(engine: Engine, tokens_max: int) -> None:
    """From now on a step of more tokens runs out of memory."""
    network = engine.executor.network

    class Small:
        def logits(self, batch: Any, arena: Any) -> torch.Tensor:
            if len(batch.tokens) > tokens_max:
                raise torch.OutOfMemoryError
            return network.logits(batch, arena)

    engine.executor.network = Small()


def test_out_of_memory_makes_steps_smaller_and_changes_no_token(checkpoint, listed, expected):
    engine = tiny_engine(checkpoint)
    starved(engine, 100)

    assert generate(engine, listed, greedy(TOKENS)) == expected
    assert engine.scheduler.limits.batch_tokens < 512


def test_out_of_memory_at_the_smallest_step_fails_somebody_and_goes_on(checkpoint):
    engine = tiny_engine(checkpoint)
    starved(engine, 4)
    for prompt in prompts(9, longest=4):
        engine.add(prompt, greedy(6))
    deltas = finish(engine)
    reasons = [d.finish_reason for d in deltas if d.finish_reason]

    assert len(reasons) == 9
    assert "error" in reasons
    assert "length" in reasons


def test_out_of_memory_tells_every_answer_that_waits_for_the_prompt(checkpoint):
    engine = tiny_engine(checkpoint)
    starved(engine, 4)
    engine.add(list(range(80)), greedy(6, n=3))
    deltas = finish(engine)

    assert [(d.index, d.finish_reason) for d in deltas] == [(i, "error") for i in range(3)]


# Nobody is lost


def chaos(path: Path, seed: int, requests: int, **options: Any) -> None:
    """Random requests, limits and cancellations; every answer ends once and all is given back."""
    rng = Random(seed)
    chosen = {"kv_bytes": 120_000, "batch_tokens": 40, "sequences_max": 6, **options}
    engine = tiny_engine(path, **chosen)
    ends: dict[tuple[int, int], int] = {}
    answers_due: dict[int, int] = {}
    added = 0
    while added < requests or not engine.idle:
        if added < requests and rng.random() < 0.5:
            n = rng.choice([1, 1, 1, 2, 3])
            params = SamplingParams(
                temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randrange(1, 30), n=n
            )
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 60))]
            answers_due[engine.add(prompt, params)] = n
            added += 1
        deltas = engine.step()
        if answers_due and rng.random() < 0.1:
            deltas += engine.cancel(rng.choice(list(answers_due)))
        for d in deltas:
            if d.finish_reason:
                ends[d.request_id, d.index] = ends.get((d.request_id, d.index), 0) + 1
        engine.scheduler.check()
    engine.require_idle()  # INV-ENG-2

    due = {(i, index) for i, n in answers_due.items() for index in range(n)}
    assert set(ends) == due  # INV-ENG-1
    assert set(ends.values()) == {1}


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["fcfs", "tierline"]))
def test_every_request_ends_once_and_nothing_is_held(checkpoint, seed, policy):
    chaos(checkpoint, seed, 25, policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kv_bytes"), [("qwen2", 120_000), ("gemma3", 220_000)])
def test_five_hundred_requests_leave_nothing_behind(tmp_path, architecture, kv_bytes):
    chaos(tiny_checkpoint(architecture, tmp_path), 1, 500, kv_bytes=kv_bytes)


def test_a_lost_block_is_noticed(checkpoint, monkeypatch):
    """Negative control."""
    give_back = BlockPool.give_back
    calls = iter(range(10**9))
    monkeypatch.setattr(
        BlockPool, "give_back", lambda pool, block: next(calls) % 50 == 7 or give_back(pool, block)
    )

    with pytest.raises(AssertionError):
        chaos(checkpoint, 0, 25)
