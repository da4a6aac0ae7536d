"""How near does the engine come to what a GPU can do, and to its peers there?

Question   tokens/s of 1, 16 and 64 sequences that decode, of prompts of 1,024 and 8,192 tokens,
           and of 16 requests (128 in, 64 out).
Budget     none yet: no GPU was at hand when this was written.
Baseline   the device itself, probed in the same run: how fast it copies and reads memory, and
           how fast it multiplies large matrices in bf16.  `share` of a decode is the time in
           which weights and cached tokens can be read, over the time of a step; of a prompt, the
           time of its multiplications at the probed rate over its time.
Peers      transformers (`generate`, SDPA) and, where `--vllm-python` names an interpreter that
           has it, vLLM; on the same random weights in bf16, of Llama-3.1-8B's shape.  The engine
           itself twice: attention in Triton, and over gathered pages.
Method     each engine alone in a process of its own, one after the other; every case once to
           warm up, for kernels are compiled and graphs captured then; the best of three.  Prompts
           are random tokens, new ones each time; greedy, end-of-sequence ignored.

    python benchmarks/bench_engine_gpu.py [--vllm-python PATH] [--folder KEPT]
    python benchmarks/bench_engine_gpu.py --device cpu --tiny     (its logic, not its figures)

Without a GPU it says so and is done.  The checkpoint takes 16 GB of disk.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROUNDS = 3
SEQUENCES_MAX, POSITIONS_MAX = 64, 8448
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16_384,
        "tie_word_embeddings": False,
    },
}
VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
Prompts = list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is asked of every engine."""

    name: str
    kind: str  # decode, prefill or served
    count: int
    tokens: int
    output_tokens: int

    def tokens_per_s(self, first_s: float, total_s: float) -> float:
        """From the instants of the first tokens and of the last."""
        if self.kind == "decode":
            return self.count * (self.output_tokens - 1) / (total_s - first_s)
        if self.kind == "prefill":
            return self.count * self.tokens / total_s
        return self.count * self.output_tokens / total_s


