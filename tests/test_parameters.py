"""Every parameter of /v1 has its effect: seen in answers over HTTP, for each of them at least once.

The model is tiny and random, so that effects are looked for in forms: which tokens came, how many,
why it ended, what was cached.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch

from servers import MODEL, Served, engine_of, served
from talkers import tiny_talker
from tierline.server.openapi import OPERATIONS
from tierline.server.openapi_words import PARAMETERS
from tierline.server.recorder import Recorder
from tierline.server.tools import tool_format

torch.set_num_threads(1)  # tiny products: a second thread only waits

KEYS = ("key-of-the-test-0123456789",)
SAID = [{"role": "user", "content": "hi"}]
END = 257  # the token that ends texts
LENGTH = 12
TEXT_MAX = 1000  # tokens of an input


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = engine_of(tiny_talker(tmp_path_factory.mktemp("parameters"), num_hidden_layers=1))
    with served(engine, input_tokens_max=TEXT_MAX, body_bytes_max=50_000) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as one:
        yield one


@dataclass(frozen=True, kw_only=True)
class Said:
    """One choice of a completion."""

    text: str
    tokens: list[str]
    logprobs: list[float]
    top: list[dict[str, float]]
    finish_reason: str


def posted(client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = client.post(path, json={"model": MODEL, **body}, headers=headers)

    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def said(client: httpx.Client, **body: Any) -> list[Said]:
    """The choices of a completion: greedy, of `LENGTH` tokens, unless asked otherwise."""
    asked = {"prompt": "The sea", "max_tokens": LENGTH, "temperature": 0, "logprobs": 0, **body}
    return [
        Said(
            text=choice["text"],
            tokens=choice["logprobs"]["tokens"],
            logprobs=choice["logprobs"]["token_logprobs"],
            top=choice["logprobs"]["top_logprobs"],
            finish_reason=choice["finish_reason"],
        )
        for choice in posted(client, "/v1/completions", asked)["choices"]
    ]


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    return posted(client, "/v1/chat/completions", {"messages": SAID, "max_tokens": 4, **body})


def token(client: httpx.Client, text: str) -> int:
    (found,) = posted(client, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    return int(found)


# --- which token comes ----------------------------------------------------------------------

# What leaves only the likeliest token, however hot.
LIKELIEST: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0},
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 1.0},
}


@pytest.mark.parametrize("parameter", LIKELIEST)
def test_sampling_can_be_narrowed_to_the_likeliest(client: httpx.Client, parameter: str) -> None:
    greedy = said(client)[0].tokens
    hot = {"temperature": 2, "n": 2}

    assert [one.tokens for one in said(client, **hot | LIKELIEST[parameter])] == [greedy] * 2
    assert all(one.tokens != greedy for one in said(client, **hot))  # the control


def test_a_seed_draws_the_same_again(client: httpx.Client) -> None:
    first, again, other = (said(client, temperature=1, seed=seed)[0] for seed in (1, 1, 2))

    assert first == again
    assert first.tokens != other.tokens


def test_bias_forces_and_bans(client: httpx.Client) -> None:
    letter = token(client, "a")
    forced = said(client, logit_bias={letter: 100})[0]
    banned = said(client, logit_bias={letter: -100, token(client, "b"): 100})[0]

    assert forced.text == "a" * LENGTH
    assert banned.text == "b" * LENGTH
    assert said(client)[0].text != forced.text  # the control


@pytest.mark.parametrize("parameter", ["presence_penalty", "frequency_penalty"])
def test_penalties_make_repeating_rarer(client: httpx.Client, parameter: str) -> None:
    often: dict[str, Any] = {"max_tokens": 40, "logit_bias": {END: -100}}
    free, held = said(client, **often)[0], said(client, **often, **{parameter: 2})[0]

    assert len(set(held.tokens)) > len(set(free.tokens))


def test_a_frequency_grows_and_a_presence_does_not(client: httpx.Client) -> None:
    """The letter leads by less than 2 for each of 40 times, and by more than 2."""
    letter = {token(client, "a"): 25}
    present = said(client, max_tokens=40, logit_bias=letter, presence_penalty=2)[0]
    frequent = said(client, max_tokens=40, logit_bias=letter, frequency_penalty=2)[0]

    assert set(present.tokens) == {"a"}
    assert frequent.tokens[0] == "a"
    assert 1 < frequent.tokens.count("a") < 30


def test_a_repetition_penalty_looks_at_the_prompt_too(client: httpx.Client) -> None:
    greedy = said(client, max_tokens=1)[0].tokens[0]
    prompt = [*posted(client, "/tokenize", {"prompt": "The sea"})["tokens"], *range(256)]
    plain = said(client, prompt=prompt, max_tokens=30, logit_bias={END: -100})[0]
    held = said(client, prompt=prompt, max_tokens=30, logit_bias={END: -100}, repetition_penalty=2)[
        0
    ]

    assert greedy
    assert plain.tokens != held.tokens


# --- how it is scored -----------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(client: httpx.Client) -> None:
    """Neither temperature nor a bias changes them; greedy takes the first of them."""
    plain = said(client, logprobs=3)[0]
    hot = said(client, logprobs=3, temperature=2, top_k=1)[0]

    assert plain.logprobs == pytest.approx(hot.logprobs, abs=1e-5)
    for chosen, top in zip(plain.logprobs, plain.top, strict=True):
        assert chosen == max(top.values())
        assert sum(map(math.exp, top.values())) < 1
    assert {len(top) for top in plain.top} == {3}
    assert max(map(len, said(client, logprobs=0)[0].top)) == 0


def test_a_chats_scores(client: httpx.Client) -> None:
    unscored = chat(client)["choices"][0]["logprobs"]
    scored = chat(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    items = posted(
        client,
        "/v1/responses",
        {
            "input": "hi",
            "max_output_tokens": 4,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
        },
    )["output"]

    assert unscored is None
    assert [len(one["top_logprobs"]) for one in scored] == [2] * 4
    (part,) = items[0]["content"]
    assert [len(one["top_logprobs"]) for one in part["logprobs"]] == [2] * 4


# --- when it ends ---------------------------------------------------------------------------


def test_limits(client: httpx.Client) -> None:
    long = {"ignore_eos": True, "max_tokens": 9}
    limited = posted(client, "/v1/completions", {"prompt": "a", **long})
    newer = chat(client, **long, max_completion_tokens=3)
    response = posted(
        client, "/v1/responses", {"input": "hi", "max_output_tokens": 2, "temperature": 0}
    )

    assert limited["usage"]["completion_tokens"] == 9
    assert limited["choices"][0]["finish_reason"] == "length"
    assert newer["usage"]["completion_tokens"] == 3
    assert response["usage"]["output_tokens"] == 2


def test_stops(client: httpx.Client) -> None:
    letters = {"logit_bias": {token(client, "a"): 100}}
    text = said(client, **letters, stop="aaa")[0]
    kept = said(client, **letters, stop=["x", "aaa"], include_stop_str_in_output=True)[0]
    by_token = said(client, **letters, stop_token_ids=[token(client, "a")])[0]

    assert (text.text, text.finish_reason, len(text.tokens)) == ("", "stop", 3)
    assert kept.text == "aaa"
    assert (by_token.finish_reason, len(by_token.tokens)) == ("stop", 1)
    assert said(client, **letters, stop="b")[0].finish_reason == "length"  # the control


def test_the_end_token(client: httpx.Client) -> None:
    ends = {"logit_bias": {END: 100}}
    plain = said(client, **ends)[0]
    later = said(client, **ends, min_tokens=5)[0]
    never = said(client, **ends, ignore_eos=True)[0]
    shown = said(client, **ends, ignore_eos=True, skip_special_tokens=False)[0]

    assert (plain.finish_reason, len(plain.tokens), plain.text) == ("stop", 1, "")
    assert (later.finish_reason, len(later.tokens)) == ("stop", 6)
    assert (never.finish_reason, len(never.tokens), never.text) == ("length", LENGTH, "")
    assert shown.text == "</s>" * LENGTH


# --- how it comes ---------------------------------------------------------------------------


def test_several_answers_and_an_echo(client: httpx.Client) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "echo": True, "temperature": 1}
    told = posted(client, "/v1/completions", body)

    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:3] for choice in told["choices"]] == ["one", "one", "two", "two"]
    assert told["usage"]["prompt_tokens"] == len("onetwo")


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_says_the_same_and_what_it_used(client: httpx.Client, usage: bool) -> None:
    body = {"model": MODEL, "messages": SAID, "max_tokens": 6, "temperature": 0}
    options = {"stream": True, "stream_options": {"include_usage": usage}}
    whole = chat(client, **body)
    lines = client.post("/v1/chat/completions", json=body | options).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]

    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["usage"] for chunk in chunks if chunk.get("usage")] == [whole["usage"]] * usage
    told = [chunk["tierline"] for chunk in chunks if "tierline" in chunk]
    assert [sorted(one) for one in told] == [sorted(whole["tierline"])]


# --- what form it has -----------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "at": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "required": ["city", "at"],
    "additionalProperties": False,
}
SCHEMA["properties"]["at"]["maxItems"] = 3  # type: ignore[index]
NAMED = {"name": "place", "schema": SCHEMA}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "json_object": ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
    "json_schema": (
        "/v1/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": NAMED}},
    ),
    "strict": (
        "/v1/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": True}}},
    ),
    "text": ("/v1/responses", {"text": {"format": {"type": "json_schema", **NAMED}}}),
    "json": ("/v1/completions", {"structured_outputs": {"json": SCHEMA}}),
    "regex": ("/v1/chat/completions", {"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}),
    "choice": ("/v1/completions", {"structured_outputs": {"choice": ["red", "green"]}}),
    "grammar": (
        "/v1/chat/completions",
        {"structured_outputs": {"grammar": 'root ::= "yes" | "no" [x-z]{2}'}},
    ),
}


def has_form(form: str, text: str) -> bool:
    if form in ("json_object", "json_schema", "strict", "text", "json"):
        try:
            jsonschema.validate(json.loads(text), {} if form == "json_object" else SCHEMA)
        except (ValueError, jsonschema.ValidationError):
            return False
        return text.startswith("{")
    patterns = {"regex": "[a-c]{3}-[0-9]{2}", "choice": "red|green", "grammar": "yes|no[x-z]{2}"}
    return re.fullmatch(patterns[form], text) is not None


def texts_of(path: str, told: dict[str, Any]) -> list[str]:
    if path == "/v1/responses":
        return [part["text"] for item in told["output"] for part in item["content"]]
    return [choice.get("text") or choice["message"]["content"] for choice in told["choices"]]


@pytest.mark.parametrize("form", FORMS)
def test_answers_have_the_form_that_is_asked_for(client: httpx.Client, form: str) -> None:
    path, bound = FORMS[form]
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    asked: dict[str, Any] = {limit: 120, "temperature": 1}
    asked |= {"prompt": "hi"} if path == "/v1/completions" else {"messages": SAID}
    if path == "/v1/responses":
        del asked["messages"]
        asked["input"] = "hi"

    for text in texts_of(path, posted(client, path, asked | bound)):
        assert has_form(form, text), text
    for text in texts_of(path, posted(client, path, asked)):
        assert not has_form(form, text)  # the control


# --- tools ----------------------------------------------------------------------------------

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
PARAMETERS_OF = {
    "add": {"type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "required": ["a", "b"]},
    "say": {
        "type": "object",
        "properties": {"how": {"type": "string", "enum": ["loud", "low"]}},
        "required": ["how"],
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in PARAMETERS_OF.items()
]


def calls_of(told: dict[str, Any]) -> list[str]:
    """Names of what the first choice calls, with arguments that fit."""
    turn = told["choices"][0]["message"]
    for call in turn.get("tool_calls", []):
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), PARAMETERS_OF[function["name"]])
    return [call["function"]["name"] for call in turn.get("tool_calls", [])]


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "qwen3_coder"])
def test_a_choice_of_tools_is_kept_in_each_format(
    server: Served, client: httpx.Client, form: str
) -> None:
    own = server.server.tools
    server.server.tools = tool_format(None, named=form)
    try:
        named = {"type": "function", "function": {"name": "say"}}
        asked = {"tools": TOOLS, "max_tokens": 200, "seed": 5}
        required = chat(client, **asked, tool_choice="required", parallel_tool_calls=False)
        one = chat(client, **asked, tool_choice=named)
        none = chat(client, **asked | {"max_tokens": 8}, tool_choice="none")
        auto = chat(client, **asked | {"max_tokens": 8}, tool_choice="auto")
    finally:
        server.server.tools = own

    assert len(calls_of(required)) == 1
    assert required["choices"][0]["finish_reason"] == "tool_calls"
    assert calls_of(one) == ["say"]
    assert calls_of(none) == calls_of(auto) == []
    assert auto["usage"]["prompt_tokens"] > none["usage"]["prompt_tokens"]


# --- what the model reads -------------------------------------------------------------------


def test_tokens_and_back(client: httpx.Client) -> None:
    text = "The sea é"
    told = posted(client, "/tokenize", {"prompt": text, "return_token_strs": True})
    special = posted(client, "/tokenize", {"prompt": "</s>", "add_special_tokens": False})
    turns = posted(client, "/tokenize", {"messages": SAID})
    open_end = posted(client, "/tokenize", {"messages": SAID, "add_generation_prompt": False})

    assert told["count"] == len(told["tokens"]) == len(text.encode())
    assert len(told["token_strs"]) == told["count"]
    assert posted(client, "/detokenize", {"tokens": told["tokens"]})["prompt"] == text
    assert special["tokens"] == [END]
    assert turns["tokens"][: open_end["count"]] == open_end["tokens"]
    assert turns["count"] > open_end["count"]
    assert chat(client)["usage"]["prompt_tokens"] == turns["count"]


# What changes the prompt, and by how many tokens.
PROMPTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "add_generation_prompt": (
        "/v1/chat/completions",
        {"messages": SAID, "add_generation_prompt": False},
        -len("assistant\n") - 1,
    ),
    "chat_template_kwargs": (
        "/v1/chat/completions",
        {"messages": SAID, "chat_template_kwargs": {"mark": "!!!"}},
        3,
    ),
    "instructions": (
        "/v1/responses",
        {"input": "hi", "instructions": "short"},
        len("system\nshort\n") + 2,
    ),
}


@pytest.mark.parametrize("parameter", PROMPTS)
def test_prompts_are_made_as_asked(client: httpx.Client, parameter: str) -> None:
    path, body, more = PROMPTS[parameter]
    without = {name: value for name, value in body.items() if name != parameter}
    counts = []
    for asked in (without, body):
        told = posted(client, path, asked | {"temperature": 0})["usage"]
        counts.append(told.get("prompt_tokens") or told["input_tokens"])

    assert counts[1] - counts[0] == more


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": "x" * TEXT_MAX}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 60_000}]}, None),
    ],
    ids=["tokens", "bytes"],
)
def test_what_is_too_long_is_refused(
    client: httpx.Client, body: dict[str, Any], param: str | None
) -> None:
    answer = client.post("/v1/chat/completions", json={"model": MODEL, **body})

    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == param


# --- how it is served -----------------------------------------------------------------------

# What is asked in a body, in headers, and which class and priority that gives.
URGENCIES: dict[str, tuple[dict[str, Any], dict[str, str], tuple[str, int]]] = {
    "nothing": ({}, {}, ("standard", 0)),
    "priority": ({"priority": 5}, {}, ("standard", 5)),
    "priority in a header": ({}, {"X-Tierline-Priority": "-7"}, ("batch", -7)),
    "priority in both": ({"priority": 5}, {"X-Tierline-Priority": "-7"}, ("standard", 5)),
    "priority that nobody has": ({"priority": 700}, {}, ("interactive", 700)),
    "priority beside targets": (
        {"priority": 10, "slo": {"ttft_ms": 60_000}},
        {},
        ("standard", 10),
    ),
    "slo": ({"slo": "batch"}, {}, ("batch", -10)),
    "slo in a header": ({}, {"X-Tierline-SLO": "interactive"}, ("interactive", 10)),
    "slo in both": ({"slo": "batch"}, {"X-Tierline-SLO": "interactive"}, ("batch", -10)),
    "slo and priority": ({"slo": "batch", "priority": 3}, {}, ("batch", 3)),
    "service_tier": ({"service_tier": "priority"}, {}, ("interactive", 10)),
    "service_tier flex": ({"service_tier": "flex"}, {}, ("batch", -10)),
}


@pytest.mark.parametrize("how", URGENCIES)
def test_urgency_is_taken_from_body_or_headers(
    server: Served, client: httpx.Client, how: str
) -> None:
    body, headers, (level, priority) = URGENCIES[how]
    own = {one.name: one.priority for one in server.server.running.levels}
    if "priority" not in how or how.startswith("service"):
        priority = own[level]
    told = posted(
        client, "/v1/chat/completions", {"messages": SAID, "max_tokens": 1, **body}, **headers
    )

    assert (told["tierline"]["class"], told["tierline"]["priority"]) == (level, priority)


def test_targets_of_its_own_are_kept_in_mind(server: Served, client: httpx.Client) -> None:
    chat(client, slo={"ttft_ms": 250, "itl_ms": 40})
    life = server.on_loop(lambda: server.server.recorder.past[-1])

    assert (life.ttft_limit_s, life.itl_limit_s) == (0.25, 0.04)


@pytest.mark.parametrize("where", ["body", "header"])
def test_a_deadline_that_nobody_could_keep_is_refused(client: httpx.Client, where: str) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": SAID, "max_tokens": 1}
    headers = {"X-Tierline-Deadline-Ms": "0.01"}
    if where == "body":
        body["deadline_ms"], headers = 0.01, {}
    late = client.post("/v1/chat/completions", json=body, headers=headers)
    ample = client.post(
        "/v1/chat/completions", json=body | {"deadline_ms": 60_000}, headers=headers
    )

    assert late.status_code == 400
    assert "even if nobody else were here" in late.json()["error"]["message"]
    assert ample.status_code == 200  # the body goes first


@pytest.mark.parametrize("header", ["X-Tierline-Priority", "X-Tierline-Deadline-Ms"])
def test_a_wrong_header_is_refused_by_its_parameter(client: httpx.Client, header: str) -> None:
    answer = client.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": SAID}, headers={header: "soon"}
    )

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("priority", "deadline_ms")
    assert header.lower() in answer.json()["error"]["message"]


CHAT = "/v1/chat/completions"
BUSY = {"model": MODEL, "messages": SAID, "ignore_eos": True, "max_tokens": 16_000, "stream": True}


def narrow(folder: Path, policy: str) -> AbstractContextManager[Served]:
    """A server that serves one at a time, and `BUSY` for longer than any test takes."""
    path = tiny_talker(folder, num_hidden_layers=1, max_position_embeddings=16_384)
    return served(engine_of(path, sequences_max=1, policy=policy, kv_bytes=16_000_000))


def until(server: Served, true: Callable[[], Any]) -> None:
    """Wait until something is so on the server's event loop."""
    end = time.monotonic() + 30
    while not server.on_loop(true):
        assert time.monotonic() < end
        time.sleep(0.005)


