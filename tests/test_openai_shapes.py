"""Answers have the shapes of OpenAI's own document, and whatever it lets a client ask is taken or
refused by its name: never a failure of ours, never ignored without a word.

What the document does not say and OpenAI does (a streamed completion's `finish_reason` is null
until its end, so is `usage`) is in `STREAMED`.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from openai_document import Judge
from servers import MODEL, engine_of, served
from talkers import tiny_talker
from tierline.server.embeddings import EmbeddingsAsked
from tierline.server.openapi_words import PARAMETERS, WITHOUT_EFFECT
from tierline.server.responses import ResponsesAsked
from tierline.server.shapes import UNSUPPORTED, ChatAsked, CompletionAsked

torch.set_num_threads(1)  # tiny products: a second thread only waits
SAID = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "of a city", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}

CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several, scored": {"n": 2, "logprobs": True, "top_logprobs": 2},
    "tools": {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200},
    "tools it may use": {"tools": TOOLS, "tool_choice": "auto"},
    "structured": {"response_format": FORMAT, "max_tokens": 200},
    "stopped": {"stop": ["e", "a"], "max_tokens": 100},
}
TEXTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several, scored": {"prompt": ["a", "b"], "n": 2, "logprobs": 2},
    "echo": {"echo": True},
    "tokens": {"prompt": [[1, 2], [3]]},
}
RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {
        "tools": [{"type": "function", "strict": True, **FUNCTION}],
        "tool_choice": "required",
        "max_output_tokens": 200,
    },
    "one tool": {
        "tools": [{"type": "function", "strict": False, **FUNCTION}],
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 200,
    },
    "scored": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "structured": {
        "text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}},
        "max_output_tokens": 200,
        "instructions": "Answer.",
        "metadata": {"a": "b"},
    },
    "json": {"text": {"format": {"type": "json_object"}}, "temperature": 0.5},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a server of a tiny model."""
    engine = engine_of(tiny_talker(tmp_path_factory.mktemp("shapes"), num_hidden_layers=1))
    with served(engine) as server, httpx.Client(base_url=f"{server.url}/v1", timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def judge(data_dir: Path) -> Judge:
    return Judge(data_dir)


def ask(client: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return client.post(path, json={"model": MODEL, **body})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream, which ends as OpenAI's streams end."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    if data[-1] == "[DONE]":
        data.pop()
    return [json.loads(one) for one in data]


# --- what is answered -----------------------------------------------------------------------


@pytest.mark.parametrize("how", CHATS)
def test_chats(client: httpx.Client, judge: Judge, how: str) -> None:
    body = {"messages": SAID, "max_tokens": 5, **CHATS[how]}

    whole = ask(client, "chat/completions", **body).json()
    chunks = events(ask(client, "chat/completions", **body, **WITH_USAGE))

    assert judge.errors("CreateChatCompletionResponse", whole) == []
    assert len(whole["choices"]) == body.get("n", 1)
    for chunk in chunks:
        assert judge.errors("CreateChatCompletionStreamResponse", chunk) == []
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    if how == "tools":
        assert whole["choices"][0]["finish_reason"] == "tool_calls"


def streamed(judge: Judge) -> Judge:
    """What OpenAI sends in streams of completions, and its document says of whole ones only."""
    made = copy.copy(judge)
    made.schemas = copy.deepcopy(judge.schemas)
    properties = made.schemas["CreateCompletionResponse"]["properties"]
    choice = properties["choices"]["items"]["properties"]
    choice["finish_reason"] = {"anyOf": [choice["finish_reason"], {"type": "null"}]}
    properties["usage"] = {"anyOf": [properties["usage"], {"type": "null"}]}
    return made


@pytest.mark.parametrize("how", TEXTS)
def test_completions(client: httpx.Client, judge: Judge, how: str) -> None:
    body = {"prompt": "a", "max_tokens": 5, **TEXTS[how]}

    whole = ask(client, "completions", **body).json()
    chunks = events(ask(client, "completions", **body, **WITH_USAGE))

    assert judge.errors("CreateCompletionResponse", whole) == []
    relaxed = streamed(judge)
    for chunk in chunks:
        assert relaxed.errors("CreateCompletionResponse", chunk) == []
    assert [choice["index"] for choice in whole["choices"]] == list(range(len(whole["choices"])))
    assert chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("how", RESPONSES)
def test_responses(client: httpx.Client, judge: Judge, how: str) -> None:
    body = {"input": "hi", "max_output_tokens": 16, **RESPONSES[how]}

    whole = ask(client, "responses", **body).json()
    told = events(ask(client, "responses", **body, stream=True))

    assert judge.errors("Response", whole) == []
    for event in told:
        assert judge.errors("ResponseStreamEvent", event) == []
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[-1]["type"] in ("response.completed", "response.incomplete")
    assert told[-1]["response"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]


def test_embeddings_and_models(client: httpx.Client, judge: Judge) -> None:
    for more in ({}, {"input": ["a", "b"]}, {"encoding_format": "base64"}):
        found = ask(client, "embeddings", **{"input": "a", **more}).json()
        if more.get("encoding_format") == "base64":
            found["data"][0]["embedding"] = []  # its document knows numbers only
        assert judge.errors("CreateEmbeddingResponse", found) == []

    listed = client.get("models").json()
    assert judge.errors("ListModelsResponse", listed) == []
    one = client.get(f"models/{MODEL}").json()
    assert judge.errors("Model", one) == []
    assert one == listed["data"][0]


def test_refusals(client: httpx.Client, judge: Judge) -> None:
    """Its document has the error's shape under the name of the events' errors."""
    for body in ({}, {"messages": []}, {"messages": SAID, "foo": 1}, {"messages": SAID, "n": 0}):
        answer = ask(client, "chat/completions", **body)
        error = {"type": "error", "sequence_number": 0, **answer.json()["error"]}

        assert answer.status_code == 400
        assert judge.errors("ResponseErrorEvent", error | {"type": "error"}) == []
        assert set(answer.json()) == {"error"}


def test_the_judge_sees_what_is_broken(client: httpx.Client, judge: Judge) -> None:
    """The control: each change of a valid answer is one that it refuses."""
    whole = ask(client, "chat/completions", messages=SAID, max_tokens=2).json()
    broken = [
        {**whole, "object": "chat"},
        {**whole, "choices": [{**whole["choices"][0], "finish_reason": "done"}]},
        {**whole, "choices": [{**whole["choices"][0], "message": {"role": "assistant"}}]},
        {**whole, "created": "now"},
        {name: value for name, value in whole.items() if name != "id"},
    ]

    assert judge.errors("CreateChatCompletionResponse", whole) == []
    for one in broken:
        assert judge.errors("CreateChatCompletionResponse", one) != []
    told = events(ask(client, "responses", input="hi", max_output_tokens=2, stream=True))
    for event in told:
        assert judge.errors("ResponseStreamEvent", {**event, "sequence_number": "1"}) != []
        assert judge.errors("ResponseStreamEvent", {**event, "type": "response.other"}) != []


# --- what is asked --------------------------------------------------------------------------

ASKED = {
    "CreateChatCompletionRequest": (
        ChatAsked,
        "chat/completions",
        {"messages": SAID, "max_tokens": 1},
    ),
    "CreateCompletionRequest": (CompletionAsked, "completions", {"prompt": "a", "max_tokens": 1}),
    "CreateResponse": (ResponsesAsked, "responses", {"input": "a", "max_output_tokens": 1}),
    "CreateEmbeddingRequest": (EmbeddingsAsked, "embeddings", {"input": "a"}),
}


@pytest.mark.parametrize("name", ASKED)
def test_each_property_is_taken_or_refused_by_name(
    client: httpx.Client, judge: Judge, name: str
) -> None:
    """Several values of each, all of them valid by OpenAI's document."""
    _, path, body = ASKED[name]
    taken, refused = set(), set()
    for parameter, schema in sorted(judge.properties(name).items()):
        values = judge.values(schema)
        assert values, parameter
        for value in values:
            answer = ask(client, path, **{**body, parameter: value})

            assert answer.status_code in (200, 400, 404), (parameter, value, answer.text)
            if answer.status_code == 200:
                taken.add(parameter)
                assert (
                    parameter in PARAMETERS
                    or parameter in WITHOUT_EFFECT
                    or asks_nothing(parameter, value)
                ), (parameter, value)
            else:
                refused.add(parameter)
                error = answer.json()["error"]
                assert (error["param"] or "").partition(".")[0] == parameter, (value, error)
                assert answer.status_code == 400 or parameter == "model"

    assert len(taken | refused) == len(judge.properties(name))
    assert len(taken) > len(refused & taken) + 3 or name == "CreateEmbeddingRequest"


def asks_nothing(parameter: str, value: Any) -> bool:
    """Of a parameter that is not supported: a value that leaves everything as it is."""
    return value is None or value in UNSUPPORTED[parameter][0]


@pytest.mark.parametrize("name", ASKED)
def test_every_property_of_openai_is_known(judge: Judge, name: str) -> None:
    """None is refused as unknown, so that each refusal says why."""
    shape, _, _ = ASKED[name]

    assert set(judge.properties(name)) - set(shape.model_fields) == set()


def test_a_property_that_nobody_knows_is_refused_by_its_name(client: httpx.Client) -> None:
    """The control: were unknown parameters ignored, the tests above would say nothing."""
    for _, path, body in ASKED.values():
        answer = ask(client, path, **body, no_such_parameter=1)

        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "no_such_parameter"
        assert answer.json()["error"]["code"] == "unknown_parameter"


def test_messages_of_each_kind(client: httpx.Client, judge: Judge) -> None:
    """Every kind of message that the document has, with text or with what we cannot read."""
    kinds = judge.schemas["ChatCompletionRequestMessage"]["oneOf"]
    assert len(kinds) >= 5
    for kind in kinds:
        for value in judge.values(kind):
            answer = ask(client, "chat/completions", messages=[value], max_tokens=1)

            assert answer.status_code in (200, 400), answer.text
            if answer.status_code == 400:
                assert answer.json()["error"]["param"].startswith("messages"), answer.text


def test_items_of_each_kind(client: httpx.Client, judge: Judge) -> None:
    """Every kind of item of a response's input is read, or refused by its place."""
    values = [
        value
        for kind in judge.schemas["InputItem"]["oneOf"] + judge.schemas["Item"]["oneOf"]
        for value in judge.values(kind, most=8)
    ]
    assert len(values) > 20
    for value in values:
        answer = ask(client, "responses", input=[value], max_output_tokens=1)

        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert answer.json()["error"]["param"].startswith("input"), (value, answer.text)
