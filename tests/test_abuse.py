"""Nothing that a stranger sends breaks the server, shows its insides or stops another's stream.

Everything goes over a raw socket to the real application with a tiny model in a process of its
own, while another client streams.  Requests with a time of their own (slow heads, slow bodies,
readers that stall) are in `test_http`.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from pydantic import ValidationError

from edge import Client, Edge, get, post, serving, status, until
from tierline.server.errors import malformed
from tierline.server.shapes import ChatAsked
from tiny_checkpoints import tiny_checkpoint

SERVE = """
import sys, time
from pathlib import Path
from servers import engine_of, served
from tierline.telemetry.logs import configure

configure(sys.stderr, level="debug", log_prompts=bool({log_prompts}))
with served(engine_of(Path(sys.argv[1])), keys=tuple(sys.argv[2:])) as one:
    print(one.url, flush=True)
    sys.stdin.read()
"""
KEY = "a-key-of-the-test-that-is-long-enough-to-be-one"
AUTHORIZED = f"Authorization: Bearer {KEY}"
SECRET = "violets-are-what-nobody-may-log"
# What no answer may hold: our files, Python's words, the library's name.
INSIDES = re.compile(rb"Traceback|File \"|site-packages|\.py\b|uvicorn|starlette|object at 0x")


class Victim:
    """The server's process, and one honest client that streams from it all the time."""

    def __init__(self, path: Path, log: Path, *, log_prompts: bool = False) -> None:
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        with log.open("wb") as words:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE.format(log_prompts=log_prompts), str(path), KEY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env=environment,
            )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().decode()
        assert url, log.read_text()
        self.port = int(url.rpartition(":")[2])

    def ask(self, sent: bytes) -> bytes:
        """What comes back before the connection closes."""
        with Client(self.port) as client:
            client.socket.settimeout(60)
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was all sent
                client.send(sent)
            return client.read()

    def chat(self, **fields: Any) -> bytes:
        """An honest conversation but for `fields`."""
        body = {"model": "tiny", "messages": said("hello"), "max_tokens": 4, **fields}
        return self.ask(chat(json.dumps(body).encode()))

    def end(self) -> None:
        """Asked to end, it ends without a word."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            assert self.process.wait(30) == 0, self.log.read_text()
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(body: bytes, *headers: str) -> bytes:
    return post("/v1/chat/completions", body, AUTHORIZED, "Connection: close", *headers)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return path


@pytest.fixture(scope="module")
def victim(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    started = Victim(model, tmp_path_factory.mktemp("abuse") / "log")
    yield started
    started.end()
    log = started.log.read_text()
    assert log.count('"request ended"') > 20
    assert not re.search("Traceback|Error|Exception", log), log
    assert SECRET not in log


class Bystander(threading.Thread):
    """Another client, who streams all the time; every stream of his comes to its end."""

    def __init__(self, port: int) -> None:
        super().__init__(name="bystander")
        self.port, self.streams, self.over = port, 0, False
        self.broken: list[bytes] = []

    def run(self) -> None:
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
        body = json.dumps({**asked, "stream": True}).encode()
        sent = post("/v1/completions", body, AUTHORIZED, "Connection: close")
        while not self.over:
            with Client(self.port) as client:
                client.socket.settimeout(60)
                client.send(sent)
                stream = client.read()
            if status(stream) != 200 or b"data: [DONE]" not in stream:
                self.broken.append(stream)
            self.streams += 1


@pytest.fixture(scope="module")
def bystander(victim: Victim) -> Iterator[Bystander]:
    thread = Bystander(victim.port)
    thread.start()
    yield thread
    thread.over = True
    thread.join()
    assert thread.streams


@pytest.fixture(autouse=True)
def undisturbed(bystander: Bystander) -> Iterator[None]:
    """Whatever is sent, another's streams go on."""
    yield
    assert bystander.is_alive()
    assert bystander.broken == []


def refused(answer: bytes, *statuses: int) -> dict[str, Any]:
    """The error of an answer that is a refusal of one of these kinds, and shows no insides."""
    assert not INSIDES.search(answer), answer
    assert status(answer) in statuses, answer[:600]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_an_honest_request_is_served(victim: Victim) -> None:
    """Control: what the others send is refused for what is wrong with it."""
    answer = victim.chat()

    assert status(answer) == 200, answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] >= 1