# Policy -> what the first and the second of two ask for, so that the second goes first.
OVERTAKING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tierline": ({"slo": {"ttft_ms": 60_000}}, {"slo": {"ttft_ms": 20_000}}),
    "tierline, by priority": ({"priority": -10}, {"priority": 10}),
    "priority": ({"priority": -5}, {"priority": 5}),
}


@pytest.mark.parametrize("policy", OVERTAKING)
def test_the_more_urgent_goes_first(tmp_path: Path, policy: str) -> None:
    """Of two who wait behind a third; without urgency, whoever came first."""
    asked = {"model": MODEL, "messages": SAID}

    def order(*two: dict[str, Any]) -> list[int]:
        """Of the first and the second, as they were begun."""
        with (
            narrow(tmp_path, policy.partition(",")[0]) as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
            ThreadPoolExecutor(2) as pool,
        ):
            recorder = server.server.recorder
            with client.stream("POST", CHAT, json=BUSY) as first:
                lines = first.iter_lines()  # held, for the stream ends with it
                next(lines)
                for number, own in enumerate(two, 1):
                    pool.submit(client.post, CHAT, json=asked | own | {"max_tokens": number})
                    until(server, partial(_has_come, recorder, number))
            until(server, lambda: not recorder.live)
            past = server.on_loop(lambda: list(recorder.past))
        begun = sorted((life.first_ps, life.output_tokens_max) for life in past)
        return [number for _, number in begun if number in (1, 2)]

    assert order(*OVERTAKING[policy]) == [2, 1]
    assert order({}, {}) == [1, 2]


