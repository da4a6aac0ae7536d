"""An operator's requests, over a real socket to a real engine: each does what it says, and nobody
without the admin token gets any of it."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from servers import MODEL, Served, engine_of, served
from tierline.server import admin
from tierline.server.admin import TOKEN_NAME, admin_token
from tierline.server.running import room_tokens
from tiny_checkpoints import tiny_checkpoint

TOKEN = "operators-only-0123456789abcdef"
KV_BYTES = 4_000_000

PATHS = sorted((method, r.path) for r in admin.routes() for method in r.methods - {"HEAD"})


class Operator:
    """A client with the admin token, and one with whatever a test gives."""

    def __init__(self, there: Served, client: httpx.Client) -> None:
        self.there, self.client = there, client

    def ask(
        self, method: str, path: str, body: Any = None, *, token: str | None = TOKEN, **more: Any
    ) -> tuple[int, Any]:
        """Status and JSON."""
        shown = f"Bearer {token}".strip().encode("latin-1")
        headers = {} if token is None else {"Authorization": shown}
        given = {} if body is None else {"json": body}
        answer = self.client.request(method, path, headers=headers, **given, **more)
        return answer.status_code, answer.json()

    def get(self, path: str, **query: Any) -> Any:
        status, found = self.ask("GET", path, params=query)
        assert status == 200, found
        return found

    def complete(self, prompt: list[int], *, token: str | None = None, tokens: int = 4) -> Any:
        """One answer of the tiny model; status and JSON."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        return self.ask("POST", "/v1/completions", body, token=token)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("admin"))


@pytest.fixture
def operator(checkpoint: Path, tmp_path: Path) -> Iterator[Operator]:
    engine = engine_of(checkpoint, kv_bytes=KV_BYTES)
    with (
        served(engine, data=tmp_path, admin_token=TOKEN) as there,
        httpx.Client(base_url=there.url, timeout=30) as client,
    ):
        yield Operator(there, client)


def refusal(answer: tuple[int, Any]) -> tuple[int, str, str | None]:
    status, found = answer
    assert set(found) == {"error"}, found
    assert {"message", "type", "param", "code"} <= set(found["error"])
    return status, found["error"]["code"], found["error"]["param"]


# The door


def test_nothing_without_the_token(operator: Operator) -> None:
    """INV-SRV-16, for every path: the control is that the right token gets past the door."""
    _, made = operator.ask("POST", "/admin/keys", {"name": "an ordinary key"})
    before = operator.get("/admin/tiers")
    for token in (None, "", TOKEN[:-1], TOKEN + "x", "é", made["key"]):
        for method, path in PATHS:
            answer = operator.ask(method, path, {} if method in ("POST", "PUT") else None,
                                  token=token)  # fmt: skip

            assert refusal(answer) == (401, "invalid_admin_token", None), (method, path, token)
    assert operator.get("/admin/tiers") == before
    assert len(operator.get("/admin/keys")["data"]) == 1
    assert not operator.get("/admin/drain")["draining"]


