"""Messages to one prompt, through the chat template that came with the checkpoint.

A template is a Jinja program written by whoever published the model. It runs in Jinja's
sandbox, which keeps it away from Python and from changing what it is given, and under a
budget: the sandbox alone would let nested loops run for ever and a text double forty times.
The budget counts rounds of loops and calls, and bounds every text that operators and blocks
build, so that it stops at the same place on every machine.

The settings (`trim_blocks`, `lstrip_blocks`, loop controls, `tojson` without escapes,
`raise_exception`) are those of transformers' `apply_chat_template`: prompts are equal.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tierline.base.errors import RequestError, SpecError
from tierline.base.files import read_text
from tierline.engine.checkpoint import Checkpoint
from tierline.engine.tokenizer import optional_object

STEPS_MAX = 200_000  # rounds of loops, and calls, in one rendering
SIZE_MAX = 16 << 20  # characters of a text, items of a list, bits of a number

Message = Mapping[str, Any]


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    now: datetime | None = None,
    **variables: Any,
) -> str:
    """The prompt that `template` makes of `messages` and `tools` (JSON schemas).

    `now` is what `strftime_now` tells; `variables` are what the template may name besides,
    such as a tokenizer's `special_tokens`. Raises `RequestError` when the template refuses the
    messages, `SpecError` when the template itself is wrong or does too much.
    """
    compiled = _compiled(template)
    given = _plain({"messages": _checked(messages), "tools": tools, **variables})
    budget = _Budget()
    try:
        return compiled.render(
            **given,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: _clock(now).strftime(form),
            _budget=budget,
        )
    except _RefusedError as error:
        raise RequestError(
            f"the chat template refuses these messages: {error}",
            hint="look at the roles, and at the order in which they come",
        ) from None
    except (SecurityError, _ExhaustedError, RecursionError, MemoryError, OverflowError) as error:
        raise SpecError(
            f"the chat template was stopped: {error or type(error).__name__}",
            hint="it may be damaged; use the template of the model's publisher",
        ) from None
    except Exception as error:  # a template may do anything, its mistakes are of any type
        raise RequestError(
            f"the chat template cannot render these messages: {error}",
            hint="look for a message without content, or a tool without a description",
        ) from None


def chat_template(checkpoint: Checkpoint, *, tools: bool = False) -> str | None:
    """The template of a checkpoint, or None; the one for tools when it has one and it is asked.

    From `chat_template.jinja`, `tokenizer_config.json`, or a GGUF file's metadata.
    """
    if checkpoint.metadata:
        key = "tokenizer.chat_template"
        found = [checkpoint.metadata.get(key + suffix) for suffix in (".tool_use", "")]
        return next((t for t in found[not tools :] if isinstance(t, str)), None)
    path = checkpoint.path / "chat_template.jinja"
    if path.is_file():
        return read_text(path, what="chat template")
    value = optional_object(checkpoint.path / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        named = {t["name"]: t["template"] for t in value if {"name", "template"} <= t.keys()}
        value = named.get("tool_use" if tools else "default", named.get("default"))
    return value if isinstance(value, str) else None


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"message {number} is not an object with a role",
                hint='a message is {"role": "user", "content": "..."}',
            )
    if not messages:
        raise RequestError("there are no messages", hint="send at least one message of a user")
    return messages


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nothing but JSON values: no object with methods gets into the sandbox."""
    try:
        copied: dict[str, Any] = json.loads(_JSON.encode(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages and tools must be JSON values: {error}") from None
    return copied


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not one")


_JSON = json.JSONEncoder(default=_fields)


def _clock(now: datetime | None) -> datetime:
    if now is None:
        raise _RefusedError("it asks for the time, which was not given")
    return now


# The sandbox and its budget.


class _RefusedError(TemplateError):
    """The template says no to the messages."""


class _ExhaustedError(TemplateError):
    """The template is over its budget."""


class _Budget:
    """What one rendering may still do."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> str:
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise _ExhaustedError(f"more than {STEPS_MAX} steps")
        return ""


def _bounded(size: int) -> None:
    if size > SIZE_MAX:
        raise _ExhaustedError(f"it builds a value of size {size}, at most {SIZE_MAX}")


def _joined(parts: Iterable[Any]) -> str:
    """The parts as one text of bounded length."""
    texts, size = [], 0
    for part in parts:
        texts.append(str(part))
        size += len(texts[-1])
        _bounded(size)
    return "".join(texts)


def _narrow(form: Any) -> None:
    """Refuse a format that names a width of its own: it may be any number."""
    if re.search(r"\d{5}|[*]|{.*{", str(form)):
        raise _ExhaustedError("it formats with a width")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


class _Counting(NodeTransformer):
    """Puts the budget into a template's syntax tree: every round of a loop, every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        context = nodes.ContextReference()
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [context], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        parts = nodes.List(node.nodes)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), [parts], [], None, None)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's name and type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_joined)  # what blocks and macros end in

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.filters["format"] = _format
        self.globals["raise_exception"] = _raise_exception
        self.joined = _joined

    @staticmethod
    def step(context: Any) -> str:
        budget: _Budget = context.parent["_budget"]  # what a template sets lies elsewhere
        return budget.step()

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counted = _Counting().visit(tree)
        return counted.set_environment(self)  # type: ignore[no-any-return]

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if obj is _Sandbox.step:  # what `_Counting` wrote: a round, and no call of the template's
            return self.step(context)
        self.step(context)
        for value in (*args, *kwargs.values()):
            _bounded(value if isinstance(value, int) else _size(value))
        if getattr(obj, "__name__", "") in ("format", "format_map"):
            _narrow(getattr(getattr(obj, "__wrapped__", obj), "__self__", ""))
        result = super().call(context, obj, *args, **kwargs)
        _bounded(_size(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _bounded(_size(left) + _size(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bounded(left.bit_length() * abs(right))
        elif operator == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(count, int):
                    _bounded(_size(many) * count)
        elif operator == "%" and isinstance(left, str):
            _narrow(left)
        return super().call_binop(context, operator, left, right)


def _format(form: Any, *args: Any, **kwargs: Any) -> str:
    _narrow(form)
    return str(form) % (kwargs or args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> NoReturn:
    raise _RefusedError(str(message))


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    try:
        compiled = _Sandbox().from_string(template)
    except TemplateSyntaxError as error:
        raise SpecError(
            f"the chat template is wrong in line {error.lineno}: {error.message}"
        ) from None
    except (TemplateError, RecursionError, MemoryError) as error:
        raise SpecError(f"the chat template is wrong: {error or 'nested too deeply'}") from None
    compiled.globals = dict(compiled.globals)  # a chain of mappings is slow to copy
    return compiled
