"""A pooled prompt's vector is the mean of the network's states, whatever it is computed beside."""

import base64
import functools
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import torch

from demo_model import demo_model
from engines import finish, generate, greedy, tiny_engine
from servers import MODEL, Served, engine_of, served
from tierline.base.errors import RequestError
from tierline.engine.build import EngineOptions, open_engine
from tierline.engine.engine import Engine
from tierline.engine.executor import Executor
from tierline.engine.generation import Delta
from tierline.engine.sampling import SamplingParams
from tierline.scheduling.scheduler import Scheduler
from tiny_checkpoints import ARCHITECTURES, tiny_checkpoint, tiny_model

NATIVE = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "qwen3_moe", "mixtral")
Vector = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("embeddings")
    return functools.cache(lambda architecture: tiny_checkpoint(architecture, folder))


def texts(*lengths: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


LISTED = texts(1, 16, 40, 97, 130)


@functools.cache
def expected(architecture: str) -> list[Vector]:
    """The mean of transformers' last hidden states, at length 1."""
    model = tiny_model(architecture)
    found = []
    for text in LISTED:
        with torch.no_grad():
            states = model.base_model(torch.tensor([text])).last_hidden_state[0]
        mean = states.mean(0)
        found.append((mean / mean.norm()).numpy())
    return found


def pool(engine: Engine, listed: Sequence[Sequence[int]]) -> list[int]:
    return [engine.add(text, SamplingParams(), pooled=True) for text in listed]


def vectors(deltas: Sequence[Delta], ids: Sequence[int]) -> list[Vector]:
    """What each pooled request was told, all of it."""
    told: dict[int, list[Delta]] = {i: [] for i in ids}
    for delta in deltas:
        if delta.request_id in told:
            told[delta.request_id].append(delta)
    assert all(len(each) == 1 for each in told.values()), "one delta for each"
    found = []
    for (delta,) in told.values():
        assert (delta.finish_reason, delta.token_ids, delta.text) == ("stop", (), "")
        assert delta.embedding is not None
        assert delta.embedding.dtype == np.float32
        found.append(delta.embedding)
    return found


def embed(engine: Engine, listed: Sequence[Sequence[int]]) -> list[Vector]:
    ids = pool(engine, listed)
    found = vectors(finish(engine), ids)
    assert not engine._pooled
    assert not engine.executor._sums
    return found


def furthest(found: Sequence[Vector], wanted: Sequence[Vector]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


def native(folder: Path, **options: Any) -> dict[str, Any]:
    return {"kernels": "native", "kernels_folder": folder, **options}


# --- what it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_mean_of_transformers_states(checkpoints, architecture):
    found = embed(tiny_engine(checkpoints(architecture)), LISTED)

    assert furthest(found, expected(architecture)) < 1e-4
    assert all(abs(float(np.linalg.norm(v)) - 1) < 1e-5 for v in found)


@pytest.mark.parametrize("architecture", NATIVE)
def test_equals_it_on_the_native_step(kernels, kernels_folder, checkpoints, architecture):
    engine = tiny_engine(checkpoints(architecture), **native(kernels_folder))

    assert "native step" in engine.facts.kernels
    assert furthest(embed(engine, LISTED), expected(architecture)) < 1e-4


def test_another_mean_would_be_seen(checkpoints, monkeypatch):
    """Negative control: whoever begins every chunk at nothing tells the mean of the last one."""
    engine = tiny_engine(checkpoints("qwen2"), batch_tokens=32)
    monkeypatch.setattr(Executor, "_sum", lambda self, s, done: torch.zeros(self.hidden))

    assert furthest(embed(engine, LISTED), expected("qwen2")) > 1e-2


def test_a_step_of_several_passes(kernels_folder, checkpoints):
    """Steps of more rows than the native step takes at once, wanted rows among them."""
    listed = texts(400, 300, 480, 200)
    path = checkpoints("llama")
    engine = tiny_engine(path, batch_tokens=2048, **native(kernels_folder))
    wanted = embed(tiny_engine(path), listed)
    (said,) = generate(tiny_engine(path), [listed[3]], greedy(5))
    ids = pool(engine, listed[:2])
    talks = engine.add(listed[3], greedy(5))
    ids += pool(engine, listed[2:])
    deltas = finish(engine)

    assert furthest(vectors(deltas, ids), wanted) < 1e-4
    assert [t for d in deltas if d.request_id == talks for t in d.token_ids] == said


# --- in any company -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 7, 64, 512])
def test_chunks_change_no_vector(checkpoints, batch_tokens):
    engine = tiny_engine(checkpoints("qwen2"), batch_tokens=batch_tokens, policy="fcfs")

    assert furthest(embed(engine, LISTED), expected("qwen2")) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "qwen3_moe"])
