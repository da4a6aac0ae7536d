"""Prompts computed in one pool of replicas and decoded in another, in a simulated fleet.

`simulate(disaggregation=...)` makes one, and prefill replicas call it.  Who receives, and
whether it pays, is decided by `scheduling.disaggregation` when a prompt begins, so that its
cache can follow layer by layer.  When the prompt is computed, what has not been sent yet
goes over the receiver's link from the network; the decode replica takes memory for it, and
the first token is delivered when the last layer has arrived:

    first token = begin + p + x + (L - 1) max(p, x) + latency
    p = prefill / L, x = bytes / rate / L

The sender keeps its copy until then.  A transfer that is lost is sent again, whole; when the
sender is gone, the decode replica computes the prompt itself.  Left out: contention where
several prompts leave one sender, and what layers sent early take from others on the link.

Invariants
    INV-SIM-44  memory held for a handover is given back when its bytes have landed, or when
                either side has died
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tierline.kv.transfer import DEVICE, REMOTE, Transfer
from tierline.scheduling.disaggregation import hand_over, pipelined_ps, receiver
from tierline.scheduling.sequence import LOADING, Sequence
from tierline.scheduling.step import Step
from tierline.sim.replica import Replica

WAY = (REMOTE, DEVICE)


@dataclass(slots=True, kw_only=True)
class _Handover:
    """One sequence on its way from one replica to another."""

    sender: Replica
    original: Sequence
    receiver: Replica | None  # None: it is decoded where its prompt was computed
    tokens: int  # that it will come to hold
    begun_ps: int  # since then layers could follow
    copy: Sequence | None = None  # there, once its prompt is computed
    bytes_left: int = -1  # to be sent; -1: all


class Room:
    """A decode replica, as `scheduling.disaggregation` asks for it.

    Memory counts as taken to the end of every output, so that nobody has to be preempted.
    """

    def __init__(self, replica: Replica, *, promised_tokens: int) -> None:
        self.number, self.accepting = replica.number, replica.accepting
        layout = replica.scheduler.layout
        blocks = replica.scheduler.pages.total // layout.pages_per_block
        self.kv_tokens_total = blocks * layout.block_tokens
        committed = replica.tokens_committed + promised_tokens
        self.kv_tokens_free = self.kv_tokens_total - committed


class Pools:
    """Who receives which sequence, and what is under way."""

    def __init__(self, decoders: Seq[Replica], *, layers: int) -> None:
        """`decoders` may grow while the fleet runs."""
        self.decoders, self.layers = decoders, layers
        self._handovers: dict[int, _Handover] = {}  # by request

    # --- what prefill replicas call ---------------------------------------------------------

    def begins(self, replica: Replica, step: Step, now_ps: int) -> None:
        """A step with prompts begins: those that are new find their receiver."""
        for s, _ in step.chunks:
            if s.first_ps < 0 and s.id not in self._handovers and not replica.decodes_only:
                self._handovers[s.id] = self._choose(replica, s, now_ps)

    def _choose(self, replica: Replica, s: Sequence, now_ps: int) -> _Handover:
        tokens = s.prompt_tokens + s.output_max_tokens
        prefill_ps = replica.line.prefill_ps(
            s.target_tokens - s.cached_tokens,
            past=s.cached_tokens,
            chunk=replica.scheduler.limits.chunk_tokens,
        )
        answer = hand_over(
            self._rooms(s),
            prompt_tokens=s.prompt_tokens,
            tokens=tokens,
            prefill_ps=prefill_ps,
            transfer_ps=min((_transfer_ps(d, s) for d in self.decoders), default=0),
            layers=self.layers,
            slack_ps=s.due_ps - now_ps - prefill_ps,
        )
        return _Handover(
            sender=replica,
            original=s,
            receiver=None if answer.number is None else self._decoder(answer.number),
            tokens=tokens,
            begun_ps=now_ps,
        )

    def _rooms(self, s: Sequence) -> list[Room]:
        promised = dict.fromkeys((d.number for d in self.decoders), 0)
        for handover in self._handovers.values():
            if handover.receiver is not None and handover.copy is None:
                promised[handover.receiver.number] += handover.tokens
        return [
            Room(d, promised_tokens=promised[d.number]) for d in self.decoders if d.could_hold(s)
        ]

    def _decoder(self, number: int) -> Replica:
        return next(d for d in self.decoders if d.number == number)

    def hands_over(self, replica: Replica, sequence: Sequence, now_ps: int) -> bool:
        """Whether a computed prompt is decoded elsewhere."""
        handover = self._handovers.get(sequence.id)
        if handover is None or handover.sender is not replica:
            return False
        chosen = handover.receiver
        if chosen is not None and not chosen.accepting:  # gone since; nothing was sent to another
            handover.receiver, handover.begun_ps = None, now_ps
            number = receiver(self._rooms(sequence), tokens=handover.tokens)
            if number is not None:
                handover.receiver = self._decoder(number)
        if handover.receiver is None:
            del self._handovers[sequence.id]
        return handover.receiver is not None

    def handed_over(self, sequence: Sequence, now_ps: int) -> None:
        """It was computed here, and its cache leaves now."""
        handover = self._handovers[sequence.id]
        there = handover.receiver
        assert there is not None
        copy = handover.copy = sequence.anew()
        copy.generated_tokens = 1
        copy.target_tokens = sequence.prompt_tokens + 1
        copy.cached_tokens = copy.parked_tokens = sequence.prompt_tokens
        copy.parked_tier = REMOTE
        copy.admitted_ps, copy.preemptions = sequence.admitted_ps, sequence.preemptions
        copy.hit_tokens, copy.loaded_tokens = sequence.hit_tokens, sequence.loaded_tokens
        prefill_ps, whole_ps = now_ps - handover.begun_ps, _transfer_ps(there, sequence)
        total_ps = pipelined_ps(prefill_ps=prefill_ps, transfer_ps=whole_ps, layers=self.layers)
        handover.bytes_left = -(-_bytes(there, sequence) * (total_ps - prefill_ps) // whole_ps)
        there.arrive(copy, now_ps)

    def finished(self, sequence: Sequence) -> None:
        """It said all it had to say where its prompt was computed."""
        self._handovers.pop(sequence.id, None)

    # --- what decode replicas call ----------------------------------------------------------

    def sends(self, transfer: Transfer) -> None:
        """A handover starts to move: of the first attempt, part has been sent already."""
        handover = self._handovers[transfer.waiters[0].id]
        if handover.bytes_left >= 0:
            transfer.bytes, handover.bytes_left = max(handover.bytes_left, 1), -1

    def landed(self, replica: Replica, transfer: Transfer, now_ps: int) -> None:
        """Its last layer has arrived: the first token is delivered."""
        copy = transfer.waiters[0]
        replica.first_token(copy, now_ps)
        self._release(self._handovers.pop(copy.id), now_ps)

    def lost(self, transfer: Transfer) -> None:
        """It has to be sent again, or computed again."""
        copy = transfer.waiters[0]
        handover = self._handovers[copy.id]
        if _keeps(handover):
            copy.cached_tokens = copy.parked_tokens = copy.prompt_tokens
        else:
            del self._handovers[copy.id]

    # --- what the fleet calls ---------------------------------------------------------------

    def expects(self, replica: Replica, sequence: Sequence) -> bool:
        """Whether what the replica keeps of a computed prompt is still to be sent."""
        handover = self._handovers.get(sequence.id)
        return handover is not None and handover.sender is replica and handover.original is sequence

    def died(self, replica: Replica, now_ps: int) -> None:
        """A replica is gone, with what it kept for others and what was on its way there."""
        for i, handover in list(self._handovers.items()):
            copy, there = handover.copy, handover.receiver
            if handover.sender is replica:
                if copy is None or there is None:
                    del self._handovers[i]
                else:
                    self._without_sender(there, copy, now_ps)
            elif there is replica and copy is not None:
                del self._handovers[i]
                self._release(handover, now_ps)

    def _without_sender(self, there: Replica, copy: Sequence, now_ps: int) -> None:
        if copy.state == LOADING:
            under_way = [t for t in there.under_way(REMOTE) if copy in t.waiters]
            there.lose(under_way[0], now_ps)
        else:
            copy.cached_tokens = copy.parked_tokens = 0
            del self._handovers[copy.id]

    def _release(self, handover: _Handover, now_ps: int) -> None:
        """The sender's copy is needed no more."""
        if _keeps(handover):
            handover.sender.scheduler.released(handover.original, now_ps)
            handover.sender.cut(now_ps)


def _keeps(handover: _Handover) -> bool:
    """Whether the sender still has what it sends."""
    held_back = handover.sender.scheduler.held_back
    return held_back.get(handover.original.id) is handover.original


def _bytes(replica: Replica, s: Sequence) -> int:
    """What the cache of a prompt weighs."""
    blocks = -(-s.prompt_tokens // replica.scheduler.layout.block_tokens)
    return blocks * replica.scheduler.index.block_bytes


def _transfer_ps(replica: Replica, s: Sequence) -> int:
    """How long that takes to a replica, without the latency."""
    link = replica.links[WAY]
    return max(link.duration_ps(_bytes(replica, s)) - link.duration_ps(0), 1)
