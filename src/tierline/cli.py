"""The command line: data to stdout, everything else to stderr.

One function per command, `(args) -> exit code`. This is the only module that reads the
environment or prints; `docs/reference/cli.md` is generated from its parsers. Exit codes:
0 done, 2 the caller can fix it, 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tierline.base.errors import DependencyError, InputError, TierlineError

Run = Callable[[argparse.Namespace], int]

EXTRAS = {  # packages that a command may miss, by the extra that brings them
    "engine": ("gguf", "llguidance", "safetensors", "tokenizers", "torch"),
    "server": (
        *("httptools", "opentelemetry", "orjson", "prometheus_client"),
        *("pydantic", "starlette", "uvicorn", "uvloop"),
    ),
}

KEYS_VARIABLE = "TIERLINE_KEYS"  # API keys of a server, separated by spaces

PLAN_EXAMPLES = """\
examples:
  tierline plan --model llama-3.1-70b --trace requests.jsonl --slo ttft_p99=2s,itl_p99=50ms -o out
  tierline plan --model qwen3-32b --workload rag --rps 12 --slo ttft_p99=3s --gpus h200,mi300x
  tierline plan --model llama-3.1-8b --users 20000 --sessions-per-day 3 --slo ttft_p99=1s
"""

SIM_EXAMPLES = """\
examples:
  tierline sim out/deployment.toml --trace requests.jsonl -o out/sim
  tierline sim out/deployment.toml --trace requests.jsonl --compare tierline,fcfs,vllm-v1 --seed 7
  tierline sim out/deployment.toml --trace requests.jsonl --fault dies:replica=0,at=60s,back=300s
"""
EXPLAIN_EXAMPLES = """\
examples:
  tierline explain slowest out/sim
  tierline explain 4711 out/sim --policy fcfs
"""

RUN_EXAMPLES = """\
examples:
  tierline models fetch demo
  tierline run demo "Why is the sky blue?"
  tierline run path/to/model --temperature 0.7
"""


SERVE_EXAMPLES = """\
examples:
  tierline serve demo
  tierline serve path/to/model --embedded --key "$KEY" --host 0.0.0.0
  tierline serve out/deployment.toml --model path/to/model.gguf
"""

CALIBRATE_EXAMPLES = """\
examples:
  tierline calibrate
  tierline plan --model smollm2-135m --workload chat --rps 0.2 --slo ttft_p99=5s \\
    --gpus this-machine --price this-machine=0.05
