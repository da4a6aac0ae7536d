"""API keys: who may ask, for which models, and how much.

The service asks `Keys.check` with the text that a caller sent, and `Keys.allow` with the model.
Both read memory only; what changes is written through `State` first.

A key is `tl-<id>-<secret>`: the id is public and names it in lists and records, the secret is 256
random bits, shown once.  What is kept is HMAC-SHA256 of the whole text under a pepper, a file of
its own beside the database, so a copy of the database alone neither admits anybody nor lets a
guess be tested.  A fast hash is right here, since nobody guesses 256 bits.

Whoever is refused learns the same, by text and by time: an unknown id is compared too.  No text
that was sent as a key is ever in an error.

Invariants
    INV-SRV-14  no key's text is at rest, in an error, or in a list
    INV-SRV-15  once a key was made, nobody is served without one
"""

import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tierline.base.errors import DependencyError, InputError
from tierline.base.files import whole_file
from tierline.server.errors import ApiError
from tierline.server.state import Key, State

PEPPER_NAME = "key.pepper"
SECRET_BYTES = 32
TENANT = "default"  # of keys from the command line, and where nobody needs a key
NAME_LENGTH_MAX = 100

_NAME = re.compile(r"[\w.@:/+-]([\w .@:/+-]*[\w.@:/+-])?")  # no quotes, no controls


def secret_file(folder: Path | None, name: str) -> str:
    """The secret in a file that only its owner may read, made at first use; None: a fresh one.

    Raises `InputError` when others can read it or it is not what was written there, and
    `DependencyError` when it cannot be made.
    """
    if folder is None:
        return secrets.token_urlsafe(SECRET_BYTES)
    path = folder / name
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        text = secrets.token_urlsafe(SECRET_BYTES)
        with whole_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise DependencyError(f"cannot read {str(path)!r}: {error}") from None
    if mode & 0o077:
        raise InputError(f"{str(path)!r} can be read by others", hint=f"chmod 600 {path}")
    if len(text) < SECRET_BYTES:
        raise InputError(
            f"{str(path)!r} holds no secret of {SECRET_BYTES} characters or more",
            hint="restore it from a copy, or remove it so that a new one is made",
        )
    return text


