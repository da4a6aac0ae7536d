"""`LLM` answers what was asked, as it streams and as it returns, and leaves nothing behind."""

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from engines import greedy
from tierline.base.errors import DoesNotFitError, InputError, RequestError
from tierline.engine import llm as module
from tierline.engine.llm import LLM, Tally
from tierline.engine.sampling import SamplingParams
from tierline.kv.pool import BlockPool
from tiny_checkpoints import VOCABULARY, tiny_checkpoint, tiny_model

TOKENS = 20
TEXTS = ["the quick brown fox", "jumps over", "the lazy dog, and then it goes on to the river"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint("qwen2", tmp_path_factory.mktemp("llm"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def open_llm(path: Path, **options: Any) -> LLM:
    chosen = {"dtype": "fp32", "kernels": "torch", "device": "cpu", "kv_bytes": 2_000_000}
    return LLM(path, **(chosen | options))


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> LLM:
    return open_llm(checkpoint)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """One for all tests; whatever a test does, nobody is left in it."""
    yield shared
    shared.engine.require_idle()


def said(llm: LLM, prompts: Any, params: Any = None) -> list[list[int]]:
    return [answer.outputs[0].token_ids for answer in llm.generate(prompts, params)]


# What a prompt may be, and what comes back


def test_text_and_ids_are_the_same_prompt(llm):
    expected = said(llm, TEXTS[0], greedy(TOKENS))

    assert said(llm, [TEXTS[0]], greedy(TOKENS)) == expected
    tokens = llm.encode(TEXTS[0])
    for prompt in (tokens, tuple(tokens), np.array(tokens), torch.tensor(tokens), [tokens]):
        assert said(llm, prompt, greedy(TOKENS)) == expected
    assert said(llm, [tokens, TEXTS[0]], greedy(TOKENS)) == expected * 2
    assert llm.generate([]) == []


def test_answers_come_in_the_order_of_their_prompts(llm):
    each = [greedy(TOKENS), greedy(3), SamplingParams(max_tokens=9, seed=4, ignore_eos=True)]
    alone = [said(llm, text, own)[0] for text, own in zip(TEXTS, each, strict=True)]
    answers = llm.generate(TEXTS, each)

    assert [answer.outputs[0].token_ids for answer in answers] == alone
    assert [len(tokens) for tokens in alone] == [TOKENS, 3, 9]
    assert len({tuple(tokens[:3]) for tokens in alone}) == 3, "prompts tell apart"
    assert [answer.prompt_token_ids for answer in answers] == [llm.encode(t) for t in TEXTS]
    for answer in answers:
        (output,) = answer.outputs
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert (output.finish_reason, output.stop, output.error) == ("length", None, None)
        assert 0 < answer.ttft_s <= answer.total_s


def test_several_answers_to_one_prompt(llm):
    params = SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=TOKENS, ignore_eos=True)
    (answer,) = llm.generate(TEXTS[0], params)

    assert [output.index for output in answer.outputs] == [0, 1, 2]
    assert {len(output.token_ids) for output in answer.outputs} == {TOKENS}
    assert len({tuple(output.token_ids) for output in answer.outputs}) == 3
    assert llm.generate(TEXTS[0], params)[0].outputs == answer.outputs
    alone = [greedy(TOKENS, n=n) for n in (1, 2)]
    one, two = llm.generate([TEXTS[1]] * 2, alone)
    assert [output.token_ids for output in two.outputs] == [one.outputs[0].token_ids] * 2


def test_seeds_repeat(checkpoint, llm):
    def sampled(where: LLM, seed: int | None) -> list[int]:
        return said(where, TEXTS[0], SamplingParams(seed=seed, max_tokens=TOKENS))[0]

    assert sampled(llm, 7) == sampled(llm, 7)
    assert sampled(llm, 7) != sampled(llm, 8)
    assert sampled(llm, None) != sampled(llm, None)
    first, again, other = (open_llm(checkpoint, seed=seed) for seed in (5, 5, 6))
    unseeded = sampled(first, None)
    assert sampled(again, None) == unseeded
    assert sampled(other, None) != unseeded


def test_logprobs_are_those_of_transformers(llm):
    params = greedy(TOKENS, logprobs=5)
    sampled = SamplingParams(seed=2, max_tokens=TOKENS, logprobs=0, ignore_eos=True)
    model = tiny_model("qwen2")
    for answer in llm.generate([TEXTS[0], TEXTS[0]], [params, sampled]):
        (output,) = answer.outputs
        prompt = answer.prompt_token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output.token_ids[:-1]])).logits
        expected = logits[0, len(prompt) - 1 :].log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]

        assert [found.token for found in output.logprobs] == output.token_ids
        found = torch.tensor([found.logprob for found in output.logprobs])
        torch.testing.assert_close(found, chosen, atol=1e-4, rtol=0)
        for row, at in zip(expected, output.logprobs, strict=True):
            top = row.topk(len(at.top))
            assert [token for token, _ in at.top] == top.indices.tolist()
            values = torch.tensor([value for _, value in at.top])
            torch.testing.assert_close(values, top.values, atol=1e-4, rtol=0)
    assert len(llm.generate(TEXTS[0], params)[0].outputs[0].logprobs[0].top) == 5


