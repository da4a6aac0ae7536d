"""A trace is read whatever its format, and nothing that was wrong with it passes in silence."""

import gzip
import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.errors import InputError, TierlineError, TraceError
from tierline.workload.profile import profile_trace
from tierline.workload.request import Request
from tierline.workload.trace import load_trace, read_trace, write_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
118,GPT-4,417,276,693,API log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 1500, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]}
"""
AIPERF = "\n".join(
    json.dumps(
        {
            "metadata": {
                "request_start_ns": 1759522419000000000 + i * 10**9,
                "conversation_id": "c1",
                "benchmark_phase": phase,
            },
            "metrics": {
                "input_sequence_length": {"value": 550, "unit": "tokens"},
                "output_sequence_length": {"value": 62, "unit": "tokens"},
            },
            "error": None,
        }
    )
    for i, phase in enumerate(["profiling", "warmup", "profiling"])
)
VLLM = json.dumps(
    {"input_lens": [10, 20], "output_lens": [3, 4], "start_times": [7.5, 9.0], "ttfts": [0.1, 0.2]}
)
GUIDELLM = json.dumps(
    {
        "benchmarks": [
            {
                "requests": {
                    "successful": [
                        {"prompt_tokens": 10, "output_tokens": 3, "request_start_time": 1.7e9},
                        {"prompt_tokens": 20, "output_tokens": 4, "start_time": 1.7e9 + 1.5},
                    ],
                    "errored": [{"prompt_tokens": 1, "output_tokens": 0, "start_time": 1.7e9}],
                }
            }
        ]
    },
    indent=2,
)


def _file(folder: Path, text: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "detected", "arrivals_s", "inputs"),
    [
        (AZURE, "azure", [0, 4.314579], [374, 396]),
        ("t_s,input_tokens,output_tokens\n0.5,10,2\n1.5,20,3\n", "csv", [0.5, 1.5], [10, 20]),
        ("input_tokens,output_tokens\n10,2\n20,3\n", "lengths", [0, 0], [10, 20]),
        (BURST, "burstgpt", [5, 118], [472, 417]),
        (MOONCAKE, "mooncake", [0, 1.5], [600, 700]),
        (AIPERF, "aiperf", [0, 2], [550, 550]),
        (VLLM, "vllm", [0, 1.5], [10, 20]),
        (GUIDELLM, "guidellm", [0, 1.5], [10, 20]),
    ],
    ids=lambda v: v if isinstance(v, str) and v.isalnum() else "",
)
def test_the_format_is_told_from_the_content(
    tmp_path: Path, text: str, detected: str, arrivals_s: list[float], inputs: list[int]
) -> None:
    packed = tmp_path / "no-telling-name"
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (_file(tmp_path, text), packed):
        reader = read_trace(path)
        requests = list(reader)

        assert reader.format == detected
        assert [r.arrival_ns / 1e9 for r in requests] == pytest.approx(arrivals_s)
        assert [r.input_tokens for r in requests] == inputs
        assert reader.has_arrivals == (detected != "lengths")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1700000000", "1700000002"),
        ("1700000000000", "1700000002000"),
        ("1700000000000000", "1700000002000000"),
        ("1700000000000000000", "1700000002000000000"),
        ("2023-11-14T22:13:20Z", "2023-11-14T22:13:22+00:00"),
        ("2023-11-14 22:13:20.0", "2023-11-14 22:13:22.0000000"),
    ],
)
def test_a_request_log_is_read_by_a_mapping_and_its_clock_is_recognised(
    tmp_path: Path, first: str, second: str
) -> None:
    mapping = {"arrival": "ts", "input": "prompt_tokens", "output": "out", "tenant": "who"}
    text = f"who,ts,prompt_tokens,out\na,{first},5,6\nb,{second},7,8\n"
    requests = list(read_trace(_file(tmp_path, text), mapping=mapping))

    assert [r.arrival_ns for r in requests] == [0, 2 * 10**9]
    assert [r.tenant for r in requests] == ["a", "b"]


def test_a_mapping_reaches_into_json_by_dotted_paths(tmp_path: Path) -> None:
    line = json.dumps({"at": 3, "usage": {"prompt_tokens": 5, "completion_tokens": 6}})
    mapping = {
        "arrival": "at",
        "input": "usage.prompt_tokens",
        "output": "usage.completion_tokens",
        "arrival_unit": "ms",
    }
    (request,) = read_trace(_file(tmp_path, line + "\n"), mapping=mapping)

    assert (request.arrival_ns, request.input_tokens, request.output_tokens) == (3_000_000, 5, 6)


def _mooncake_rows(count: int) -> list[str]:
    row = {"input_length": 600, "output_length": 5, "hash_ids": [0]}
    return [json.dumps({"timestamp": i} | row) for i in range(count)]


def test_broken_rows_are_counted_with_their_lines_and_left_out(tmp_path: Path) -> None:
    rows = _mooncake_rows(500)
    rows[9] = rows[9].replace("600", "-600")
    rows[19] = '{"timestamp": 19'
    rows[29] = rows[29].replace('"output_length": 5, ', "")
    reader = read_trace(_file(tmp_path, "\n".join(rows)))
    requests = list(reader)

    assert len(requests) == 497
    assert reader.report.broken == 3
    assert [line for line, _ in reader.report.broken_lines] == [10, 20, 30]
    assert "-600 is not positive" in reader.report.broken_lines[0][1]
    assert "3 of 500 rows are broken" in reader.report.sentences()[0]


def test_too_many_broken_rows_are_an_error_that_can_be_overridden(tmp_path: Path) -> None:
    rows = _mooncake_rows(100)
    rows[4] = rows[5] = "nonsense"
    path = _file(tmp_path, "\n".join(rows))

    with pytest.raises(TraceError, match="2 of 100 rows are broken") as caught:
        list(read_trace(path))
    assert "0.01" in caught.value.hint
    assert len(list(read_trace(path, broken_max=0.02))) == 98


def test_on_error_fail_stops_at_the_first_broken_row(tmp_path: Path) -> None:
    rows = _mooncake_rows(1000)
    rows[4] = "nonsense"

    with pytest.raises(TraceError, match="line 5"):
        list(read_trace(_file(tmp_path, "\n".join(rows)), on_error="fail"))


def test_failed_requests_are_left_out_and_said(tmp_path: Path) -> None:
    reader = read_trace(_file(tmp_path, BURST))
    list(reader)

    assert reader.report.failed == 1
    assert "1 failed" in reader.report.sentences()[0]


def test_unsorted_arrivals_are_counted_and_loading_sorts_them(tmp_path: Path) -> None:
    text = "t_s,input_tokens,output_tokens\n3,1,1\n1,2,1\n2,3,1\n"
    reader = read_trace(_file(tmp_path, text))
    requests = load_trace(reader)

    assert reader.report.unsorted == 1
    assert [r.input_tokens for r in requests] == [2, 3, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"t_s,input_tokens,output_tokens\n", "a header and no rows"),
        (b'{"tierline_trace": 1, "block_tokens": 512}\n', "a header and no rows"),
        (b'{"tierline_trace": 2, "block_tokens": 512}\n{}\n', "version 1"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not text"),
        (b"a\0b\n", "is not text"),
        (b"hello,world\n1,2\n", "no format that is known"),
        (b'{"request_count": {"avg": 3},\n "input_sequence_length": {}}', "without requests"),
        (b'{"broken": \n', "neither JSON lines nor a JSON document"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)

    with pytest.raises(TraceError, match=message) as caught:
        list(read_trace(path))
    assert caught.value.hint


def test_a_missing_file_and_wrong_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    path = _file(tmp_path, MOONCAKE)

    with pytest.raises(InputError, match="cannot read"):
        read_trace(tmp_path / "absent")
    with pytest.raises(TraceError) as caught:
        read_trace(path, format="moncake")
    assert "mooncake" in caught.value.hint
    with pytest.raises(TraceError) as caught:
        read_trace(path, mapping={"inptu": "x"})
    assert "'input'" in caught.value.hint
    csv = _file(tmp_path, "ts,prompt,out\n1,2,3\n", "log.csv")
    with pytest.raises(TraceError) as caught:
        list(read_trace(csv, mapping={"input": "promt", "output": "out"}))
    assert "'prompt'" in caught.value.hint


def test_a_truncated_gzip_says_how_far_it_was_readable(tmp_path: Path) -> None:
    rows = [f"{i},{i * 7919 % 1000 + 1},{i * 104729 % 500 + 1}" for i in range(50_000)]
    text = "t_s,input_tokens,output_tokens\n" + "\n".join(rows)
    path = tmp_path / "trace.gz"
    packed = gzip.compress(text.encode())
    path.write_bytes(packed[: len(packed) // 2])

    with pytest.raises(TraceError, match=r"damaged gzip file after line \d+, \d+ requests"):
        list(read_trace(path))
    reader = read_trace(path, allow_truncated=True)
    assert 0 < len(list(reader)) < 50_000
    assert reader.report.truncated
    path.write_bytes(packed)
    assert len(list(read_trace(path))) == 50_000


REQUESTS = st.builds(
    Request,
    arrival_ns=st.integers(0, 10**15),
    input_tokens=st.integers(1, 10**6),
    output_tokens=st.integers(1, 10**6),
    prefix_blocks=st.lists(st.integers(0, 2**62), max_size=5).map(tuple),
    session=st.text("abc1", max_size=3),
    tenant=st.text("abc1", max_size=3),
    priority=st.integers(-5, 5),
    model=st.sampled_from(["", "llama-3.1-8b"]),
    deadline_ns=st.none() | st.integers(1, 10**15),
)


@given(requests=st.lists(REQUESTS, min_size=1, max_size=20), packed=st.booleans())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Request], packed: bool
) -> None:
    path = tmp_path_factory.mktemp("trace") / ("trace.jsonl.gz" if packed else "trace.jsonl")
    count = write_trace(path, requests, block_tokens=16)
    reader = read_trace(path)

    assert count == len(requests)
    assert list(reader) == requests
    assert reader.block_tokens == 16
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == packed


def test_client_rates_give_arrivals_at_the_given_rate(data_dir: Path) -> None:
    path = data_dir / "traces/servegen_client_rates.csv.gz"
    selection = {"workload": "deepseek-r1", "duration_s": "1200", "seed": "3"}
    reader = read_trace(path, mapping=selection)
    requests = list(reader)
    text = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
    rows = [line.split(",") for line in text]
    expected = sum(
        600 * float(r[3]) for r in rows if r[0] == "deepseek-r1" and float(r[2]) in (0.0, 600.0)
    )

    assert len(requests) == pytest.approx(expected, rel=0.05)
    assert requests == list(reader)
    assert requests != list(read_trace(path, mapping=selection | {"seed": "4"}))
    assert all(a.arrival_ns <= b.arrival_ns for a, b in pairwise(requests))
    assert "seed 3" in reader.report.sentences()[0]
    with pytest.raises(TraceError, match="several workloads"):
        list(read_trace(path))


STARTS = st.sampled_from(
    [
        b"",
        b"t_s,input_tokens,output_tokens\n1,2,3\n",
        MOONCAKE.encode(),
        AIPERF.encode() + b"\n",
        VLLM.encode(),
        GUIDELLM.encode(),
        b'{"tierline_trace": 1, "block_tokens": 512}\n',
        b"workload,client,t_s,rate_rps,cv,pattern,p0,p1\n",
    ]
)
VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    "timestamp",
    "input_length",
    "output_length",
    "hash_ids",
    "metadata",
    "metrics",
    "arrival_ns",
    "input_tokens",
    "output_tokens",
    "prefix_blocks",
    "priority",
    "input_lens",
    "output_lens",
    "start_times",
    "benchmarks",
    "requests",
]
RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(KEYS),
        VALUES,
    ),
    max_size=4,
).map(lambda records: "\n".join(json.dumps(r) for r in records).encode())


@given(start=STARTS, rest=st.binary(max_size=60) | RECORDS)
def test_no_file_whatever_is_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "trace"
    path.write_bytes(start + rest)
    requests = None
    with suppress(TierlineError):
        requests = profile_trace(read_trace(path, broken_max=0.9)).requests

    assert requests is None or requests > 0


def test_block_ids_may_be_text_or_unsigned_hashes(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 600, "output_length": 5}
    ids = [["a", "b"], ["a", "c"], [2**64 - 1, 7]]
    text = "\n".join(json.dumps(row | {"hash_ids": i}) for i in ids)
    first, second, third = (r.prefix_blocks for r in read_trace(_file(tmp_path, text)))

    assert first[0] == second[0]
    assert first[1] != second[1]
    assert third == (2**63 - 1, 7)