def cases(*, tiny: bool) -> list[Case]:
    """All of them, or as small as they can be."""
    long, short, out = (16, 8, 4) if tiny else (1024, 128, 129)
    decodes = [(f"decode_{n}", "decode", n, short, out) for n in ((1, 3) if tiny else (1, 16, 64))]
    prefills = [(f"prefill_{n}", "prefill", 1, n, 1) for n in (long, 8 * long)]
    listed = [*decodes, *prefills, ("served_16", "served", 16, short, out // 2)]
    names = ("name", "kind", "count", "tokens", "output_tokens")
    return [Case(**dict(zip(names, values, strict=True))) for values in listed]


# -- what the device could do -----------------------------------------------------------------


def step_bytes(shape: dict[str, Any], case: Case) -> float:
    """Bytes of bf16 that one decode step has to read: weights, and the tokens cached so far.

    Of the embedding a few rows are read; the head is read whole.
    """
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    per_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim
    cached = case.count * (case.tokens + case.output_tokens / 2)
    return 2 * (layer_weights(shape) + head_weights(shape) + cached * per_token)


def prompt_flops(shape: dict[str, Any], case: Case) -> float:
    """Multiplications and additions of a prompt: two for each weight and token, and attention
    over half the square; the head is asked once."""
    square = case.tokens**2 / 2 * shape["num_hidden_layers"] * shape["hidden_size"]
    return case.count * (
        2 * layer_weights(shape) * case.tokens + 2 * head_weights(shape) + 4 * square
    )


def layer_weights(shape: dict[str, Any]) -> int:
    """Weights of all layers, norms left out."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return int(shape["num_hidden_layers"] * (2 * hidden * (hidden + kv) + 3 * hidden * inner))


def head_weights(shape: dict[str, Any]) -> int:
    """Weights of the product that gives logits."""
    return int(shape["hidden_size"] * shape["vocab_size"])


def share(
    case: Case, tokens_per_s: float, shape: dict[str, Any], probe: dict[str, float]
) -> float | None:
    """Of the probed rate of the device; None where two rates are mixed."""
    if case.kind == "decode":
        least_s = step_bytes(shape, case) / probe["read_bytes_per_s"]
        return least_s * tokens_per_s / case.count
    if case.kind == "prefill":
        least_s = prompt_flops(shape, case) / probe["flops_per_s"]
        return least_s * tokens_per_s / (case.count * case.tokens)
    return None


def probe(command: dict[str, Any]) -> dict[str, float]:
    """Copy, read and multiply, the best of ten each."""
    import torch

    device, tiny = torch.device(command["device"]), command["tiny"]
    values = torch.ones((1 << 24) if tiny else (1 << 31), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(values)
    size = 512 if tiny else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in "ab")

    def best_s(work: Callable[[], object]) -> float:
        found = []
        for _ in range(10):
            synchronise(device)
            start_s = time.perf_counter()
            work()
            synchronise(device)
            found.append(time.perf_counter() - start_s)
        return min(found)

    wide = values.view(torch.int32)  # summed without a conversion to float
    return {
        "copy_bytes_per_s": round(2 * values.nbytes / best_s(lambda: target.copy_(values))),
        "read_bytes_per_s": round(values.nbytes / best_s(lambda: wide.max())),
        "flops_per_s": round(2 * size**3 / best_s(lambda: a @ b)),
    }


def synchronise(device: Any) -> None:
    """Wait for the device; a CPU has nothing under way."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- engines ----------------------------------------------------------------------------------


class Tierline:
    """This engine, with attention in Triton or over gathered pages."""

    def __init__(self, command: dict[str, Any]) -> None:
        from tierline.engine.attention import gathered
        from tierline.engine.build import EngineOptions, open_engine
        from tierline.engine.network import Network

        self.engine = open_engine(
            command["folder"],
            EngineOptions(
                device=command["device"],
                dtype="bf16",
                kernels="torch",
                kv_bytes=50_000_000 if command["tiny"] else None,
                sequences_max=SEQUENCES_MAX,
                positions_max=POSITIONS_MAX,
            ),
        )
        network = self.engine.executor.network
        assert isinstance(network, Network)
        network.attention = gathered
        if command["engine"] == "tierline":
            from tierline.engine import attention_cuda

            network.attention = attention_cuda.attend

    def generate(self, prompts: Prompts, output_tokens: int) -> tuple[float, float]:
        """Seconds until all have a first token, and until all are done."""
        from tierline.engine.sampling import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        start_s = time.perf_counter()
        waiting = {self.engine.add(prompt, params) for prompt in prompts}
        first_s = 0.0
        while not self.engine.idle:
            waiting -= {delta.request_id for delta in self.engine.step()}
            if not waiting:
                first_s = first_s or time.perf_counter() - start_s
        return first_s, time.perf_counter() - start_s


class Transformers:
    """`generate` over one rectangle of tokens."""

    def __init__(self, command: dict[str, Any]) -> None:
        import torch
        import transformers

        self.torch, self.device = torch, command["device"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            command["folder"], dtype=torch.bfloat16, attn_implementation="sdpa"
        ).to(self.device)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate(self, prompts: Prompts, output_tokens: int) -> tuple[float, float]:
        """The prompt comes first to the streamer, then the tokens of each step."""
        ids = self.torch.tensor(prompts, device=self.device)
        streamer = _Streamer()
        with self.torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=output_tokens,
                streamer=streamer,
            )
        return streamer.instants_s[1], streamer.instants_s[-1]


class _Streamer:
    def __init__(self) -> None:
        self.start_s, self.instants_s = time.perf_counter(), list[float]()

    def put(self, _: object) -> None:
        self.instants_s.append(time.perf_counter() - self.start_s)

    def end(self) -> None:
        pass


class Vllm:
    """vLLM in one process, with its CUDA graphs."""

    def __init__(self, command: dict[str, Any]) -> None:
        import vllm

        self.params = vllm.SamplingParams
        self.engine = vllm.LLM(
            command["folder"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=POSITIONS_MAX,
            max_num_seqs=SEQUENCES_MAX,
            seed=0,
        ).llm_engine
        self.requests = 0

    def generate(self, prompts: Prompts, output_tokens: int) -> tuple[float, float]:
        """What `LLM.generate` does, with the instants of its steps."""
        params = self.params(
            temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        start_s = time.perf_counter()
        waiting = set()
        for prompt in prompts:
            self.requests += 1
            waiting.add(str(self.requests))
            self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)
        first_s = 0.0
        while self.engine.has_unfinished_requests():
            waiting -= {o.request_id.partition("-")[0] for o in self.engine.step()}
            if not waiting:
                first_s = first_s or time.perf_counter() - start_s
        return first_s, time.perf_counter() - start_s


ENGINES: dict[str, Any] = {
    "tierline": Tierline,
    "tierline, gathered": Tierline,
    "transformers": Transformers,
    "vllm": Vllm,
}


def measured(command: dict[str, Any]) -> dict[str, float]:
    """Tokens/s of each case: the best of the rounds, after one to warm up."""
    engine, rng = ENGINES[command["engine"]](command), random.Random(0)
    found = {}
    for case in (Case(**fields) for fields in command["cases"]):
        rates = []
        for _ in range(1 + ROUNDS):
            prompts = [
                rng.choices(range(command["vocabulary"]), k=case.tokens) for _ in range(case.count)
            ]
            rates.append(case.tokens_per_s(*engine.generate(prompts, case.output_tokens)))
        found[case.name] = round(max(rates[1:]), 1)
    return found


# -- processes --------------------------------------------------------------------------------


def write_checkpoint(command: dict[str, Any]) -> dict[str, float]:
    """Random weights of the wanted shape, unless they are there."""
    import torch
    import transformers

    folder = Path(command["folder"])
    if not (folder / "config.json").exists():
        config = transformers.LlamaConfig(**SHAPES[command["shape"]], eos_token_id=0)
        torch.manual_seed(0)
        with torch.device(command["device"]):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        scratch = folder.with_name(folder.name + ".unfinished")
        model.save_pretrained(scratch)
        scratch.rename(folder)
    return {}


WORK: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "checkpoint": write_checkpoint,
    "probe": probe,
    "measure": measured,
}


def in_process(python: str, do: str, command: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own answers; where it fails, its last line."""
    done = subprocess.run(
        [python, __file__, "--worker", do, json.dumps(command)],
        env={**os.environ, **VLLM},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no words"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def report(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, as the one line that is printed."""
    name = "tiny" if arguments.tiny else "llama-3.1-8b"
    shape = SHAPES[name]
    asked = cases(tiny=arguments.tiny)
    command = {
        "device": arguments.device,
        "tiny": arguments.tiny,
        "shape": name,
        "folder": str(folder / name),
        "vocabulary": shape["vocab_size"],
        "cases": [asdict(case) for case in asked],
    }
    line: dict[str, Any] = {"benchmark": "engine_gpu", "model": name, "device": arguments.device}
    for do in ("checkpoint", "probe"):
        line[do] = in_process(sys.executable, do, command)
        if "failed" in line[do]:
            return line
    del line["checkpoint"]
    pythons = dict.fromkeys(ENGINES, sys.executable) | {"vllm": arguments.vllm_python}
    if arguments.device == "cpu":
        del pythons["tierline"]  # its attention is Triton's, for CUDA
    line["engines"] = {
        engine: in_process(python, "measure", command | {"engine": engine})
        for engine, python in pythons.items()
        if python is not None
    }
    line["shares"] = {
        engine: {
            case.name: round(part, 4)
            for case in asked
            if (part := share(case, rates[case.name], shape, line["probe"])) is not None
        }
        for engine, rates in line["engines"].items()
        if "failed" not in rates
    }
    return line | {"python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model and cases for a check")
    parser.add_argument("--vllm-python", help="an interpreter that has vLLM")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        do, command = arguments.worker
        print(json.dumps(WORK[do](json.loads(command))))
        return
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(json.dumps({"benchmark": "engine_gpu", "skipped": "no GPU"}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(report(arguments, folder)))


if __name__ == "__main__":
    main()
