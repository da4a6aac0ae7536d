"""The bundled example: people in conversation with three assistants, for about ten minutes.

    python tools/make_example.py          writes examples/chat.jsonl.gz

Nobody's traffic: drawn from a seed, with the features that decide a plan. Conversations begin
at random and become more frequent until the middle; turns follow each other after a pause.
A prompt is the assistant's instructions, all turns so far, and what the person adds, so
prompts grow and share prefixes: within a conversation, and with everybody's instructions.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tierline.base.rng import stream
from tierline.workload.request import Request
from tierline.workload.trace import write_trace

if TYPE_CHECKING:
    import numpy as np

OUT = Path(__file__).resolve().parents[1] / "examples" / "chat.jsonl.gz"
SEED = 7
REQUESTS = 5_000
SPAN_S = 600.0
BLOCK_TOKENS = 128
CONTEXT_TOKENS_MAX = 16_384
INSTRUCTIONS_BLOCKS = {"support": 8, "tutor": 3, "shopping": 5}
TURNS_MEAN = 3.5
PAUSE_S = 25.0  # median, of reading and typing
ADDED_TOKENS = 90  # median, by a person in one turn
ANSWER_TOKENS = 180  # median


@dataclass
class Conversation:
    """One conversation: how long its history is, and the ids of the blocks that hold it."""

    name: str
    assistant: str
    history_tokens: int
    blocks: list[int]
    ids: Iterator[int] = field(repr=False)

    def turn(self, at_s: float, added: int, answer: int) -> Request:
        """The next request; history then holds its prompt and its answer."""
        prompt = self.history_tokens + added
        while len(self.blocks) < prompt // BLOCK_TOKENS:
            self.blocks.append(next(self.ids))
        self.history_tokens = prompt + answer
        return Request(
            arrival_ns=round(at_s * 1e9),
            input_tokens=prompt,
            output_tokens=answer,
            prefix_blocks=tuple(self.blocks),
            session=self.name,
            tenant=self.assistant,
        )


def conversations(rng: "np.random.Generator") -> Iterator[tuple[float, Conversation]]:
    """Conversations with their first moment, about as many as the requests need, in no order."""
    names = list(INSTRUCTIONS_BLOCKS)
    shared = {
        name: [1 + 100 * i + b for b in range(n)]
        for i, (name, n) in enumerate(INSTRUCTIONS_BLOCKS.items())
    }
    ids = iter(range(1_000, 10_000_000))
    for number in range(round(1.4 * REQUESTS / TURNS_MEAN)):
        at_s = float(rng.triangular(-0.3, 0.55, 1.2)) * SPAN_S
        assistant = names[int(rng.choice(len(names), p=[0.5, 0.2, 0.3]))]
        blocks = list(shared[assistant])
        history = len(blocks) * BLOCK_TOKENS
        yield at_s, Conversation(f"c{number}", assistant, history, blocks, ids)


def requests() -> list[Request]:
    """All requests, in order of arrival; conversations already run when the ten minutes begin."""
    rng = stream(SEED, "example")
    queue = [(at_s, c.name, c) for at_s, c in conversations(rng)]
    heapq.heapify(queue)
    drawn: list[Request] = []
    while len(drawn) < REQUESTS:
        at_s, name, conversation = heapq.heappop(queue)
        added = 1 + round(float(rng.lognormal()) * ADDED_TOKENS)
        answer = 1 + round(float(rng.lognormal(sigma=0.7)) * ANSWER_TOKENS)
        if conversation.history_tokens + added + answer > CONTEXT_TOKENS_MAX:
            continue  # too long to go on
        if at_s >= 0:
            drawn.append(conversation.turn(at_s, added, answer))
        if rng.random() >= 1 / TURNS_MEAN:
            pause_s = float(rng.lognormal(sigma=0.8)) * PAUSE_S
            heapq.heappush(queue, (at_s + pause_s, name, conversation))
    return drawn


def main() -> None:
    write_trace(OUT, requests(), block_tokens=BLOCK_TOKENS)


if __name__ == "__main__":
    main()
