"""A greedy answer through the server is the engine's own, token for token: as a chat or a
completion, streamed or whole, alone or among others, with a cached prefix or without."""

import asyncio
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from demo_model import demo_model
from servers import MODEL, engine_of, served
from tierline.engine.demo import models_folder
from tierline.engine.engine import Engine
from tierline.engine.llm import LLM
from tierline.engine.sampling import SamplingParams
from tierline.server.completions import token_name
from tiny_checkpoints import tiny_chat_checkpoint

torch.set_num_threads(1)  # tiny products: a second thread only waits
FP32 = {"dtype": "fp32", "kernels": "torch"}
TOGETHER = 32
SYSTEM = "You are a patient teacher of geography, and answer in whole sentences, never in lists."
QUESTIONS = ("What is the capital of France?", "Name a long river.", "Why is the sea salt?")
BEGINNINGS = ("The capital of France is", "Once upon a time, in a harbour far away,", "1, 2, 3, 4,")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request; `messages` of a chat, or `prompt` of a completion."""

    messages: tuple[str, ...] = ()  # system and user in turns
    prompt: str = ""
    as_tokens: bool = False
    stream: bool = False
    scored: bool = False  # with log-probabilities, which name every token
    n: int = 1
    max_tokens: int = 16
    stop: str | None = None

    @property
    def turns(self) -> list[dict[str, str]]:
        roles = ("system", "user") if len(self.messages) == 2 else ("user",)
        return [
            {"role": role, "content": text} for role, text in zip(roles, self.messages, strict=True)
        ]

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0,
            ignore_eos=True,
            n=self.n,
            stop=(self.stop,) if self.stop else (),
        )

    def body(self, llm: LLM) -> tuple[str, dict[str, Any]]:
        """Where it is sent, and what."""
        told: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "n": self.n,
            "stream": self.stream,
        }
        if self.stop:
            told["stop"] = self.stop
        if self.messages:
            scored: dict[str, Any] = {"logprobs": True} if self.scored else {}
            return "/v1/chat/completions", told | scored | {"messages": self.turns}
        scored = {"logprobs": 1} if self.scored else {}
        prompt = llm.encode(self.prompt) if self.as_tokens else self.prompt
        return "/v1/completions", told | scored | {"prompt": prompt}


def asks() -> list[Ask]:
    """Of every kind, with prompts that share beginnings."""
    found: list[Ask] = []
    for stream, scored in itertools.product((False, True), repeat=2):
        alike: dict[str, Any] = {"stream": stream, "scored": scored}
        found += [
            Ask(messages=(SYSTEM, question), max_tokens=20, **alike) for question in QUESTIONS
        ]
        found += [
            Ask(prompt=f"{SYSTEM} {text}", as_tokens=at != 1, max_tokens=12 + at, **alike)
            for at, text in enumerate(BEGINNINGS)
        ]
        found.append(Ask(messages=QUESTIONS[:1], n=2, **alike))
        found.append(Ask(prompt=BEGINNINGS[0], n=2, stop="e", **alike))
    assert len(found) == TOGETHER
    return found


@dataclass
class Said:
    """One choice: its text, its tokens where they were asked for, and why it ended."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        """A choice, or what a chunk adds to it."""
        turn = choice.get("message") or choice.get("delta") or choice
        self.text += turn.get("content") or turn.get("text") or ""
        scored = choice.get("logprobs") or {}
        self.tokens += scored.get("tokens", [])
        self.tokens += [bytes(entry["bytes"]).hex() for entry in scored.get("content") or []]
        self.finish_reason = choice["finish_reason"] or self.finish_reason


def own(llm: LLM, ask: Ask) -> list[Said]:
    """The engine's answer, computed alone."""
    prompt = llm.chat_prompt(ask.turns) if ask.messages else ask.prompt
    (answer,) = llm.generate([prompt], ask.params)
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    return [
        Said(
            output.text,
            [
                tokenizer.token_bytes(token).hex() if ask.messages else token_name(tokenizer, token)
                for token in output.token_ids
            ]
            if ask.scored
            else [],
            output.finish_reason,
        )
        for output in answer.outputs
    ]


