"""Prompts computed in one pool and decoded in another take what the closed form says, and the
memory that either side holds for the other is given back whatever happens between."""

from dataclasses import replace
from random import Random

import pytest

from fleets import BLOCK_TOKENS, small_instance, small_workload
from tierline.base.clock import PS_PER_MS, PS_PER_S
from tierline.catalog.deployment import Disaggregation
from tierline.kv.transfer import DEVICE, REMOTE
from tierline.perf.transfer import pipelined_s
from tierline.sim.api import simulate
from tierline.sim.faults import parse_fault
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance
from tierline.sim.record import FINISHED, Run
from tierline.workload.request import Request

SPLIT = Disaggregation(prefill_instances=1, decode_instances=1)
ROOMY = small_instance(blocks=600)
BUSY = small_workload(Random(3), count=60, rate_rps=60)


def run(
    requests: list[Request] = BUSY,
    *faults: str,
    instance: Instance = ROOMY,
    pools: Disaggregation | None = SPLIT,
    **options: object,
) -> Run:
    replicas = pools.prefill_instances + pools.decode_instances if pools else 2
    return simulate(
        instance,
        requests,
        levels=(),
        replicas=replicas,
        trace_block_tokens=BLOCK_TOKENS,
        disaggregation=pools,
        faults=[parse_fault(text) for text in faults],
        check=True,
        **options,  # type: ignore[arg-type]
    )


def one(input_tokens: int, output_tokens: int = 5) -> list[Request]:
    return [Request(arrival_ns=0, input_tokens=input_tokens, output_tokens=output_tokens)]


def moved(run: Run, kind: str = "handover") -> list[int]:
    return [replica.moved_bytes.get(kind, 0) for replica in run.replicas]