BODY = '{"model":"tiny","max_tokens":2,"messages":[{"role":"user","content":"hi"}]%s}'
DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        (BODY % "").encode() + b"x",
        b"\xef\xbb\xbf" + (BODY % "").encode(),
        (BODY % "").encode("utf-16"),
        (BODY % ',"user":"\xff"').encode("latin-1"),
        (BODY % r',"user":"\ud800"').encode(),
        (BODY % r',"user":"\udc00\ud800"').encode(),
        (BODY % (',"stop":' + "[" * DEEP + "]" * DEEP)).encode(),
        (BODY % (',"metadata":' + '{"a":' * DEEP + "1" + "}" * DEEP)).encode(),
        (BODY % (',"response_format":' + '{"type":' * DEEP + "1" + "}" * DEEP)).encode(),
        (BODY % ',"temperature":NaN').encode(),
        (BODY % ',"temperature":-Infinity').encode(),
        (BODY % ',"top_p":1e999').encode(),
        (BODY % ',"logit_bias":{"1":NaN}').encode(),
        (BODY % (',"seed":' + "9" * 5000)).encode(),
        (BODY % (',"seed":' + "9" * 300)).encode(),
        (BODY % ',"n":1000000').encode(),
        (BODY % ',"top_logprobs":1000000,"logprobs":true').encode(),
        (BODY % ',"max_completion_tokens":-1').encode(),
        (BODY % ',"max_completion_tokens":1e400').encode(),
        (BODY % ',"logit_bias":{"-1":1}').encode(),
        (BODY % ',"logit_bias":{"99999999999999999999":1}').encode(),
        (BODY % ',"logit_bias":{"١":1}').encode(),
        (BODY % ',"logit_bias":{"5000":1}').encode(),
        (BODY % ',"stop_token_ids":[-1]').encode(),
        (BODY % ',"stop_token_ids":[99999999]').encode(),
        (BODY % (',"stop":[' + ",".join(f'"{i}"' for i in range(10_001)) + "]")).encode(),
        (BODY % (',"stop":"' + "x" * 100_000 + '"')).encode(),
        (BODY % "".join(f',"k{i}":1' for i in range(20_000))).encode(),
        (BODY % ',"messages":[]').encode(),
        (BODY % ',"messages":[{"role":"god","content":"hi"}]').encode(),
        (BODY % ',"chat_template_kwargs":{"messages":[]}').encode(),
        (BODY % ',"deadline_ms":1e-300').encode(),
        (BODY % ',"priority":99999999999999999999').encode(),
        (BODY % ',"slo":"no such class"').encode(),
        (BODY % (',"messages":[{"role":"user","content":"' + "long " * 100_000 + '"}]')).encode(),
    ],
    ids=lambda _: "case",
)
def test_a_wrong_body_is_the_callers_mistake(victim: Victim, body: bytes) -> None:
    refused(victim.ask(chat(body)), 400, 413, 422, 429)


@pytest.mark.parametrize(
    "extra",
    [
        ',"user":"ÿ😀"',
        ',"stop":["a","ÿ"]',
        ',"chat_template_kwargs":{"a":' + "[" * 100 + "]" * 100 + "}",
        ',"temperature":1e-3,"top_p":0.5,"seed":9,"logit_bias":{"65":1}',
        ',"deadline_ms":60000,"priority":3',
        ',"messages":[{"role":"user","content":"' + "long " * 50 + '"}]',
    ],
)
def test_what_is_like_it_and_right_is_served(victim: Victim, extra: str) -> None:
    """Negative control of the test above."""
    answer = victim.ask(chat((BODY % extra).encode()))

    assert status(answer) == 200, answer


@pytest.mark.parametrize(
    "extra",
    [
        ',"user":"\\u0000"',
        ',"model":"tiny"',  # twice the same
        ',"stop":[' + ",".join(f'"\\u0001{i}"' for i in range(10_000)) + "]",
        ',"seed":-9223372036854775808',
        ',"temperature":1e-300',
        ',"top_p":1e-300',
        ',"repetition_penalty":1e-300',
        ',"logit_bias":{"65":-100,"66":100}',
        ',"n":128',
        ',"user":"' + "u" * 100_000 + '"',
        ',"chat_template_kwargs":{"a":NaN}',
        ',"chat_template_kwargs":{"__class__":1}',
        ',"chat_template_kwargs":{"a":' + "[" * 150 + "]" * 150 + "}",
    ],
)
def test_an_odd_body_is_served_or_refused(victim: Victim, extra: str) -> None:
    answer = victim.ask(chat((BODY % extra).encode()))

    if status(answer) != 200:
        refused(answer, 400, 413, 422, 429)
    assert not INSIDES.search(answer)


