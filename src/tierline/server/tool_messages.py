"""Conversations with tools, from OpenAI's form to what a chat template renders.

OpenAI's calls carry arguments as JSON text and ids that results refer to. Templates want
objects, often the function's name with a result, and Llama's one call per message. A model whose
template knows no tools reads them as text: the tools in a system message, its earlier calls as
it would have written them, results in messages of the user.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tierline.base.errors import RequestError
from tierline.server.tool_slots import written

Messages = list[dict[str, Any]]
_ABOUT = """\
You may call one or more functions to help with the request.

These functions are available, as JSON schemas within <tools></tools>:
<tools>
{tools}
</tools>

"""
_HOW = {
    "hermes": """\
To call a function, write a JSON object with its name and arguments within \
<tool_call></tool_call>:
<tool_call>
{"name": "example_function", "arguments": {"example_parameter": "value"}}
</tool_call>""",
    "llama3_json": """\
To call a function, answer with nothing but a JSON object with its name and parameters:
{"name": "example_function", "parameters": {"example_parameter": "value"}}
Put a ; between calls.""",
    "qwen3_coder": """\
To call a function, write it in this form:
<tool_call>
<function=example_function>
<parameter=example_parameter>
value
</parameter>
</function>
</tool_call>""",
}


def described(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates take it: OpenAI's form, complete."""
    schema = {"type": "object", "properties": {}} | dict(parameters)
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def templated(messages: Sequence[Mapping[str, Any]], *, one_by_one: bool) -> Messages:
    """For a template that takes tools: arguments as objects, results with their names.

    `one_by_one`: a message with several calls becomes one for each, followed by its result.
    """
    names: dict[str, str] = {}
    made = [_filled(message, names) for message in messages]
    return _one_by_one(made) if one_by_one else made


def untemplated(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    format: str,  # noqa: A002
) -> Messages:
    """For a template that knows no tools: all of it as text."""
    names: dict[str, str] = {}
    made: Messages = []
    for message in messages:
        filled = _filled(message, names)
        if filled["role"] == "tool":
            text = f"<tool_response>\n{filled['content']}\n</tool_response>"
            if made and made[-1].pop("of_tools", False):
                made[-1] |= {"content": f"{made[-1]['content']}\n{text}", "of_tools": True}
            else:
                made.append({"role": "user", "content": text, "of_tools": True})
            continue
        calls = [_WRITTEN[format](call["function"]) for call in filled.pop("tool_calls", ())]
        joint = "; " if format == "llama3_json" else "\n"
        parts = [text for text in (filled["content"], joint.join(calls)) if text]
        made.append(filled | {"content": "\n".join(parts)})
    for message in made:
        message.pop("of_tools", None)
    return _told(made, tools, format) if tools else made


def _told(messages: Messages, tools: Sequence[Mapping[str, Any]], form: str) -> Messages:
    """With the tools at the end of the system message."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    about = _ABOUT.replace("{tools}", listed) + _HOW[form]
    if messages and messages[0]["role"] in ("system", "developer"):
        first = messages[0]
        return [first | {"content": f"{first['content']}\n\n{about}"}, *messages[1:]]
    return [{"role": "system", "content": about}, *messages]


def _filled(message: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A copy whose content is a text, with calls as objects and results with names.

    `names` is which function each call so far was of, by id.
    """
    made = dict(message)
    made["content"] = _content(message.get("content"))
    calls = made.pop("tool_calls", None)
    if calls:
        made["tool_calls"] = [_call(call) for call in calls]
        names |= {call["id"]: call["function"]["name"] for call in calls}
    if made.get("role") == "tool":
        identity = made.get("tool_call_id")
        if identity not in names:
            raise RequestError(
                f"a tool message answers the call {identity!r}, which no message made",
                hint="send the assistant's message with its tool_calls before their results",
            )
        made["name"] = names[identity]
    return made


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = _arguments(function.get("arguments"))
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def _arguments(text: Any) -> dict[str, Any]:
    try:
        value = text if isinstance(text, Mapping) else json.loads(text or "{}")
    except (TypeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, Mapping):
        raise RequestError(
            "the arguments of an earlier tool call are not one JSON object",
            hint="send them as the model made them; leave out a call that was cut short",
        )
    return dict(value)


def _one_by_one(messages: Messages) -> Messages:
    """Each call in a message of its own, followed by its result."""
    made: Messages = []
    for message in messages:
        if message["role"] == "tool":
            place = _place_of_result(made, message["tool_call_id"])
            made.insert(place, message)
            continue
        calls = message.get("tool_calls") or [None]
        for call in calls:
            made.append(message if call is None else message | {"tool_calls": [call]})
    return made


def _place_of_result(messages: Messages, identity: str) -> int:
    """Behind the latest call with this id."""
    for place in range(len(messages) - 1, -1, -1):
        if any(call.get("id") == identity for call in messages[place].get("tool_calls", ())):
            return place + 1
    raise AssertionError("a result without its call was refused before")


def _hermes(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _llama3_json(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "parameters": function["arguments"]}
    return json.dumps(call, ensure_ascii=False)


def _qwen3_coder(function: Mapping[str, Any]) -> str:
    parameters = "".join(
        f"<parameter={name}>\n{written(value)}\n</parameter>\n"
        for name, value in function["arguments"].items()
    )
    name = function["name"]
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


_WRITTEN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "qwen3_coder": _qwen3_coder,
}
