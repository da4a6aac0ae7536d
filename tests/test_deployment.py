"""A deployment file is canonical, complete, and refuses what it does not understand."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given

from strategies import deployments
from tierline.base.errors import SpecError
from tierline.base.files import write_text
from tierline.catalog.deployment import (
    SCHEDULERS,
    Deployment,
    Limits,
    ModelRef,
    Parallel,
    Planned,
    Policies,
    SloClass,
    Tier,
    load_deployment,
    parse_deployment,
)
from tierline.scheduling.profiles import POLICIES

CHAT = Deployment(
    model=ModelRef(name="llama-3.1-70b", hf_id="meta-llama/Llama-3.1-70B-Instruct"),
    gpu="h100-sxm",
    replicas=13,
    weight_format="fp8",
    kv_format="fp8",
    parallel=Parallel(tp=4),
    limits=Limits(batch_tokens_max=8192, sequences_max=256, context_tokens_max=32768),
    policies=Policies(),
    tiers=(Tier(name="device", capacity_bytes=320_000_000_000),),
    slo=(SloClass(targets=("ttft_p99=2s", "itl_p99=50ms")),),
    planned=Planned(offered_rps=120, usable_rps_per_instance=12, created_by="tierline 0.1.0"),
)


def read(text: str) -> Deployment:
    return parse_deployment(text, where="fleet.toml")


@given(deployments())
def test_reading_gives_back_what_was_written(deployment: Deployment) -> None:
    text = deployment.to_toml()

    assert read(text) == deployment
    assert read(text).to_toml() == text


@given(deployments())
def test_a_changed_deployment_is_a_changed_file(deployment: Deployment) -> None:
    """Negative control: the file would be canonical, too, if it left fields out."""
    shorter = replace(deployment.limits, sequences_max=deployment.limits.sequences_max + 1)

    assert replace(deployment, limits=shorter).to_toml() != deployment.to_toml()


def test_a_file_we_wrote_is_the_file_we_would_write(tmp_path: Path) -> None:
    path = tmp_path / "deployment.toml"
    write_text(path, CHAT.to_toml())

    assert load_deployment(path).to_toml() == path.read_text(encoding="utf-8")


def test_every_field_is_in_the_file() -> None:
    tables = tomllib.loads(CHAT.to_toml())

    assert set(tables["policies"]) == {
        *("scheduler", "chunked_prefill", "chunk_tokens", "prefix_cache", "routing")
    }
    assert tables["parallel"] == {"tp": 4, "pp": 1, "dp": 1, "ep": 1}
    assert tables["planned"]["offered_rps"] == 120.0


@pytest.mark.parametrize(
    ("parallel", "gpus"),
    [(Parallel(), 1), (Parallel(tp=4), 4), (Parallel(tp=8, pp=2), 16), (Parallel(dp=8, ep=8), 8)],
)
def test_gpus_of_an_instance(parallel: Parallel, gpus: int) -> None:
    deployment = replace(CHAT, parallel=parallel)

    assert deployment.gpus_per_instance == gpus
    assert deployment.gpus == 13 * gpus


def bent(dotted: str, value: Any) -> str:
    """The file of CHAT with one key set, or removed when the value is None."""
    tables = tomllib.loads(CHAT.to_toml())
    *path, last = dotted.split(".")
    table = tables
    for key in path:
        table = table[int(key)] if isinstance(table, list) else table.setdefault(key, {})
    if value is None:
        del table[last]
    else:
        table[last] = value
    return tomli_w.dumps(tables)


WRONG: list[tuple[str, Any, str, str]] = [
    ("replica", 2, "unknown key 'replica'", "did you mean 'replicas'"),
    ("policies.prefix_cach", True, "policies: unknown key", "'prefix_cache'"),
    ("limits.sequences_max", 0, "limits.sequences_max must be a whole number of at least 1", ""),
    ("limits.sequences_max", 2.5, "limits.sequences_max must be a whole number", ""),
    ("limits.sequences_max", None, "limits.sequences_max is missing", "add it"),
    ("replicas", True, "replicas must be a whole number", ""),
    ("gpu_memory_utilization", 1.2, "at most 1, not 1.2", ""),
    ("weight_format", "fp7", "weight_format is 'fp7'", "fp8"),
    ("kv_format", "nvfp", "kv_format is 'nvfp'", "did you mean 'nvfp4'"),
    ("policies.routing", "prefix", "policies.routing is 'prefix'", "prefix-aware"),
    ("policies.chunked_prefill", 1, "policies.chunked_prefill must be true or false", ""),
    ("tiers.0.name", "hbm", "tiers[0].name is 'hbm'", "device"),
    ("tiers.0.enabled", False, "no enabled tier named 'device'", "always holds"),
    ("tiers", [], "no enabled tier named 'device'", ""),
    ("slo.0.targets", "ttft_p99=2s", "slo[0].targets must be a list of text", ""),
    ("parallel.ep", 3, "parallel.ep is 3", "ranks"),
    ("policies.disaggregation.prefill_instances", 4, "decode_instances is missing", ""),
    ("policies.speculation", {"method": "eagle"}, "speculation.draft_tokens is missing", ""),
    ("policies.chunked_prefill", False, "limits.batch_tokens_max is below", "raise"),
    ("model", "llama", "model must be a table", ""),
    ("model.name", "a\nb", "model.name must be one line of text", ""),
    ("model.name", " ", "model.name must be one line of text", ""),
    ("slo.0.targets", ["ttft_p99=2s\n"], "slo[0].targets must be a list of text", ""),
    ("planned.growth", "big", "planned.growth must be a number above 0", ""),
]


@pytest.mark.parametrize(("key", "value", "message", "hint"), WRONG)
def test_a_wrong_file_is_named_with_its_key(key: str, value: Any, message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(bent(key, value))

    assert str(caught.value).startswith("fleet.toml: ")
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_the_bent_file_was_right_before() -> None:
    """Negative control: setting a key to what it was changes nothing."""
    assert read(bent("replicas", 13)) == CHAT


@pytest.mark.parametrize(
    ("schema", "message", "hint"),
    [
        (2, "schema is 2; this version reads 1", "update tierline"),
        (0, "schema is 0", "write schema = 1"),
        ("1", "schema is '1'", "write schema = 1"),
        (True, "schema is True", "write schema = 1"),
        (None, "schema is missing", "write schema = 1"),
    ],
)
def test_another_schema_says_what_to_do(schema: Any, message: str, hint: str) -> None:
    """Said before unknown keys are, for a newer file has some."""
    text = bent("schema", schema) + "\n[future]\nkey = 1\n"

    with pytest.raises(SpecError) as caught:
        read(text)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_a_scheduler_by_its_old_name_is_told_the_new_one() -> None:
    text = CHAT.to_toml().replace('scheduler = "tierline"', 'scheduler = "slo-aware"')
    assert text != CHAT.to_toml()

    with pytest.raises(SpecError, match=r"fleet.toml: .*'slo-aware'") as raised:
        read(text)

    assert raised.value.hint == 'write scheduler = "tierline"'


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_the_file_is_a_policy(name: str) -> None:
    assert POLICIES[name].name == name


def test_prefill_and_decode_instances_add_up() -> None:
    text = bent("policies.disaggregation", {"prefill_instances": 3, "decode_instances": 9})

    with pytest.raises(SpecError, match="3 prefill and 9 decode instances, replicas is 13"):
        read(text)


def test_two_tiers_of_one_name() -> None:
    device = {"name": "device", "capacity_bytes": 1, "enabled": True}

    with pytest.raises(SpecError, match="tiers has"):
        read(bent("tiers", [device, device]))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot read deployment file") as caught:
        load_deployment(tmp_path / "absent.toml")

    assert "absent.toml" in str(caught.value)
