"""Do the systems that exports are written for accept them? Run inside the venv of
`tools/export_proof_venv.sh`: one JSON case a line in, one JSON verdict a line out.

A case is {"reader": NAME, "input": WORDS OR TEXT}; a verdict is {"ok": BOOL, "message": TEXT}.
The readers are the real ones: the argument parsers of vLLM and SGLang, the Serve schema and
the LLM configuration of Ray, and the published schemas of Kubernetes.
"""

import argparse
import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable


@functools.cache
def vllm_parser() -> argparse.ArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@functools.cache
def sglang_parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def read_vllm(words: list[str]) -> str:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    assert words[:2] == ["vllm", "serve"], words
    parsed = vllm_parser().parse_args(words[2:])
    validate_parsed_serve_args(parsed)
    return f"{parsed.model_tag} on {parsed.tensor_parallel_size}"


def read_sglang(words: list[str]) -> str:
    assert words[:3] == ["python", "-m", "sglang.launch_server"], words
    parsed = sglang_parser().parse_args(words[3:])
    return f"{parsed.model_path} on {parsed.tp_size}"


def read_ray(text: str) -> str:
    import yaml
    from ray.serve.llm import LLMConfig
    from ray.serve.schema import ServeDeploySchema
    from vllm.engine.arg_utils import AsyncEngineArgs

    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    arguments = schema.applications[0].args
    configs = arguments.get("llm_configs") or list(arguments.values())
    for config in configs:
        LLMConfig.model_validate(config)
        AsyncEngineArgs(model=config["model_loading_config"]["model_id"], **config["engine_kwargs"])
    return f"{len(configs)} models"


def read_kubernetes(text: str) -> str:
    import kubernetes_validate
    import yaml

    documents = list(yaml.safe_load_all(text))
    for document in documents:
        kubernetes_validate.validate(document, "1.30", strict=True)
    return ", ".join(document["kind"] for document in documents)


READERS: dict[str, Callable[..., str]] = {
    "vllm": read_vllm,
    "sglang": read_sglang,
    "ray-serve": read_ray,
    "kubernetes": read_kubernetes,
}


def judge(case: dict[str, object]) -> dict[str, object]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return {"ok": True, "message": READERS[str(case["reader"])](case["input"])}
    except SystemExit:  # how argparse says no
        return {"ok": False, "message": said.getvalue()[-400:]}
    except ImportError:
        raise  # a broken venv is no verdict
    except Exception as error:
        return {"ok": False, "message": f"{type(error).__name__}: {error}"[:400]}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(judge(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