def test_a_stop_string_ends_the_text(llm):
    whole = llm.generate(TEXTS[0], greedy(60))[0].outputs[0].text
    stop = whole[9:12]
    cut = llm.generate(TEXTS[0], greedy(60, stop=[stop, "never said"]))[0].outputs[0]
    kept = llm.generate(TEXTS[0], greedy(60, stop=stop, include_stop_str_in_output=True))[0]

    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop) == ("stop", stop)
    assert len(cut.token_ids) < 60
    assert kept.outputs[0].text == cut.text + stop


def test_bytes_that_are_no_characters_stream_to_their_text(llm):
    """Only bytes of a few long characters are allowed, in any order."""
    allowed = {token for text in ("é€😀", "a") for token in llm.encode(text)}
    banned = [token for token in range(VOCABULARY) if token not in allowed]
    params = SamplingParams(seed=3, max_tokens=150, banned_tokens=banned, temperature=20.0)
    deltas = list(llm.stream(TEXTS[0], params))
    ids = [token for delta in deltas for token in delta.token_ids]
    text = "".join(delta.text for delta in deltas)

    assert text == llm.tokenizer.decode(ids)
    assert set(text) & set("é€😀")
    assert "\ufffd" in text
    assert any(not delta.text for delta in deltas), "parts of a character are held back"


# Streams


def test_what_streams_is_what_is_returned(llm):
    params = greedy(40, n=2, logprobs=1, stop="\x7f\x00")
    (answer,) = llm.generate(TEXTS[2], params)
    deltas = list(llm.stream(TEXTS[2], params))

    for output in answer.outputs:
        own = [delta for delta in deltas if delta.index == output.index]
        assert "".join(delta.text for delta in own) == output.text
        assert [token for delta in own for token in delta.token_ids] == output.token_ids
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == output.finish_reason


def test_streams_are_read_in_turns_and_beside_other_answers(llm):
    expected = said(llm, TEXTS, greedy(TOKENS))
    first, second = (llm.stream(text, greedy(TOKENS)) for text in TEXTS[:2])
    found: list[list[int]] = [[], []]
    for step, deltas in enumerate(zip(first, second, strict=True)):
        for tokens, delta in zip(found, deltas, strict=True):
            tokens += delta.token_ids
        if step == 5:
            assert said(llm, TEXTS, greedy(TOKENS)) == expected

    assert found == expected[:2]


def test_leaving_a_stream_early_frees_everything(llm):
    stream = llm.stream(TEXTS[0], greedy(200, n=2))
    for _ in zip(stream, range(5), strict=False):
        assert not llm.engine.idle
    stream.close()

    llm.engine.require_idle()
    never_read = llm.stream(TEXTS[0], greedy(200))
    assert llm.engine.idle
    del never_read