def _has_come(recorder: Recorder, number: int) -> bool:
    """Whether the scheduler has the request of so many tokens."""
    lives = recorder.live.values()
    return any(life.engine_ids and life.output_tokens_max == number for life in lives)


def test_a_deadline_that_will_pass_is_refused_at_once(tmp_path: Path) -> None:
    """Behind many who go before, with the time after which another try makes sense."""
    many, asked = 400, {"model": MODEL, "messages": SAID, "max_tokens": 1}
    crowd = {"model": MODEL, "prompt": ["x" * 1900] * many, "max_tokens": 1}
    with (
        narrow(tmp_path, "fcfs") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        lives, engines = server.server.recorder.live, server.server.engine

        def predicted_s() -> float:
            predict = engines.engine.predicted_ttft_s
            return float(server.on_loop(lambda: engines.call(lambda: predict(20))))

        with client.stream("POST", CHAT, json=BUSY) as first:
            lines = first.iter_lines()  # held, for the stream ends with it
            next(lines)
            alone_s = predicted_s()
            pool.submit(client.post, "/v1/completions", json=crowd)
            until(server, lambda: any(len(life.engine_ids) == many for life in lives.values()))
            behind_s = predicted_s()
            late = client.post(CHAT, json=asked | {"deadline_ms": behind_s * 500})

    assert behind_s > 10 * alone_s
    assert late.status_code == 429, late.text
    assert late.json()["error"]["code"] == "overloaded"
    wait_s = int(late.headers["retry-after-ms"]) / 1000
    assert int(late.headers["retry-after"]) == max(1, math.ceil(wait_s))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_answers_say_how_they_were_served(client: httpx.Client, path: str) -> None:
    """Times, and of the second of two equal prompts: what was cached, and where it lay."""
    text = f"{path} " * 10
    prompts: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/completions": {"prompt": text},
        "/v1/responses": {"input": text},
    }
    first, second = (posted(client, path, {**prompts[path], "temperature": 0}) for _ in range(2))
    cached = []
    for told in (first, second):
        usage, own = told["usage"], told["tierline"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        cached.append(details["cached_tokens"])
        assert own["ttft_ms"] >= own["queue_ms"] >= 0
        assert own["preemptions"] == 0

    assert cached[0] < 64
    assert 100 < cached[1] < len(text) + 64
    assert cached[1] % 16 == 0
    assert second["tierline"]["prefix_tier"] == "device"


def test_tenants_share_nothing_that_is_cached(tmp_path: Path) -> None:
    """The tenant is the key's: the same prompt of another one is computed again."""
    engine = engine_of(tiny_talker(tmp_path, num_hidden_layers=1))
    with served(engine, data=tmp_path / "data", keys=KEYS) as server:
        keys = server.server.keys

        def asked(tenant: str) -> int:
            _, text = server.on_loop(lambda: keys.create(tenant=tenant, name="one"))
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json={"model": MODEL, "prompt": "the same " * 20, "max_tokens": 1},
                headers={"Authorization": f"Bearer {text}"},
            )
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        counts = [asked("one"), asked("other"), asked("one")]

    assert counts[:2] == [0, 0]
    assert counts[2] > 100


