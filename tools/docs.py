"""The pages of docs/reference, written from the code, and the examples in the documents, run.

    python tools/docs.py              write the pages
    python tools/docs.py --check      fail, and say which, when a page is not what it would write
    python tools/docs.py --examples   run every block that follows a `<!-- run -->` line
    python tools/docs.py --record     run them, and write down what they print where it is shown

A page is a function of the code alone, so that it is the same on every machine and Python;
that is why the command line is listed from the parser's own table and not from its help text.

Of a ```console block every line `$ command` is run, from the root of the project. What follows
it must be what the command prints (`...` stands for any text); nothing means: it must succeed.
A command whose printed text has a line that begins with `error:` must end with status 2.
A ```python block must run to its end.  Blocks that follow `<!-- run with a server -->` ask one at
port 8000, model demo; a test runs them.
"""

import argparse
import ast
import doctest
import inspect
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tierline import cli
from tierline.base import errors
from tierline.base.units import significant
from tierline.catalog import deployment, formats
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import gpu_names, load_gpu
from tierline.catalog.models import known_models
from tierline.server import openapi, openapi_words, shapes
from tierline.telemetry import logs, meanings, spans
from tierline.workload import importers, request

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "docs/reference"
NOTICE = "<!-- Written by tools/docs.py from the code; `make docs` writes it again. -->\n"
MARK = "<!-- run -->"
MARK_SERVER = "<!-- run with a server -->"
TIMEOUT_S = 600


# Pages

GPU_HEAD = (
    *("name", "accelerator", "memory GB", "memory GB/s", "BF16 TFLOPS", "FP8", "FP4"),
    *("scale-up GB/s", "domain", "low $/h", "typical $/h", "high $/h", "price as of"),
)
MODEL_HEAD = (
    *("name", "parameters (10⁹)", "active (10⁹)", "layers", "KV bytes per token"),
    *("positions", "published as"),
)


def cli_page() -> str:
    """Every command with its arguments."""
    parser = cli.build_parser()
    parts = ["# Command line", parser.description or ""]
    for names, command in commands_of(parser):
        parts += [f"## `{names}`", command.description or "", *argument_tables(command)]
    return join(parts)


