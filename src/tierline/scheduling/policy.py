"""Who goes first, who gives way, how long a chunk may be: small functions, and a table.

A policy is data.  Its order is a key that is fixed when a request enters the queue: slack,
aging and fair shares are written as instants, so a heap stays sorted while time passes.

The tierline policy.  Everybody has a deadline, given or that of a patient class, and the
earliest goes first.  That *is* aging: a request is overtaken only by those that arrive before
its deadline and want their token before it.  These mechanisms keep that order good under load:

- shedding: when not everybody can be on time, the longest of those that would be late step
  back (Moore and Hodgson 1968: the most on-time starts), so that nobody drags others down;
- overtaking: prompts under way and newcomers are served in one order, chunk by chunk;
- adaptive chunks: no step breaks the promise of a stream that runs (`chunking`);
- background: whoever can wait for minutes goes behind, until its deadline is near;
- floors: background and late work have a share of the tokens admitted.  Who is below it goes
  first, with a part of each step, so that nobody who can be on time is held up for long;
- giving way: background leaves, prompt or stream, for a prompt that can be on time and has
  no room; it enters only where its predicted end has room, too (`foresees`);
- debts: a tenant above its share is delayed by what a fair server would delay it.

Nobody starves (INV-SCHED-1, proven in docs/concepts/scheduling.md): who can be on time enters
before its deadline or steps back; who stepped back, with Q tokens of service before it,
enters before (Q + 2M) 100/f others are admitted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.scheduling.sequence import BACKGROUND, ON_TIME, Sequence

PATIENT_PS = 60 * PS_PER_S  # whoever may wait longer than this for a first token is background


# --- orders: smaller goes first --------------------------------------------------------------


def by_arrival(sequence: Sequence) -> Any:
    """First come, first served."""
    return sequence.arrival_ps


def by_length(sequence: Sequence) -> Any:
    """Shortest prompt first."""
    return (sequence.prompt_tokens, sequence.arrival_ps)


def by_rank(sequence: Sequence) -> Any:
    """Static priority: the more urgent class first."""
    return (sequence.rank, sequence.arrival_ps)


def by_deadline(sequence: Sequence) -> Any:
    """Earliest deadline first."""
    return sequence.due_ps


def by_cached_prefix(sequence: Sequence) -> Any:
    """Longest cached prefix first, then arrival; the scheduler fills in what is cached."""
    return (0, sequence.arrival_ps)


# --- bands -----------------------------------------------------------------------------------


def one_band(sequence: Sequence) -> int:  # noqa: ARG001
    """Nobody is background."""
    return ON_TIME


def patient_last(sequence: Sequence) -> int:
    """Who may wait for more than a minute goes behind those who may not."""
    return BACKGROUND if sequence.due_ps - sequence.arrival_ps > PATIENT_PS else ON_TIME


# --- victims: who gives memory back ----------------------------------------------------------


def youngest(running: Iterable[Sequence]) -> Sequence:
    """The last to arrive."""
    return max(running, key=lambda s: (s.arrival_ps, s.id))


def minds_least(running: Iterable[Sequence]) -> Sequence:
    """The least urgent band and class, then the furthest deadline, then the least work lost."""
    return max(running, key=lambda s: (s.band, s.rank, s.due_ps, -s.cached_tokens, s.id))


def fewest_outputs(running: Iterable[Sequence]) -> Sequence:
    """The fewest tokens generated, then the longest prompt: the least decoding lost."""
    return min(running, key=lambda s: (s.generated_tokens - s.joined_tick, -s.prompt_tokens, s.id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Every choice of a scheduler that is not arithmetic."""

    name: str
    key: Callable[[Sequence], Any] = by_arrival
    band: Callable[[Sequence], int] = one_band
    victim: Callable[[Iterable[Sequence]], Sequence] = youngest
    overtakes: bool = False  # a more urgent newcomer goes before prompts under way
    sheds: bool = False  # who cannot be on time steps back early, longest first
    adaptive_chunk: bool = False  # sizes prompt chunks by the tightest ITL target
    gives_way: bool = False  # background decodes leave for a waiting prompt that is not
    foresees: bool = False  # background enters only if all that is here could end here
    refuses: bool = False  # turns away who would be too late, instead of serving it last
    swaps: bool = False  # preempted work may park in DRAM instead of being recomputed
    floors_percent: tuple[int, int, int] = (0, 0, 0)  # guaranteed share of token service, by band
    owed_percent: int = 100  # of a step's prompt tokens, for who is below that, beside the others
    debt_max_tokens: int = 0  # how far a tenant above its share falls back; 0: tenants unknown
    debt_free_tokens: int = 0  # what a tenant may have waiting before that begins
    # What other engines do differently (see `profiles`).
    mixes: bool = True  # prompt chunks share a step with decodes
    reserves_output: float = 0.0  # share of output limits that admission keeps memory for
    reserves_newcomer: float = 1.0  # the same share for whoever is about to enter
    reserves_max_tokens: int = 1 << 40  # of an output limit that admission looks at
    prompts_preempt: bool = False  # a prompt under way takes memory from the last to arrive
    longest_prefix_first_below: int = 0  # reorder by cached prefix while fewer wait; 0: never
    gathers: bool = False  # admits nobody until the batch has drained


FCFS = Policy(name="fcfs")
SHORTEST = Policy(name="shortest", key=by_length)
PRIORITY = Policy(name="priority", key=by_rank, victim=minds_least)
EDF = Policy(name="edf", key=by_deadline, victim=minds_least)
TIERLINE = Policy(
    name="tierline",
    key=by_deadline,
    band=patient_last,
    victim=minds_least,
    overtakes=True,
    sheds=True,
    adaptive_chunk=True,
    gives_way=True,
    foresees=True,
    swaps=True,
    floors_percent=(0, 5, 2),
    owed_percent=25,
    debt_max_tokens=1_000_000,
    debt_free_tokens=20_000,
)
BASELINES = (FCFS, SHORTEST, PRIORITY, EDF)


def deadline_or_patience(due_ps: int, arrival_ps: int) -> int:
    """A deadline for everybody: without one of its own a request ages from its arrival."""
    return due_ps if due_ps < FOREVER_PS else arrival_ps + 10 * PATIENT_PS