"""


def plan(args: argparse.Namespace) -> int:
    """Plan a fleet and write plan.json, deployment.toml and report.html."""
    from tierline.planner.api import plan as make
    from tierline.planner.api import write_plan
    from tierline.planner.plan_json import plan_to_json
    from tierline.planner.text import render_text

    result = make(
        args.model,
        slo=args.slo,
        trace=args.trace,
        trace_format=args.format,
        mapping=_pairs(args.map, "--map"),
        workload=args.workload,
        rps=args.rps,
        users=args.users,
        sessions_per_day=args.sessions_per_day,
        gpus=_names(args.gpus),
        prices=_prices(args.price),
        growth=args.growth,
        safety=args.safety,
        budget_usd_per_year=args.budget,
        quality=args.quality,
        engine=args.engine,
        replay=not args.quick,
        average_load=args.average_load,
        api_usd_per_million=_api_price(args.api_price),
        curve=args.curve,
        instance=_pairs(args.instance, "--instance"),
        progress=True,
    )
    paths = write_plan(result, Path(args.output)) if args.output else []
    print(plan_to_json(result) if args.json else render_text(result))
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def sim(args: argparse.Namespace) -> int:
    """Replay a trace on a deployment, request by request, under one policy or several."""
    from tierline.planner.simulation import replay_of, run_all, summaries_json, write_simulation
    from tierline.sim.text import compare, render

    replay = replay_of(
        Path(args.deployment),
        trace=Path(args.trace),
        trace_format=args.format,
        mapping=_pairs(args.map, "--map"),
        policies=_names(args.compare),
        seed=args.seed,
        faults=args.fault or (),
    )
    watched = args.output is not None
    done = run_all(replay, watched=watched, request=args.request, progress=True)
    paths = []
    if args.output is not None:
        paths = write_simulation(done, Path(args.output), table=args.table)
    if args.json:
        print(summaries_json(done), end="")
    else:
        print(render(done.summaries[0]), end="")
        if len(done.summaries) > 1:
            print("\n" + compare(done.summaries), end="")
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def explain(args: argparse.Namespace) -> int:
    """Tell why a request of a simulation took as long as it did: every wait, and for whom."""
    from tierline.planner.simulation import explain_request
    from tierline.sim.explain import render_explanation

    told = explain_request(Path(args.folder), args.request, policy=args.policy, progress=True)
    print(told.to_json() if args.json else render_explanation(told), end="\n" * args.json)
    return 0


def profile(args: argparse.Namespace) -> int:
    """Describe a trace: lengths, arrivals, concurrency, sessions, prefix reuse."""
    from tierline.workload.profile import describe, profile_trace
    from tierline.workload.trace import read_trace

    reader = read_trace(Path(args.trace), format=args.format, mapping=_pairs(args.map, "--map"))
    found = profile_trace(reader, progress=True)
    print(_json(found.to_dict()) if args.json else describe(found))
    return 0


def export(args: argparse.Namespace) -> int:
    """Turn a deployment file into what another engine or orchestrator reads."""
    from tierline.base.files import write_text
    from tierline.catalog.deployment import load_deployment
    from tierline.planner.export import export as make

    result = make(load_deployment(Path(args.deployment)), args.to)
    if args.json:
        print(_json({"files": result.files, "not_expressed": list(result.not_expressed)}))
    elif args.output is None:
        for text in result.files.values():
            print(text, end="" if text.endswith("\n") else "\n")
    if args.output is not None:
        for name, text in result.files.items():
            path = Path(args.output) / name
            write_text(path, text)
            print(f"wrote {path}", file=sys.stderr)
    for line in result.not_expressed:
        print(f"not expressed: {line}", file=sys.stderr)
    return 0


def accuracy(args: argparse.Namespace) -> int:
    """Compare predictions with measurements of your own or published ones, row by row."""
    from tierline.planner.accuracy import render_text, report

    found = report([Path(file) for file in args.file], progress=True)
    print(_json(found) if args.json else render_text(found))
    return 0


def models(args: argparse.Namespace) -> int:
    """List the models that come by name, describe one, or fetch the demo model's weights."""
    from tierline.catalog.models import known_models, load_model

    if args.name == "fetch":
        return _fetch(args)
    if args.what is not None:
        raise InputError(
            f"{args.what!r} is one word too many",
            hint="tierline models [MODEL], or tierline models fetch demo",
        )
    rows = [_model_row(load_model(n)) for n in ([args.name] if args.name else known_models())]
    if args.json:
        print(_json(rows))
        return 0
    print(f"{'model':<26}{'params':>10}{'active':>10}{'layers':>8}{'KV B/token':>12}  native")
    for row in rows:
        print(
            f"{row['name']:<26}{row['params'] / 1e9:>9.2f}B{row['params_active'] / 1e9:>9.2f}B"
            f"{row['layers']:>8}{row['kv_bytes_per_token_bf16']:>12,}  {row['native_format']}"
        )
    return 0


def _fetch(args: argparse.Namespace) -> int:
    """`tierline models fetch demo`: bring the weights here, print where they lie."""
    from tierline.base.names import lookup
    from tierline.engine.demo import NAMES, SHA256, fetch_demo

    lookup("checkpoint to fetch", args.what or "", NAMES)
    path = fetch_demo(show=sys.stderr.isatty())
    size_bytes = path.stat().st_size
    told = {"name": args.what, "path": str(path), "sha256": SHA256, "size_bytes": size_bytes}
    print(_json(told) if args.json else path)
    return 0


def run_model(args: argparse.Namespace) -> int:
    """Answer a prompt, or chat in the terminal, with a real model on this machine."""
    from tierline.base.units import parse_bytes
    from tierline.engine.llm import LLM

    params = _sampling(args)
    options = {name: getattr(args, name) for name in ("dtype", "device", "kernels", "seed")}
    if args.kv_bytes is not None:
        options["kv_bytes"] = parse_bytes(args.kv_bytes)
    if args.json and args.prompt is None:
        raise InputError("--json answers one prompt", hint="tierline run MODEL PROMPT --json")
    llm = LLM(args.model, building=_building, **options)
    facts = llm.facts
    print(
        f"{facts.model}: {facts.dtype} on {facts.device}, kernels {facts.kernels}, "
        f"{facts.weight_bytes / 1e6:.0f} MB of weights, KV cache of {facts.kv_tokens:,} tokens",
        file=sys.stderr,
    )
    said: list[dict[str, str]] = []
    if args.system:
        said.append({"role": "system", "content": args.system})
    if args.prompt is not None:
        return _answer(llm, said, args.prompt, params, args)
    return _converse(llm, said, params, args)