def commands_of(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands of a parser, and the commands of those, each with its full name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield command.prog, command
                yield from commands_of(command)


def argument_tables(command: argparse.ArgumentParser) -> list[str]:
    """One table of what a command takes; the standard --help is left out."""
    rows = []
    for action in command._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
        takes_value = action.nargs != 0
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        label = value or action.dest.upper()
        name = f"{flags} `{label}`" if flags and takes_value else flags or f"`{label}`"
        needed = "required" if action.required and flags else default_text(action)
        help_text = (action.help or "") % {**vars(action), "prog": command.prog}
        rows.append((name, needed, help_text))
    return [table(("argument", "default", "meaning"), rows)] if rows else []


def default_text(action: argparse.Action) -> str:
    """The default as a reader would type it; a flag has none."""
    empty = action.default is None or action.default is False or action.default == argparse.SUPPRESS
    return "" if empty else f"`{action.default}`"


def deployment_page() -> str:
    """Every key of a deployment file."""
    parts = ["# Deployment file", inspect.getdoc(deployment) or ""]
    parts += [dataclass_section(cls) for cls in dataclasses_of(deployment)]
    return join(parts)


def trace_page() -> str:
    """The trace format, and the column names of every format that is read."""
    keys = [f.name for f in fields(importers.Columns) if f.name != "failed_output_zero"]
    rows = [
        (f"`{name}`", *(f"`{value}`" if (value := getattr(columns, k)) else "" for k in keys))
        for name, columns in importers.FORMATS.items()
    ]
    example = (
        '{"tierline_trace": 1, "block_tokens": 512}\n'
        '{"arrival_ns": 0, "input_tokens": 812, "output_tokens": 64}\n'
        '{"arrival_ns": 41000000, "input_tokens": 1310, "output_tokens": 220, '
        '"prefix_blocks": [17, 18], "session": "a"}'
    )
    return join(
        [
            "# Trace format",
            "A trace is JSON lines, gzip or not: a header with the version and the tokens that a"
            " prefix block spans, then one request a line. Facts that a request does not state"
            " are left out of its line.",
            f"```json\n{example}\n```",
            dataclass_section(request.Request),
            "## Formats that are read",
            "A format is told from the content of the file. The columns say under which name it"
            " keeps each fact; empty means that it does not have that fact.",
            table(("format", *(k.replace("_", " ") for k in keys)), rows),
        ]
    )


def gpus_page() -> str:
    """The accelerators of the catalogue."""
    return join(
        [
            "# Accelerators",
            "Rates are peak, dense, decimal and one direction. An empty cell is not known, or not"
            " there. Prices are per accelerator and hour, dated, and yours replace them"
            " (`--price`). Sources stand in `src/tierline/catalog/data/gpus/`.",
            table(GPU_HEAD, [gpu_row(load_gpu(name)) for name in gpu_names()]),
        ]
    )


def gpu_row(gpu: GpuSpec) -> tuple[str, ...]:
    """One accelerator as a table row."""
    math = [gpu.flops_per_s.get(key) for key in ("bf16", "fp8", "fp4")]
    prices = [gpu.price.low_usd, gpu.price.typical_usd, gpu.price.high_usd]
    return (
        f"`{gpu.name}`",
        gpu.title,
        f"{gpu.memory_bytes / 1e9:g}",
        f"{gpu.memory_bytes_per_s / 1e9:g}",
        *(f"{rate / 1e12:g}" if rate else "" for rate in math),
        f"{gpu.scale_up.bytes_per_s / 1e9:g} {gpu.scale_up.kind}",
        str(gpu.scale_up.domain_gpus),
        *(f"{usd:.2f}" if usd is not None else "" for usd in prices),
        gpu.price.as_of if any(usd is not None for usd in prices) else "",
    )


def models_page() -> str:
    """The models of the catalogue."""
    rows = []
    for name, model in known_models().items():
        rows.append(
            (
                f"`{name}`",
                significant(model.params / 1e9),
                significant(model.params_active / 1e9),
                str(model.layers),
                f"{model.kv_elements_per_token * 2:,}",
                f"{model.positions_max:,}",
                f"`{model.native_format}`",
            )
        )
    return join(
        [
            "# Models",
            "Counted from the shapes. KV bytes per token are those of a BF16 cache over all"
            " layers, inside every attention window; FP8 halves them. A model that is not here"
            " is read from its `config.json`: see [add a model](../guides/add-a-model.md).",
            table(MODEL_HEAD, rows),
        ]
    )


def formats_page() -> str:
    """Number formats of weights and cache."""

    def rows(known: dict[str, formats.Format]) -> list[tuple[str, ...]]:
        return [(f"`{f.name}`", f"{f.bits:g}", f.math, f.quality, f.note) for f in known.values()]

    head = ("name", "bits", "math", "quality to test for", "note")
    return join(
        [
            "# Number formats",
            inspect.getdoc(formats) or "",
            "## Weights",
            table(head, rows(formats.WEIGHT_FORMATS)),
            "## KV cache",
            table(head, rows(formats.KV_FORMATS)),
        ]
    )


def errors_page() -> str:
    """The tree of errors, and what each means."""
    tree, _, rest = (inspect.getdoc(errors) or "").partition("A broken invariant")
    intro, _, drawn = tree.partition("\n\n")
    rows = [
        (f"`{name}`", (inspect.getdoc(error) or "").splitlines()[0])
        for name, error in vars(errors).items()
        if isinstance(error, type)
    ]
    return join(
        [
            "# Errors",
            "The command line prints `error:` and, where there is one, `hint:` on standard error,"
            " and ends with status 2.",
            intro,
            f"```text\n{textwrap.dedent(drawn).strip()}\n```",
            "A broken invariant" + rest,
            table(("error", "meaning"), rows),
        ]
    )


def metrics_page() -> str:
    """What a running server tells: its metrics, the attributes of its spans, its logs' fields."""
    head = ("metric", "kind", "unit", "labels", "meaning")
    rows = {
        origin: [
            (f"`{m.name}`", m.kind, m.unit, ", ".join(f"`{x}`" for x in m.labels), m.text)
            for m in meanings.MEANINGS
            if m.name.startswith(origin)
        ]
        for origin in ("vllm:", "tierline:", "process_")
    }
    labels = " and ".join(f"`{label}`" for label in meanings.MODEL_LABELS)
    return join(
        [
            "# Metrics, spans and log fields",
            "[Observe a server](../guides/observe.md) says how to use them.",
            "## Metrics that mean the same as vLLM's",
            f"They have vLLM's names, labels ({labels}, beside those listed) and buckets, so that"
            " dashboards and alerts made for vLLM work. A histogram has `_bucket`, `_sum` and"
            " `_count`.",
            table(head, rows["vllm:"]),
            "## Metrics of our own",
            f"They have {labels}, too. `class` is a class of service of the configuration; what is"
            f" in no configuration is counted as `{meanings.OTHER}`.",
            table(head, rows["tierline:"]),
            "## The process",
            table(head, rows["process_"]),
            "## Outcomes",
            "Every request ends in one. Those without vLLM's word are not in `vllm:` metrics.",
            table(
                ("outcome", "`finished_reason`"),
                [(f"`{k}`", f"`{v}`" if v else "") for k, v in meanings.FINISHED_REASONS.items()],
            ),
            "## Attributes of spans",
            "Beside `gen_ai.operation.name`, `gen_ai.provider.name`, `gen_ai.system` and"
            " `gen_ai.request.model`, as far as a request has them; times are in seconds.",
            "\n".join(f"- `{name}`" for name in spans.FACTS.values()),
            "Events: "
            + ", ".join(spans.EVENTS)
            + "; with "
            + ", ".join(f"`{name}`" for name in spans.EVENT_FACTS.values())
            + " as they have them.",
            "## Fields of log lines",
            "Beside `ts`, `level`, `logger` and `message`.",
            table(("field", "meaning"), [(f"`{k}`", v) for k, v in logs.FIELDS.items()]),
        ]
    )


# What OpenAI's reference describes; ours, and what was added, stand on the page.
GENERATIONS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "embeddings": "/v1/embeddings",
}
OWN_ANSWERS = (
    *("Service", "ServiceOfEmbedding", "Model", "Tokenized", "Detokenized", "Health"),
    *("Readiness", "KeyTold", "KeyMade", "Sums", "UsageRecord", "RunTold", "Draining", "LogLevel"),
    *("Tier", "CacheReset"),
)