async def through(client: httpx.AsyncClient, llm: LLM, ask: Ask) -> tuple[list[Said], int]:
    """The server's answer, and how many tokens of its prompt were cached."""
    path, body = ask.body(llm)
    said = [Said() for _ in range(ask.n)]
    if not ask.stream:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        for choice in told["choices"]:
            said[choice["index"]].add(choice)
        return said, told["usage"]["prompt_tokens_details"]["cached_tokens"]
    async with client.stream("POST", path, json=body) as stream:
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    said[choice["index"]].add(choice)
    assert line == "" or line == "data: [DONE]"
    return said, 0


def different(
    engine: Engine, llm: LLM, listed: Sequence[Ask], *, rounds: int = 2
) -> tuple[list[tuple[Ask, list[Said], list[Said]]], int]:
    """Answers that are not the engine's, of each alone and of all at once; cached tokens."""
    expected = [own(llm, ask) for ask in listed]

    async def ask_all(url: str) -> list[tuple[list[Said], int]]:
        limits = httpx.Limits(max_connections=len(listed))
        async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits) as client:
            found = [await through(client, llm, ask) for ask in listed[::3]]
            for _ in range(rounds):
                found += await asyncio.gather(*(through(client, llm, ask) for ask in listed))
            return found

    with served(engine) as server, ThreadPoolExecutor(1) as pool:
        found = pool.submit(asyncio.run, ask_all(server.url)).result()
    wanted = [*zip(listed[::3], expected[::3], strict=True)]
    wanted += [*zip(listed, expected, strict=True)] * rounds
    wrong = [
        (ask, own_, said)
        for (ask, own_), (said, _) in zip(wanted, found, strict=True)
        if said != own_
    ]
    return wrong, sum(cached for _, cached in found)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_checkpoint(tmp_path_factory.mktemp("equal"), max_position_embeddings=1024)


def alone(path: Path, **options: Any) -> LLM:
    """The reference: an engine of its own, without a cache of prefixes."""
    return LLM(path, **({"kv_bytes": 4_000_000, "prefix_cache": False, "device": "cpu"} | options))


def test_answers_are_the_engines_own(tiny: Path) -> None:
    """INV-SRV-2, in rooms so small that requests also wait for each other."""
    engine = engine_of(tiny, sequences_max=12, batch_tokens=64)

    wrong, cached_tokens = different(engine, alone(tiny, **FP32), asks())

    assert not wrong
    assert cached_tokens > 500


def test_a_server_that_samples_otherwise_in_company_would_be_seen(tiny: Path) -> None:
    """Negative control: the second-best token for one row of each step of five or more."""
    engine = engine_of(tiny)
    sample = engine.sampler.sample

    def disturbed(logits: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if len(logits) >= 5:
            logits = logits.clone()
            logits[0, logits[0].argmax()] = -100.0
        return sample(logits, *rest, **named)

    engine.sampler.sample = disturbed  # type: ignore[method-assign]

    wrong, _ = different(engine, alone(tiny, **FP32), asks(), rounds=1)

    assert wrong
    assert len(wrong) < TOGETHER  # who was alone is right


@pytest.mark.slow
def test_real_answers_are_the_engines_own() -> None:
    """INV-SRV-2 on the demo model and its fast kernels."""
    path = demo_model()
    folder = models_folder().parent / "kernels"
    options = {"dtype": "auto", "kernels": "auto", "kernels_folder": folder}
    engine = engine_of(path, kv_bytes=200_000_000, **options)

    wrong, cached_tokens = different(engine, alone(path, kv_bytes=200_000_000), asks())

    assert not wrong
    assert cached_tokens > 500
