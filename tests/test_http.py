"""A client that is slow, endless, gone or silent costs only itself (INV-SRV-40..43)."""

import json
import time
from collections.abc import Iterator

import pytest

from edge import BODY_MAX, Client, Edge, get, post, serving, status, until
from tierline.server.browser import PAGE_HEADERS, allowed_hosts
from tierline.server.http import Limits

QUICK = Limits(head_s=0.3, linger_s=0.3, unread_s=0.6, head_bytes_max=8 << 10)


@pytest.fixture(scope="module")
def shared() -> Iterator[Edge]:
    """One server for the tests that only ask."""
    with serving(Edge(), QUICK, origins=("https://ours.example",)) as edge:
        yield edge


@pytest.fixture
def edge(shared: Edge) -> Iterator[Edge]:
    """That server, idle before and after."""
    shared.ended.clear()
    yield shared
    shared.await_idle()
    until(lambda: not shared.connections, "the end of every connection")


def code(answer: bytes) -> str:
    """The code of a refusal, out of a whole response."""
    told = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(told) >= {"message", "type", "param", "code"}
    return str(told["code"])


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", (0, "")),
        (b"\r\n", (408, "request_timeout")),
        (b"GET / HT", (408, "request_timeout")),
        (get("/quick")[:-2], (408, "request_timeout")),
        (get("/quick", "X: " + "y" * 9000), (431, "head_too_large")),
        (b"GET /" + b"y" * 9000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (431, "head_too_large")),
        (get("/quick", *["A: b"] * 3000), (431, "head_too_large")),
        (b"GET /quick HTTP/1.1\r\nX: " + b"y" * 9000, (431, "head_too_large")),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", (400, "invalid_http")),
        (get("/quick", "Two words: 1"), (400, "invalid_http")),
        (get("/quick", "X: 1\r\n folded"), (400, "invalid_http")),
        (get("/quick", "X: a\x00b"), (400, "invalid_http")),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", (400, "invalid_http")),
        ("GET /é HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode(), (400, "invalid_http")),
    ],
)
def test_a_head_that_is_late_large_or_wrong_is_told_so(
    edge: Edge, sent: bytes, expected: tuple[int, str]
) -> None:
    with Client(edge.port) as client:
        client.send(sent)
        answer = client.read()
        until(lambda: not edge.connections, "the end of the connection")

    assert (status(answer), code(answer) if answer else "") == expected


@pytest.mark.parametrize("piece", [b"X: y\r\n", b"\r\n", b"G"])
def test_a_dripping_head_ends_however_often_it_drips(edge: Edge, piece: bytes) -> None:
    """INV-SRV-40: what counts is progress, not bytes."""
    with Client(edge.port) as client:
        if piece[:1] == b"X":
            client.send(get("/quick")[:-2])
        for _ in range(12):
            try:
                client.send(piece)
            except OSError:
                break
            time.sleep(0.06)
        answer = client.read()

    assert status(answer) in (0, 400, 408)


def test_without_the_limit_it_would_go_on() -> None:
    """Negative control: the same drip under a long limit is served in the end."""
    patient = Limits(head_s=60)
    with serving(Edge(), patient) as edge, Client(edge.port) as client:
        client.send(get("/quick")[:-2])
        for _ in range(12):
            client.send(b"X: y\r\n")
            time.sleep(0.06)
        client.send(b"\r\n")

        assert client.answer()[0] == 200


def test_between_requests_a_connection_may_rest(edge: Edge) -> None:
    with Client(edge.port) as client:
        for _ in range(2):
            client.send(get("/quick"))
            assert client.answer()[0] == 200
            time.sleep(0.5)  # longer than a head may take

        client.send(get("/quick"))
        assert client.answer()[0] == 200


def test_one_connection_too_many_is_told_so_and_the_others_are_served() -> None:
    with serving(Edge(), Limits(connections_max=2, linger_s=0.2)) as edge:
        with Client(edge.port) as first, Client(edge.port) as second, Client(edge.port) as third:
            until(lambda: edge.connections == 3, "three connections")
            assert code(third.read()) == "too_many_connections"
            for client in (first, second):
                client.send(get("/quick"))
                assert client.answer()[0] == 200
        until(lambda: not edge.connections, "no connection")
        with Client(edge.port) as fourth:
            fourth.send(get("/quick"))
            assert fourth.answer()[0] == 200


def test_nothing_says_what_it_is_made_of(edge: Edge) -> None:
    with Client(edge.port) as client:
        client.send(get("/quick", "Connection: close"))
        head = client.read().lower()

    assert b"server: tierline" in head
    assert b"uvicorn" not in head


# --- bodies -------------------------------------------------------------------------------------


