"""Tools: offered to a model in its own format, and its calls read back.

The chat and responses endpoints ask for a model's `ToolFormat` once, then for each request: the
messages as the model's chat template wants them, the grammar that holds the model to the
caller's choice, and a parser for what it writes. Formats have vLLM's names:

    hermes        <tool_call>{"name": ..., "arguments": {...}}</tool_call>; Qwen 2.5 and 3
    llama3_json   {"name": ..., "parameters": {...}}; Llama 3.1 to 3.3
    qwen3_coder   <tool_call><function=...><parameter=...>...; Qwen3-Coder

The format is read off the chat template, as that is what the model was trained on. A template
that knows no tools, or writes calls in another way, gets `hermes`, with the tools described in
a system message of ours.

Invariants
    INV-SRV-33  calls and results that come back with a conversation are in its prompt
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tierline.base.errors import RequestError
from tierline.base.names import lookup
from tierline.engine.grammar import Wanted
from tierline.server import tool_grammar
from tierline.server.tool_grammar import Offer
from tierline.server.tool_messages import described, templated, untemplated
from tierline.server.tool_parser import (
    CALL,
    CALL_END,
    PYTHON_TAG,
    CallArguments,
    CallEnd,
    CallStart,
    JsonCalls,
    LlamaCalls,
    Piece,
    TextPiece,
    ToolParser,
    XmlCalls,
)
from tierline.server.tool_slots import slots

__all__ = [
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Choice",
    "Piece",
    "TextPiece",
    "Tool",
    "ToolFormat",
    "ToolParser",
    "tool_format",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that a model may call; `parameters` is a JSON schema of an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False  # whether a schema that cannot be enforced whole is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """OpenAI's `tool_choice` and `parallel_tool_calls`."""

    kind: Literal["none", "auto", "required", "function"] = "auto"
    name: str = ""  # of the one to call, for "function"
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How one model is told of tools and writes calls."""

    name: str
    templated: bool  # the chat template takes `tools=` itself
    special: frozenset[str] = frozenset()  # marks that are special tokens of the vocabulary

    @property
    def skip_special_tokens(self) -> bool:
        """What `SamplingParams` needs: a mark that is a special token must reach the parser."""
        return not self.special

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
    ) -> list[dict[str, Any]]:
        """OpenAI's messages as the chat template wants them.

        A template that takes tools gets earlier calls with arguments as objects; another gets
        calls and results as text, and the tools in a system message. Raises `RequestError` for
        a call whose arguments are no JSON object, and for a result without its call.
        """
        if self.templated:
            return templated(messages, one_by_one=self.name == "llama3_json")
        return untemplated(messages, template_tools(tools), format=self.name)

    def wanted(self, tools: Sequence[Tool], choice: Choice) -> Wanted | None:
        """The grammar of an answer under `choice`, or None where anything goes.

        "function": one call of it. "required": one call or more. "auto": text, in which what
        begins as a call is one. Raises `RequestError` for a tool that is not offered, and for
        one that this format cannot write.
        """
        text = self.lark(tools, choice)
        return None if text is None else Wanted(kind="lark", text=text)

    def lark(self, tools: Sequence[Tool], choice: Choice) -> str | None:
        """The text of `wanted`."""
        if choice.kind == "none" or (choice.kind == "auto" and not tools):
            return None
        if not tools:
            raise RequestError("there is no tool to call", hint="offer tools, or ask for none")
        offered = {tool.name: tool for tool in tools}
        if len(offered) < len(tools):
            raise RequestError("two tools have one name", hint="names tell tools apart")
        if choice.kind == "function":
            offered = {choice.name: lookup("tool", choice.name, offered, error=RequestError)}
        return _GRAMMARS[self.name](
            [
                Offer(name=t.name, parameters=t.parameters, strict=t.strict)
                for t in offered.values()
            ],
            free=choice.kind == "auto",
            parallel=choice.parallel and choice.kind != "function",
            special=self.special,
        )

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        """A parser of one answer; only `tools` can be called."""
        if self.name == "qwen3_coder":
            return XmlCalls({tool.name: slots(tool.parameters)[0] for tool in tools})
        names = [tool.name for tool in tools]
        return LlamaCalls(names) if self.name == "llama3_json" else JsonCalls(names)


_GRAMMARS: dict[str, Callable[..., str]] = {
    "hermes": tool_grammar.hermes,
    "llama3_json": tool_grammar.llama3_json,
    "qwen3_coder": tool_grammar.qwen3_coder,
}


def tool_format(
    template: str | None, *, named: str | None = None, special: Collection[str] = ()
) -> ToolFormat:
    """The format of a model with this chat template, or the one that its operator `named`.

    `special` are the special tokens of the model's vocabulary, as text. Raises `InputError` for
    an unknown name.
    """
    if named is not None:
        lookup("format of tool calls", named, _GRAMMARS)
    template = template or ""
    found = _found(template)
    name = named or found or "hermes"
    marks = {PYTHON_TAG} if name == "llama3_json" else {CALL, CALL_END}
    takes_tools = re.search(r"\btools\b", template) is not None
    return ToolFormat(
        name=name,
        templated=takes_tools and (named or found) is not None,
        special=frozenset(marks & set(special)),
    )


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates take them."""
    return [described(tool.name, tool.description, tool.parameters) for tool in tools]


def _found(template: str) -> str | None:
    if re.search(r"\btools\b", template) is None:
        return None
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if CALL in template:
        return "hermes"
    if re.search(r'"parameters\\*": ', template) and "<|start_header_id|>" in template:
        return "llama3_json"
    return None
