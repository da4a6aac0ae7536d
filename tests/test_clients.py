"""Other people's clients talk to the server as they talk to OpenAI: `openai` whole and streamed,
with tools, structured output, responses, embeddings, errors and retries; litellm; LangChain; curl.

The tiny model says nothing that means anything, so what is tested with it is the form; that a
real model's words come through is tested with the demo model.
"""

import asyncio
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from demo_model import demo_model
from other_clients import TOOLS, Place
from servers import MODEL, Served, engine_of, served
from talkers import tiny_talker
from test_house import docs
from tierline.engine.demo import models_folder
from tierline.server.life import Life
from tierline.server.serve import listening

torch.set_num_threads(1)  # tiny products: a second thread only waits

KEY, ADMIN = "key-of-the-test-0123456789", "admin-of-the-test-0123456789"
SAID: list[Any] = [{"role": "user", "content": "hi"}]
LONG = 1500  # tokens: seconds, for whoever is not cancelled
INPUT_MAX = 1000
TEXT_ONLY = {str(token): -100 for token in range(256, 264)}  # bans what is no byte, the end too


ARGUMENTS = {"weather": {"city": str}, "add": {"a": int, "b": int}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("clients")
    limits = {"output_tokens_default": 64, "input_tokens_max": INPUT_MAX}
    engine = engine_of(tiny_talker(folder, num_hidden_layers=1))
    with served(engine, data=folder / "data", keys=(KEY,), admin_token=ADMIN, **limits) as one:
        yield one


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with client_of(server) as one:
        yield one


def client_of(server: Served, key: str = KEY, **options: Any) -> openai.OpenAI:
    chosen = {"max_retries": 0, "timeout": 60} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **chosen)


def require_calls(calls: Any) -> list[str]:
    """The names of what is called; every call has the arguments that its function takes."""
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        arguments = json.loads(call.function.arguments)
        assert {k: type(v) for k, v in arguments.items()} == ARGUMENTS[call.function.name]
    return [call.function.name for call in calls]


def until(true: Callable[[], Any], what: str, *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"no {what} after {seconds:g} s"
        time.sleep(0.01)


def last_life(server: Served) -> Life:
    """Of who ended last, once nobody is there."""
    until(lambda: not server.on_loop(lambda: len(server.server.recorder.live)), "end of all")
    found: Life = server.on_loop(lambda: server.server.recorder.past[-1])
    return found


# --- openai: chats --------------------------------------------------------------------------


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": SAID, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked, **usage))
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()

    said = whole.choices[0].message.content
    assert said
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    assert final.choices[0].message.content == said
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert whole.usage is not None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 1
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"


def test_several_choices_with_their_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=SAID,
        n=3,
        seed=7,
        logprobs=True,
        top_logprobs=2,
        max_tokens=9,
        logit_bias=TEXT_ONLY,
    )

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        said = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
        assert said.decode(errors="replace") == choice.message.content
        assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {2}


def test_what_is_not_openais_goes_through_extra_body(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=SAID,
        max_tokens=4,
        extra_body={"top_k": 1, "ignore_eos": True, "priority": 3},
        extra_headers={"X-Tierline-SLO": "batch"},
    )

    told = answer.model_dump()["tierline"]
    assert (told["class"], told["priority"]) == ("batch", 3)
    assert told["ttft_ms"] >= told["queue_ms"] >= 0


def test_closing_a_stream_ends_its_generation(server: Served, client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    stream = client.chat.completions.create(
        model=MODEL, messages=SAID, max_tokens=LONG, stream=True, extra_body=extra
    )
    for _ in range(3):
        next(stream)
    stream.close()
    life = last_life(server)

    assert life.outcome == "cancelled"
    assert life.output_tokens < LONG


def test_a_stream_that_is_read_to_its_end_is_not_cancelled(
    server: Served, client: openai.OpenAI
) -> None:
    """The control of the test above."""
    list(client.chat.completions.create(model=MODEL, messages=SAID, max_tokens=9, stream=True))

    assert last_life(server).outcome in ("stop", "length")


# --- openai: tools --------------------------------------------------------------------------


def test_tools_are_called_and_their_results_are_read(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "max_tokens": 300, "seed": 1}
    first = client.chat.completions.create(messages=SAID, tool_choice="required", **asked)
    turn = first.choices[0].message
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        for call in turn.tool_calls or []
    ]
    second = client.chat.completions.create(
        messages=[*SAID, turn, *results], **{**asked, "max_tokens": 8}
    )

    assert first.choices[0].finish_reason == "tool_calls"
    assert set(require_calls(turn.tool_calls)) <= set(ARGUMENTS)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_function_that_is_named_is_called_once(client: openai.OpenAI, name: str) -> None:
    chosen: Any = {"type": "function", "function": {"name": name}}
    answer = client.chat.completions.create(
        model=MODEL, messages=SAID, tools=TOOLS, tool_choice=chosen, max_tokens=200
    )

    assert require_calls(answer.choices[0].message.tool_calls) == [name]


