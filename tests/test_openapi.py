"""/openapi.json is what the server does: every path, parameter and error stands in it, answers
have the shapes that it promises, and a stranger's fuzzer finds nothing that it does not say."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.routing import Route

import tierline
from servers import MODEL, Served, engine_of, served
from talkers import tiny_talker
from tierline.server import dashboard, openapi, texts
from tierline.server.app import routes
from tierline.server.calls import Call
from tierline.server.errors import TYPES, ApiError
from tierline.server.openapi import OPERATIONS, Operation, document, schemas
from tierline.server.openapi_words import ERRORS, PARAMETERS, WITHOUT_EFFECT
from tierline.server.shapes import UNSUPPORTED, DetokenizeAsked, Shape

KEY, ADMIN = "key-of-the-test-0123456789", "admin-of-the-test-0123456789"
BEARER = {"Authorization": f"Bearer {KEY}"}
OPERATOR = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openapi")
    engine = engine_of(tiny_talker(folder))
    with served(engine, data=folder / "data", keys=(KEY,), admin_token=ADMIN) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as one:
        yield one


# --- the document and the code --------------------------------------------------------------


def test_every_path_of_a_program_is_in_it_and_no_other() -> None:
    pages = {route.path for route in dashboard.routes() if isinstance(route, Route)}
    there = set()
    for route in routes():
        if isinstance(route, Route) and route.path not in pages:
            methods = (route.methods or set()) - {"HEAD"}
            there |= {(method, route.path.replace(":path}", "}")) for method in methods}

    assert there == {(operation.method, operation.path) for operation in OPERATIONS}


def test_every_parameter_is_explained_and_nothing_else() -> None:
    asked = [operation.asks for operation in OPERATIONS if operation.asks is not None]
    names = {field.alias or name for shape in asked for name, field in shape.model_fields.items()}
    known = set(PARAMETERS) | set(WITHOUT_EFFECT) | set(UNSUPPORTED)

    assert names - known == set()
    assert known - names == set()
    assert set(WITHOUT_EFFECT) & (set(PARAMETERS) | set(UNSUPPORTED)) == set()


def test_every_code_of_a_refusal_is_explained_with_its_status() -> None:
    """Statuses and codes as they stand in the source, wherever an error is made."""
    folder = Path(tierline.__file__).parent / "server"
    source = "\n".join(path.read_text() for path in sorted(folder.glob("*.py")))
    named = set(re.findall(r'\bcode="([a-z_]+)"', source))
    placed = re.findall(
        r'(?:ApiError|_refuse)\(\s*(\d{3}),[^()]*?(?:\([^()]*\)[^()]*?)*code="([a-z_]+)"', source
    )

    assert named - {"invalid_json", "server_error"} <= set(ERRORS)
    assert len(placed) > 20
    assert {code: int(status) for status, code in placed}.items() <= {
        code: status for code, (status, _) in ERRORS.items()
    }.items()
    elsewhere = {"invalid_json", "invalid_http", "head_too_large", "too_many_connections"}
    assert set(ERRORS) - named <= elsewhere | {"unsupported_media_type"}


def test_types_of_refusals_are_those_of_the_document() -> None:
    told = schemas()["Refusal"]["properties"]["type"]["enum"]
    made = {ApiError(status, "", code=code).type for code, (status, _) in ERRORS.items()}

    assert made == set(told)
    assert set(TYPES) <= {status for status, _ in ERRORS.values()}


def test_every_schema_is_one_and_every_reference_leads_somewhere() -> None:
    made = document(version="1", models=[MODEL], key_required=True)
    references = set(re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(made)))

    assert len(references) > 50
    for reference in references:
        place: Any = made
        for part in reference.split("/"):
            place = place[part]
    for schema in made["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [one for path in made["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(OPERATIONS)


def test_what_has_no_effect_says_why() -> None:
    chat = schemas()["ChatAsked"]["properties"]

    assert chat["audio"]["enum"] == [None]
    assert chat["audio"]["description"] == "Not supported: this server makes text only."
    assert chat["store"]["enum"] == [False, None]
    assert chat["user"]["description"].startswith("Accepted, without effect: ")
    assert chat["top_k"]["x-origin"] == "vLLM"
    assert chat["temperature"]["description"]


def test_an_unexplained_parameter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the tables."""
    others = {name: words for name, words in PARAMETERS.items() if name != "min_p"}
    monkeypatch.setattr(openapi, "PARAMETERS", others)
    schemas.cache_clear()
    try:
        with pytest.raises(KeyError, match="min_p"):
            schemas()
    finally:
        schemas.cache_clear()


# --- the document as it is served -----------------------------------------------------------