class Keys:
    """The keys that a server knows, in memory; `State` keeps what is made here."""

    def __init__(
        self,
        state: State,
        kept: Iterable[Key],
        *,
        pepper: str,
        static: Sequence[str],
        clock_s: Callable[[], float],
    ) -> None:
        self._state, self._clock_s = state, clock_s
        self._pepper = pepper.encode()
        self._mark = hmac.digest(self._pepper, b"which pepper", "sha256").hex()[:16]
        self._kept = {key.id: key for key in kept}
        self._static = [
            self._new(f"static-{i}", text, tenant=TENANT, name="command line")
            for i, text in enumerate(static, 1)
        ]
        self._nobody = self._new("", secrets.token_urlsafe(SECRET_BYTES), tenant=TENANT, name="")

    @classmethod
    async def open(
        cls, state: State, *, static: Sequence[str] = (), clock_s: Callable[[], float]
    ) -> "Keys":
        """The keys of a data folder, and those that the command line gives.

        `clock_s` is Unix time.  Raises `InputError` when the pepper is not the one that kept keys
        were made with, or a key of the command line cannot travel in a header.
        """
        for text in static:
            if not re.fullmatch(r"[!-~]+", text):
                raise InputError(
                    "a key given on the command line is empty or has characters that cannot "
                    "travel in a header",
                    hint="letters, digits and ASCII signs, without spaces",
                )
        kept = await state.keys()
        pepper = secret_file(state.folder, PEPPER_NAME)
        keys = cls(state, kept, pepper=pepper, static=static, clock_s=clock_s)
        strangers = [k for k in kept if k.pepper != keys._mark and k.revoked_s is None]
        if strangers:
            assert state.folder is not None
            raise InputError(
                f"{len(strangers)} keys in {str(state.folder)!r} were made with another "
                f"{PEPPER_NAME}",
                hint=f"restore {PEPPER_NAME} from a copy; without it no kept key can be recognised",
            )
        return keys

    @property
    def required(self) -> bool:
        """Whether a caller needs a key: from the first one on, revoked or not (INV-SRV-15)."""
        return bool(self._kept or self._static)

    def list(self) -> list[Key]:
        """Every kept key, in the order of making, with what it has spent so far."""
        return [
            replace(key, spent_tokens=self._state.spent_tokens(key.id))
            for key in self._kept.values()
        ]

    async def create(
        self,
        *,
        tenant: str,
        name: str,
        models: Iterable[str] | None = None,
        budget_tokens: int | None = None,
        expires_s: float | None = None,
    ) -> tuple[Key, str]:
        """A new key, and its text: here and never again.

        `models` None means every model; the budget counts prompts and answers; `expires_s` is
        Unix time.  Raises `InputError` for what makes no key, `DependencyError` when it cannot be
        kept.
        """
        now_s = self._clock_s()
        _check_name("tenant", tenant)
        _check_name("name", name)
        if models is not None and not (models := tuple(models)):
            raise InputError("a key for no model", hint="name models, or leave it out for all")
        if budget_tokens is not None and budget_tokens <= 0:
            raise InputError(f"budget_tokens is {budget_tokens}", hint="give 1 or more")
        if expires_s is not None and expires_s <= now_s:
            raise InputError(
                "expires_s is in the past", hint=f"seconds since 1970; it is {now_s:.0f} now"
            )
        key_id = secrets.token_hex(6)
        text = f"tl-{key_id}-{secrets.token_urlsafe(SECRET_BYTES)}"
        key = replace(
            self._new(key_id, text, tenant=tenant, name=name),
            models=models,
            budget_tokens=budget_tokens,
            expires_s=expires_s,
            created_s=now_s,
        )
        await self._state.add_key(key)
        self._kept[key_id] = key
        return key, text

    async def revoke(self, key_id: str) -> Key:
        """Nobody is served with this key any more; what was admitted ends as it would.

        Raises `ApiError` 404 for an id that no key has, and `DependencyError` when it cannot be
        written: it holds until the server ends, and may be asked for again.
        """
        key = self._kept.get(key_id)
        if key is None:
            raise ApiError(404, f"no key {key_id!r}", code="key_not_found", param="id")
        revoked_s = self._clock_s() if key.revoked_s is None else key.revoked_s
        key = self._kept[key_id] = replace(key, revoked_s=revoked_s)
        await self._state.revoke_key(key_id, now_s=revoked_s)
        return key

    def check(self, text: str | None) -> Key:
        """The key that this text is, if it may ask for anything now.

        Raises `ApiError`: 401 (none, unknown, revoked, expired), 402 (budget spent), 503 (it has
        a budget, and what it uses cannot be recorded at the moment).
        """
        if not self.required:
            return self._nobody
        if not text:
            raise _unauthorized("an API key is needed", code="missing_api_key")
        key = self._find(text)
        if key is None:
            raise _unauthorized("the API key is not known here", code="invalid_api_key")
        if key.revoked_s is not None:
            raise _unauthorized(f"the API key {key.id!r} was revoked", code="revoked_api_key")
        if key.expires_s is not None and key.expires_s <= self._clock_s():
            raise _unauthorized(f"the API key {key.id!r} has expired", code="expired_api_key")
        self._check_budget(key)
        return key

    def allow(self, key: Key, model: str) -> None:
        """Raises `ApiError` 403 when the key is not for this model."""
        if key.models is not None and model not in key.models:
            raise ApiError(
                403,
                f"the API key {key.id!r} is not for model {model!r}",
                code="model_not_allowed",
                param="model",
                hint=f"it is for: {', '.join(key.models)}",
            )

    def _check_budget(self, key: Key) -> None:
        if key.budget_tokens is not None:
            spent_tokens = self._state.spent_tokens(key.id)
            if spent_tokens >= key.budget_tokens:
                raise ApiError(
                    402,
                    f"the API key {key.id!r} has spent its budget: {spent_tokens} of "
                    f"{key.budget_tokens} tokens",
                    code="budget_exhausted",
                    hint="ask the operator for a key with a larger budget",
                )
        if self._state.full or (key.budget_tokens is not None and self._state.trouble):
            raise ApiError(
                503,
                "usage cannot be recorded at the moment, and this key's usage must be",
                code="usage_not_recorded",
                headers={"Retry-After": "5"},
                hint="try again in a few seconds; /ready says why",
            )

    def _find(self, text: str) -> Key | None:
        """The key of this text; every path hashes once and compares as often."""
        digest = self._digest(text)
        parts = text.split("-", 2)
        named = self._kept.get(parts[1], self._nobody) if len(parts) == 3 else self._nobody
        found = named if hmac.compare_digest(named.digest, digest) else None
        for key in self._static:
            found = key if hmac.compare_digest(key.digest, digest) else found
        return found

    def _digest(self, text: str) -> bytes:
        return hmac.digest(self._pepper, text.encode("utf-8", "replace"), "sha256")

    def _new(self, key_id: str, text: str, *, tenant: str, name: str) -> Key:
        return Key(
            id=key_id,
            tenant=tenant,
            name=name,
            models=None,
            budget_tokens=None,
            created_s=self._clock_s(),
            expires_s=None,
            revoked_s=None,
            digest=self._digest(text),
            pepper=self._mark,
        )


def _check_name(what: str, text: str) -> None:
    if len(text) > NAME_LENGTH_MAX or not _NAME.fullmatch(text):
        raise InputError(
            f"{what} is not a name: {text[:NAME_LENGTH_MAX]!r}",
            hint=f"letters, digits, spaces and . @ : / + - _, {NAME_LENGTH_MAX} at most",
        )


def _unauthorized(message: str, *, code: str) -> ApiError:
    return ApiError(
        401,
        message,
        code=code,
        headers={"WWW-Authenticate": "Bearer"},
        hint="send `Authorization: Bearer <key>` with a key that the operator made",
    )