def test_parallel_calls_come_where_they_are_allowed(client: openai.OpenAI) -> None:
    counts: dict[bool, set[int]] = {}
    for parallel in (True, False):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=SAID,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=parallel,
            n=2,
            seed=3,
            max_tokens=400,
            logit_bias={"257": -100},  # rather another call than the end
        )
        calls = [require_calls(choice.message.tool_calls) for choice in answer.choices]
        counts[parallel] = {len(names) for names in calls}

    assert max(counts[True]) > 1
    assert counts[False] == {1}


def test_calls_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=SAID, tools=TOOLS, tool_choice="required", max_tokens=300, seed=1
    ) as stream:
        kinds = {event.type for event in stream}
        turn = stream.get_final_completion().choices[0]

    assert "tool_calls.function.arguments.delta" in kinds
    assert turn.finish_reason == "tool_calls"
    assert require_calls(turn.message.tool_calls)


# --- openai: structured output --------------------------------------------------------------


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=SAID, response_format=Place, max_tokens=200, n=3
    )

    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Place)
        assert choice.finish_reason == "stop"


def test_an_answer_that_is_not_bound_does_not_parse(client: openai.OpenAI) -> None:
    """The control: random weights write no JSON unless they are made to."""
    answer = client.chat.completions.create(model=MODEL, messages=SAID, max_tokens=200, n=3)

    for choice in answer.choices:
        with pytest.raises(ValueError, match="JSON"):
            Place.model_validate_json(choice.message.content or "")


def test_arguments_are_parsed_into_a_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=SAID,
        tools=[openai.pydantic_function_tool(Place)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    (call,) = answer.choices[0].message.tool_calls or []

    assert isinstance(call.function.parsed_arguments, Place)


# --- openai: responses ----------------------------------------------------------------------


def test_a_response_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "hi", "temperature": 0}
    short = client.responses.create(**asked, max_output_tokens=3)
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()

    assert (short.status, whole.status) == ("incomplete", "completed")
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    assert short.usage is not None
    assert short.usage.output_tokens == 3
    assert whole.output_text
    assert final.output_text == whole.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert whole.usage is not None
    assert final.usage is not None
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert [event.sequence_number for event in events][:3] == [0, 1, 2]


def test_a_responses_tools_and_forms(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    called = client.responses.create(
        model=MODEL,
        input="hi",
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    (call,) = called.output
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "hi"}, call.model_dump(), result],  # type: ignore[list-item]
        max_output_tokens=8,
    )
    parsed = client.responses.parse(
        model=MODEL, input="hi", text_format=Place, max_output_tokens=200
    )

    arguments = json.loads(call.arguments)
    assert {k: type(v) for k, v in arguments.items()} == ARGUMENTS[call.name]
    assert after.output_text
    assert isinstance(parsed.output_parsed, Place)


# --- openai: the rest -----------------------------------------------------------------------


def test_texts_embeddings_and_models(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=3, echo=True)
    plain = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    packed = client.embeddings.create(model=MODEL, input=["one", "two"])  # base64, by default

    assert [choice.text[:1] for choice in text.choices] == ["a", "b"]
    for one, other in zip(plain.data, packed.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)
    assert plain.data[0].embedding != plain.data[1].embedding
    assert plain.model_dump()["tierline"]["pooling"] == "mean"
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tierline"