def http_page() -> str:
    """Every path, parameter, header, shape and error of the server."""
    document = openapi.document(version="", models=(), key_required=True)
    known = document["components"]["schemas"]
    return join(
        [
            "# HTTP interface",
            "What `tierline serve` answers. A server tells the same to machines at `/openapi.json`."
            " [Use it with the clients you have](../guides/use-with-clients.md) says how it differs"
            " from OpenAI's.",
            "## Paths",
            "`key`: an API key, `Authorization: Bearer ...`, once the server has any; `admin`: the"
            " admin token of its data folder, likewise.",
            table(("path", "what", "needs", "answers"), path_rows(document)),
            "## Parameters under /v1",
            "● is required, ○ may be given; null is as good as absent. A parameter that is not here"
            " is refused by its name. *From* says who named it: what is not OpenAI's goes into"
            " `extra_body` of `openai`.",
            table(
                ("parameter", "type", *GENERATIONS, "from", "meaning"), list(parameter_rows(known))
            ),
            "### Taken without effect",
            table(("parameter", "why"), sorted(without_effect_rows())),
            "### Not supported, and why",
            "They are OpenAI's. Asked for with a value that would change something, they are"
            " refused with `unsupported_parameter`; null and the values listed here pass.",
            table(("parameter", "passes", "why"), sorted(unsupported_rows())),
            "## Parameters elsewhere",
            *other_parameters(known),
            "## Headers of requests",
            table(("header", "meaning"), word_rows(openapi_words.REQUEST_HEADERS)),
            "## Headers of answers",
            table(("header", "meaning"), word_rows(openapi_words.RESPONSE_HEADERS)),
            "## Errors",
            '`{"error": {"message", "type", "param", "code", "hint"}}`, also as the'
            " last event of a stream that had begun. `param` is the place in the body.",
            table(
                ("status", "`code`", "when"),
                [
                    (str(status), f"`{code}`", what)
                    for code, (status, what) in openapi_words.ERRORS.items()
                ],
            ),
            "## What parameters are made of",
            *(shape_section(name, known) for name in parts_of_requests(known)),
            "## What answers are made of",
            "Chats, completions, responses, embeddings and their events have OpenAI's shapes, with"
            " [`tierline`](#service) beside `usage`: in every whole answer, and in the last event"
            " of a stream's choice. Here is what is ours.",
            *(shape_section(name, known, answer=True) for name in OWN_ANSWERS),
        ]
    )


