"""Who steps back when not everybody can be on time.

Take the prompts in order of their deadlines.  Whenever one would be late, the longest so far
steps back: Moore and Hodgson's rule (1968), which keeps the most jobs on time that one
server can.  Without it, every deadline order falls like dominoes at overload: each late
prompt makes the next one late, and the earliest deadline first is the worst of all.

What a tenant in debt asks for comes later in that order and counts as longer by the debt, so
whoever floods steps back before those who do not.
"""

from collections.abc import Iterable
from heapq import heappop, heappush

from tierline.perf.line import StepLine
from tierline.scheduling.sequence import Sequence


def too_late(
    jobs: Iterable[Sequence],
    line: StepLine,
    *,
    now_ps: int,
    chunk: int,
    between_ps: int,
    decodes: int,
    context_tokens: int,
) -> list[Sequence]:
    """The fewest of `jobs` that must step back so that all others can have their first token by
    their deadline, at the rate of `chunk` tokens a step beside the decodes, with `between_ps`
    from one such step to the next."""
    rate = line.prefill_rate(chunk=chunk, decodes=decodes, context_tokens=context_tokens)
    end_ps, on_time = now_ps, True
    work: list[tuple[Sequence, int]] = []
    for job in sorted(jobs, key=lambda s: (s.due_ps + s.debt_ps, s.id)):
        tokens = job.target_tokens - job.cached_tokens
        work_ps = rate(tokens, job.cached_tokens) + between_ps * tokens // chunk
        end_ps += work_ps
        on_time = on_time and end_ps <= job.due_ps
        work.append((job, work_ps))
    if on_time:  # mostly
        return []
    end_ps = now_ps
    kept: list[tuple[int, int, Sequence, int]] = []
    late: list[Sequence] = []
    for job, work_ps in work:
        end_ps += work_ps
        heappush(kept, (-work_ps - job.debt_ps, job.id, job, work_ps))
        if end_ps > job.due_ps:
            _, _, longest, work_ps = heappop(kept)
            end_ps -= work_ps
            late.append(longest)
    return late