BAD, MISSING = openai.BadRequestError, openai.NotFoundError
NEVER = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"not": {}}}}
NOWHERE = {"type": "function", "function": {"name": "a", "parameters": {"$ref": "#/no"}}}
REFUSED: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], int, str]] = {
    # what is asked, how it is raised, with which status and code; the name is that of `param`
    "temperature": ({"temperature": 3}, BAD, 400, "invalid_value"),
    "foo": ({"extra_body": {"foo": 1}}, BAD, 400, "unknown_parameter"),
    "store": ({"store": True}, BAD, 400, "unsupported_parameter"),
    "response_format": ({"response_format": NEVER}, BAD, 400, "invalid_grammar"),
    "structured_outputs": (
        {"extra_body": {"structured_outputs": {"regex": "("}}},
        BAD,
        400,
        "invalid_grammar",
    ),
    "tools": ({"tools": [NOWHERE]}, BAD, 400, "invalid_grammar"),
    "slo": ({"extra_body": {"slo": "none such"}}, BAD, 400, "unknown_service_class"),
    "model": ({"model": "gpt-4"}, MISSING, 404, "model_not_found"),
    "messages": (
        {"messages": [{"role": "user", "content": "x" * INPUT_MAX}]},
        openai.APIStatusError,
        413,
        "input_too_long",
    ),
}


@pytest.mark.parametrize("param", REFUSED)
def test_refusals_are_typed_errors(client: openai.OpenAI, param: str) -> None:
    asked, kind, status, code = REFUSED[param]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": SAID, **asked})

    error = caught.value
    assert (error.status_code, error.code) == (status, code)
    assert (error.param or "").partition(".")[0] == param
    assert error.type == "invalid_request_error"
    assert isinstance(error.body, dict)
    assert error.body["message"]


def test_wrong_keys_are_typed_errors(server: Served) -> None:
    """401 for a key that is wrong, 403 for another model's, 402 for one that has spent all."""
    keys = server.server.keys

    def refused(
        kind: type[openai.APIStatusError], key: str, *, after_one: bool = False
    ) -> tuple[int, str | None, str | None]:
        with client_of(server, key) as client:
            create = partial(client.chat.completions.create, model=MODEL, messages=SAID)
            if after_one:
                create(max_tokens=2)
            with pytest.raises(kind) as caught:
                create(max_tokens=2)
        return caught.value.status_code, caught.value.code, caught.value.type

    def made(**fields: Any) -> str:
        return str(server.on_loop(lambda: keys.create(tenant="a", name="b", **fields))[1])

    wrong = refused(openai.AuthenticationError, "wrong")
    poor = refused(openai.APIStatusError, made(budget_tokens=1), after_one=True)
    foreign = refused(openai.PermissionDeniedError, made(models=["other"]))

    assert wrong == (401, "invalid_api_key", "authentication_error")
    assert poor == (402, "budget_exhausted", "billing_error")
    assert foreign == (403, "model_not_allowed", "permission_error")