def path_rows(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row an operation."""
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            needs = [scheme for one in told.get("security", ()) for scheme in one]
            answers = ", ".join(sorted(told["responses"]))
            yield f"`{method.upper()} {path}`", told["summary"], ", ".join(needs), answers


def parameter_rows(known: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row a parameter that does something, with who takes it."""
    shapes_of = {one.path: one.asks for one in openapi.OPERATIONS if one.asks is not None}
    asked = [known[shapes_of[path].__name__] for path in GENERATIONS.values()]
    for name, (whose, what) in openapi_words.PARAMETERS.items():
        fields = [schema["properties"].get(name, {}) for schema in asked]
        found = [field if "x-origin" in field else None for field in fields]  # has an effect
        if not any(found):
            continue
        kinds = dict.fromkeys(type_text(one) for one in found if one)
        marks = [
            ("●" if name in schema.get("required", ()) else "○") if one else ""
            for schema, one in zip(asked, found, strict=True)
        ]
        yield f"`{name}`", "; ".join(kinds), *marks, whose, what


def without_effect_rows() -> Iterator[tuple[str, ...]]:
    for name, why in openapi_words.WITHOUT_EFFECT.items():
        yield f"`{name}`", why


def unsupported_rows() -> Iterator[tuple[str, ...]]:
    for name, (passing, why) in shapes.UNSUPPORTED.items():
        yield f"`{name}`", ", ".join(f"`{json.dumps(value)}`" for value in passing), why


def word_rows(words: dict[str, str]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", what) for name, what in words.items()]


def other_parameters(known: dict[str, Any]) -> Iterator[str]:
    """A table for every operation that is no generation and takes something."""
    for one in openapi.OPERATIONS:
        if one.asks is None or not one.asks.model_fields or one.path in GENERATIONS.values():
            continue
        schema = known[one.asks.__name__]
        rows = [
            (f"`{name}`", type_text(field), required_text(name, schema), field["description"])
            for name, field in schema["properties"].items()
        ]
        yield f"### `{one.method} {one.path}`"
        yield table(("parameter", "type", "", "meaning"), rows)


def required_text(name: str, schema: dict[str, Any]) -> str:
    return "required" if name in schema.get("required", ()) else ""


def parts_of_requests(known: dict[str, Any]) -> list[str]:
    """The shapes that bodies refer to, in the order in which a reader meets them."""
    found: dict[str, None] = {}
    waiting = [known[one.asks.__name__] for one in openapi.OPERATIONS if one.has_body and one.asks]
    while waiting:
        for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(waiting.pop(0))):
            if name not in found:
                found[name] = None
                waiting.append(known[name])
    return list(found)


def shape_section(name: str, known: dict[str, Any], *, answer: bool = False) -> str:
    """A heading, what it is, and a table of its fields."""
    schema = known[name]
    required = schema.get("required", ())
    rows = []
    for field, told in schema["properties"].items():
        null = " or null" if answer and {"type": "null"} in told.get("anyOf", ()) else ""
        word = "" if (field in required) == answer else "may be absent" if answer else "required"
        rows.append((f"`{field}`", type_text(told) + null, word))
    about = " ".join(schema.get("description", "").split())
    return f"### `{name}`\n\n{about}\n\n{table(('field', 'type', ''), rows)}"


def type_text(schema: dict[str, Any]) -> str:
    """A JSON schema in words; null, which is absence in a request, is left out."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})"
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return ", ".join(f"`{json.dumps(value)}`" for value in values if value is not None)
    if branches := schema.get("anyOf"):
        return " or ".join(type_text(one) for one in branches if one != {"type": "null"})
    kind = schema.get("type")
    limits = limits_text(schema)
    if kind == "array":
        return f"list{limits} of {type_text(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_text(schema['additionalProperties'])}"
    names = {"string": "text", "boolean": "true or false", None: "anything"}
    default = f"; else {json.dumps(schema['default'])}" if "default" in schema else ""
    return names.get(kind, str(kind)) + limits + default


def limits_text(schema: dict[str, Any]) -> str:
    """The bounds of a number, of a text's characters or of a list's items, where they are near."""
    signs = {
        "≥": ("minimum", "minLength", "minItems"),
        ">": ("exclusiveMinimum",),
        "≤": ("maximum", "maxLength", "maxItems"),
        "<": ("exclusiveMaximum",),
    }
    found = [
        f"{sign} {schema[key]:,.10g}"
        for sign, keys in signs.items()
        for key in keys
        if key in schema and abs(schema[key]) < 2**31 - 1
    ]
    counted = " characters" if found and schema.get("type") == "string" else ""
    limits = [", ".join(found) + counted] if found else []
    limits += [f"like `{schema['pattern']}`"] if "pattern" in schema else []
    return f" ({', '.join(limits)})" if limits else ""


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "http-api.md": http_page,
    "deployment.md": deployment_page,
    "trace-format.md": trace_page,
    "gpus.md": gpus_page,
    "models.md": models_page,
    "formats.md": formats_page,
    "errors.md": errors_page,
    "metrics.md": metrics_page,
}


# Parts of pages


def join(parts: Iterable[str]) -> str:
    """Parts with a blank line between them, under the line that says who wrote the page."""
    return NOTICE + "\n" + "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in line) + " |"
        for line in lines
    )


def dataclasses_of(module: ModuleType) -> list[type]:
    """The dataclasses that a module defines, outermost first: last defined, first read."""
    own = [v for v in vars(module).values() if is_dataclass(v) and isinstance(v, type)]
    return [cls for cls in reversed(own) if cls.__module__ == module.__name__]


def dataclass_section(cls: type) -> str:
    """A heading, the docstring and a table of the fields with their comments."""
    rows = [(f"`{f.name}`", f"`{f.type}`", f.default, f.comment) for f in fields_of(cls)]
    head = ("field", "type", "default", "meaning")
    return f"## {cls.__name__}\n\n{inspect.getdoc(cls)}\n\n{table(head, rows)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldText:
    """One field of a dataclass as its source has it."""

    name: str
    type: str
    default: str
    comment: str


def fields_of(cls: type) -> list[FieldText]:
    """The fields in order; the comment is the one at the end of the field's line."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    defaults = {f.name: f.default for f in fields(cls)}
    return [
        FieldText(
            name=ast.unparse(node.target),
            type=ast.unparse(node.annotation),
            default=f"`{defaults[ast.unparse(node.target)]!r}`" if node.value else "required",
            comment=comments.get(node.end_lineno or node.lineno, ""),
        )
        for node in body.body
        if isinstance(node, ast.AnnAssign)
    ]


# Writing and checking


def stale_pages(folder: Path) -> list[str]:
    """Names of the pages that are missing, or not what the code says now, or written no more."""
    stale = [name for name, page in PAGES.items() if text_of(folder / name) != page()]
    others = [f for f in sorted(folder.glob("*.md")) if f.name not in PAGES]
    return stale + [f.name for f in others if (text_of(f) or "").startswith(NOTICE)]


def text_of(path: Path) -> str | None:
    """The text of a page, or None when there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else None


def write_pages(folder: Path) -> None:
    """Write every page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


# Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One block that a document promises to work."""

    where: str  # file:line
    language: str
    text: str


def examples_in(document: Path, mark: str = MARK) -> list[Example]:
    """The blocks after a mark; a mark without a block is an error of the document."""
    lines = document.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines):
        if line.strip() != mark:
            continue
        fence = lines[number + 1].strip() if number + 1 < len(lines) else ""
        assert fence in ("```console", "```python"), f"{document}:{number + 1}: no block follows"
        end = lines.index("```", number + 2)
        name = f"{document}:{number + 2}"
        text = "\n".join(lines[number + 2 : end])
        found.append(Example(where=name, language=fence.removeprefix("```"), text=text))
    return found


