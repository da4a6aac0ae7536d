"""Before anybody comes, the model is seen to answer and steps are timed; nothing of it stays."""

from pathlib import Path

import pytest

from engines import answers, finish, greedy
from servers import engine_of
from tierline.server.running import render_running, running_of
from tierline.server.warmup import OUTPUT_TOKENS, PROMPT_TOKENS, warmed
from tiny_checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("warm"))


def test_what_was_measured_stands_beside_its_price(checkpoint: Path) -> None:
    engine = engine_of(checkpoint)
    running = running_of(engine)
    found = warmed(engine, running)

    assert found.prompt_tokens == PROMPT_TOKENS
    assert (found.prompt.steps, found.decode.steps) == (1, OUTPUT_TOKENS - 1)
    assert found.prompt.p50 == pytest.approx(found.prompt.measured_s / found.prompt.predicted_s)
    assert found.to_dict()["token_s"] == pytest.approx(found.decode.measured_s / found.decode.steps)
    assert f"  measured   {found}" in render_running(running, measured=str(found))
    assert "  measured " not in render_running(running)


def test_nothing_of_it_stays(checkpoint: Path) -> None:
    """The control: without forgetting, its blocks would be found by who asks the same."""
    prompt = list(range(PROMPT_TOKENS))
    warm, cold = engine_of(checkpoint), engine_of(checkpoint)
    warmed(warm, running_of(warm))
    found = []
    for engine in (warm, cold, cold):
        engine.add(prompt, greedy(8))
        deltas = finish(engine)
        found.append((deltas[0].cached_tokens, list(answers(deltas).values())))

    assert found[0] == found[1]
    assert found[0][0] == 0 < found[2][0]
    assert warm.scheduler.index.evictable_blocks == cold.scheduler.index.evictable_blocks


def test_a_model_with_few_positions_is_measured_as_far_as_it_goes(checkpoint: Path) -> None:
    engine = engine_of(checkpoint, positions_max=2)
    found = warmed(engine, running_of(engine))

    assert (found.prompt_tokens, found.decode) == (1, None)
    assert "then a token" not in str(found)