def test_a_door_left_open_would_be_seen(
    one_operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the guard the same requests are answered."""
    monkeypatch.setattr(admin, "_require_operator", lambda *_: None)

    for path in ("/admin/keys", "/admin/usage", "/admin/tiers", "/admin/log-level"):
        assert one_operator.ask("GET", path, token=None)[0] == 200


def test_the_token_is_no_api_key(operator: Operator) -> None:
    operator.ask("POST", "/admin/keys", {"name": "closes the door"})

    assert refusal(operator.complete([1, 2], token=TOKEN)) == (401, "invalid_api_key", None)


def test_without_a_token_nobody_administers(checkpoint: Path) -> None:
    with served(engine_of(checkpoint)) as there, httpx.Client(base_url=there.url) as client:
        for token in (None, "", "anything"):
            answer = Operator(there, client).ask("GET", "/admin/keys", token=token)

            assert refusal(answer) == (403, "admin_disabled", None)


def test_a_token_is_made_once_in_a_file_of_its_owner(tmp_path: Path) -> None:
    token, path = admin_token(tmp_path)

    assert path == tmp_path / TOKEN_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert admin_token(tmp_path)[0] == token == path.read_text().strip()
    assert len(token) >= 32


# Keys


def test_a_key_from_its_making_to_its_end(operator: Operator) -> None:
    assert operator.complete([1, 2, 3])[0] == 200  # nobody needs a key yet
    asked = {"name": "app", "tenant": "acme", "models": [MODEL], "budget_tokens": 10}
    status, made = operator.ask("POST", "/admin/keys", asked)
    text = made.pop("key")
    listed = operator.get("/admin/keys")["data"]

    assert status == 201
    assert {k: made[k] for k in asked} == asked
    assert listed == [made]
    assert "digest" not in made

    assert refusal(operator.complete([1, 2, 3])) == (401, "missing_api_key", None)
    assert operator.complete([1, 2, 3], token=text)[0] == 200  # 7 tokens
    assert operator.complete([1, 2, 3], token=text)[0] == 200  # 14 of 10: what is inside ends
    assert refusal(operator.complete([1, 2, 3], token=text)) == (402, "budget_exhausted", None)
    assert operator.get("/admin/keys")["data"][0]["spent_tokens"] == 14

    _, other = operator.ask("POST", "/admin/keys", {"name": "other"})
    assert operator.complete([1, 2, 3], token=other["key"])[0] == 200
    status, revoked = operator.ask("DELETE", f"/admin/keys/{other['id']}")
    assert (status, revoked["revoked_s"] > 0) == (200, True)
    answer = operator.complete([1, 2, 3], token=other["key"])
    assert refusal(answer) == (401, "revoked_api_key", None)
    assert other["key"].split("-", 2)[2] not in json.dumps([answer, operator.get("/admin/keys")])


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_value", "name"),
        ({"name": "n", "budget": 5}, 400, "unknown_parameter", "budget"),
        ({"name": "n", "budget_tokens": 0}, 400, "invalid_value", "budget_tokens"),
        ({"name": "n", "budget_tokens": "5"}, 400, "invalid_value", "budget_tokens"),
        ({"name": "n", "models": ["other"]}, 400, "model_not_found", "models"),
        ({"name": "n", "models": []}, 400, "invalid_value", None),
        ({"name": "n", "expires_s": 5.0}, 400, "invalid_value", None),
        ({"name": "\n"}, 400, "invalid_value", None),
        ({"name": "n", "tenant": ""}, 400, "invalid_value", None),
        ([1], 400, "invalid_value", None),
    ],
)
def test_what_makes_no_key(one_operator: Operator, body: Any, status: int, code: str, param: str):
    assert refusal(one_operator.ask("POST", "/admin/keys", body)) == (status, code, param)
    assert one_operator.get("/admin/keys")["data"] == []


@pytest.mark.parametrize(
    ("method", "path", "query", "code", "param"),
    [
        ("GET", "/admin/usage", {"limit": "5"}, "unknown_parameter", "limit"),
        ("GET", "/admin/usage", {"by": "day,tenent"}, "invalid_value", None),
        ("GET", "/admin/usage", {"since": "yesterday"}, "invalid_value", "since"),
        ("GET", "/admin/usage/records", {"limit": "0"}, "invalid_value", "limit"),
        ("GET", "/admin/usage/records", {"before": "x"}, "invalid_value", "before"),
        ("GET", "/admin/keys", {"all": "1"}, "unknown_parameter", "all"),
        ("GET", "/admin/runs", {"limit": "9999"}, "invalid_value", "limit"),
        ("POST", "/admin/drain", {"now": "1"}, "unknown_parameter", "now"),
    ],
)
def test_queries_are_checked(
    one_operator: Operator, method: str, path: str, query: dict[str, str], code: str, param: str
) -> None:
    assert refusal(one_operator.ask(method, path, params=query)) == (400, code, param)


@pytest.mark.parametrize("key_id", ["nobody", "x" * 500, "../keys", "%00"])
def test_revoking_what_is_not_there(one_operator: Operator, key_id: str) -> None:
    status, found = one_operator.ask("DELETE", f"/admin/keys/{key_id}")

    assert status in (404, 405)
    assert found["error"]["code"] in ("key_not_found", "not_found", "method_not_allowed")


@pytest.fixture(scope="module")
def one_operator(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """For tests that change nothing."""
    data = tmp_path_factory.mktemp("data")
    with (
        served(engine_of(checkpoint), data=data, admin_token=TOKEN) as there,
        httpx.Client(base_url=there.url, timeout=30) as client,
    ):
        yield Operator(there, client)


# Usage and runs


def test_usage_is_what_answers_said(operator: Operator) -> None:
    answers = [operator.complete([5] * n)[1] for n in (3, 40, 40)]
    (day,) = operator.get("/admin/usage")["data"]
    (total,) = operator.get("/admin/usage", by="")["data"]
    page = operator.get("/admin/usage/records", limit=2)
    rest = operator.get("/admin/usage/records", limit=2, before=page["next_before"])
    records = page["data"] + rest["data"]

    said = [answer["usage"] for answer in answers]
    cached = [(u.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for u in said]
    assert [r["request_id"] for r in records] == [a["id"] for a in answers][::-1]
    assert [r["prompt_tokens"] for r in records] == [40, 40, 3]
    assert [r["cached_tokens"] for r in records] == cached[::-1]
    assert max(cached) > 0
    assert {r["outcome"] for r in records} == {"length"}
    assert all(0 <= r["queue_s"] <= r["ttft_s"] <= r["e2e_s"] for r in records)
    assert rest["next_before"] is None
    assert (total["requests"], total["output_tokens"]) == (3, 12)
    assert total["prompt_tokens"] == sum(u["prompt_tokens"] for u in said)
    assert {k: day[k] for k in total} == total
    assert operator.get("/admin/usage", since="2100-01-01")["data"] == []
    assert operator.get("/admin/usage", by="tenant,model")["data"][0]["model"] == MODEL


def test_runs_are_remembered(checkpoint: Path, tmp_path: Path) -> None:
    for run in (1, 2):
        engine = engine_of(checkpoint)
        with (
            served(engine, data=tmp_path, admin_token=TOKEN) as there,
            httpx.Client(base_url=there.url, timeout=30) as client,
        ):
            operator = Operator(there, client)
            for _ in range(run):
                operator.complete([1, 2])
            found = operator.get("/admin/runs")["data"]

    assert [(r["ended"], r["requests"]) for r in found] == [("", 2), ("stopped", 1)]
    assert found[1]["started_s"] <= found[1]["ended_s"] <= found[0]["started_s"]


def test_a_disk_that_refuses_holds_up_no_answer(operator: Operator) -> None:
    """Served from a real disk's point of view: full, said, and well again by itself."""
    _, free = operator.ask("POST", "/admin/keys", {"name": "free"})
    _, counted = operator.ask("POST", "/admin/keys", {"name": "counted", "budget_tokens": 99})
    state = operator.there.server.state

    def refuses(yes: int) -> None:
        work = lambda connection: connection.execute(f"PRAGMA query_only = {yes}")  # noqa: E731
        operator.there.on_loop(lambda: state._ask(work))

    refuses(1)
    during = [operator.complete([1, 2], token=free["key"])[0] for _ in range(3)]
    ready = operator.client.get("/ready")
    on_budget = refusal(operator.complete([1, 2], token=counted["key"]))
    refuses(0)
    while state.waiting:
        time.sleep(0.01)

    assert during == [200] * 3
    assert ready.status_code == 503
    assert ready.json()["reason"].startswith("usage cannot be recorded: ")
    assert on_budget == (503, "usage_not_recorded", None)
    assert operator.client.get("/ready").status_code == 200
    assert operator.get("/admin/usage")["data"][0]["requests"] == 3
    assert operator.complete([1, 2], token=counted["key"])[0] == 200


# Drain and logs


def test_draining_closes_the_door_and_opens_it_again(operator: Operator) -> None:
    status, drained = operator.ask("POST", "/admin/drain")
    while_closed = operator.complete([1, 2])
    ready = operator.client.get("/ready")
    operator.ask("DELETE", "/admin/drain")

    assert (status, drained) == (200, {"draining": True, "requests": 0})
    assert refusal(while_closed)[:2] == (503, "draining")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert operator.complete([1, 2])[0] == 200
    assert operator.client.get("/ready").status_code == 200


def test_the_log_level_changes(operator: Operator) -> None:
    loggers = [logging.getLogger(n) for n in ("tierline", "uvicorn", "uvicorn.access")]
    before = [logger.level for logger in loggers]
    try:
        status, found = operator.ask("PUT", "/admin/log-level", {"level": "error"})
        heard = logging.getLogger("tierline.requests").isEnabledFor(logging.INFO)
        unknown = refusal(operator.ask("PUT", "/admin/log-level", {"level": "erorr"}))

        assert (status, found) == (200, {"level": "error"})
        assert operator.get("/admin/log-level") == found
        assert not heard
        assert unknown == (400, "invalid_value", None)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# Memory


def test_tiers_shrink_and_grow_and_say_what_they_hold(operator: Operator) -> None:
    prompt = list(range(64))
    operator.complete(prompt)
    (before,) = operator.get("/admin/tiers")["data"]
    half = before["bytes"] // 2
    status, shrunk = operator.ask("PUT", "/admin/tiers", {"device_bytes": half})
    running, metrics = operator.there.server.running, operator.client.get("/metrics").text
    after_shrink = operator.complete(prompt)
    _, grown = operator.ask("PUT", "/admin/tiers", {"device_bytes": before["bytes"]})

    assert before["tier"] == "device"
    assert (before["blocks_held"], before["blocks_cached"] > 0) == (0, True)
    assert status == 200
    assert half * 0.9 < shrunk["data"][0]["bytes"] <= half
    assert shrunk["data"][0]["blocks"] <= before["blocks"] // 2
    assert running.rooms[0].bytes == shrunk["data"][0]["bytes"]
    assert room_tokens(running.instance) == running.rooms[0].tokens
    assert f'num_gpu_blocks="{shrunk["data"][0]["blocks"]}"' in metrics
    assert after_shrink[0] == 200
    assert grown["data"][0]["bytes"] == before["bytes"]


@pytest.mark.parametrize("device_bytes", [1, KV_BYTES * 2])
def test_a_size_that_cannot_be_is_refused(one_operator: Operator, device_bytes: int) -> None:
    before = one_operator.get("/admin/tiers")
    answer = one_operator.ask("PUT", "/admin/tiers", {"device_bytes": device_bytes})

    assert refusal(answer) == (409, "does_not_fit", "device_bytes")
    assert answer[1]["error"]["hint"]
    assert one_operator.get("/admin/tiers") == before


def test_resetting_the_cache_forgets(operator: Operator) -> None:
    prompt = list(range(64))

    def cached() -> int:
        usage = operator.complete(prompt)[1]["usage"]
        return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))

    first, second = cached(), cached()
    status, reset = operator.ask("POST", "/admin/cache/reset")
    third = cached()

    assert (first, second > 0, third) == (0, True, 0)
    assert status == 200
    assert reset["blocks_forgotten"] > 0
