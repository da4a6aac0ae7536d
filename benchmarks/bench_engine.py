"""Does the engine serve as fast as the best engines on the same CPU, weights and precision?

Question   tokens/s of one request, of a long prompt and of 16 requests; seconds for 32 requests
           that share a prefix; seconds until ready; memory beside weights and cache.
Budget     `ASKED` below: each a ratio to a peer, measured in the same run.
Baseline   llama.cpp, vLLM and transformers on the same weights: a random Qwen2.5-0.5B shape in
           bf16, and SmolLM2-135M from its GGUF (`engine_models`).  A peer takes part when its
           interpreter is named (`--llama-python`, `--vllm-python`); transformers is that of this
           environment.
Method     each engine in its own process on all cores; one computes at a time; rounds over
           metrics, engines within a metric one after the other, another one first in each
           round.  A ratio is the median of the rounds' ratios.  Prompts are random tokens, new
           ones each time; greedy, end-of-sequence ignored.  Read bandwidth is probed just
           before and after each sample of decoding; `share` is tokens/s times the bytes of the
           weights over it.  `others` is what everybody else took of the cores meanwhile: on a
           machine that is not quiet the figures of engines whose threads wait by spinning fall
           by ten times, so believe no run that is not `quiet`.

Files come from the page cache and vLLM's compiled graphs, when there are, from its cache; both
lie in `--folder` and are kept.  No new round begins after `--minutes`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_models import Model, demo_model, random_model
from engine_process import CORES, BandwidthProbe, Worker, WorkerDiedError, status_bytes, watching
from tierline.engine import native
from tierline.engine.demo import find_demo

OPEN_LIMIT_S, SAMPLE_LIMIT_S = 400, 120
CHECKED = {"count": 1, "tokens": 32, "output_tokens": 8, "shared": 0, "seed": 0}
PEERS = ("llama.cpp", "vllm", "transformers")
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else it keeps one of two cores for its scheduler
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(CORES),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What is asked of every engine in every round."""

    name: str
    unit: str
    count: int = 1
    tokens: int
    output_tokens: int
    shared: int = 0
    by: tuple[str, ...] = ("tierline", *PEERS)
    models: tuple[str, ...] = ("random", "demo")

    def value(self, reply: Mapping[str, float]) -> float:
        """From the instants of the first and the last token."""
        total_s = reply["total_s"]
        if self.name == "decode":
            return (self.output_tokens - 1) / (total_s - reply["first_s"])
        if self.name == "prefill":
            return self.tokens / total_s
        if self.unit == "s":
            return total_s
        return self.count * self.output_tokens / total_s


