"""A mix has the shares, the lengths and the rate that were asked for, from a seed."""

from collections import Counter
from itertools import islice, pairwise

import pytest

from tierline.base.errors import InputError
from tierline.cli import main
from tierline.workload.mix import Part, lengths_of, mixed, read_part
from tierline.workload.trace import read_trace

CHAT = Part(name="chat", priority=2, share=3, lengths=[(10, 1), (20, 2), (30, 3)])
BATCH = Part(name="batch", priority=0, share=1, lengths=[(1000, 7)])


def drawn(count=8000, *, seed=1, rate_rps=5.0, parts=(CHAT, BATCH)):
    return list(islice(mixed(parts, rate_rps=rate_rps, seed=seed), count))


def test_shares_lengths_and_rate_are_those_asked_for():
    requests = drawn()
    by_class = Counter(r.priority for r in requests)

    assert by_class[2] / len(requests) == pytest.approx(0.75, abs=0.02)
    assert requests[-1].arrival_ns / 1e9 == pytest.approx(len(requests) / 5, rel=0.05)
    assert {(r.input_tokens, r.output_tokens) for r in requests if r.priority == 2} == set(
        CHAT.lengths
    )
    assert all(b.arrival_ns >= a.arrival_ns for a, b in pairwise(requests))


def test_a_mix_is_a_function_of_its_seed():
    assert drawn(500) == drawn(500)
    assert drawn(500) != drawn(500, seed=2)


@pytest.mark.parametrize(
    ("parts", "rate_rps", "said"),
    [
        ((), 1.0, "0 classes"),
        ((CHAT,), 0.0, "0 requests/s"),
        ((Part(name="x", priority=0, share=1, lengths=[]),), 1.0, "nothing to draw"),
        ((Part(name="x", priority=0, share=0, lengths=[(1, 1)]),), 1.0, "share of 0"),
    ],
)
def test_what_makes_no_trace_is_said(parts, rate_rps, said):
    with pytest.raises(InputError, match=said):
        mixed(parts, rate_rps=rate_rps, seed=1)


@pytest.mark.parametrize(
    "text", ["chat", "chat=a.csv", "chat@high:1=a.csv", "chat:0=a.csv", ":1=a"]
)
def test_a_class_that_is_not_one_is_said(text):
    with pytest.raises(InputError, match="NAME@PRIORITY"):
        read_part(text)


def test_long_prompts_can_be_left_out(data_dir):
    trace = data_dir / "traces" / "mooncake_conversation.jsonl.gz"

    assert max(a for a, _ in lengths_of(read_trace(trace), below_tokens=30_000)) < 30_000
    assert max(a for a, _ in lengths_of(read_trace(trace))) > 30_000


def test_the_command_writes_a_mix(tmp_path, data_dir):
    out = tmp_path / "mix.jsonl"
    traces = data_dir / "traces"
    classes = [
        f"chat@2:0.8={traces / 'azure2023_conv.csv.gz'}",
        f"batch@0:0.2={traces / 'arxiv_summarization_lengths.csv.gz'}",
    ]
    argv = ["synthesize", "--mix", *classes, "--rps", "4", "--requests", "400", "-o", str(out)]

    assert main(argv) == 0
    requests = list(read_trace(out))
    assert len(requests) == 400
    assert 40 < sum(r.priority == 0 for r in requests) < 130
    assert main([*argv, "--arrivals", "day"]) == 2
    assert main(["synthesize", "--mix", *classes, "--workload", "chat", "-o", str(out)]) == 2
