"""Who may ask: a key opens what it is for, nothing at rest is a key, and a refusal tells nobody
more than they know."""

import asyncio
import hmac
import logging
import re
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from states import fill, make_room, until, usage
from tierline.base.errors import InputError, TierlineError
from tierline.server import keys as keys_module
from tierline.server.errors import ApiError
from tierline.server.keys import PEPPER_NAME, Keys, secret_file
from tierline.server.state import KEY_FIELDS, State

NOW_S = 1000.0


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def with_keys(
    work: Callable[[Keys, State, Clock], Awaitable[Any]],
    path: Path | None = None,
    *,
    static: tuple[str, ...] = (),
) -> Any:
    async def run() -> Any:
        state = State.open(path)
        try:
            clock = Clock()
            keys = await Keys.open(state, static=static, clock_s=clock)
            return await work(keys, state, clock)
        finally:
            await state.close(ended="stopped", now_s=NOW_S)

    return asyncio.run(run())


def refusal(keys: Keys, text: str | None) -> tuple[int, str]:
    """Status and code, when it is refused; (200, the key's id) when not."""
    try:
        return 200, keys.check(text).id
    except ApiError as error:
        return error.status, error.code


def test_a_key_opens_what_it_is_for() -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        key, text = await keys.create(tenant="acme", name="app", models=["demo"])
        found = keys.check(text)
        keys.allow(found, "demo")
        with pytest.raises(ApiError) as refused:
            keys.allow(found, "other")
        return key, text, found, refused.value

    key, text, found, refused = with_keys(work)

    assert found == key
    assert re.fullmatch(rf"tl-{key.id}-[\w-]{{43}}", text)  # 43 characters are 32 bytes
    assert (refused.status, refused.code, refused.param) == (403, "model_not_allowed", "model")
    assert "it is for: demo" in (refused.hint or "")


def test_who_is_refused_and_how() -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        _, good = await keys.create(tenant="a", name="good")
        revoked, revoked_text = await keys.create(tenant="a", name="revoked")
        await keys.revoke(revoked.id)
        _, passing = await keys.create(tenant="a", name="passing", expires_s=NOW_S + 5)
        _, key_id, secret = good.split("-", 2)
        said = {
            "good": refusal(keys, good)[0],
            "passing": refusal(keys, passing)[0],
            "none": refusal(keys, None),
            "empty": refusal(keys, ""),
            "words": refusal(keys, "let me in"),
            "no secret": refusal(keys, f"tl-{key_id}-"),
            "another id": refusal(keys, f"tl-{'0' * 12}-{secret}"),
            "another's secret": refusal(keys, f"tl-{key_id}-{revoked_text.split('-', 2)[2]}"),
            "longer": refusal(keys, good + "x"),
            "shorter": refusal(keys, good[:-1]),
            "other case": refusal(keys, good.upper()),
            "not ASCII": refusal(keys, good + "é\udc80\x00"),
            "a megabyte": refusal(keys, "x" * 10**6),
            "revoked": refusal(keys, revoked_text),
        }
        clock.now_s += 5
        said["expired"] = refusal(keys, passing)
        clock.now_s -= 5  # a clock that jumps back gives it its time back
        said["not expired"] = refusal(keys, passing)[0]
        return said

    said = with_keys(work)

    assert {k: said.pop(k) for k in ("good", "passing", "not expired")} == {
        "good": 200,
        "passing": 200,
        "not expired": 200,
    }
    assert said.pop("none") == said.pop("empty") == (401, "missing_api_key")
    assert said.pop("revoked") == (401, "revoked_api_key")
    assert said.pop("expired") == (401, "expired_api_key")
    assert set(said.values()) == {(401, "invalid_api_key")}


def test_a_budget_ends() -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        key, text = await keys.create(tenant="a", name="n", budget_tokens=16)
        before = refusal(keys, text)
        state.record(usage(1, key_id=key.id))  # 15 tokens
        between = refusal(keys, text)
        state.record(usage(2, key_id=key.id))  # at once: nobody waited for the disk
        with pytest.raises(ApiError) as refused:
            keys.check(text)
        return before, between, refused.value, keys.list()[0].spent_tokens

    before, between, refused, spent = with_keys(work)

    assert before[0] == between[0] == 200
    assert (refused.status, refused.code) == (402, "budget_exhausted")
    assert "30 of 16 tokens" in str(refused)
    assert spent == 30


