"""How far does what really happened lie from what a replay predicts, and a change from its what-if?

Question   measured over predicted: medians and p99 of TTFT, TPOT and end to end, of requests as
           they were served, and of the same requests served again with smaller steps.
Budget     medians within a factor 1.3 on a quiet machine, both as they were and changed.
Baseline   the step law alone, without the scale of the measured steps.
Method     the demo model on its own clock.  Poisson arrivals of mixed lengths and classes, a third
           of them with a common prefix, recorded as the server records them; then the same
           arrivals, of other tokens, with the changed step.  Each round does both; the figures of
           each are told, with the spread of the steps, which says how quiet the machine was.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from tierline.base.clock import PS_PER_S
from tierline.engine.build import EngineOptions, open_engine
from tierline.engine.demo import resolve_model
from tierline.engine.engine import Engine
from tierline.engine.sampling import SamplingParams
from tierline.server.life import Life, StepSample
from tierline.server.prediction import scale_of, step_fit
from tierline.server.replay import Side, Traffic, side_of, traffic_of
from tierline.server.running import Running, running_of
from tierline.server.whatif import Change, what_if

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from recorded import recorder_of

LEVELS = ("interactive", "standard", "standard", "batch")
SMALLER = 128  # tokens of a changed step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rps", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    kernels = Path.home() / ".cache" / "tierline" / "kernels"
    engine = open_engine(resolve_model("demo"), EngineOptions(kernels_folder=kernels))
    running = running_of(engine)
    rounds = [one_round(engine, running, args.requests, args.rps, n) for n in range(args.rounds)]
    print(json.dumps({"benchmark": "whatif", "rps": args.rps, "rounds": rounds}))


def one_round(engine: Engine, running: Running, requests: int, rps: float, seed: int) -> object:
    """Record, predict, change, record again."""
    limits = engine.scheduler.limits
    before, steps = serve(engine, running, requests=requests, rps=rps, seed=seed, tokens=1000)
    engine.scheduler.limits = replace(limits, batch_tokens=SMALLER, chunk_tokens=SMALLER)
    after, steps_after = serve(
        engine, running, requests=requests, rps=rps, seed=seed, tokens=20_000
    )
    engine.scheduler.limits = limits
    scale = scale_of(steps, running)
    change = Change(batch_tokens=SMALLER)
    told = what_if(before, running, change, scale=scale)
    law = what_if(before, running, change)
    truth = side_of(after.measured)
    fit = step_fit(steps, running).all
    assert fit is not None
    return {
        "scale": round(scale, 3),
        "scale_of_the_changed": round(scale_of(steps_after, running), 3),
        "steps_p90_over_p10": round(fit.p90 / fit.p10, 2),
        "as_it_was": ratios(told.measured, told.before),
        "changed": ratios(truth, told.after),
        "as_it_was_by_the_law_alone": ratios(told.measured, law.before),
        "sentence": told.sentence,
    }


def ratios(measured: Side, predicted: Side) -> dict[str, float]:
    """Measured over predicted."""
    told = {}
    for name in ("ttft", "tpot", "e2e"):
        ours, theirs = getattr(measured.all, name), getattr(predicted.all, name)
        for percentile in ("p50_s", "p99_s"):
            told[f"{name}_{percentile[:-2]}"] = round(
                getattr(ours, percentile) / getattr(theirs, percentile), 2
            )
    return told


def serve(
    engine: Engine, running: Running, *, requests: int, rps: float, seed: int, tokens: int
) -> tuple[Traffic, list[StepSample]]:
    """Serve one stream of requests in real time; prompts are of tokens from `tokens` on."""
    recorder = recorder_of(engine, running)
    engine.watch(recorder.step)
    coming = arrivals(running, engine, requests=requests, rps=rps, seed=seed, tokens=tokens)
    lives: dict[int, Life] = {}
    while coming or not engine.idle:
        while coming and coming[0][0].arrival_ps <= engine.clock.now_ps():
            life, prompt = coming.pop(0)
            number = engine.add(
                prompt,
                SamplingParams(max_tokens=life.output_tokens_max, temperature=0.0, ignore_eos=True),
                rank=-life.priority,
                ttft_s=life.ttft_limit_s,
                itl_s=life.itl_limit_s,
                arrival_ps=life.arrival_ps,
            )
            lives[number] = life
            recorder.begin(life)
            recorder.named(life, number, engine.chain(number))
        if engine.idle:
            time.sleep(0.001)
        for delta in engine.step():
            life = lives[delta.request_id]
            if life.first_ps is None:
                recorder.cached(life, delta)
            recorder.tokens(life, delta.index, delta)
            if delta.finish_reason:
                recorder.end(life, delta.finish_reason, delta.at_ps)
    block_tokens = running.block_tokens
    return traffic_of(recorder.past, running.levels, block_tokens=block_tokens), list(
        recorder.steps
    )


def arrivals(
    running: Running, engine: Engine, *, requests: int, rps: float, seed: int, tokens: int
) -> list[tuple[Life, list[int]]]:
    """Lives that begin from a second from now on, and their prompts."""
    rng = random.Random(seed)
    base = tokens + 5000 * (seed % 3)
    prefix = [base + rng.randrange(5000) for _ in range(256)]
    at_ps = engine.clock.now_ps() + PS_PER_S
    made = []
    for i in range(requests):
        at_ps += round(rng.expovariate(rps) * PS_PER_S)
        prompt = [base + rng.randrange(5000) for _ in range(rng.choice([30, 100, 250, 600]))]
        prompt = prefix + prompt if i % 3 == 0 else prompt
        level = running.level(rng.choice(LEVELS))
        life = Life(
            id=f"{tokens}-{seed}-{i}",
            endpoint="completions",
            model=running.model,
            tenant="",
            key_id="",
            level=level.name,
            priority=level.priority,
            stream=True,
            arrived_s=0.0,
            arrival_ps=at_ps,
            prompt_tokens=len(prompt),
            output_tokens_max=rng.choice([8, 24, 64, 96]),
            ttft_limit_s=level.limit_s("ttft"),
            itl_limit_s=level.limit_s("itl"),
        )
        made.append((life, prompt))
    return made


if __name__ == "__main__":
    main()