def test_the_tally_counts_what_streams(llm):
    tally = Tally(llm.engine.clock.now_ps())
    for delta in llm.stream(TEXTS[0], greedy(TOKENS)):
        tally.add(delta)
    told = tally.as_dict()

    assert told["text"] == llm.generate(TEXTS[0], greedy(TOKENS))[0].outputs[0].text
    assert (told["prompt_tokens"], told["output_tokens"]) == (len(TEXTS[0]), TOKENS)
    assert told["ttft_s"] > 0
    assert told["tokens_per_s"] > 0
    assert f"{TOKENS} tokens" in str(tally)


# Ctrl-C


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A job in the background ignores SIGINT, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def pressed(after: int) -> Iterator[None]:
    """Somebody presses Ctrl-C once, when that many blocks were taken and not yet entered."""
    take, calls = BlockPool.take, itertools.count(1)

    def taking(pool: BlockPool, count: int) -> Any:
        taken = take(pool, count)
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGINT)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPool, "take", taking)
        yield


@pytest.mark.parametrize("after", [1, 2, 7])
def test_ctrl_c_leaves_nobody_in_the_engine(llm, after):
    expected = said(llm, TEXTS, greedy(TOKENS))
    with pressed(after), pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS * 2, greedy(TOKENS, n=2))
    llm.engine.require_idle()
    with pressed(min(after, 2)), pytest.raises(KeyboardInterrupt):
        list(llm.stream(TEXTS[0], greedy(TOKENS)))
    llm.engine.require_idle()

    assert said(llm, TEXTS, greedy(TOKENS)) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_any_moment_leaves_nobody_in_the_engine(llm):
    """A timer presses it; wherever that is, the engine goes on afterwards."""
    rng, caught = Random(0), 0
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for _ in range(25):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.03))
            try:
                llm.generate(TEXTS, greedy(TOKENS, n=2))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
            llm.engine.require_idle()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert caught > 5


def test_half_a_step_is_noticed(checkpoint, monkeypatch):
    """Negative control: without waiting for the step's end a block is lost."""
    llm = open_llm(checkpoint)
    monkeypatch.setattr(module, "_undivided", nullcontext)
    with pressed(2), pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, greedy(TOKENS))

    with pytest.raises(AssertionError):
        llm.engine.require_idle()


# Prefixes


def test_cached_prefixes_are_reported(checkpoint):
    llm, bare = open_llm(checkpoint), open_llm(checkpoint, prefix_cache=False)
    prompt = list(range(70))
    first, again = (llm.generate(prompt, greedy(4))[0] for _ in range(2))
    never = [bare.generate(prompt, greedy(4))[0] for _ in range(2)]

    assert (first.cached_tokens, again.cached_tokens) == (0, 64)
    assert [answer.cached_tokens for answer in never] == [0, 0]
    assert {tuple(a.outputs[0].token_ids) for a in (first, again, *never)} == {
        tuple(first.outputs[0].token_ids)
    }
    (answer,) = llm.generate([*prompt, *first.outputs[0].token_ids, 3], greedy(4))
    assert answer.cached_tokens == 64


def test_tenants_share_no_cached_prefix(checkpoint):
    engine = open_llm(checkpoint).engine

    def cached(tenant: str) -> int:
        engine.add(list(range(70)), greedy(4), tenant=tenant)
        deltas = []
        while not engine.idle:
            deltas += engine.step()
        return deltas[-1].cached_tokens

    assert [cached(tenant) for tenant in ("a", "a", "b", "b", "", "a")] == [0, 64, 0, 64, 0, 64]


# Conversations