def test_chunks_and_company_change_no_bit_on_the_native_step(
    kernels_folder, checkpoints, architecture
):
    options = native(kernels_folder)
    path = checkpoints(architecture)
    whole = [embed(tiny_engine(path, **options), [text])[0] for text in LISTED]
    for batch_tokens in (1, 7, 64):
        engine = tiny_engine(path, batch_tokens=batch_tokens, policy="fcfs", **options)

        assert furthest(embed(engine, LISTED), whole) == 0


def test_another_order_of_sums_would_be_seen(kernels_folder, checkpoints, monkeypatch):
    """Negative control: chunks that are summed by themselves first differ in their last bits."""
    options = native(kernels_folder, policy="fcfs")
    path = checkpoints("qwen2")
    whole = embed(tiny_engine(path, **options), LISTED)
    engine = tiny_engine(path, batch_tokens=7, **options)
    network: Any = engine.executor.network
    logits = network.logits

    def apart(batch: Any, arena: Any) -> torch.Tensor:
        before = batch.sums.clone()
        batch.sums.zero_()
        found: torch.Tensor = logits(batch, arena)
        batch.sums += before
        return found

    monkeypatch.setattr(network, "logits", apart)

    assert 0 < furthest(embed(engine, LISTED), whole) < 1e-5


@pytest.mark.parametrize("kernels_named", ["torch", "native"])
def test_among_answers_nobody_is_disturbed(kernels_folder, checkpoints, kernels_named):
    path = checkpoints("qwen2")
    options: dict[str, Any] = native(kernels_folder) if kernels_named == "native" else {}
    talk = texts(30, 64, 110)
    said = generate(tiny_engine(path, **options), talk, greedy(40))
    engine = tiny_engine(path, batch_tokens=48, **options)
    talking = [engine.add(text, greedy(40)) for text in talk]
    deltas, ids = [], []
    for text in LISTED:
        for _ in range(4):
            deltas += engine.step()
        ids += pool(engine, [text])
    deltas += finish(engine)

    assert furthest(vectors(deltas, ids), expected("qwen2")) < 1e-4
    tokens = [[t for d in deltas if d.request_id == i for t in d.token_ids] for i in talking]
    assert tokens == said


def crowded(path: Path) -> Engine:
    """Memory for a few; prompts in small chunks, beside answers that grow."""
    return tiny_engine(path, kv_bytes=160_000, batch_tokens=24, sequences_max=6, policy="fcfs")


def test_preemption_changes_no_vector(checkpoints):
    engine = crowded(checkpoints("qwen2"))
    preempted: list[int] = []
    engine.scheduler.note = lambda at_ps, s, what, why: (
        preempted.append(s.id) if what == "preempted" and s.id in engine._pooled else None
    )
    found = []
    for _ in range(3):
        for text in texts(60, 60):
            engine.add(text, greedy(60))
        ids = pool(engine, LISTED)
        found += vectors(finish(engine), ids)

    assert preempted
    assert furthest(found, expected("qwen2") * 3) < 1e-5


# --- what would go wrong --------------------------------------------------------------------------


def test_cached_tokens_would_be_missing(checkpoints, monkeypatch):
    """Negative control: from somebody else's blocks there is no sum to go on from, and whoever
    went on from nothing would tell another vector."""
    text = LISTED[-1]
    engine = tiny_engine(checkpoints("qwen2"))
    chain = engine._chain(text, "")
    generate(engine, [text], greedy(1))
    add = Scheduler.add

    def shared(self: Scheduler, s: Any) -> bool:
        s.chain = chain
        return add(self, s)

    monkeypatch.setattr(Scheduler, "add", shared)
    pool(engine, [text])
    with pytest.raises(KeyError):
        engine.step()

    engine = tiny_engine(checkpoints("qwen2"))
    generate(engine, [text], greedy(1))
    monkeypatch.setattr(Executor, "_sum", lambda self, s, done: torch.zeros(self.hidden))
    found = embed(engine, [text])

    assert furthest(found, expected("qwen2")[-1:]) > 1e-3