@pytest.mark.slow
def test_a_hundred_megabytes_are_refused_whether_announced_or_not(victim: Victim) -> None:
    big = b"x" * 100_000_000
    announced = chat(big, "Expect: 100-continue")[:-100_000_000]
    refused(victim.ask(announced), 413)
    head, _, _ = chat(b"", "Transfer-Encoding: chunked").partition(b"Content-Length: 0\r\n")
    rest = chat(b"", "Transfer-Encoding: chunked").partition(b"Content-Length: 0\r\n")[2]
    answer = victim.ask(head + rest + b"%x\r\n" % len(big) + big + b"\r\n0\r\n\r\n")

    if answer:  # it may be cut before it has read why
        refused(answer, 413)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "..\\..\\etc\\passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "tiny\x00.gguf",
        "tiny\r\nSet-Cookie: a=b",
        "tiny\nx",
        "x" * 256,
        "x" * 100_000,
        "",
        "{{ 7 * 7 }}",
        "$(id)",
        "😀" * 40,
    ],
    ids=lambda _: "case",
)
def test_a_models_name_is_a_name(victim: Victim, name: str) -> None:
    """Neither a path, nor a header, nor a template."""
    for answer in (
        victim.chat(model=name),
        victim.ask(get(f"/v1/models/{quoted(name)}", AUTHORIZED, "Connection: close")),
    ):
        assert b"root:" not in answer
        assert b"set-cookie" not in answer.partition(b"\r\n\r\n")[0].lower()
        if name:
            refused(answer, 400, 404, 431)


def quoted(name: str) -> str:
    from urllib.parse import quote

    return name if "%" in name else quote(name, safe="/.\\:")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/dashboard/static/../../../../etc/passwd",
        "/dashboard/static/..%2f..%2f..%2fetc%2fpasswd",
        "/dashboard/static/%2e%2e/%2e%2e/server.py",
        "/dashboard/static/../server.py",
        "/dashboard/static/%00",
        "/dashboard/static//etc/passwd",
        "/v1/../admin",
        "//evil.example/",
        "/%ff%fe",
        "/" + "a/" * 5000,
        "/v1/models/" + "%2e%2e%2f" * 300,
    ],
)
def test_a_path_stays_inside(victim: Victim, path: str) -> None:
    answer = victim.ask(get(path, AUTHORIZED, "Connection: close"))

    assert 400 <= status(answer) < 500, answer[:300]
    assert b"root:" not in answer
    assert not INSIDES.search(answer.replace(b"/server.py", b""))


def test_a_path_that_stays_inside_is_served(victim: Victim) -> None:
    """Negative control of the test above."""
    answer = victim.ask(get("/dashboard/static/dashboard.js", AUTHORIZED, "Connection: close"))

    assert status(answer) == 200


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer wrong",
        f"Authorization: Bearer {KEY}x",
        f"Authorization: Bearer {KEY[:-1]}",
        f"Authorization: Basic {KEY}",
        "Authorization: Bearer " + "x" * 30_000,
        "Authorization: Bearer",
        "Authorization: ",
        "Authorization: Bearer \xe9",
        "Authorization: Bearer tl-0-0",
        "X: no key at all",
    ],
)
def test_a_wrong_key_opens_nothing(victim: Victim, header: str) -> None:
    body = (BODY % "").encode()
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        sent = post(path, body, header, "Connection: close")
        error = refused(victim.ask(sent.replace("é".encode(), b"\xe9")), 401)
        assert KEY[:8] not in json.dumps(error)


@pytest.mark.parametrize(
    "header",
    [
        "X-Request-Id: a%0d%0aSet-Cookie: a=b",
        "X-Request-Id: " + "r" * 20_000,
        "X-Request-Id: \xff\xfe",
        "traceparent: 00-" + "z" * 32 + "-1-1",
        "traceparent: " + "0" * 20_000,
        "X-Tierline-Priority: nan",
        "X-Tierline-Priority: 1e999",
        "X-Tierline-Deadline-Ms: -1",
        "X-Tierline-Deadline-Ms: \xb2",
        "X-Tierline-Slo: ../../etc",
        "Accept: " + "*/*," * 5000,
        "Cookie: " + "a=b; " * 5000,
        "Range: bytes=0-18446744073709551615",
        "Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        "X-Forwarded-For: 127.0.0.1",
        "X-HTTP-Method-Override: DELETE",
    ],
)
def test_an_odd_header_hurts_nobody(victim: Victim, header: str) -> None:
    answer = victim.ask(chat((BODY % "").encode(), header.encode("latin-1").decode("latin-1")))
    head = answer.partition(b"\r\n\r\n")[0].lower()

    assert status(answer) in (0, 200, 400, 431), answer[:300]
    assert b"set-cookie" not in head
    assert not INSIDES.search(answer)