def test_a_chat_is_its_template_and_an_answer(llm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    answer = llm.chat(messages, greedy(TOKENS))

    assert answer.prompt_token_ids == llm.encode(text) == llm.chat_prompt(messages)
    assert [answer.outputs[0].token_ids] == said(llm, text, greedy(TOKENS))


def test_a_checkpoint_without_tokenizer_takes_ids(llm, checkpoint, tmp_path):
    bare = Path(shutil.copytree(checkpoint, tmp_path / "tiny-qwen2"))
    (bare / "tokenizer.json").unlink()
    plain = open_llm(bare)
    (answer,) = plain.generate([1, 2, 3], greedy(TOKENS))

    assert [answer.outputs[0].token_ids] == said(llm, [1, 2, 3], greedy(TOKENS))
    assert answer.outputs[0].text == ""
    with pytest.raises(InputError, match="no tokenizer") as caught:
        plain.generate("text", greedy(TOKENS))
    assert "tokenizer.json" in caught.value.hint
    with pytest.raises(InputError, match="no chat template"):
        plain.chat([{"role": "user", "content": "Hi?"}])
    plain.engine.require_idle()


# What cannot be


@pytest.mark.parametrize(
    ("prompts", "what"),
    [
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([[VOCABULARY]], "not in the vocabulary"),
        (list(range(200)) * 3, "600 tokens"),
        ("x" * 600, "600 tokens"),
        ("\ud800", "not valid Unicode"),
        ([1, "a"], "a prompt is text or a list of token ids; found int 1"),
        ([[1, "a"]], "found list"),
        ([[1.5]], "found list"),
        (5, "found int 5"),
        (None, "found NoneType"),
        (b"text", "found bytes"),
        ({"prompt": "text"}, "found dict"),
        ([{"prompt": "text"}], "found dict"),
        (torch.tensor([[1.5, 2.5]]), "found Tensor"),
    ],
)
def test_a_prompt_that_cannot_be_is_said_before_anything_is_computed(
    llm, monkeypatch, prompts, what
):
    monkeypatch.setattr(llm.engine, "step", None)
    listed = [TEXTS[0], *prompts] if isinstance(prompts, list) and len(prompts) == 1 else prompts

    with pytest.raises(RequestError, match=what):
        llm.generate(listed)
    llm.engine.require_idle()


def test_params_that_cannot_be_are_said(llm):
    with pytest.raises(InputError, match="2 sampling parameters for 3 prompts"):
        llm.generate(TEXTS, [greedy(1), greedy(1)])
    with pytest.raises(InputError, match="params are SamplingParams; found str 'max_tokens'"):
        llm.generate(TEXTS[0], {"max_tokens": 3})
    with pytest.raises(RequestError, match="max_tokens is 0"):
        llm.generate(TEXTS, greedy(0))


def test_what_never_fits_takes_nobody_else_along(checkpoint):
    llm = open_llm(checkpoint, kv_bytes=30_000)

    with pytest.raises(DoesNotFitError, match="a prompt of 200 tokens"):
        llm.generate([[1, 2], [1] * 200], [greedy(3), greedy(100)])
    llm.engine.require_idle()
    assert len(said(llm, [1, 2], greedy(3))[0]) == 3


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"kernel": "torch"}, "unknown key 'kernel'", "did you mean 'kernels'"),
        ({"dtype": "fp33"}, "unknown dtype 'fp33'", "fp32"),
        ({"kv_bytes": 0}, "kv_bytes is 0", ""),
    ],
)
def test_options_that_are_not_known_are_said(checkpoint, options, what, hint):
    with pytest.raises(InputError, match=what) as caught:
        LLM(checkpoint, **options)
    assert hint in caught.value.hint


def test_a_model_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        LLM(tmp_path / "nothing")
    with pytest.raises(InputError, match="unknown checkpoint 'dmo'") as caught:
        LLM("dmo")
    assert "demo" in caught.value.hint


def test_two_models_in_one_process(checkpoint, tmp_path, llm):
    other = open_llm(tiny_checkpoint("gemma3", tmp_path))
    expected = [said(each, TEXTS[0], greedy(TOKENS))[0] for each in (llm, other)]
    found: list[list[int]] = [[], []]
    streams = [each.stream(TEXTS[0], greedy(TOKENS)) for each in (llm, other)]
    for deltas in zip(*streams, strict=True):
        for tokens, delta in zip(found, deltas, strict=True):
            tokens += delta.token_ids

    assert found == expected
    assert expected[0] != expected[1]
    other.engine.require_idle()