CHUNKED = "POST /body HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def chunked(*pieces: bytes) -> bytes:
    head = (CHUNKED + "Transfer-Encoding: chunked\r\n\r\n").encode()
    return head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (post("/body", b"{}"), (200, None)),
        (post("/body", b'"' + b"x" * (BODY_MAX - 2) + b'"'), (200, None)),
        (chunked(b"{", b"}"), (200, None)),
        (post("/body", b"x" * (BODY_MAX + 1)), (413, "request_too_large")),
        (chunked(*[b"x" * 60_000] * 20), (413, "request_too_large")),
        (post("/body", b"{}", "Content-Type: text/plain"), (415, "unsupported_media_type")),
        (post("/body", b"{}", "Content-Type: "), (415, "unsupported_media_type")),
        (post("/body", b"{}", "Content-Encoding: gzip"), (415, "unsupported_media_type")),
        (post("/body", b"{}", "Content-Type: Application/JSON; charset=utf-8"), (200, None)),
        (post("/body", b'"\xff"'), (400, "invalid_encoding")),
        (post("/body", b'"\xed\xa0\x80"'), (400, "invalid_encoding")),  # a surrogate
        (post("/body", b"{}")[:-1], (408, "request_timeout")),
        (chunked(b"{", b"}")[:-5], (408, "request_timeout")),
    ],
)
def test_a_body_is_whole_or_refused(
    edge: Edge, sent: bytes, expected: tuple[int, str | None]
) -> None:
    with Client(edge.port) as client:
        client.send(sent)
        answered, body = client.answer()

    assert (answered, body.get("error", {}).get("code")) == expected


def test_a_large_body_is_refused_before_it_is_sent(edge: Edge) -> None:
    with Client(edge.port) as client:
        client.send(post("/body", b"", "X: y").replace(b"Length: 0", b"Length: 100000000"))
        answered, body = client.answer()
        started_s = time.monotonic()
        client.read()

    assert (answered, body["error"]["code"]) == (413, "request_too_large")
    assert time.monotonic() - started_s < 5  # and the connection ends, as the body never comes


def test_a_body_that_nobody_wanted_is_dropped_and_the_connection_stays(edge: Edge) -> None:
    with Client(edge.port) as client:
        client.send(post("/quick", b"x" * 3_000_000))
        assert client.answer()[0] == 200
        time.sleep(0.5)  # longer than a refused sender is listened to
        client.send(get("/quick"))
        assert client.answer()[0] == 200


def test_a_client_that_leaves_amid_its_body_is_gone() -> None:
    with serving(Edge()) as edge:
        with Client(edge.port) as client:
            client.send(post("/body", b"{}")[:-1])
            until(lambda: edge.connections == 1, "a connection")
        edge.await_end("gone")


# --- smuggling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 2\r\nContent-Length: 5",
        "Content-Length: +2",
        "Content-Length: 2 2",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding : chunked",
        "Content-Length: 99999999999999999999",
    ],
)
def test_a_request_with_two_lengths_is_no_request(edge: Edge, headers: str) -> None:
    """What follows it is never taken for another request."""
    smuggled = get("/late")
    with Client(edge.port) as client:
        client.send(f"{CHUNKED}{headers}\r\n\r\n".encode() + b"0\r\n\r\n" + smuggled)
        answer = client.read()

    assert status(answer) in (0, 400)  # 0: found out after its head was complete
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert not {"read", "whole"} & set(edge.ended)


def test_pipelined_requests_are_answered_in_their_order(edge: Edge) -> None:
    """Control: two requests that are whole are two."""
    with Client(edge.port) as client:
        client.send(post("/body", b"{}") + get("/quick", "Connection: close"))
        answers = client.read().split(b"HTTP/1.1 ")[1:]

    assert [a.partition(b"\r\n\r\n")[2] for a in answers] == [b'{"bytes": 2}', b'{"ok":true}']


# --- streams ------------------------------------------------------------------------------------


def events(answer: bytes) -> list[bytes]:
    return [line for line in answer.split(b"\r\n") if line.startswith((b"data", b":"))]


def test_a_stream_arrives_whole(edge: Edge) -> None:
    with Client(edge.port) as client:
        client.send(get("/count", "Connection: close"))
        answer = client.read()
        edge.await_end("whole")

    assert events(answer) == [b"data: %d\n\n" % i for i in range(100)] + [b"data: [DONE]\n\n"]
    assert b"text/event-stream" in answer
    assert answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("path", ["/wait", "/silent", "/count", "/flood"])