def test_what_cannot_be_counted_is_not_given_on_a_budget() -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        _, counted = await keys.create(tenant="a", name="counted", budget_tokens=10**6)
        _, free = await keys.create(tenant="a", name="free")
        await state._ask(fill)
        for i in range(300):
            state.record(usage(i))
        await until(lambda: bool(state.trouble))
        during = refusal(keys, counted), refusal(keys, free)[0]
        await state._ask(make_room)
        await until(lambda: not state.waiting)
        return during, refusal(keys, counted)[0]

    during, after = with_keys(work)

    assert during == ((503, "usage_not_recorded"), 200)
    assert after == 200


def test_nobody_with_a_key_is_served_when_no_record_can_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        _, text = await keys.create(tenant="a", name="n")
        monkeypatch.setattr(state, "_waiting", 10**6)
        full = refusal(keys, text)
        monkeypatch.setattr(state, "_waiting", 0)
        return full

    assert with_keys(work) == (503, "usage_not_recorded")


def test_keys_outlive_the_server(tmp_path: Path) -> None:
    async def first(keys: Keys, state: State, clock: Clock) -> Any:
        good = await keys.create(tenant="a", name="n", models=["m"], budget_tokens=99)
        bad = await keys.create(tenant="a", name="revoked")
        await keys.revoke(bad[0].id)
        await state.record(usage(key_id=good[0].id))
        return good, bad

    (key, text), (_, revoked) = with_keys(first, tmp_path)

    async def second(keys: Keys, state: State, clock: Clock) -> Any:
        return keys.check(text), refusal(keys, revoked), keys.list()

    found, refused, listed = with_keys(second, tmp_path)

    assert found == keys_module.replace(key, spent_tokens=15)
    assert refused == (401, "revoked_api_key")
    assert [k.name for k in listed] == ["n", "revoked"]