METRICS = (
    Metric(name="decode", unit="tok/s", tokens=128, output_tokens=129),
    Metric(name="prefill", unit="tok/s", tokens=1024, output_tokens=1),
    Metric(
        name="concurrent",
        unit="tok/s",
        count=16,
        tokens=128,
        output_tokens=64,
        models=("random",),
    ),
    Metric(
        name="shared_prefix",
        unit="s",
        count=32,
        tokens=1024 + 32,
        output_tokens=16,
        shared=1024,
        by=("tierline", "vllm", "llama.cpp"),
        models=("random",),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Ours over theirs: at least `least`, or at most `most`."""

    model: str
    metric: str
    peers: tuple[str, ...]  # the best of these
    least: float | None = None
    most: float | None = None

    def met(self, ratio: float) -> bool:
        return (self.least is None or ratio >= self.least) and (
            self.most is None or ratio <= self.most
        )


ASKED = (
    Asked(model="random", metric="decode", peers=("llama.cpp",), least=1.0),
    Asked(model="random", metric="decode", peers=("vllm",), least=1.5),
    Asked(model="random", metric="prefill", peers=PEERS, least=1.1),
    Asked(model="random", metric="concurrent", peers=PEERS, least=1.4),
    Asked(model="random", metric="shared_prefix", peers=("vllm",), most=0.8),
    Asked(model="demo", metric="decode", peers=("llama.cpp",), least=1.0),
    Asked(model="demo", metric="prefill", peers=("llama.cpp",), least=5.0),
)
READY_ASKED_S = 5.0
OTHERS_MOST = 0.05  # of all cores, for a run to count as quiet


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement of one engine."""

    value: float
    others_share: float
    bytes_per_s: float | None = None  # of memory, around the sample


Samples = dict[str, dict[str, dict[int, Sample]]]  # metric -> engine -> round


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a run is made of."""

    pythons: Mapping[str, str]  # engine -> interpreter
    folder: Path
    rounds: int
    until_s: float
    probe: BandwidthProbe


def say(words: str) -> None:
    """Progress, for whoever watches."""
    print(words, file=sys.stderr, flush=True)


@contextmanager
def opened(bench: Bench, model: Model, lost: dict[str, str]) -> Iterator[dict[str, "Opened"]]:
    """All engines with the model loaded, idle. One that fails is lost, and the rest go on."""
    engines: dict[str, Opened] = {}
    for path in (*model.folder.glob("*.safetensors"), model.gguf):
        path.read_bytes()  # into the page cache, for all alike
    try:
        for name, python in bench.pythons.items():
            cache = bench.folder / "vllm-cache"
            env = {**VLLM, "VLLM_CACHE_ROOT": str(cache)} if name == "vllm" else {}
            log = bench.folder / f"{model.name}-{name}.log"
            worker = Worker(name, python, env=env, log=log)
            engines[name] = Opened(worker=worker)
            try:
                with watching(worker.process.pid) as watched:
                    ready = worker.ask(OPEN_LIMIT_S, do="open", **_description(bench, model))
                engines[name].ready = {**ready, "others": round(watched.others_share, 2)}
                engines[name].tokens = worker.ask(SAMPLE_LIMIT_S, do="generate", **CHECKED)[
                    "tokens"
                ]
                say(f"{model.name} {name}: ready in {ready['ready_s']:.1f} s")
            except WorkerDiedError as death:
                lost[f"{model.name} {name}"] = str(death)
                del engines[name]
        yield engines
    finally:
        for engine in engines.values():
            engine.worker.end()


def _description(bench: Bench, model: Model) -> dict[str, Any]:
    return {
        "own": str(model.own),
        "folder": str(model.folder),
        "gguf": str(model.gguf),
        "kernels": str(bench.folder / "kernels"),
        "vocabulary": model.vocabulary,
        "weight_bytes": model.weight_bytes,
    }


@dataclass(slots=True, kw_only=True)
class Opened:
    """An engine with its weights loaded."""

    worker: Worker
    ready: dict[str, float] | None = None
    tokens: list[int] | None = None  # greedy, of one prompt: the same weights say the same


def measure(
    bench: Bench, model: Model, engines: dict[str, Opened], lost: dict[str, str]
) -> Samples:
    """Rounds over metrics over engines."""
    samples: Samples = defaultdict(lambda: defaultdict(dict))
    order = list(engines)
    for number in range(bench.rounds):
        for metric in METRICS:
            if model.name not in metric.models:
                continue
            for name in order:
                if name not in engines or name not in metric.by:
                    continue
                if time.monotonic() > bench.until_s:
                    lost.setdefault("time", f"over in round {number + 1} of {model.name}")
                    return samples
                try:
                    sample = _sample(bench, metric, engines[name].worker, seed=number + 1)
                except WorkerDiedError as death:
                    lost[f"{model.name} {name}"] = f"{metric.name}, {death}"
                    del engines[name]
                    continue
                samples[metric.name][name][number] = sample
                say(
                    f"{model.name} {number + 1} {metric.name} {name}: {sample.value:.2f} "
                    f"{metric.unit}, others {sample.others_share:.0%}"
                )
        order.append(order.pop(0))
    return samples


def _sample(bench: Bench, metric: Metric, worker: Worker, *, seed: int) -> Sample:
    probed = metric.name == "decode"
    before = bench.probe.bytes_per_s() if probed else None
    with watching(worker.process.pid) as watched:
        reply = worker.ask(
            SAMPLE_LIMIT_S,
            do="generate",
            count=metric.count,
            tokens=metric.tokens,
            output_tokens=metric.output_tokens,
            shared=metric.shared,
            seed=f"{metric.name} {seed}",
        )
    after = bench.probe.bytes_per_s() if probed else None
    return Sample(
        value=metric.value(reply),
        others_share=watched.others_share,
        bytes_per_s=(before + after) / 2 if before and after else None,
    )


# -- the result -------------------------------------------------------------------------------


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes and how many."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "n": len(values),
    }


def summaries(samples: Samples, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metric -> engine -> median and extremes, decoding with its share of the bandwidth."""
    found: dict[str, Any] = {}
    for metric, engines in samples.items():
        found[metric] = {}
        for name, rounds in engines.items():
            listed = list(rounds.values())
            line = summary([s.value for s in listed])
            line["others_max"] = round(max(s.others_share for s in listed), 2)
            rates = [(s.value, s.bytes_per_s) for s in listed if s.bytes_per_s]
            if rates:
                read = facts.get(name, {}).get("weight_bytes", 0)
                line["bandwidth_gb_per_s"] = summary([rate / 1e9 for _, rate in rates])
                line["share"] = summary([value * read / rate for value, rate in rates])
            found[metric][name] = line
    return found


def ratios(samples: Samples, model: str) -> list[dict[str, Any]]:
    """What was asked of this model, and what is reached."""
    found = []
    for asked in ASKED:
        engines = samples.get(asked.metric, {})
        ours = engines.get("tierline")
        theirs = [name for name in asked.peers if name in engines]
        if asked.model != model or not ours or not theirs:
            continue
        medians = {n: statistics.median(s.value for s in engines[n].values()) for n in theirs}
        best = (min if asked.most else max)(medians, key=medians.__getitem__)
        both = ours.keys() & engines[best].keys()
        if not both:
            continue
        line = summary([ours[r].value / engines[best][r].value for r in sorted(both)])
        bound = {"at_least": asked.least} if asked.least else {"at_most": asked.most}
        found.append(
            {
                "metric": asked.metric,
                "peer": best,
                **line,
                **bound,
                "met": asked.met(line["median"]),
            }
        )
    return found


def memory(engine: Opened, facts: Mapping[str, Any]) -> dict[str, float]:
    """Peak resident memory, and what of it is neither weights nor cache. MB."""
    peak = status_bytes(engine.worker.process.pid, "VmHWM")
    now = status_bytes(engine.worker.process.pid, "VmRSS")
    known = facts["weight_bytes"] + facts["kv_bytes"]
    return {
        "peak_rss_mb": round(peak / 1e6),
        "peak_beside_mb": round((peak - known) / 1e6),
        "now_beside_mb": round((now - known) / 1e6),
    }


def run_model(bench: Bench, model: Model, lost: dict[str, str]) -> dict[str, Any]:
    """Everything about one model."""
    with opened(bench, model, lost) as engines:
        began = dict(engines)
        samples = measure(bench, model, engines, lost)
        facts = {n: e.worker.ask(SAMPLE_LIMIT_S, do="facts") for n, e in engines.items()}
        rss = {name: memory(engine, facts[name]) for name, engine in engines.items()}
    reference = began["transformers"].tokens if "transformers" in began else None
    ready = {name: engine.ready for name, engine in began.items()}
    found: dict[str, Any] = {
        "title": model.title,
        "results": summaries(samples, facts),
        "asked": ratios(samples, model.name),
        "ready": ready,
        "memory": rss,
        "engines": facts,
        "same_first_tokens_of_8": {
            name: _alike(engine.tokens or [], reference)
            for name, engine in began.items()
            if reference is not None
        },
    }
    if own := ready.get("tierline"):
        found["ready_met"] = own["ready_s"] <= READY_ASKED_S
    return found


def quiet(found: Mapping[str, Any]) -> bool:
    """Whether nobody else took much of the cores during any sample."""
    shares = [
        figures["others_max"]
        for model in found.values()
        for engines in model["results"].values()
        for figures in engines.values()
    ]
    return bool(shares) and max(shares) <= OTHERS_MOST


def _alike(tokens: list[int], reference: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(tokens, reference, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(reference))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--vllm-python", help="interpreter that has vLLM for CPUs")
    parser.add_argument("--engines", default=",".join(("tierline", *PEERS)), help="which, in order")
    parser.add_argument("--models", default="random,demo", help="which weights, in order")
    parser.add_argument("--demo", type=Path, help="SmolLM2's GGUF; found where it was fetched to")
    parser.add_argument("--folder", type=Path, help="for models and caches; kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--minutes", type=float, default=11, help="no sample begins later")
    parser.add_argument("--plot", type=Path, help="write a picture (SVG) here")
    return parser.parse_args()


def interpreters(asked: argparse.Namespace, lost: dict[str, str]) -> dict[str, str]:
    """Engine -> the interpreter it is installed in, for those that take part."""
    known = {
        "tierline": sys.executable,
        "transformers": sys.executable,
        "llama.cpp": asked.llama_python,
        "vllm": asked.vllm_python,
    }
    for name in asked.engines.split(","):
        if not known[name]:
            lost[name] = "left out: no interpreter was named"
    return {name: known[name] for name in asked.engines.split(",") if known[name]}


def models(asked: argparse.Namespace, folder: Path, lost: dict[str, str]) -> Iterator[Model]:
    """The weights that were asked for, written when they are not there."""
    for name in asked.models.split(","):
        if name == "random":
            yield random_model(folder)
        elif path := asked.demo or find_demo():
            yield demo_model(folder, path)
        else:
            lost[name] = "left out: run `tierline models fetch demo`"


def main() -> None:
    """One JSON line."""
    asked = arguments()
    folder = asked.folder or Path(tempfile.gettempdir()) / "tierline-bench-engine"
    folder.mkdir(parents=True, exist_ok=True)
    lost: dict[str, str] = {}
    pythons = interpreters(asked, lost)
    kernels = native.load(folder / "kernels")  # built before anything is timed
    start_s = time.monotonic()
    bench = Bench(
        pythons=pythons,
        folder=folder,
        rounds=1 if asked.quick else asked.rounds,
        until_s=start_s + asked.minutes * 60,
        probe=BandwidthProbe(folder),
    )
    found = {m.name: run_model(bench, m, lost) for m in models(asked, folder, lost)}
    result = {
        "benchmark": "engine",
        "models": found,
        "left_out": lost,
        "quiet": quiet(found),
        "cores": CORES,
        "kernels": kernels.reason if isinstance(kernels, native.Missing) else kernels.isa,
        "seconds": round(time.monotonic() - start_s),
        "python": platform.python_version(),
    }
    print(json.dumps(result))
    if asked.plot:
        from engine_picture import picture

        asked.plot.write_text(picture(found))


if __name__ == "__main__":
    main()