def failure_of(example: Example, *, root: Path = ROOT) -> str | None:
    """None when the example does what it shows, else what it did instead."""
    if example.language == "python":
        done = run([sys.executable, "-c", example.text], root)
        return None if done.returncode == 0 else done.stdout
    for command, expected in sessions(example.text):
        done = run(["bash", "-c", command], root)
        status = 2 if any(line.startswith("error:") for line in expected.splitlines()) else 0
        if done.returncode != status:
            return f"$ {command}\nended with status {done.returncode}\n{done.stdout}"
        if expected and not matches(expected, done.stdout):
            return f"$ {command}\nprinted\n{done.stdout}"
    return None


def record_examples(document: Path, root: Path = ROOT) -> None:
    """Put what commands print now in place of what the document shows."""
    page = document.read_text(encoding="utf-8")
    for example in examples_in(document):
        if example.language == "console":
            page = page.replace(example.text, recorded(example.text, root))
    document.write_text(page, encoding="utf-8")


def recorded(text: str, root: Path) -> str:
    """The block with every output that it shows replaced.

    An output that ends in a line `...` keeps its length; one with `...` elsewhere stays.
    """
    parts = []
    for command, expected in sessions(text):
        shown = expected.split("\n")
        cut = shown[-1] == "..."
        if expected and "..." not in "".join(shown[:-1] if cut else shown):
            printed = run(["bash", "-c", command], root).stdout.strip("\n").split("\n")
            shown = [*printed[: len(shown) - 1], "..."] if cut else printed
        shown = [line.rstrip() for line in shown]
        parts.append("\n".join([f"$ {command}", *shown]).rstrip("\n"))
    return "\n".join(parts)