# --- all of them ----------------------------------------------------------------------------

HERE = "test_parameters.py"
WHERE: dict[str, tuple[str, str]] = {
    **dict.fromkeys(LIKELIEST, (HERE, "test_sampling_can_be_narrowed_to_the_likeliest")),
    **dict.fromkeys(PROMPTS, (HERE, "test_prompts_are_made_as_asked")),
    "model": ("test_clients.py", "test_refusals_are_typed_errors"),
    "messages": ("test_server_equal.py", "test_answers_are_the_engines_own"),
    "prompt": ("test_server_equal.py", "test_answers_are_the_engines_own"),
    "input": ("test_embeddings.py", "test_texts_and_tokens_are_the_same"),
    "seed": (HERE, "test_a_seed_draws_the_same_again"),
    "stop": (HERE, "test_stops"),
    "stop_token_ids": (HERE, "test_stops"),
    "include_stop_str_in_output": (HERE, "test_stops"),
    "frequency_penalty": (HERE, "test_a_frequency_grows_and_a_presence_does_not"),
    "presence_penalty": (HERE, "test_penalties_make_repeating_rarer"),
    "repetition_penalty": (HERE, "test_a_repetition_penalty_looks_at_the_prompt_too"),
    "logit_bias": (HERE, "test_bias_forces_and_bans"),
    "n": (HERE, "test_several_answers_and_an_echo"),
    "echo": (HERE, "test_several_answers_and_an_echo"),
    "max_tokens": (HERE, "test_limits"),
    "max_completion_tokens": (HERE, "test_limits"),
    "max_output_tokens": (HERE, "test_limits"),
    "min_tokens": (HERE, "test_the_end_token"),
    "ignore_eos": (HERE, "test_the_end_token"),
    "skip_special_tokens": (HERE, "test_the_end_token"),
    "stream": (HERE, "test_a_stream_says_the_same_and_what_it_used"),
    "stream_options": (HERE, "test_a_stream_says_the_same_and_what_it_used"),
    "structured_outputs": (HERE, "test_answers_have_the_form_that_is_asked_for"),
    "response_format": (HERE, "test_answers_have_the_form_that_is_asked_for"),
    "text": (HERE, "test_answers_have_the_form_that_is_asked_for"),
    "logprobs": (HERE, "test_log_probabilities_are_the_models_own"),
    "top_logprobs": (HERE, "test_a_chats_scores"),
    "include": (HERE, "test_a_chats_scores"),
    "tools": (HERE, "test_a_choice_of_tools_is_kept_in_each_format"),
    "tool_choice": (HERE, "test_a_choice_of_tools_is_kept_in_each_format"),
    "parallel_tool_calls": ("test_clients.py", "test_parallel_calls_come_where_they_are_allowed"),
    "service_tier": (HERE, "test_urgency_is_taken_from_body_or_headers"),
    "truncation": ("test_openai_shapes.py", "test_each_property_is_taken_or_refused_by_name"),
    "encoding_format": (
        "test_embeddings.py",
        "test_the_openai_client_reads_what_transformers_says",
    ),
    "dimensions": ("test_embeddings.py", "test_what_cannot_be_answered_is_refused"),
    "priority": (HERE, "test_the_more_urgent_goes_first"),
    "deadline_ms": (HERE, "test_a_deadline_that_nobody_could_keep_is_refused"),
    "slo": (HERE, "test_targets_of_its_own_are_kept_in_mind"),
}


def test_every_parameter_of_v1_is_here() -> None:
    asked = [one.asks for one in OPERATIONS if one.generates and one.asks is not None]
    names = {name for shape in asked for name in shape.model_fields} & set(PARAMETERS)
    folder = Path(__file__).parent

    assert set(WHERE) == names
    for file, test in set(WHERE.values()):
        assert f"def {test}(" in (folder / file).read_text(), (file, test)