def test_it_is_served_with_keys_in_order_to_everybody(client: httpx.Client) -> None:
    answer = client.get("/openapi.json")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert told == document(version=version("tierline"), models=[MODEL], key_required=True)
    assert answer.text == json.dumps(
        told, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert told["paths"]["/v1/chat/completions"]["post"]["security"] == [{"key": []}]
    assert told["components"]["schemas"]["ChatAsked"]["properties"]["model"]["enum"] == [MODEL]


def valid(schema: str, value: Any) -> None:
    """`value` is what the document promises."""
    made = {"$ref": f"#/components/schemas/{schema}", "components": {"schemas": schemas()}}
    jsonschema.Draft202012Validator(made).validate(value)


READING = [
    one for one in OPERATIONS if one.method == "GET" and one.tells not in (None, Shape)
]  # fmt: skip


@pytest.mark.parametrize("operation", READING, ids=lambda one: one.path)
def test_what_is_read_has_its_shape(client: httpx.Client, operation: Operation) -> None:
    headers = OPERATOR if operation.path.startswith("/admin") else BEARER
    client.post("/v1/completions", json=SMALL, headers=BEARER)

    answer = client.get(operation.path.replace("{name}", MODEL), headers=headers)

    assert answer.status_code == 200
    assert operation.tells is not None
    valid(operation.tells.__name__, answer.json())


SMALL = {"model": MODEL, "prompt": "a", "max_tokens": 2}
CHANGES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/admin/keys", {"name": "one", "models": [MODEL], "budget_tokens": 10}),
    ("PUT", "/admin/log-level", {"level": "info"}),
    ("PUT", "/admin/tiers", {"device_bytes": 2_000_000}),
    ("POST", "/admin/cache/reset", None),
    ("POST", "/admin/drain", None),
    ("DELETE", "/admin/drain", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=lambda one: str(one)[:20])
def test_what_is_changed_has_its_shape(
    client: httpx.Client, method: str, path: str, body: dict[str, Any] | None
) -> None:
    operation = next(one for one in OPERATIONS if (one.method, one.path) == (method, path))

    answer = client.request(method, path, json=body, headers=OPERATOR)

    assert answer.status_code == operation.status
    assert operation.tells is not None
    valid(operation.tells.__name__, answer.json())
    if path == "/admin/keys":
        gone = client.delete(f"{path}/{answer.json()['id']}", headers=OPERATOR)
        valid("KeyTold", gone.json())


def test_a_refusal_has_its_shape(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json=SMALL)

    assert answer.status_code == 401
    valid("Refused", answer.json())
    with pytest.raises(jsonschema.ValidationError):
        valid("Refused", {"error": {**answer.json()["error"], "code": "no_such_code"}})


def test_a_wrong_method_is_told_all_right_ones(client: httpx.Client) -> None:
    for path in {operation.path for operation in OPERATIONS if "{" not in operation.path}:
        answer = client.request("PATCH", path)
        methods = {operation.method for operation in OPERATIONS if operation.path == path}

        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) - {"HEAD"} == methods
        valid("Refused", answer.json())


def test_a_field_that_is_not_documented_is_seen() -> None:
    """The control of every validation here."""
    whole = {"count": 1, "max_model_len": 2, "tokens": [1]}
    valid("Tokenized", whole)

    for broken in (whole | {"more": 1}, whole | {"tokens": ["1"]}, {"count": 1, "tokens": []}):
        with pytest.raises(jsonschema.ValidationError):
            valid("Tokenized", broken)


# --- a stranger's fuzzer --------------------------------------------------------------------

# 413 refuses what is too large before its shape is looked at; deadlines are checked last.
SCHEMATHESIS = """\
[checks.negative_data_rejection]
expected-statuses = ["4xx", "503", "504"]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Like `server`, with so few positions that 128 answers of any length come at once."""
    folder = tmp_path_factory.mktemp("fuzzed")
    path = tiny_talker(folder, max_position_embeddings=128, num_hidden_layers=1)
    options = {"keys": (KEY,), "admin_token": ADMIN, "output_tokens_default": 4}
    with served(engine_of(path), data=folder / "data", **options) as one:
        yield one


def fuzzed(server: Served, folder: Path, *, token: str, options: list[str]) -> int:
    """How many requests were answered as documented; fails when one was not. Seeded."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.is_file():
        pytest.skip("schemathesis is not installed; pip install 'tierline[clients]'")
    config = folder / "schemathesis.toml"
    config.write_text(SCHEMATHESIS)
    done = subprocess.run(
        [
            *(program, "--config-file", config, "run", f"{server.url}/openapi.json"),
            *("-H", f"Authorization: Bearer {token}", "--seed", "1", "--no-shrink"),
            # What no schema says: which fields need which. 400 answers it, and says so.
            *("--exclude-checks", "positive_data_acceptance", "--request-timeout", "30"),
            *("--max-failures", "3", "--phases", "coverage,fuzzing", "-n", "20", *options),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=850,
        check=False,
    )
    shown = "\n".join(line[:300] for line in done.stdout.splitlines())

    assert done.returncode == 0, shown
    passed = re.search(r"\d+ generated, (\d+) passed", shown)

    assert passed, shown
    assert server.server.not_ready == ""
    return int(passed[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing(small: Served, tmp_path: Path) -> None:
    """Conforming and hostile requests: no failure of ours, and every answer is as documented."""
    passed = fuzzed(small, tmp_path, token=KEY, options=["--exclude-path-regex", "^/admin"])

    assert passed > 1000
    before = small.server.recorder.past
    assert {"chat", "completions", "responses", "embeddings"} <= {life.endpoint for life in before}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing_where_operators_are(small: Served, tmp_path: Path) -> None:
    """All of /admin but closing the door, behind which the others would find 503."""
    passed = fuzzed(
        small,
        tmp_path,
        token=ADMIN,
        options=["--include-path-regex", "^/admin", "--exclude-operation-id", "post_admin_drain"],
    )

    assert passed > 100


@pytest.mark.slow
def test_schemathesis_sees_what_is_not_documented(
    small: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a field that answers have and their shape has not."""

    async def otherwise(call: Call, asked: DetokenizeAsked) -> None:
        await call.answer(b'{"text": "%d"}' % len(asked.tokens))

    monkeypatch.setattr(texts.DETOKENIZE, "handle", otherwise)
    options = ["--include-path", "/detokenize"]

    with pytest.raises(AssertionError, match="schema"):
        fuzzed(small, tmp_path, token=KEY, options=options)