def test_nothing_at_rest_or_said_is_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """INV-SRV-14: neither the text nor its secret is in any file, list, error or log."""
    said: list[str] = []

    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        key, text = await keys.create(tenant="a", name="n", budget_tokens=1)
        for wrong in (text + "x", text[:-1], "tl-" + text.split("-", 2)[2]):
            with pytest.raises(ApiError) as refused:
                keys.check(wrong)
            said.append(refused.value.body().decode())
        await state.record(usage(key_id=key.id))
        with pytest.raises(ApiError) as refused:
            keys.check(text)
        said.append(refused.value.body().decode())
        said.extend([repr(key), repr(keys.list())])
        return text, {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    with caplog.at_level(logging.DEBUG):
        text, files = with_keys(work, tmp_path)

    secret = text.split("-", 2)[2]
    seen = "\n".join(said) + caplog.text
    assert len(said) == 6
    assert secret not in seen
    assert all(secret[:16].encode() not in content for content in files.values())
    assert len(files) >= 3
    pepper = files[PEPPER_NAME].strip()
    assert all(pepper not in content for name, content in files.items() if name != PEPPER_NAME)
    digest = hmac.digest(pepper, text.encode(), "sha256")  # the control: this one is there
    assert any(digest in content for content in files.values())


def test_an_unknown_id_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many hashes and comparisons for any text, so that time says nothing about ids."""
    work_done: list[tuple[int, int]] = []

    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        key, good = await keys.create(tenant="a", name="n")
        counts = {"digest": 0, "compare": 0}

        class Counted:
            @staticmethod
            def digest(*arguments: Any) -> bytes:
                counts["digest"] += 1
                return hmac.digest(*arguments)

            @staticmethod
            def compare_digest(a: bytes, b: bytes) -> bool:
                counts["compare"] += 1
                return hmac.compare_digest(a, b)

        monkeypatch.setattr(keys_module, "hmac", Counted)
        for text in (good, f"tl-{key.id}-wrong", "tl-unknown-wrong", "nothing", "static-one"):
            counts.update(digest=0, compare=0)
            refusal(keys, text)
            work_done.append((counts["digest"], counts["compare"]))

    with_keys(work, static=("static-one", "static-two"))

    assert work_done == [(1, 3)] * 5


def test_keys_of_the_command_line() -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        return refusal(keys, "one"), keys.check("two"), refusal(keys, "three"), keys.list()

    first, second, third, listed = with_keys(work, static=("one", "two"))

    assert first == (200, "static-1")
    assert (second.id, second.tenant, second.models) == ("static-2", "default", None)
    assert third == (401, "invalid_api_key")
    assert listed == []


@pytest.mark.parametrize("text", ["", "with space", "new\nline", "é"])
def test_a_key_that_cannot_travel_is_refused(text: str) -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> None: ...

    with pytest.raises(InputError, match="cannot travel in a header") as refused:
        with_keys(work, static=("fine", text))

    assert not text or text not in str(refused.value)


def test_without_keys_nobody_needs_one_and_then_everybody_does() -> None:
    """INV-SRV-15: the first key closes the door, and revoking it does not open it again."""

    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        before = keys.required, keys.check(None), keys.check("anything")
        key, _ = await keys.create(tenant="a", name="n")
        between = keys.required, refusal(keys, None)
        await keys.revoke(key.id)
        return before, between, (keys.required, refusal(keys, None))

    before, between, after = with_keys(work)

    assert (before[0], before[1].id, before[2].tenant) == (False, "", "default")
    assert between == after == (True, (401, "missing_api_key"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tenant": ""}, "tenant is not a name"),
        ({"tenant": "a\nb"}, "tenant is not a name"),
        ({"name": "<script>"}, "name is not a name"),
        ({"name": "x" * 101}, "name is not a name"),
        ({"models": []}, "a key for no model"),
        ({"budget_tokens": 0}, "budget_tokens is 0"),
        ({"expires_s": NOW_S}, "expires_s is in the past"),
    ],
)
def test_what_makes_no_key(fields: dict[str, Any], message: str) -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        with pytest.raises(InputError, match=message) as refused:
            await keys.create(**({"tenant": "a", "name": "n"} | fields))
        return refused.value.hint, keys.list()

    hint, listed = with_keys(work)

    assert hint
    assert listed == []


def test_revoking_what_is_not_there() -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        with pytest.raises(ApiError) as refused:
            await keys.revoke("nobody")
        return refused.value.status, refused.value.code

    assert with_keys(work) == (404, "key_not_found")


def test_a_revocation_that_cannot_be_kept_holds_until_the_end() -> None:
    """The key is refused at once; the caller is told that a restart would forget it."""

    async def work(keys: Keys, state: State, clock: Clock) -> Any:
        key, text = await keys.create(tenant="a", name="n")
        await state._ask(lambda c: c.execute("PRAGMA query_only = 1"))
        with pytest.raises(TierlineError, match="cannot be reached"):
            await keys.revoke(key.id)
        refused = refusal(keys, text)
        await state._ask(lambda c: c.execute("PRAGMA query_only = 0"))
        await keys.revoke(key.id)  # again, and now it is kept
        return refused, (await state.keys())[0].revoked_s

    assert with_keys(work) == ((401, "revoked_api_key"), NOW_S)


# The files beside the database


def test_a_secret_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    first = secret_file(tmp_path, "a")

    assert secret_file(tmp_path, "a") == first != secret_file(tmp_path, "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert secret_file(None, "a") != secret_file(None, "a")


def open_to_others(path: Path) -> None:
    path.chmod(0o644)


def cut(path: Path) -> None:
    path.write_text("short")


def remove(path: Path) -> None:
    path.unlink()


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 99)


@pytest.mark.parametrize(
    ("harm", "message", "hint"),
    [
        (open_to_others, "can be read by others", "chmod 600"),
        (cut, "holds no secret", "restore it"),
        (garble, "cannot read", ""),
        (remove, "1 keys in .* were made with another key.pepper", "restore key.pepper"),
    ],
)
def test_a_harmed_pepper_is_said(
    tmp_path: Path, harm: Callable[[Path], None], message: str, hint: str
) -> None:
    async def work(keys: Keys, state: State, clock: Clock) -> None:
        await keys.create(tenant="a", name="n")

    with_keys(work, tmp_path)
    harm(tmp_path / PEPPER_NAME)
    with pytest.raises(TierlineError, match=message) as refused:
        with_keys(work, tmp_path)

    assert hint in refused.value.hint


def test_a_key_has_a_column_for_every_field() -> None:
    assert {"digest", "pepper", "spent_tokens"} < set(KEY_FIELDS)
