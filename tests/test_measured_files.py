"""Rows of anybody's file become predictions or named problems; none is dropped, none raises.

The published files stand for the formats; small files written here stand for everything that
people bring: other names, missing columns, empty cells, nonsense.
"""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierline.base.errors import InputError, TierlineError
from tierline.planner.measured_files import _degrees, read_measured
from tierline.planner.measured_names import gpu_named, model_named, weights_of

COLUMNS = "model,gpu_system,engine,isl,osl,concurrency,tp,precision,ttft_ms,tpot_ms"
ROW = "Qwen/Qwen3-8B,h100_sxm,vllm,1024,256,8,1,,55,7.1"


def written(folder: Path, *rows: str, columns: str = COLUMNS) -> Path:
    path = folder / "mine.csv"
    path.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "format_", "rows", "problems", "left_out"),
    [
        ("measured_inferencex.csv.gz", "InferenceX", 2924, 0, 1112),
        ("measured_trtllm_perf_overview.csv", "TensorRT-LLM", 815, 0, 0),
        ("measured_mlperf_v41.csv", "MLPerf Inference", 166, 12, 0),
    ],
)
def test_every_row_of_the_published_files_is_accounted_for(
    data_dir, name, format_, rows, problems, left_out
):
    reading = read_measured(data_dir / name)

    assert reading.format == format_
    assert (len(reading.rows), len(reading.problems)) == (rows, problems)
    assert sum(reading.left_out.values()) == left_out
    assert all("h100-nvl" in problem.reason for problem in reading.problems)


def test_runs_measured_request_by_request_carry_their_settings(data_dir):
    runs = read_measured(data_dir / "measured_vllm_per_request.jsonl.gz").runs
    first, second = runs

    assert [len(run.requests) for run in runs] == [300, 300]
    assert (first.model.name, first.gpu.name, first.version) == (
        "llama-3.1-8b",
        "rtxpro6000se",
        "0.19.0",
    )
    assert (first.batch_tokens, first.sequences_max, first.block_tokens) == (2048, 128, 16)
    assert (second.layout.dp, second.layout.ep, second.model.name) == (2, 2, "qwen3-30b-a3b")
    request = first.requests[0]
    assert (request.input_tokens, request.output_tokens) == (2358, 531)
    assert len(request.blocks) == 2358 // 16
    assert request.arrival_s <= request.scheduled_s < request.first_s < request.last_s


def test_own_rows_need_only_the_columns_that_tell_the_format(tmp_path):
    reading = read_measured(written(tmp_path, ROW))
    row = reading.rows[0]

    assert not reading.problems
    assert (row.model.name, row.gpu.name, row.layout.weights) == ("qwen3-8b", "h100-sxm", "bf16")
    assert (row.clients, row.layout.gpus) == (8, 1)
    assert (row.ttft_s, row.tpot_s) == pytest.approx((0.055, 0.0071))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("acme/Wonder-9T,h100_sxm,vllm,1024,256,8,1,,55,7.1", "unknown model 'wonder-9t'"),
        ("Qwen/Qwen3-8B,h900,vllm,1024,256,8,1,,55,7.1", "unknown gpu 'h900'"),
        ("Qwen/Qwen3-8B,h100_sxm,quickllm,1024,256,8,1,,55,7.1", "unknown engine 'quickllm'"),
        ("Qwen/Qwen3-8B,h100_sxm,vllm,1024,256,8,1,fp3,55,7.1", "unknown precision 'fp3'"),
        ("Qwen/Qwen3-8B,h100_sxm,vllm,1024,256,many,1,,55,7.1", "'many' is not a number"),
        ("Qwen/Qwen3-8B,h100_sxm,vllm,1024,256,0,1,,55,7.1", "concurrency '0' is below 1"),
        ("Qwen/Qwen3-8B,h100_sxm,vllm,1024,256,1e9,1,,55,7.1", "concurrency '1e9' is above"),
        ("Qwen/Qwen3-8B,h100_sxm,vllm,1024,256,8,1,,-3,7.1", "ttft_ms '-3' is not positive"),
        ("Qwen/Qwen3-8B,h100_sxm,vllm,1024,256,8,1,,,", "neither ttft_ms nor tpot_ms"),
        ("Qwen/Qwen3-8B", "unknown gpu ''"),
    ],
)
def test_a_row_that_cannot_be_predicted_is_named_with_its_line(tmp_path, row, reason):
    reading = read_measured(written(tmp_path, ROW, row))

    assert len(reading.rows) == 1
    assert reading.count == 2
    assert reading.problems[0].where == "mine.csv:3"
    assert reason in reading.problems[0].reason