def test_a_draining_server_is_a_typed_error(server: Served, client: openai.OpenAI) -> None:
    server.on_loop(lambda: setattr(server.server.service, "draining", True))
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=SAID)
    finally:
        server.on_loop(lambda: setattr(server.server.service, "draining", False))

    assert (caught.value.status_code, caught.value.code) == (503, "draining")
    assert int(caught.value.response.headers["retry-after"]) > 0


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with room for one."""
    engine = engine_of(tiny_talker(tmp_path_factory.mktemp("narrow"), num_hidden_layers=1))
    with served(engine, open_max=1) as one:
        yield one


def test_a_full_server_is_a_typed_error_that_says_when_to_come_again(narrow: Served) -> None:
    """`Retry-After` is what the scheduler predicts at that moment, and nothing else."""
    engine = narrow.server.engine.engine
    predict, predicted_s = engine.predicted_ttft_s, []

    def heard(*asked: Any, **named: Any) -> float:
        predicted_s.append(predict(*asked, **named))
        return predicted_s[-1]

    extra = {"ignore_eos": True}
    with client_of(narrow) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=SAID, max_tokens=LONG, stream=True, extra_body=extra
        )
        engine.predicted_ttft_s = heard  # type: ignore[method-assign]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=SAID)
        engine.predicted_ttft_s = predict  # type: ignore[method-assign]
        stream.close()
    last_life(narrow)

    error, headers = caught.value, caught.value.response.headers
    assert (error.code, error.type) == ("overloaded", "rate_limit_error")
    (wait_s,) = predicted_s
    assert int(headers["retry-after"]) == math.ceil(max(wait_s, 1.0))
    assert int(headers["retry-after-ms"]) == round(max(wait_s, 1.0) * 1000)


def test_a_client_comes_again_and_is_served(narrow: Served) -> None:
    """`openai` waits as long as it is told, without being asked to."""
    extra = {"ignore_eos": True}
    with client_of(narrow, max_retries=2) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=SAID, max_tokens=LONG, stream=True, extra_body=extra
        )

        async def somebody_was_refused() -> None:
            past = narrow.server.recorder.past
            before = len(past)
            while not any(life.outcome == "refused" for life in list(past)[before:]):
                await asyncio.sleep(0.01)

        started = time.monotonic()
        refused = asyncio.run_coroutine_threadsafe(somebody_was_refused(), narrow.loop)
        refused.add_done_callback(lambda _: stream.response.close())
        answer = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=SAID, max_tokens=4
        )
        waited_s = time.monotonic() - started

    assert answer.retries_taken >= 1
    assert answer.parse().choices[0].message.content
    assert waited_s >= 1


def test_many_at_once_from_an_event_loop(server: Served) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": SAID, "max_tokens": 12, "temperature": 0}

    async def run() -> tuple[list[str], str, str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
        ) as client:
            create = client.chat.completions.create
            several = await asyncio.gather(*(create(**asked) for _ in range(8)))
            text = ""
            async for chunk in await create(**asked, stream=True):
                text += chunk.choices[0].delta.content or ""
            long: dict[str, Any] = {**asked, "max_tokens": LONG, "stream": True}
            stream = await create(**long, extra_body={"ignore_eos": True})
            async for _ in stream:
                break
            await stream.close()
            response = await client.responses.create(model=MODEL, input="hi", temperature=0)
        return [one.choices[0].message.content or "" for one in several], text, response.id

    whole, streamed, response_id = asyncio.run(run())

    assert set(whole) == {streamed}
    assert streamed
    assert response_id.startswith("resp_")
    last_life(server)
    recent = server.on_loop(lambda: [life.outcome for life in server.server.recorder.past][-2:])
    assert recent[0] == "cancelled" or recent[1] == "cancelled"


def test_a_small_answer_does_not_wait_for_more() -> None:
    """asyncio sends at once on sockets that say that they are TCP; others wait 40 ms."""
    with listening("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


# --- curl -----------------------------------------------------------------------------------


def curl(server: Served, path: str, *options: str, body: dict[str, Any] | None = None) -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    sent = ["-d", json.dumps(body), "-H", "Content-Type: application/json"] if body else []
    return subprocess.run(
        [
            program,
            "-sS",
            f"{server.url}{path}",
            "-H",
            f"Authorization: Bearer {KEY}",
            *sent,
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_curl_whole_and_streamed(server: Served) -> None:
    asked = {"model": MODEL, "messages": SAID, "max_tokens": 12, "temperature": 0}
    path = "/v1/chat/completions"
    whole = json.loads(curl(server, path, body=asked))
    stream = curl(server, path, "-N", body=asked | {"stream": True})
    told = curl(server, path, "-w", "%{http_code} %{content_type}", "-o", "-", body={"foo": 1})

    lines = [line for line in stream.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert '"param":"model"' in told or '"param":"foo"' in told
    assert told.endswith("400 application/json")
    assert json.loads(curl(server, "/v1/models"))["data"][0]["id"] == MODEL


def test_curl_that_goes_away_is_cancelled(server: Served) -> None:
    """`--max-time` ends it amid a stream."""
    asked = {"model": MODEL, "messages": SAID, "max_tokens": LONG, "ignore_eos": True}
    with pytest.raises(subprocess.CalledProcessError):
        curl(server, "/v1/chat/completions", "-N", "-m", "0.5", body=asked | {"stream": True})

    assert last_life(server).outcome == "cancelled"


# --- litellm and LangChain ------------------------------------------------------------------


def other_client(package: str, name: str, server: Served) -> dict[str, Any]:
    """What one of `other_clients` brings back."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install 'tierline[clients]'")
    script = Path(__file__).with_name("other_clients.py")
    done = subprocess.run(
        [sys.executable, script, name, server.url, KEY, MODEL],
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks the internet
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for called, arguments in found["calls"]:
        assert {k: type(v) for k, v in arguments.items()} == ARGUMENTS[called]
    assert found["calls"]
    assert found["whole"]
    assert found["streamed"] == found["whole"]
    assert found["tokens"][0] > 0
    return found


@pytest.mark.slow
def test_litellm(server: Served) -> None:
    found = other_client("litellm", "litellm", server)

    assert found["tokens"][0] == found["tokens"][1]
    assert math.hypot(*found["vector"]) == pytest.approx(1, abs=1e-5)
    assert "is not known" in found["refused"]


@pytest.mark.slow
def test_langchain(server: Served) -> None:
    found = other_client("langchain_openai", "langchain", server)

    assert found["async"] == found["responses"] == found["whole"]
    assert found["batch"] == [found["whole"]] * 2
    assert found["streamed calls"]
    for place in found["places"]:
        Place.model_validate(place)
    assert len(found["places"]) == 2


# --- what the guide shows -------------------------------------------------------------------

GUIDE = docs.examples_in(docs.ROOT / "docs/guides/use-with-clients.md", docs.MARK_SERVER)
OTHERS = re.compile(r"^(?:import|from) (litellm|langchain_openai)", re.MULTILINE)


@pytest.fixture(scope="module")
def demo_named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server as the guide has it, but for what it says."""
    engine = engine_of(tiny_talker(tmp_path_factory.mktemp("guide"), num_hidden_layers=1))
    with served(engine, model_names=("demo",)) as one:
        yield one


@pytest.mark.parametrize(
    "example",
    [pytest.param(e, marks=[pytest.mark.slow] * (e.language == "python")) for e in GUIDE],
    ids=lambda example: Path(example.where).name,
)
def test_the_guides_examples_work(demo_named: Served, example: Any) -> None:
    other = OTHERS.search(example.text)
    if other is not None and importlib.util.find_spec(other[1]) is None:
        pytest.skip(f"{other[1]} is not installed; pip install 'tierline[clients]'")
    text = example.text.replace("http://localhost:8000", demo_named.url)

    assert text != example.text
    assert docs.failure_of(replace(example, text=text)) is None


def test_an_example_that_does_not_work_is_seen(demo_named: Served) -> None:
    """The control of the test above: the same with a model that is not there."""
    text = GUIDE[0].text.replace("http://localhost:8000", demo_named.url)

    assert "model_not_found" in docs.failure_of(replace(GUIDE[0], text=text.replace("demo", "no")))


# --- a real model ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_model_says_what_is_right_to_everyone() -> None:
    """Paris, whole and streamed, from a chat, a response and a text; and as a choice."""
    folder = models_folder().parent / "kernels"
    options = {"dtype": "auto", "kernels": "auto", "kernels_folder": folder}
    engine = engine_of(demo_model(), kv_bytes=100_000_000, **options)
    question: Any = "What is the capital of France? Answer in one sentence."
    turns: list[Any] = [{"role": "user", "content": question}]
    with served(engine) as server, client_of(server) as client:
        asked: dict[str, Any] = {"model": MODEL, "temperature": 0}
        answer = client.chat.completions.create(messages=turns, max_tokens=32, **asked)
        stream = client.chat.completions.create(messages=turns, max_tokens=32, stream=True, **asked)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        response = client.responses.create(input=question, max_output_tokens=32, **asked)
        text = client.completions.create(
            prompt="The capital of France is", max_tokens=8, **asked
        ).choices[0]
        extra = {"structured_outputs": {"choice": ["Berlin", "London", "Paris", "Rome"]}}
        chosen = client.chat.completions.create(
            messages=turns, max_tokens=8, extra_body=extra, **asked
        )

    said = answer.choices[0].message.content or ""
    assert "Paris" in said
    assert streamed == response.output_text == said
    assert "Paris" in text.text
    assert chosen.choices[0].message.content == "Paris"
