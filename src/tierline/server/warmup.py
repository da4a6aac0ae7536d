"""A request of our own before anybody comes: what is made at first use is made, the model is seen
to answer, and what this machine does now stands beside what was predicted of it.

`serve.run` calls it once, when the engine is open.
"""

from dataclasses import dataclass
from typing import Any

from tierline.base.errors import DependencyError
from tierline.base.units import format_seconds
from tierline.engine.engine import Engine
from tierline.engine.observation import StepSample
from tierline.engine.sampling import SamplingParams
from tierline.server.prediction import Ratio, step_fit
from tierline.server.running import Running

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 9
PARAMS = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Steps at the start, beside their prices."""

    prompt_tokens: int
    prompt: Ratio  # the step that computed it
    decode: Ratio | None  # those after it; None: the model has no more positions

    def __str__(self) -> str:
        told = f"a prompt of {self.prompt_tokens} tokens {_told(self.prompt)}"
        return told if self.decode is None else f"{told}, then a token {_told(self.decode)}"

    def to_dict(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_s": self.prompt.measured_s,
            "prompt_predicted_s": self.prompt.predicted_s,
            "token_s": self.decode and self.decode.measured_s / self.decode.steps,
            "token_predicted_s": self.decode and self.decode.predicted_s / self.decode.steps,
        }


def warmed(engine: Engine, running: Running) -> Measured:
    """Serve one prompt twice, and forget it; what the second time took.

    Raises `DependencyError` when the model does not answer.
    """
    samples: list[StepSample] = []
    engine.watch(samples.append)
    length = min(PROMPT_TOKENS, running.limits.chunk_tokens, (running.positions_max + 1) // 2)
    prompt = [i % engine.vocabulary for i in range(length)]
    for _ in range(2):
        samples.clear()
        engine.add(prompt, PARAMS, tenant="warm-up")
        while not engine.idle:
            for delta in engine.step():
                if delta.finish_reason == "error":
                    raise DependencyError(
                        f"{running.model} does not answer: {delta.error}",
                        hint="is its checkpoint whole, and is there memory to compute with?",
                    )
        engine.reset_cache()
    fit = step_fit(samples, running)
    assert fit.mixed is not None, "every prompt takes a step"
    return Measured(prompt_tokens=length, prompt=fit.mixed, decode=fit.decode)


def _told(ratio: Ratio) -> str:
    mean_s = ratio.measured_s / ratio.steps
    return f"{format_seconds(mean_s)} ({ratio.p50:.2f} x what is predicted)"