class Failing:
    """A network that runs out of memory after it has added to the sums."""

    def __init__(self, engine: Engine, *, fails: int) -> None:
        self.network, self.fails = engine.executor.network, fails

    def logits(self, batch: Any, arena: Any) -> torch.Tensor:
        logits = self.network.logits(batch, arena)
        self.fails -= 1
        if self.fails % 2 == 0 and self.fails >= 0:
            raise MemoryError
        return logits


def test_a_step_that_ran_out_of_memory_counts_once(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"), batch_tokens=512)
    engine.executor.network = Failing(engine, fails=5)

    assert furthest(embed(engine, LISTED), expected("qwen2")) < 1e-5
    assert engine.scheduler.limits.batch_tokens < 512


def test_cancelled_leaves_nothing(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"), batch_tokens=32)
    (long,) = pool(engine, [LISTED[-1]])
    engine.step()
    assert engine.executor._sums
    (told,) = engine.cancel(long)

    assert (told.finish_reason, told.embedding) == ("cancelled", None)
    assert not engine._pooled
    assert not engine.executor._sums
    assert finish(engine) == []


def test_a_broken_network_is_said(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"))
    network: Any = engine.executor.network
    network.norm._weight.fill_(float("nan"))
    pool(engine, LISTED[:1])
    (told,) = finish(engine)

    assert (told.finish_reason, told.error) == ("error", "the embedding is not finite")


def test_what_cannot_be_embedded_is_said(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"))
    for wrong in ([], [10**6], [1] * 600):
        with pytest.raises(RequestError):
            pool(engine, [wrong])
    engine.require_idle()


# --- what it is good for --------------------------------------------------------------------------


def test_alike_sentences_lie_nearer(kernels_folder):
    """The demo model was not made for this; it still tells a paraphrase from another subject."""
    engine = open_engine(demo_model(), EngineOptions(kernels_folder=kernels_folder))
    assert engine.tokenizer is not None
    pairs = (
        ("The cat is sleeping on the sofa.", "A kitten naps on the couch."),
        ("The stock market fell sharply today.", "Shares dropped a lot on Wall Street."),
        ("How do I bake bread at home?", "What is the recipe for homemade bread?"),
        ("The rocket reached orbit after nine minutes.", "The spacecraft entered orbit."),
    )
    encoded = [engine.tokenizer.encode(text, special=True) for pair in pairs for text in pair]
    found = np.stack(embed(engine, encoded))
    near = found @ found.T
    for at in range(len(found)):
        others = [near[at, i] for i in range(len(found)) if i not in (at, at ^ 1)]

        assert near[at, at ^ 1] > max(others)


# --- over a socket --------------------------------------------------------------------------------

TEXTS = ["one", "two words", "and \u00e9\u4e16 a longer one " * 6]


@pytest.fixture(scope="module")
def server(checkpoints: Any) -> Iterator[Served]:
    with served(engine_of(checkpoints("qwen2")), input_tokens_max=400) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def direct(server: Served, listed: Sequence[Sequence[int]]) -> list[Vector]:
    """What an engine of its own says."""
    model = tiny_model("qwen2")
    found = []
    for text in listed:
        with torch.no_grad():
            mean = model.base_model(torch.tensor([list(text)])).last_hidden_state[0].mean(0)
        found.append((mean / mean.norm()).numpy())
    return found


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_openai_client_reads_what_transformers_says(server, client, form):
    """The client asks for base64 unless told otherwise."""
    tokenizer = server.server.engine.engine.tokenizer
    listed = [tokenizer.encode(text, special=True) for text in TEXTS]
    found = client.embeddings.create(model=MODEL, input=TEXTS, **form)
    vectors = [
        np.frombuffer(base64.b64decode(each.embedding), "<f4")
        if isinstance(each.embedding, str)
        else np.array(each.embedding, dtype=np.float32)
        for each in found.data
    ]

    assert [each.index for each in found.data] == [0, 1, 2]
    assert furthest(vectors, direct(server, listed)) < 1e-4
    tokens = sum(map(len, listed))
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (tokens, tokens)
    assert found.model == MODEL
    assert found.tierline["pooling"] == "mean"


def test_texts_and_tokens_are_the_same(server, client):
    tokenizer = server.server.engine.engine.tokenizer
    listed = [tokenizer.encode(text, special=True) for text in TEXTS]
    told = [
        client.embeddings.create(model=MODEL, input=TEXTS),
        client.embeddings.create(model=MODEL, input=listed),
    ]
    alone = [client.embeddings.create(model=MODEL, input=TEXTS[1])]
    alone += [client.embeddings.create(model=MODEL, input=listed[1])]

    both = [[np.array(each.embedding) for each in answer.data] for answer in told]
    assert furthest(*both) < 1e-6
    for answer in alone:
        assert np.abs(np.array(answer.data[0].embedding) - both[0][1]).max() < 1e-5


def test_it_says_how_vectors_came_to_be(server):
    response = httpx.post(
        f"{server.url}/v1/embeddings", json={"model": MODEL, "input": "some", "dimensions": 64}
    )
    body = response.json()

    assert response.headers["x-tierline-pooling"] == "mean"
    assert body["tierline"]["normalized"] is True
    assert body["tierline"]["ttft_ms"] > 0
    assert len(body["data"][0]["embedding"]) == 64
    assert body["object"] == "list"


@pytest.mark.parametrize(
    ("asked", "status", "code", "param"),
    [
        ({"input": ""}, 400, "invalid_value", "input"),
        ({"input": []}, 400, "invalid_value", "input"),
        ({"input": [[]]}, 400, "invalid_value", "input"),
        ({"input": ["one", ""]}, 400, "invalid_value", "input"),
        ({"input": 7}, 400, "invalid_value", "input"),
        ({"input": ["one", [1]]}, 400, "invalid_value", "input"),
        ({"input": [-1]}, 400, "invalid_value", "input"),
        ({"input": [10**6]}, 400, "invalid_value", None),
        ({}, 400, "invalid_value", "input"),
        ({"input": "x" * 401}, 413, "input_too_long", "input"),
        ({"input": "one", "dimensions": 32}, 400, "unsupported_parameter", "dimensions"),
        ({"input": "one", "encoding_format": "int8"}, 400, "invalid_value", "encoding_format"),
        ({"input": "one", "temperature": 1}, 400, "unknown_parameter", "temperature"),
        ({"input": "one", "model": "other"}, 404, "model_not_found", "model"),
        ({"input": "one", "slo": "none such"}, 400, "unknown_service_class", "slo"),
    ],
)
def test_what_cannot_be_answered_is_refused(server, asked, status, code, param):
    response = httpx.post(f"{server.url}/v1/embeddings", json={"model": MODEL} | asked)
    error = response.json()["error"]

    assert response.status_code == status, error
    assert error["code"] == code
    assert (error["param"] or "").split(".")[0] == (param or "")
    assert error["type"] == "invalid_request_error"


def test_answers_and_vectors_at_once(server, client):
    """Many callers: each gets its own, and greedy answers stay what they are."""
    said = client.completions.create(model=MODEL, prompt="so", max_tokens=20, temperature=0)
    alone = [client.embeddings.create(model=MODEL, input=text).data[0] for text in TEXTS]

    def ask(number: int) -> float:
        if number % 2:
            again = client.completions.create(
                model=MODEL, prompt="so", max_tokens=20, temperature=0
            )
            return float(again.choices[0].text != said.choices[0].text)
        each = client.embeddings.create(model=MODEL, input=TEXTS).data
        return max(
            float(np.abs(np.array(a.embedding) - np.array(b.embedding)).max())
            for a, b in zip(each, alone, strict=True)
        )

    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(ask, range(24))) < 1e-5


def test_its_life_is_on_record(server, client):
    client.embeddings.create(model=MODEL, input=TEXTS)
    life = server.on_loop(lambda: server.server.recorder.past[-1])

    assert (life.endpoint, life.outcome, life.output_tokens) == ("embeddings", "stop", 0)
    assert life.answers == 3
    assert life.ttft_s is not None


def test_its_shape_is_openais(server, data_dir):
    path = data_dir / "evals" / "openai_openapi" / "openapi_subset.json.gz"
    document = json.loads(gzip.decompress(path.read_bytes()))
    schema = {"$ref": "#/components/schemas/CreateEmbeddingResponse", **document}
    body = httpx.post(f"{server.url}/v1/embeddings", json={"model": MODEL, "input": TEXTS}).json()

    jsonschema.validate(body, schema)
    del body["data"][0]["index"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, schema)