@pytest.mark.parametrize("slower", [1, 10, 40])  # from hidden transfers to exposed ones
@pytest.mark.parametrize("input_tokens", [500, 1000, 4096, 20_000])
def test_one_request_takes_what_the_closed_form_says(input_tokens: int, slower: int) -> None:
    specs = dict(ROOMY.tier_specs)
    specs[REMOTE] = replace(specs[REMOTE], read_bytes_per_s=specs[REMOTE].read_bytes_per_s / slower)
    instance = replace(ROOMY, tier_specs=specs)
    r = run(one(input_tokens), instance=instance).requests
    link = instance.links()[(REMOTE, DEVICE)]
    latency_s = link.duration_ps(0) / PS_PER_S
    size_bytes = -(-input_tokens // BLOCK_TOKENS) * instance.block_bytes
    prefill_s = instance.line().prefill_ps(input_tokens, chunk=512) / PS_PER_S
    transfer_s = link.duration_ps(size_bytes) / PS_PER_S - latency_s
    layers = instance.cost.model.layers
    closed_s = pipelined_s(prefill_s, transfer_s, layers=layers) + latency_s
    one_byte_ps = PS_PER_S / link.bytes_per_s

    assert r.first_ps[0] == pytest.approx(closed_s * PS_PER_S, abs=one_byte_ps + 2)
    assert r.replica[0] == 1
    # Control: without the pipeline the whole transfer would follow the whole prompt.
    assert closed_s < prefill_s + transfer_s - 0.9 * min(prefill_s, transfer_s)


def test_a_short_prompt_and_a_last_token_stay_where_they_are() -> None:
    short, said = run(one(400)), run(one(4000, output_tokens=1))

    assert (short.requests.replica[0], said.requests.replica[0]) == (0, 0)
    assert moved(short) == moved(said) == [0, 0]


def test_everybody_goes_over_once_and_finishes_there() -> None:
    done = run()
    r = done.requests
    there = [i for i in range(len(r)) if r.replica[i] == 1]
    blocks = sum(-(-r.input_tokens[i] // BLOCK_TOKENS) for i in there)

    assert r.outcome.count(FINISHED) == len(BUSY)
    assert len(there) > len(BUSY) / 2
    assert moved(done) == [0, blocks * ROOMY.block_bytes]
    assert all(r.output_tokens[i] == BUSY[i].output_tokens for i in range(len(r)))


def test_prompts_do_not_disturb_streams_in_another_pool() -> None:
    """What the pools are for; the same replicas together are the control."""
    long = [Request(arrival_ns=0, input_tokens=1000, output_tokens=400)]
    long += [
        Request(arrival_ns=10**8 * (i + 1), input_tokens=6000, output_tokens=2) for i in range(20)
    ]
    apart = run(long, policy="fcfs")
    together = run(long, pools=None, policy="fcfs", routing="round-robin")

    assert apart.requests.itl_max_ps[0] < 0.8 * together.requests.itl_max_ps[0]


def test_a_lost_transfer_is_sent_again_whole() -> None:
    well, lost = run(one(8000)), run(one(8000), "lost-transfer:replica=1,at=0s")

    assert lost.requests.outcome[0] == FINISHED
    assert lost.requests.replica[0] == 1
    assert moved(lost)[1] == 2 * moved(well)[1]
    waited_ps = lost.requests.first_ps[0] - well.requests.first_ps[0]
    assert 0 < waited_ps < ROOMY.links()[(REMOTE, DEVICE)].duration_ps(moved(well)[1]) + PS_PER_MS


def _handed_over_ps() -> int:
    """When the cache of one long prompt is on its way, over a link that is slow from the start."""
    prefill_ps = ROOMY.line().prefill_ps(8000, chunk=512)
    return prefill_ps + 5 * PS_PER_MS


CLOGGED = "link:replica=1,tier=remote,at=0s,factor=0.01"


def test_a_sender_that_dies_leaves_the_prompt_to_the_receiver() -> None:
    at_ms = _handed_over_ps() // PS_PER_MS
    done = run(one(8000), CLOGGED, f"dies:replica=0,at={at_ms}ms")
    r = done.requests

    assert (r.outcome[0], r.replica[0]) == (FINISHED, 1)
    assert done.replicas[1].prefill_tokens >= 8000, "it was computed again there"


def test_a_receiver_that_dies_gives_the_sender_its_memory_back() -> None:
    at_ms = _handed_over_ps() // PS_PER_MS
    done = run(one(8000), CLOGGED, f"dies:replica=1,at={at_ms}ms")
    r = done.requests

    assert (r.outcome[0], r.replica[0]) == (FINISHED, 0), "nobody else decodes"
    assert done.replicas[0].prefill_tokens >= 8000 + 64


def test_a_receiver_that_is_gone_before_the_prompt_is_done_is_replaced() -> None:
    pools = Disaggregation(prefill_instances=1, decode_instances=2)
    done = run(one(8000), "dies:replica=1,at=100ms", pools=pools)
    late = run(one(8000), pools=pools)

    assert done.requests.replica[0] == 2
    assert late.requests.replica[0] == 1
    assert done.requests.first_ps[0] > late.requests.first_ps[0], "nothing was sent ahead"


def test_a_full_decode_pool_leaves_decoding_to_the_prefill_pool() -> None:
    tight = small_instance(blocks=60)
    requests = [Request(arrival_ns=i, input_tokens=1500, output_tokens=200) for i in range(8)]
    done = run(requests, instance=tight)
    by_replica = [done.requests.replica.tolist().count(n) for n in (0, 1)]

    assert done.requests.outcome.count(FINISHED) == 8
    assert min(by_replica) > 0
    assert all(replica.preemptions == 0 for replica in done.replicas[1:])


def test_receivers_are_filled_evenly() -> None:
    pools = Disaggregation(prefill_instances=1, decode_instances=3)
    requests = [
        Request(arrival_ns=i * 10**7, input_tokens=2000, output_tokens=300) for i in range(9)
    ]
    served = run(requests, pools=pools).requests.replica.tolist()

    assert sorted(served) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_only_the_prefill_pool_is_routed_to() -> None:
    seen: list[Fleet] = []
    pools = Disaggregation(prefill_instances=2, decode_instances=2)
    done = run(pools=pools, prepare=seen.append)

    assert [r.number for r in seen[0].groups[0]] == [0, 1]
    assert done.replicas[2].prefill_tokens < done.replicas[0].prefill_tokens / 100