def sessions(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block with the lines that should follow it."""
    for part in ("\n" + text).split("\n$ ")[1:]:
        lines = part.split("\n")
        end = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
        yield "\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :]).strip("\n")


def matches(expected: str, printed: str) -> bool:
    """Whether the text is the expected one; `...` stands for any text, space is loose."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected + "\n", printed + "\n", flags)


def run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    """Run with this Python's environment first on the path; both streams together."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PATH": path, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def documents(root: Path) -> list[Path]:
    """Every document that may hold examples."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def run_examples(root: Path) -> int:
    """How many examples fail; each failure is printed."""
    failures = 0
    for example in (e for document in documents(root) for e in examples_in(document)):
        failure = failure_of(example, root=root)
        print(f"{'ok  ' if failure is None else 'FAIL'} {example.where}")
        if failure is not None:
            failures += 1
            print(textwrap.indent(failure, "     "))
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Write, check or run the documents.")
    parser.add_argument("--check", action="store_true", help="fail when a page is stale")
    parser.add_argument("--examples", action="store_true", help="run the marked examples")
    parser.add_argument("--record", action="store_true", help="write down what examples print")
    args = parser.parse_args()
    folder = ROOT / REFERENCE
    if args.record:
        for document in documents(ROOT):
            record_examples(document)
        return 0
    if args.examples:
        return 1 if run_examples(ROOT) else 0
    if args.check:
        stale = stale_pages(folder)
        for name in stale:
            print(f"error: {REFERENCE}/{name} is stale; run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    write_pages(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