def test_an_unknown_format_says_what_was_found_and_what_is_known(tmp_path):
    path = written(tmp_path, "1,2", columns="apples,pears")

    with pytest.raises(InputError, match="apples, pears") as raised:
        read_measured(path)
    assert "gpu_system" in raised.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\x1f\x8bnot gzip", "gzip"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"", "its columns: none"),
        (b'{"arrival_s": 1}\n', "not a line of a per-request run"),
        (b"{broken\n", "not a line of a per-request run"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_its_name(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_measured(path)


def test_a_run_of_an_unknown_model_is_a_problem_and_the_other_run_is_read(tmp_path):
    def lines(name: str, model: str) -> list[dict[str, object]]:
        settings_ = {"type": "run", "run": name, "model": model, "gpu": "H100", "vllm": "0.19.0"}
        times = {"arrival_s": 0.0, "first_s": 0.1, "last_s": 0.9, "input": 64, "output": 9}
        return [settings_, {"run": name, **times}]

    entries = lines("a", "acme/Wonder-9T") + lines("b", "Qwen/Qwen3-8B")
    path = tmp_path / "runs.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, entries)).encode()))
    reading = read_measured(path)

    assert [run.name for run in reading.runs] == ["b"]
    assert "wonder-9t" in reading.problems[0].reason


@pytest.mark.parametrize(
    ("record", "degrees"),
    [
        ({"tp": "8", "attn_dp": "1", "moe_tp": "1", "moe_ep": "8"}, (8, 1, 8)),
        ({"tp": "64", "attn_dp": "1", "moe_tp": "8", "moe_ep": "8"}, (8, 1, 8)),
        ({"tp": "16", "attn_dp": "1", "moe_tp": "4", "moe_ep": "4"}, (4, 1, 4)),
        ({"tp": "1", "attn_dp": "64", "moe_tp": "8", "moe_ep": "8"}, (1, 8, 8)),
        ({"tp": "4", "attn_dp": "4", "moe_tp": "1", "moe_ep": "16"}, (4, 1, 4)),
        ({"tp": "2", "attn_dp": "", "moe_tp": "", "moe_ep": ""}, (2, 1, 1)),
        ({}, (1, 1, 1)),
    ],
)
def test_products_written_as_degrees_are_undone(record, degrees):
    assert _degrees(record) == degrees


@pytest.mark.parametrize(
    ("published", "name"),
    [
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("nvidia/DeepSeek-R1-0528-NVFP4-v2", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "deepseek-v3"),
        ("amd/Llama-3.3-70B-Instruct-FP8-KV", "llama-3.3-70b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("llama-70b", "llama-2-70b"),
    ],
)
def test_the_endings_of_a_checkpoint_do_not_hide_its_model(published, name):
    assert model_named(published).name == name


@pytest.mark.parametrize(
    ("published", "name"),
    [
        ("b200_sxm", "b200"),
        ("NVIDIA H100-SXM-80GB", "h100-sxm"),
        ("NVIDIA H100-PCIe-80GB", "h100-pcie"),
        ("AMD Instinct MI300X-NPS1-SPX-192GB-750W", "mi300x"),
        ("NVIDIA GH200 Grace Hopper Superchip 144GB", "gh200"),
        ("RTX PRO 6000 Blackwell SE 96GB", "rtxpro6000se"),
        ("A100-80GB-PCIe", "a100-pcie"),
    ],
)
def test_accelerators_are_found_by_what_their_names_hold(published, name):
    assert gpu_named(published).name == name


@pytest.mark.parametrize(
    ("said", "name", "format_"),
    [
        ("fp4", "deepseek-ai/DeepSeek-R1", "nvfp4"),
        ("", "nvidia/Qwen3-32B-NVFP4", "nvfp4"),
        ("", "Qwen/Qwen3-32B", "bf16"),
        ("", "openai/gpt-oss-120b", "mxfp4"),
        ("fp4", "openai/gpt-oss-120b", "mxfp4"),
        ("fp8", "deepseek-ai/DeepSeek-R1", "fp8-block"),
        ("fp16", "meta-llama/Llama-3.1-8B", "bf16"),
    ],
)
def test_the_precision_is_said_or_in_the_name_or_the_models_own(said, name, format_):
    assert weights_of(said, name, model_named(name)) == format_


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=12)
LIKELY = st.sampled_from(["h100_sxm", "vllm", "1024", "0", "nan", "1e400", "-1", "", "qwen3-8b"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(CELL | LIKELY, min_size=1, max_size=12), max_size=4))
def test_no_cell_whatsoever_raises(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("cells")
    path = written(folder, *(",".join(cells) for cells in rows))
    try:
        reading = read_measured(path)
    except TierlineError:
        return  # a file that csv or UTF-8 refuses as a whole

    assert all(row.input_tokens > 0 for row in reading.rows)
    assert all(problem.reason for problem in reading.problems)