def test_a_client_that_leaves_ends_its_block_at_once(path: str) -> None:
    """INV-SRV-42, wherever the block waits."""
    with serving(Edge(stalled_s=30)) as edge:
        with Client(edge.port) as client:
            client.send(get(path))
            until(lambda: bool(edge.server.server_state.tasks), "a task")
            if path != "/wait":
                client.read_until(b"\r\n\r\n")
        edge.await_end("gone")

    assert edge.ended == ["gone"]


def test_an_answer_inside_of_a_watched_block_is_no_leaving(edge: Edge) -> None:
    with Client(edge.port) as client:
        for _ in range(3):
            client.send(get("/late"))
            assert client.answer()[0] == 200

    assert edge.ended == ["whole"] * 3


def test_a_reader_that_stalls_loses_its_stream_and_nobody_else_does() -> None:
    with serving(Edge(stalled_s=0.3)) as edge:  # noqa: SIM117
        with Client(edge.port, buffer_bytes=4096) as stalled, Client(edge.port) as other:
            stalled.send(get("/flood"))
            stalled.read_until(b"\r\n\r\n")
            other.send(get("/count", "Connection: close"))
            assert other.read().endswith(b"0\r\n\r\n")
            edge.await_end("stalled")
            until(lambda: not edge.connections, "the end of the connection")

    assert sorted(edge.ended) == ["stalled", "told inside", "whole"]


def test_a_slow_reader_is_not_a_stalled_one() -> None:
    """Negative control: the same stream, read all the time, lives far beyond the limit."""
    with serving(Edge(stalled_s=0.3)) as edge:
        with Client(edge.port, buffer_bytes=4096) as slow:
            slow.send(get("/flood"))
            end_s = time.monotonic() + 1.2
            while time.monotonic() < end_s:
                assert slow.socket.recv(1 << 20)
            assert edge.ended == []
        edge.await_end("gone")


def test_an_answer_that_nobody_reads_is_cut() -> None:
    """Of any kind, not only streams (INV-SRV-40)."""
    with serving(Edge(), QUICK) as edge, Client(edge.port, buffer_bytes=4096) as client:
        client.send(get("/big"))
        until(lambda: edge.connections == 1, "the connection")
        until(lambda: not edge.connections, "its end")


def test_a_silent_stream_pings() -> None:
    with serving(Edge(ping_s=0.1)) as edge, Client(edge.port) as client:
        client.send(get("/silent"))
        client.read_until(b": ping\n\n")
        client.read_until(b": ping\n\n")

    assert edge.ended in ([], ["gone"])


# --- browsers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example@127.0.0.1", False),
        ("127.0.0.1:80/evil", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_a_rebound_name_reads_nothing(edge: Edge, host: str, allowed: bool) -> None:
    """INV-SRV-43."""
    with Client(edge.port) as client:
        client.send(get("/quick", host=host))
        answered, _ = client.answer()

    assert (answered == 200) == allowed


def test_a_host_is_sent_exactly_once(edge: Edge) -> None:
    with Client(edge.port) as client:
        client.send(b"GET /quick HTTP/1.1\r\n\r\n")
        assert client.answer()[0] == 400
        client.send(get("/quick", "Host: localhost"))
        assert client.answer()[0] == 400


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1", True),
        ("http://127.0.0.1:80", True),
        ("https://127.0.0.1", False),
        ("http://127.0.0.1:9", False),
        ("http://evil.example", False),
        ("null", False),
        ("https://ours.example", True),
    ],
)
def test_a_foreign_page_changes_nothing(edge: Edge, origin: str, allowed: bool) -> None:
    with Client(edge.port) as client:
        client.send(post("/body", b"{}", f"Origin: {origin}"))
        answered, _ = client.answer()

    assert (answered == 200) == allowed
    assert bool(edge.ended) == allowed


def test_a_foreign_page_may_read_only_where_it_is_named() -> None:
    preflight = get("/quick", "Origin: https://ours.example", "Access-Control-Request-Method: POST")
    preflight = preflight.replace(b"GET", b"OPTIONS")
    shared = []
    for origins in ((), ("https://ours.example",)):
        with serving(Edge(), origins=origins) as edge, Client(edge.port) as client:
            client.send(preflight.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            shared.append(b"access-control-allow-origin" in client.read().lower())

    assert shared == [False, True]


def test_pages_say_what_they_may_load(edge: Edge) -> None:
    with Client(edge.port) as client:
        client.send(get("/quick", "Connection: close"))
        head = client.read().lower()

    for name, value in PAGE_HEADERS:
        assert name + b": " + value.lower() in head


def test_who_listens_for_others_is_called_as_they_like() -> None:
    assert allowed_hosts("0.0.0.0") is None
    assert allowed_hosts("localhost") == allowed_hosts("127.0.0.1")
    assert "gpu.example" in (allowed_hosts("0.0.0.0", "GPU.example") or ())