def _building() -> None:
    print("building the CPU kernels, once for this machine ...", file=sys.stderr)


def _sampling(args: argparse.Namespace) -> Any:
    from tierline.engine.sampling import SamplingParams

    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed
    )
    for warning in params.warnings():
        print(f"note: {warning}", file=sys.stderr)
    return params


def _converse(llm: Any, said: list[dict[str, str]], params: Any, args: argparse.Namespace) -> int:
    """Turn by turn until the input ends; Ctrl-C ends an answer, not the conversation."""
    if sys.stdin.isatty():
        print("Ctrl-C stops an answer, Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InputError(f"what was typed is not valid text: {error}") from None
        if not line:
            return 0
        if line.strip():
            _answer(llm, said, line.strip(), params, args)


def _answer(
    llm: Any, said: list[dict[str, str]], prompt: str, params: Any, args: argparse.Namespace
) -> int:
    """One answer, as it comes; both turns are added to what was said."""
    from tierline.engine.llm import Tally

    turn = {"role": "user", "content": prompt}
    chats = llm.engine.chat is not None and not args.raw
    tokens = llm.chat_prompt([*said, turn]) if chats else llm.encode(prompt)
    tally = Tally(llm.engine.clock.now_ps())
    stream = llm.stream(tokens, params)
    try:
        for delta in stream:
            tally.add(delta)
            if not args.json:
                print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
        if args.prompt is not None:
            raise
    if args.json:
        print(_json(tally.as_dict()))
    else:
        print()
        print(tally, file=sys.stderr)
    said += [turn, {"role": "assistant", "content": tally.text}]
    if tally.error is not None:
        raise DependencyError(f"the answer was broken off: {tally.error}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """Serve a model, or a deployment file, to OpenAI's clients, with a page to watch it."""
    from tierline.server.serve import Wish, run
    from tierline.telemetry.logs import configure

    configure(sys.stderr, level=args.log_level, log_prompts=args.log_prompts)
    wish = Wish(
        target=args.target,
        model=args.model,
        options=_engine_options(args),
        host=args.host,
        port=args.port,
        keys=tuple(args.key or os.environ.get(KEYS_VARIABLE, "").split()),
        names=tuple(_names(args.name) or ()),
        data=_data_folder(args),
        tool_format=args.tool_format,
        input_tokens_max=args.input_max,
        open_max=args.open_max,
        drain_s=args.drain,
        version=version("tierline"),
    )

    def started(told: Any) -> None:
        print(_json(told.to_dict()) if args.json else told, flush=True)

    run(wish, started=started)
    return 0


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of an engine's options; the rest is left to it."""
    from tierline.base.units import parse_bytes
    from tierline.engine.demo import models_folder

    names = [*("dtype", "device", "kernels", "policy", "seed")]
    names += ("positions_max", "sequences_max", "batch_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.kv_bytes is not None:
        given["kv_bytes"] = parse_bytes(args.kv_bytes)
    return given | {"kernels_folder": models_folder().parent / "kernels", "building": _building}


def _data_folder(args: argparse.Namespace) -> Path | None:
    if not (args.embedded or args.data):
        return None
    return Path(args.data or Path.home() / ".local" / "share" / "tierline").expanduser()


def calibrate(args: argparse.Namespace) -> int:
    """Measure this machine in a minute and write its catalogue entry, to plan and simulate with."""
    import time
    from datetime import date

    from tierline.catalog.gpus import own_folder, require_own_name
    from tierline.engine.build import device_named
    from tierline.engine.calibrate import calibrate as measure
    from tierline.engine.calibrate import require_writable, write_entry
    from tierline.engine.demo import models_folder, resolve_model
    from tierline.engine.machine import entry_name

    device = device_named(args.device)
    output = Path(args.output) if args.output else None
    name = args.name or (output.stem if output else entry_name(device))
    path = output or own_folder() / f"{require_own_name(name)}.toml"
    require_writable(path)
    cache = models_folder().parent
    found = measure(
        name=require_own_name(name),
        device=device,
        scratch=Path(args.scratch) if args.scratch else cache,
        kernels_folder=cache / "kernels",
        model=resolve_model(args.model) if args.model else None,
        today=date.today().isoformat(),
        timer=time.perf_counter,
        seconds=args.seconds,
        progress=True,
    )
    write_entry(found.gpu, path)
    print(_json(found.as_dict() | {"path": str(path)}) if args.json else found)
    print(f"wrote {path}", file=sys.stderr)
    return 0


def gpus(args: argparse.Namespace) -> int:
    """List the accelerators of the catalogue and your own, or describe one with its sources."""
    from tierline.catalog.gpus import load_gpu, load_gpus, own_files

    found = [load_gpu(args.name)] if args.name else [*load_gpus(None), *map(load_gpu, own_files())]
    rows = [_gpu_row(gpu) for gpu in found]
    if args.json:
        print(_json(rows))
        return 0
    print(f"{'gpu':<16}{'memory':>9}{'rate':>11}{'bf16':>9}{'fp8':>8}{'fp4':>8}{'$/h':>8}  as of")
    for row in rows:
        rates = row["tflops"]
        price = "unknown" if row["usd_per_hour"] is None else f"{row['usd_per_hour']:.2f}"
        print(
            f"{row['name']:<16}{row['memory_gb']:>6.0f} GB{row['memory_tb_per_s']:>6.2f} TB/s"
            f"{_cell(rates['bf16']):>9}{_cell(rates.get('fp8')):>8}{_cell(rates.get('fp4')):>8}"
            f"{price:>8}  {row['price_as_of']}"
        )
    if args.name:
        for field, source in found[0].sources.items():
            print(f"  {field}: {source}")
    return 0


def synthesize(args: argparse.Namespace) -> int:
    """Write a seeded trace that looks like another one, like a built-in workload, or a mix."""
    from tierline.workload.archetypes import workload_profile
    from tierline.workload.profile import profile_trace
    from tierline.workload.synthesis import write_synthetic

    if sum(given is not None for given in (args.like, args.workload, args.mix)) != 1:
        raise InputError("give --like TRACE, --workload KIND or --mix CLASS..., one of them")
    if args.mix is not None:
        return _mix(args)
    if args.like is not None:
        source = profile_trace(Path(args.like), progress=True)
        source = source if args.rps is None else source.at_rate(args.rps)
    else:
        source = workload_profile(args.workload, rps=args.rps or 1.0)
    count = write_synthetic(
        source,
        Path(args.output),
        seed=args.seed,
        requests=args.requests,
        arrivals=args.arrivals or "gamma",
    )
    return _wrote(args, count)


def _mix(args: argparse.Namespace) -> int:
    from itertools import islice

    from tierline.workload.mix import mixed, read_part
    from tierline.workload.trace import write_trace

    if args.arrivals not in (None, "poisson"):
        raise InputError(
            f"a mix has no {args.arrivals} arrivals", hint="its arrivals are poisson, at --rps"
        )
    parts = [read_part(text) for text in args.mix]
    drawn = mixed(parts, rate_rps=args.rps or 1.0, seed=args.seed)
    return _wrote(args, write_trace(Path(args.output), islice(drawn, args.requests)))


def _wrote(args: argparse.Namespace, count: int) -> int:
    if args.json:
        print(_json({"path": args.output, "requests": count, "seed": args.seed}))
    else:
        print(f"wrote {count:,} requests to {args.output}", file=sys.stderr)
    return 0


# --- rows and arguments ---------------------------------------------------------------------


def _model_row(spec: Any) -> dict[str, Any]:
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "params": spec.params,
        "params_active": spec.params_active,
        "layers": spec.layers,
        "kv_bytes_per_token_bf16": 2 * spec.kv_elements_per_token,
        "positions_max": spec.positions_max,
        "legal_tp": spec.legal_tp(16),
        "native_format": spec.native_format,
        "source": spec.source,
    }


def _gpu_row(gpu: Any) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "title": gpu.title,
        "generation": gpu.generation,
        "memory_gb": gpu.memory_bytes / 1e9,
        "memory_tb_per_s": gpu.memory_bytes_per_s / 1e12,
        "tflops": {k: v / 1e12 for k, v in gpu.flops_per_s.items()},
        "fabric": gpu.scale_up.kind,
        "usd_per_hour": gpu.price.typical_usd,
        "price_as_of": gpu.price.as_of,
        "price_source": gpu.price.source,
        "sources": dict(gpu.sources),
    }


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1 else f"{value:.2g}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False)


def _names(texts: Sequence[str] | None) -> list[str] | None:
    names = [name.strip() for text in texts or () for name in text.split(",") if name.strip()]
    return names or None


def _pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in _names(texts) or ():
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise InputError(f"{option} {part!r} is not NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _prices(texts: Sequence[str] | None) -> dict[str, float]:
    return {gpu: _number(usd, "--price") for gpu, usd in _pairs(texts, "--price").items()}


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a number") from None


def _api_price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2:
        raise InputError(
            f"--api-price {text!r} is not INPUT,OUTPUT",
            hint="dollars per million input and output tokens, for example 0.60,0.60",
        )
    return _number(parts[0], "--api-price"), _number(parts[1], "--api-price")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; the reference page is generated from it."""
    parser = argparse.ArgumentParser(
        prog="tierline", description="Plan, run and prove LLM serving fleets."
    )
    parser.add_argument("--version", action="version", version=f"tierline {version('tierline')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_sim(commands)
    _add_explain(commands)
    _add_profile(commands)
    _add_synthesize(commands)
    _add_export(commands)
    _add_accuracy(commands)
    _add_run(commands)
    _add_serve(commands)
    _add_calibrate(commands)
    for run, name in ((models, "MODEL"), (gpus, "GPU")):
        command = _command(commands, run)
        command.add_argument("name", nargs="?", metavar=name, help=f"describe this {name.lower()}")
        if run is models:
            command.add_argument(
                "what", nargs="?", metavar="NAME", help="after `fetch` in place of MODEL: demo"
            )
    return parser


def _command(
    commands: Any, run: Run, epilog: str | None = None, *, name: str | None = None
) -> argparse.ArgumentParser:
    text = (run.__doc__ or "").strip()
    command: argparse.ArgumentParser = commands.add_parser(
        name or run.__name__,
        help=text[0].lower() + text[1:].rstrip("."),
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="machine-readable output on stdout")
    command.set_defaults(run=run)
    return command


def _add_trace_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", help="format of the trace (default: found from its content)")
    command.add_argument(
        "--map",
        action="append",
        metavar="FIELD=COLUMN,...",
        help="columns of a plain log: arrival=ts,input=prompt_tokens,output=completion_tokens",
    )


def _add_plan(commands: Any) -> None:
    command = _command(commands, plan, PLAN_EXAMPLES)
    command.add_argument("--model", required=True, help="name, or path of a config.json")
    command.add_argument(
        "--slo",
        required=True,
        action="append",
        metavar="[CLASS[@PRIORITY]:]TARGETS",
        help="ttft_p99=2s,itl_p99=50ms; metrics ttft, itl, tpot, e2e; repeat for classes",
    )
    demand = command.add_argument_group("demand (one of)")
    demand.add_argument("--trace", help="request log or trace; see docs/reference/trace-format.md")
    _add_trace_options(command)
    demand.add_argument("--workload", help="built-in lengths: chat, rag, code, agent")
    demand.add_argument(
        "--rps", type=float, help="requests a second in a busy minute (p95 of the minutes)"
    )
    demand.add_argument("--users", type=int, help="from the business side: daily users ...")
    demand.add_argument("--sessions-per-day", type=float, help="... and sessions of each")
    command.add_argument(
        "--gpus", action="append", metavar="GPU,...", help="names or .toml files (default: all)"
    )
    command.add_argument(
        "--price", action="append", metavar="GPU=USD,...", help="dollars per GPU-hour"
    )
    command.add_argument("--growth", type=float, default=1.0, help="multiply demand (default 1)")
    command.add_argument(
        "--average-load", type=float, help="mean over peak rate (default: the trace's, else 0.5)"
    )
    command.add_argument("--safety", type=float, help="1.2 predictable, 1.5 otherwise (default)")
    command.add_argument("--budget", type=float, metavar="USD", help="dollars a year")
    command.add_argument(
        "--quality",
        default="negligible",
        help="worst loss a format may have untested: none, negligible, mild, moderate",
    )
    command.add_argument("--engine", default="vllm", help="engine whose host times to plan with")
    command.add_argument(
        "--quick", action="store_true", help="take the closed form's word: no replay decides"
    )
    command.add_argument(
        "--api-price", metavar="IN,OUT", help="hosted $ per million tokens, for the break-even"
    )
    command.add_argument(
        "--curve", metavar="CSV", help="measured load curve of one instance, in place of predicted"
    )
    command.add_argument(
        "--instance",
        action="append",
        metavar="tp=4,weights=fp8,kv=fp8",
        help="the instance that --curve was measured on",
    )
    command.add_argument(
        "-o", "--output", help="folder for plan.json, deployment.toml, report.html"
    )


def _add_sim(commands: Any) -> None:
    command = _command(commands, sim, SIM_EXAMPLES)
    command.add_argument("deployment", help="deployment.toml")
    command.add_argument("--trace", required=True, help="request log or trace")
    _add_trace_options(command)
    command.add_argument("--seed", type=int, default=0, help="equal seeds, equal runs")
    command.add_argument(
        "--fault",
        action="append",
        metavar="KIND:KEY=VALUE,...",
        help="dies:replica=0,at=60s,back=300s; slow, link, disk-full, disk-fails, lost-transfer, "
        "burst; repeat for more",
    )
    command.add_argument(
        "--compare",
        action="append",
        metavar="POLICY,...",
        help="tierline, fcfs, shortest, priority, edf; vllm-v1, sglang, trtllm-no-evict, "
        "trtllm-max-utilization, static (default: the deployment's own)",
    )
    command.add_argument(
        "--request",
        default="slowest",
        help="whose life the page draws: a number, or the slowest to its first token (default)",
    )
    command.add_argument(
        "--table", default="csv", help="format of the requests: csv, csv.gz, parquet (default csv)"
    )
    command.add_argument(
        "-o",
        "--output",
        help="folder for summary.json, the table of requests, page.html, trace.json.gz, run.json",
    )


def _add_explain(commands: Any) -> None:
    command = _command(commands, explain, EXPLAIN_EXAMPLES)
    command.add_argument(
        "request", help="its number, the first column of requests.csv; or the word slowest"
    )
    command.add_argument(
        "folder", nargs="?", default=".", help="what `tierline sim -o` wrote (default: here)"
    )
    command.add_argument("--policy", help="of those compared (default: the best)")


def _add_profile(commands: Any) -> None:
    command = _command(commands, profile)
    command.add_argument("trace", help="request log or trace")
    _add_trace_options(command)


def _add_synthesize(commands: Any) -> None:
    command = _command(commands, synthesize)
    command.add_argument("--like", metavar="TRACE", help="the trace to imitate")
    command.add_argument("--workload", help="built-in lengths: chat, rag, code, agent")
    command.add_argument(
        "--mix",
        nargs="+",
        metavar="CLASS",
        help="classes, each NAME@PRIORITY:SHARE=TRACE with the lengths of a trace; the scheduler "
        "tells them apart by priority",
    )
    command.add_argument("--rps", type=float, help="mean requests a second")
    command.add_argument("--requests", type=int, default=5000, help="how many (default 5000)")
    command.add_argument("--seed", type=int, default=0, help="equal seeds, equal traces")
    command.add_argument(
        "--arrivals", help="poisson, gamma, bursts or day (default gamma; a mix is poisson)"
    )
    command.add_argument("-o", "--output", required=True, help="file to write")


def _add_export(commands: Any) -> None:
    command = _command(commands, export)
    command.add_argument("deployment", help="deployment.toml")
    command.add_argument(
        "--to", required=True, help="vllm, sglang, trtllm, ray-serve or kubernetes"
    )
    command.add_argument("-o", "--output", help="folder to write to (default: stdout)")


def _add_run(commands: Any) -> None:
    command = _command(commands, run_model, RUN_EXAMPLES, name="run")
    command.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or `demo`")
    command.add_argument("prompt", nargs="?", metavar="PROMPT", help="without it: a conversation")
    command.add_argument("--system", help="what the model is told before the conversation")
    command.add_argument("--raw", action="store_true", help="the prompt as it is, no chat template")
    command.add_argument("--max-tokens", type=int, default=512, help="of one answer (512)")
    command.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from (1)")
    command.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    command.add_argument("--dtype", default="auto", help="fp32, bf16 or fp16 (as stored)")
    command.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (cuda if there)")
    command.add_argument("--kernels", default="auto", help="native or torch (native if possible)")
    command.add_argument("--kv-bytes", metavar="SIZE", help="of the KV cache, such as 2GB")


def _add_serve(commands: Any) -> None:
    command = _command(commands, serve, SERVE_EXAMPLES)
    command.add_argument(
        "target", metavar="MODEL|DEPLOYMENT", help="a folder, a GGUF file, `demo`, or a .toml file"
    )
    command.add_argument("--model", help="the checkpoint, beside a deployment file")
    command.add_argument(
        "--name", action="append", metavar="NAME,...", help="what clients call it (its own name)"
    )
    command.add_argument("--host", default="127.0.0.1", help="to listen on (127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    command.add_argument(
        "--key",
        action="append",
        help=f"that callers have to show; repeat for more (or in {KEYS_VARIABLE}, which others on"
        " this machine do not see)",
    )
    command.add_argument(
        "--embedded", action="store_true", help="keep keys, usage and runs in a data folder"
    )
    command.add_argument(
        "--data", metavar="FOLDER", help="that folder (~/.local/share/tierline); means --embedded"
    )
    _add_serving_limits(command)
    engine = command.add_argument_group("engine (a deployment file says most of these)")
    engine.add_argument("--dtype", help="fp32, bf16 or fp16 (as stored)")
    engine.add_argument("--device", help="cpu, cuda or cuda:N (cuda if there)")
    engine.add_argument("--kernels", help="native or torch (native if possible)")
    engine.add_argument("--kv-bytes", metavar="SIZE", help="of the KV cache, such as 2GB")
    engine.add_argument("--policy", help="tierline, fcfs, shortest, priority or edf (tierline)")
    engine.add_argument("--positions-max", type=int, help="tokens of prompt and answer together")
    engine.add_argument("--sequences-max", type=int, help="computed at once (64)")
    engine.add_argument("--batch-tokens", type=int, help="of one step (512 on a CPU)")
    engine.add_argument("--seed", type=int, help="of requests that have none of their own (0)")


def _add_serving_limits(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tool-format", help="hermes, llama3_json or qwen3_coder (as the chat template says)"
    )
    command.add_argument(
        "--input-max", type=int, metavar="TOKENS", help="longest input, 413 above (the model's)"
    )
    command.add_argument(
        "--open-max", type=int, default=1024, metavar="N", help="requests here at once (1024)"
    )
    command.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for what is under way when told to stop (30)",
    )
    command.add_argument("--log-level", default="info", help="debug, info, warning or error (info)")
    command.add_argument(
        "--log-prompts", action="store_true", help="write prompts to the log; never done otherwise"
    )


def _add_calibrate(commands: Any) -> None:
    command = _command(commands, calibrate, CALIBRATE_EXAMPLES)
    command.add_argument("--name", help="of the entry (default this-machine)")
    command.add_argument(
        "-o", "--output", metavar="FILE", help="(default NAME.toml in ~/.config/tierline/gpus)"
    )
    command.add_argument("--seconds", type=float, default=60.0, help="to spend (60)")
    command.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (cuda if there)")
    command.add_argument(
        "--scratch", metavar="FOLDER", help="on the disk to measure (default ~/.cache/tierline)"
    )
    command.add_argument(
        "--model", help="a checkpoint to compare steps with (default: SmolLM2-135M's shape)"
    )


def _add_accuracy(commands: Any) -> None:
    command = _command(commands, accuracy)
    command.add_argument(
        "file",
        nargs="+",
        help="measured rows (CSV of InferenceX, TensorRT-LLM or MLPerf; JSON lines of requests)",
    )


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Python before 3.13 does not see an optional PROMPT behind options."""
    parser = build_parser()
    args, left = parser.parse_known_args(argv)
    if len(left) == 1 and not left[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = left.pop()
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors become a message, a hint and an exit code."""
    args = _parsed(argv)
    run: Run = args.run
    try:
        return run(args)
    except TierlineError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        print(f"error: this command needs the package {package}", file=sys.stderr)
        print(f"\nhint: pip install 'tierline[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written in part", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def run() -> None:
    """The `tierline` command."""
    sys.exit(main())