class Echo(Edge):
    """An application that says in a header what it read in one."""

    async def do_echo(self, scope: Any, receive: Any, send: Any) -> None:
        told = unquote_to_bytes(dict(scope["headers"])[b"x-request-id"])
        headers = [(b"content-length", b"0"), (b"x-request-id", told)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("sent", "told"), [("a", True), ("a%0d%0aSet-Cookie: a=b", False), ("a%00", False)]
)
def test_even_an_application_that_repeats_it_makes_no_header_of_it(sent: str, told: bool) -> None:
    """Below ours: what has no line break is sent (the control), anything else is dropped."""
    with serving(Echo()) as edge, Client(edge.port) as client:
        client.send(get("/echo", f"X-Request-Id: {sent}", "Connection: close"))
        answer = client.read().lower()

    assert (b"x-request-id: a\r\n" in answer) == told
    assert b"set-cookie" not in answer


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "BREW"])
def test_a_method_that_nobody_knows(victim: Victim, method: str) -> None:
    sent = chat((BODY % "").encode()).replace(b"POST", method.encode(), 1)

    assert status(victim.ask(sent)) in (400, 405)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted",
    [
        {"regex": "(a+)+" * 20 + "b"},
        {"regex": "(" * 5000 + ")" * 5000},
        {"regex": "a{1,1000000000}"},
        {"regex": "("},
        {"grammar": "start: start start"},
        {"grammar": "no grammar at all"},
        {"choice": ["x" * 100_000] * 50},
        {"json": {"$ref": "#"}},
        {"json": {"$ref": "http://127.0.0.1:1/x"}},
        {"json": {"$ref": "file:///etc/passwd"}},
        {"json": {"type": "string", "pattern": "(a|a)*" * 50}},
        {"json": {"enum": list(range(50_000))}},
        {"json": {"allOf": [{"anyOf": [{"type": "string"}] * 50}] * 50}},
        {"json": {"type": "array", "minItems": 10**9}},
        {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(5_000)}}},
        {"json": True, "regex": "a"},
        {"json": "not JSON"},
    ],
    ids=lambda _: "case",
)
def test_a_pathological_grammar_costs_little(victim: Victim, wanted: dict[str, Any]) -> None:
    """Compiled or refused within seconds, while the other client's stream goes on."""
    started_s = time.monotonic()
    answer = victim.chat(structured_outputs=wanted)
    took_s = time.monotonic() - started_s

    if status(answer) != 200:
        refused(answer, 400, 422)
    assert b"root:" not in answer
    assert not INSIDES.search(answer)
    assert took_s < 60  # a limit against standing still, not a measurement


def test_no_prompt_is_in_a_refusal_or_in_metrics(victim: Victim) -> None:
    """INV-SRV-7; the log is looked at when the server has ended."""
    served = victim.chat(messages=said(SECRET))
    answers = [
        victim.chat(messages=said(SECRET), temperature=99),
        victim.chat(messages=said(SECRET), user=7),
        victim.chat(messages=[{"role": "user", "content": {"text": SECRET}}]),
        victim.chat(messages=said(SECRET * 5000)),
        victim.chat(messages=said("hi"), stop=[SECRET * 1000]),
        victim.chat(messages=said("hi"), tools=[{"type": SECRET}]),
        victim.ask(get("/metrics", AUTHORIZED, "Connection: close")),
    ]

    assert status(served) == 200
    for answer in answers:
        assert answer
        assert SECRET.encode() not in answer


def test_a_prompt_that_is_repeated_would_be_seen(model: Path, tmp_path: Path) -> None:
    """Negative control: the log of a server that is asked for prompts, and pydantic's own words."""
    talking = Victim(model, tmp_path / "log", log_prompts=True)
    assert status(talking.chat(messages=said(SECRET))) == 200
    talking.end()
    with pytest.raises(ValidationError) as wrong:
        ChatAsked.model_validate({"model": "tiny", "messages": SECRET})

    assert SECRET in talking.log.read_text()
    assert SECRET in str(wrong.value)
    assert SECRET.encode() not in malformed(wrong.value).body()


@pytest.mark.slow
def test_three_hundred_clients_that_leave_are_forgotten(victim: Victim) -> None:
    """At any instant of theirs; and the server holds nothing of them."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    sent = post("/v1/completions", json.dumps(body).encode(), AUTHORIZED)

    def leave(number: int) -> None:
        with Client(victim.port) as client:
            client.send(sent[: len(sent) * (1 + number % 10) // 8])
            if number % 10 > 7:
                client.socket.recv(1 + number)

    leaving = [threading.Thread(target=leave, args=(i,)) for i in range(300)]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()

    def running() -> float:
        text = victim.ask(get("/metrics", "Connection: close")).decode()
        found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", text, re.M)
        assert found, text[:500]
        return sum(map(float, found))

    until(lambda: running() <= 1, "everybody gone but the bystander", seconds=60)
