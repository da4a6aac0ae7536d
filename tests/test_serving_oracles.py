"""The scheduler and the simulator give the numbers that the specification works out by hand."""

from array import array
from dataclasses import replace

import pytest

from tierline.base.clock import FOREVER_PS, PS_PER_MS, PS_PER_S
from tierline.base.errors import DoesNotFitError
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.speculation import tokens_per_pass
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.policy import FCFS, TIERLINE, Policy
from tierline.scheduling.scheduler import Limits
from tierline.scheduling.sequence import Sequence
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance, build_instance
from tierline.sim.record import Requests

COST = StepCost(
    load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=4)
)
KV_TOKEN_BYTES = 327_680  # of a 70B with 8 KV heads in 16 bit


def instance(*, chunk: int = 512, device_bytes: int = 180 * 10**9, drafts: int = 0) -> Instance:
    return build_instance(
        COST,
        name="70B on 4 H100",
        block_tokens=16,
        limits=Limits(
            batch_tokens=chunk, sequences_max=256, chunk_tokens=chunk, draft_tokens=drafts
        ),
        device_bytes=device_bytes,
    )


def served(of: Instance, policy: Policy, sequences: list[Sequence]) -> tuple[Fleet, Requests]:
    """All of them to their last token; outputs are their limits."""
    requests = Requests(len(sequences))
    outputs = array("q", [s.output_max_tokens for s in sequences])
    fleet = Fleet(
        [of.replica(0, policy, seed=7)],
        arrivals=iter(sequences),
        outputs=outputs,
        requests=requests,
    )
    fleet.run()
    return fleet, requests


def request(number: int, prompt: int, outputs: int, **fields: object) -> Sequence:
    fields = {"arrival_ps": 0, **fields}
    return Sequence(number, prompt_tokens=prompt, output_max_tokens=outputs, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "admitted"), [(4096, 134), (8192, 67), (16_384, 33), (32_768, 16)]
)
def test_a_pool_of_180_gb_admits_what_was_worked_out(prompt, admitted):
    """4 x 80 GB less 140 GB of weights: 50 users of 16K do not fit, 10 do."""
    scheduler = instance(chunk=16_000).replica(0, FCFS).scheduler
    for number in range(200):
        scheduler.add(request(number, prompt, 1))
    before = -1
    while scheduler.running != before:  # nobody ends: prompts pile up until memory is full
        before = scheduler.running
        for _ in range(4):
            scheduler.complete(scheduler.next_step(0, 1), 1, (), 0)

    # One more may have begun its chunks; a block each for first tokens may cost one prompt.
    assert len(scheduler.decoding) in (admitted, admitted - 1)
    assert not scheduler.preemptions


def test_a_prompt_over_the_pool_is_refused_before_anything_is_computed():
    scheduler = instance(device_bytes=1000 * KV_TOKEN_BYTES).replica(0, FCFS).scheduler

    with pytest.raises(DoesNotFitError, match="5000 tokens"):
        scheduler.add(request(0, 5000, 10))
    assert scheduler.next_step(0, 1).empty


def test_only_the_new_turn_is_computed():
    """12,000 tokens of history are cached, 50 are new: 50 of 12,050 are computed."""
    names = list(range(800))
    first = request(0, 12_000, 1, chain=names)
    second = request(1, 12_050, 1, chain=names, arrival_ps=60 * PS_PER_S)
    fleet, columns = served(instance(), FCFS, [first, second])

    assert columns.cached_tokens[1] == 12_000
    assert fleet.replicas[0].totals.prefill_tokens == 12_050


def longest_gap_ms(of: Instance, policy: Policy) -> float:
    """A stream with an ITL target of 50 ms, while a prompt of 16,000 tokens arrives."""
    stream = request(0, 100, 400, itl_ps=50 * PS_PER_MS, due_ps=PS_PER_S)
    prompt = request(1, 16_000, 1, arrival_ps=2 * PS_PER_S, due_ps=30 * PS_PER_S)
    _, columns = served(of, policy, [stream, prompt])
    return columns.itl_max_ps[0] / PS_PER_MS


def test_a_long_prompt_never_breaks_a_stream_that_was_promised_its_pace():
    plain = replace(TIERLINE, adaptive_chunk=False)
    chunk_s = COST.step_s(1, 500, 2048, 2048 * 15_000)

    assert longest_gap_ms(instance(chunk=2048), TIERLINE) <= 50
    # One chunk and one decode bound the gap of whoever sizes nothing.
    assert 50 < longest_gap_ms(instance(chunk=2048), plain) <= chunk_s * 1e3 + 20
    # Negative control: the prompt in one piece stops the stream for its whole length.
    assert longest_gap_ms(instance(chunk=16_300), plain) > 1000


@pytest.mark.parametrize(
    ("alpha", "tokens"), [(0.0, 1.0), (0.5, 1.9688), (0.8, 3.6893), (1.0, 6.0)]
)
def test_speculation_emits_what_the_table_says(alpha, tokens):
    """K = 5 drafts accepted one by one with probability alpha: E = (1 - a^6) / (1 - a)."""
    of = replace(instance(drafts=5), acceptance=alpha, draft_s=0.005)
    outputs = 3001
    fleet, columns = served(of, FCFS, [request(n, 64, outputs) for n in range(4)])
    totals = fleet.replicas[0].totals
    mean = 4 * (outputs - 1) / totals.decode_tokens  # decode_tokens counts verified steps

    assert tokens_per_pass(alpha, 5) == pytest.approx(tokens, abs=1e-4)
    assert mean == pytest.approx(tokens, rel=0.02)
    assert set(columns.output_tokens) == {outputs}


def test_speculation_changes_no_count_of_tokens_and_leaks_nothing():
    sequences = [request(n, 100 + n, 20 + n, due_ps=FOREVER_PS) for n in range(40)]
    of = replace(instance(drafts=3), acceptance=0.6)
    fleet, columns = served(of, TIERLINE, sequences)
    scheduler = fleet.replicas[0].scheduler
    scheduler.check()

    assert list(columns.output_tokens) == [20 + n for n in range(40)]
    assert scheduler.pages.free == scheduler.pages.total
