"""A synthetic trace has its profile's lengths, rate, bursts, tenants and reuse, from its seed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from tierline.base.errors import InputError
from tierline.workload.archetypes import workload_profile
from tierline.workload.profile import Profile, profile_trace
from tierline.workload.synthesis import synthesize, write_synthetic
from tierline.workload.trace import read_trace

KS_MAX = 0.03
REUSE_MAX = 0.05
SIZES = np.geomspace(1e3, 1e8, 60)


def _distance(source: Profile, drawn: Profile) -> float:
    assert source.reuse is not None
    assert drawn.reuse is not None
    return max(abs(source.reuse.block_hit_rate(s) - drawn.reuse.block_hit_rate(s)) for s in SIZES)


@pytest.mark.parametrize(
    "name",
    ["azure2023_conv.csv.gz", "mooncake_conversation.jsonl.gz", "mooncake_synthetic.jsonl.gz"],
)
def test_lengths_and_reuse_are_those_of_the_real_trace(data_dir: Path, name: str) -> None:
    path = data_dir / "traces" / name
    real, source = list(read_trace(path)), profile_trace(path)
    drawn = list(synthesize(source, seed=1, requests=source.requests))
    again = profile_trace(drawn)

    for field in ("input_tokens", "output_tokens"):
        pair = [[getattr(r, field) for r in trace] for trace in (real, drawn)]
        assert ks_2samp(*pair).statistic <= KS_MAX
    assert again.length_correlation == pytest.approx(source.length_correlation, abs=0.03)
    assert again.arrivals.rate_rps == pytest.approx(source.arrivals.rate_rps, rel=0.03)  # type: ignore[union-attr]
    if source.reuse is None:
        assert again.reuse is None
    else:
        assert _distance(source, again) <= REUSE_MAX


def test_the_checks_see_a_wrong_trace(data_dir: Path) -> None:
    """Negative control: another profile, or chains that nothing continues, fail both bounds."""
    path = data_dir / "traces/mooncake_conversation.jsonl.gz"
    real, source = list(read_trace(path)), profile_trace(path)
    wrong = list(synthesize(workload_profile("chat", rps=3), seed=1, requests=5000))
    lengths = [[r.input_tokens for r in trace] for trace in (real, wrong)]
    unshared = [
        replace(r, prefix_blocks=tuple(range(i * 1000, i * 1000 + len(r.prefix_blocks))))
        for i, r in enumerate(synthesize(source, seed=1, requests=5000))
    ]

    assert ks_2samp(*lengths).statistic > KS_MAX
    assert _distance(source, profile_trace(unshared)) > REUSE_MAX


def test_a_seed_gives_one_trace_and_another_seed_another() -> None:
    profile = workload_profile("agent", rps=5)
    first, second = (list(synthesize(profile, seed=3, requests=500)) for _ in range(2))

    assert first == second
    assert first != list(synthesize(profile, seed=4, requests=500))
    assert first[:100] == list(synthesize(profile, seed=3, requests=100))


def test_gamma_arrivals_have_the_cv_and_bursts_the_peaks(data_dir: Path) -> None:
    code = profile_trace(data_dir / "traces/azure2023_code.csv.gz")
    conversation = profile_trace(data_dir / "traces/mooncake_conversation.jsonl.gz")
    assert code.arrivals is not None
    bursts = profile_trace(synthesize(code, seed=1, requests=8819, arrivals="bursts")).arrivals
    steady = profile_trace(synthesize(code, seed=1, requests=8819)).arrivals
    gamma = profile_trace(synthesize(conversation, seed=1, requests=12_000, arrivals="gamma"))
    assert bursts is not None
    assert steady is not None
    assert gamma.arrivals is not None

    assert gamma.arrivals.iat_cv == pytest.approx(conversation.arrivals.iat_cv, rel=0.1)  # type: ignore[union-attr]
    assert bursts.peak_to_mean == pytest.approx(code.arrivals.peak_to_mean, rel=0.25)
    assert steady.peak_to_mean < 1.5
    assert bursts.rate_rps == pytest.approx(code.arrivals.rate_rps, rel=0.05)


def test_a_day_is_drawn_with_its_hours() -> None:
    shape = tuple(0.5 if hour < 12 else 1.5 for hour in range(24))
    flat = workload_profile("chat", rps=0.5)
    profile = replace(flat, arrivals=replace(flat.arrivals, day_shape=shape))  # type: ignore[type-var]
    drawn = profile_trace(synthesize(profile, seed=1, requests=90_000, arrivals="day"))
    assert drawn.arrivals is not None
    assert drawn.arrivals.day_shape is not None

    assert drawn.arrivals.day_shape == pytest.approx(shape, rel=0.1)


def test_tenants_priorities_and_sessions_come_back() -> None:
    profile = replace(
        workload_profile("chat", rps=5),
        tenants=20,
        tenant_zipf=1.0,
        priorities={0: 0.75, 10: 0.25},
    )
    drawn = profile_trace(synthesize(profile, seed=1, requests=20_000))

    assert drawn.tenants == 20
    assert drawn.tenant_zipf == pytest.approx(1.0, abs=0.1)
    assert drawn.priorities[10] == pytest.approx(0.25, abs=0.02)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InputError, match="no rate"):
        synthesize(workload_profile("chat"), seed=1, requests=10)
    chat = workload_profile("chat", rps=1)
    with pytest.raises(InputError, match="shorter than a day"):
        synthesize(chat, seed=1, requests=10, arrivals="day")
    with pytest.raises(InputError, match="unknown arrival process"):
        synthesize(chat, seed=1, requests=10, arrivals="poison")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 requests"):
        synthesize(chat, seed=1, requests=0)


def test_a_written_trace_is_read_back_and_equal_bytes_for_equal_seeds(tmp_path: Path) -> None:
    profile = workload_profile("agent", rps=5)
    paths = [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl.gz")]
    counts = [write_synthetic(profile, path, seed=1, requests=300) for path in paths]

    assert counts == [300, 300]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert list(read_trace(paths[0])) == list(synthesize(profile, seed=1, requests=300))
