"""Answers of a given form: what a body asks for, as a grammar that is compiled beside the loop.

`response_format`, `structured_outputs` and tools each ask for a form; at most one of them bounds
an answer.  One grammar is compiled at a time, on a thread, so that many hostile ones take one
core and no more; those that were used lately are at hand at once.  What is wrong is said of the
parameter that the caller wrote, not of the grammar that was made of it.

`response_format` without `strict: true`, and tools likewise, are held to what the grammar library
knows of their schema; with it, what would not be enforced is refused by name.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tierline.base.errors import RequestError
from tierline.engine.grammar import BYTES_MAX, Grammar, Grammars, Wanted
from tierline.engine.schema_size import require_bounded
from tierline.server.errors import ApiError
from tierline.server.server import Server
from tierline.server.shapes import Asked, ResponseFormat, StructuredOutputs
from tierline.server.tools import Choice, Tool, ToolFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What bounds an answer, and which parameter said so."""

    wanted: Wanted
    param: str
    tools: tuple[Tool, ...] = ()  # whose grammar it is

    @property
    def kind(self) -> str:
        """As lives and metrics name it."""
        return "tools" if self.tools else self.wanted.kind


def form_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Form | None:
    """The form that is asked for, if any; raises `ApiError` for two, or for none that is one."""
    asked = [w for w in (_of_format(response_format), _of_structured(structured)) if w]
    if len(asked) > 1:
        raise ApiError(
            400,
            "response_format and structured_outputs both bound the answer",
            code="invalid_value",
            param="structured_outputs",
            hint="use one of them",
        )
    return asked[0] if asked else None


def _of_format(asked: ResponseFormat | None) -> Form | None:
    if asked is None or asked.type == "text":
        return None
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        return Form(wanted=Wanted(kind="json_object"), param="response_format")
    text = json.dumps(asked.json_schema.schema_, ensure_ascii=False)
    wanted = Wanted(kind="json_schema", text=text, lenient=not asked.json_schema.strict)
    return Form(wanted=wanted, param="response_format.json_schema.schema")


def _of_structured(asked: StructuredOutputs | None) -> Form | None:
    if asked is None:
        return None
    schema = asked.json_schema
    if isinstance(schema, dict):
        schema = json.dumps(schema, ensure_ascii=False)
    given = {
        "json_schema": schema,
        "json_object": "" if asked.json_object else None,
        "regex": asked.regex,
        "choice": tuple(asked.choice) if asked.choice else None,
        "ebnf": asked.grammar,
    }
    found = [(kind, text) for kind, text in given.items() if text is not None]
    if len(found) != 1:
        raise ApiError(
            400,
            "structured_outputs needs exactly one of json, json_object, regex, choice, grammar",
            code="invalid_value",
            param="structured_outputs",
        )
    kind, text = found[0]
    return Form(wanted=Wanted(kind=kind, text=text), param="structured_outputs")


def form_of_tools(calls: ToolFormat, tools: tuple[Tool, ...], choice: Choice) -> Form | None:
    """The form of calls under `choice`; None: anything goes. Raises `ApiError` naming a tool."""
    size = sum(len(json.dumps(tool.parameters)) for tool in tools)
    if size > BYTES_MAX:
        hint = f"at most {BYTES_MAX} bytes are taken"
        raise _refused(RequestError(f"the tools have {size} bytes of schemas", hint=hint), "tools")
    try:
        require_bounded([tool.parameters for tool in tools])
        wanted = calls.wanted(tools, choice)
    except RequestError as error:
        raise _first_wrong(calls, tools) or _refused(error, "tools") from None
    return Form(wanted=wanted, param="tools", tools=tools) if wanted else None


def _first_wrong(calls: ToolFormat, tools: Sequence[Tool]) -> ApiError | None:
    """The refusal of the first tool of which no grammar can be written."""
    for number, tool in enumerate(tools):
        try:
            require_bounded(tool.parameters)
            calls.lark([tool], Choice(kind="required"))
        except RequestError as error:
            return _of_tool(number, tool, error)
    return None


def require_free_end(form: Form | None, asked: Asked) -> None:
    """Raise `ApiError` for what forbids the end where a form allows nothing else."""
    forbidding = {"ignore_eos": asked.ignore_eos, "min_tokens": bool(asked.min_tokens)}
    for param, given in forbidding.items() if form is not None else ():
        if given:
            raise ApiError(
                400,
                f"{param} forbids the end of the answer, where its form may allow nothing else",
                code="invalid_value",
                param=param,
                hint=f"leave out {param}, or the form (tools, response_format, structured_outputs)",
            )


async def compiled(server: Server, form: Form | None, asked: Asked) -> Grammar | None:
    """The grammar of a form; raises `ApiError` for one that is wrong or not supported."""
    if form is None:
        return None
    require_free_end(form, asked)
    grammars = server.grammars
    if grammars is None:
        raise ApiError(
            400,
            "this model has no tokenizer: its answers cannot be bound to a form",
            code="unsupported_parameter",
            param=form.param,
        )
    kept = grammars.kept(form.wanted)
    if kept is not None:
        return kept
    async with server.compiling:
        return await asyncio.to_thread(_compile, grammars, form)


def _compile(grammars: Grammars, form: Form) -> Grammar:
    try:
        return grammars.compile(form.wanted)
    except RequestError as error:
        raise _blamed(grammars, form.tools, error) or _refused(error, form.param) from None


def _blamed(grammars: Grammars, tools: Sequence[Tool], error: RequestError) -> ApiError | None:
    """The refusal of tools: of the first whose schema is refused alone, or of all together."""
    for number, tool in enumerate(tools):
        text = json.dumps({"type": "object", **tool.parameters})
        try:
            grammars.check(Wanted(kind="json_schema", text=text, lenient=not tool.strict))
        except RequestError as own:
            return _of_tool(number, tool, own)
    if not tools:
        return None
    return _refused(RequestError(f"the tools together: {error}", hint=error.hint), "tools")


def _of_tool(number: int, tool: Tool, error: RequestError) -> ApiError:
    named = f"tool {tool.name!r}: {str(error).removeprefix(f'tool {tool.name!r}: ')}"
    return _refused(RequestError(named, hint=error.hint), f"tools.{number}.function.parameters")


def _refused(error: RequestError, param: str) -> ApiError:
    return ApiError(400, str(error), code="invalid_grammar", param=param, hint=error.hint)
