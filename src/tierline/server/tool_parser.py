"""From a model's text to calls of tools, as early as they are certain.

Chat and responses push what the engine's detokenizer gives and send the pieces on: text as
content, a call's name once, its arguments as they come. `ToolFormat.parser` picks the parser.

A parser keeps only text that may still mean two things: white space and the start of a mark,
a call's head until the name is certain, in `qwen3_coder` a value that is not plain text. A call
begins when the name of a tool that was offered is complete. What never becomes a call is text,
marks included. What breaks off after that stays a call whose arguments break off, as a client
has seen them already; what follows a broken call is text.

White space around calls belongs to the format and is no content.

Invariants
    INV-SRV-30  any split of a text gives the same pieces, joined
    INV-SRV-31  text that holds no call comes out as it went in
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tierline.server.tool_slots import Slot

SPACE = " \t\r\n"
SPACE_MAX = 64  # in one gap of a call's head: longer ones are text
NAME_MAX = 256  # of a parameter
PYTHON_TAG = "<|python_tag|>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
VALUE_END = "</parameter>"
_SIGNS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)  # what matters for the end of a JSON value


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; calls are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of a call's arguments, which are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is over."""

    index: int


Piece = TextPiece | CallStart | CallArguments | CallEnd


class _UnfinishedError(Exception):
    """The text ends where more was expected."""


class _OtherError(Exception):
    """The text is something else."""


class _Reader:
    """Reads what is expected at the start of a text, or says that it is not there."""

    __slots__ = ("at", "text")

    def __init__(self, text: str, at: int = 0) -> None:
        self.text, self.at = text, at

    def space(self) -> None:
        """Skip white space."""
        end = min(len(self.text), self.at + SPACE_MAX)
        while self.at < end and self.text[self.at] in SPACE:
            self.at += 1

    def one_of(self, *options: str) -> str:
        """The option that comes next, none of which starts another."""
        for option in options:
            if self.text.startswith(option, self.at):
                self.at += len(option)
                return option
        rest = self.text[self.at : self.at + max(map(len, options))]
        if any(option.startswith(rest) for option in options):
            raise _UnfinishedError
        raise _OtherError

    def then(self, *options: str) -> str:
        """`one_of` after white space."""
        self.space()
        return self.one_of(*options)

    def until(self, mark: str, *, most: int) -> str:
        """What comes before `mark`, in one line."""
        end = self.text.find(mark, self.at, self.at + most + len(mark))
        found = self.text[self.at : end if end >= 0 else None]
        if "\n" in found or len(found) > most:
            raise _OtherError
        if end < 0:
            raise _UnfinishedError
        self.at = end + len(mark)
        return found


class ToolParser:
    """What all formats share: text, marks, and a call that begins, goes on and ends.

    A state is a method that reads from `_held`, says what is certain, and returns whether it
    got anywhere; `_UnfinishedError` means that it waits for more.
    """

    mark: str  # what announces a call within text

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = ""
        self._marked = 0  # characters of `_held` that are the announcement of a call
        self._calls = 0
        self._in_call = False
        self._pieces: list[Piece] = []
        self._state: Callable[[], bool] = self._text

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain now and were not before."""
        self._held += text
        self._run()
        return self._taken()

    def end(self) -> list[Piece]:
        """The rest: no text follows."""
        while self._held and self._state != self._text:
            if self._in_call:
                self._broken_off()
            elif self._state == self._tail:
                self._held = ""  # a close that is cut short
            else:
                self._no_call()
                self._run()
        if self._held and not (self._calls and not self._held.strip(SPACE)):
            self._pieces.append(TextPiece(self._held))
        self._held = ""
        if self._in_call:
            self._finish()
        return self._taken()

    def _run(self) -> None:
        try:
            while self._held and self._state():
                pass
        except _UnfinishedError:
            pass

    def _taken(self) -> list[Piece]:
        taken, self._pieces = self._pieces, []
        return taken

    # States.

    def _text(self) -> bool:
        at = self._held.find(self.mark)
        if at >= 0:
            start = len(self._held[:at].rstrip(SPACE))
            self._say(start)
            self._marked = at - start + len(self.mark)
            self._state = self._head
            return True
        self._say(len(_certain(self._held, self.mark).rstrip(SPACE)))
        return False

    def _head(self) -> bool:
        """Whether a call begins here; if not, the mark was text."""
        reader = _Reader(self._held, self._marked)
        try:
            name = self._read_head(reader)
        except _OtherError:
            self._no_call()
            return True
        self._held = self._held[reader.at :]
        self._pieces.append(CallStart(self._calls, name))
        self._in_call = True
        self._begun(name)
        return True

    def _tail(self) -> bool:
        """What closes a call; anything else is text."""
        reader = _Reader(self._held)
        try:
            self._read_tail(reader)
        except _OtherError:
            self._state = self._text
            return True
        self._held = self._held[reader.at :]
        self._after_call()
        return True

    # What a format says for itself.

    def _read_head(self, reader: _Reader) -> str:
        raise NotImplementedError

    def _read_tail(self, reader: _Reader) -> None:
        raise NotImplementedError

    def _begun(self, name: str) -> None:
        raise NotImplementedError

    def _broken_off(self) -> None:
        """The text ends within a call."""
        self._argue(self._held)
        self._held = ""

    def _after_call(self) -> None:
        self._state = self._text

    # Steps that states share.

    def _say(self, size: int) -> None:
        if size:
            self._pieces.append(TextPiece(self._held[:size]))
            self._held = self._held[size:]

    def _argue(self, text: str) -> None:
        if text:
            self._pieces.append(CallArguments(self._calls, text))

    def _finish(self) -> None:
        self._pieces.append(CallEnd(self._calls))
        self._calls += 1
        self._in_call = False

    def _no_call(self) -> None:
        self._say(self._marked)
        self._marked = 0
        self._state = self._text


class JsonCalls(ToolParser):
    """`hermes`: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    mark = CALL

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__([json.dumps(name, ensure_ascii=False) for name in names])
        self._depth = 0
        self._quoted = False

    def _read_head(self, reader: _Reader) -> str:
        reader.then("{")
        if reader.then('"name"', '"type"') == '"type"':
            for part in (":", '"function"', ",", '"name"'):
                reader.then(part)
        reader.then(":")
        name: str = json.loads(reader.then(*self._names))
        if reader.then(",", "}") == "}":
            reader.at -= 1  # no arguments; the tail reads it
            return name
        reader.then('"arguments"', '"parameters"')
        reader.then(":")
        reader.then("{")
        reader.at -= 1
        return name

    def _begun(self, name: str) -> None:
        del name
        if self._held.startswith("}"):
            self._argue("{}")
            self._finish()
            self._state = self._tail
        else:
            self._state = self._value

    def _value(self) -> bool:
        """Arguments up to the bracket that closes them, whatever their strings hold."""
        read = 0
        for found in _SIGNS.finditer(self._held):
            sign, read = found.group(), found.end()
            if sign == '"':
                self._quoted = not self._quoted
            elif not self._quoted and sign in "{[":
                self._depth += 1
            elif not self._quoted and sign in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._argue_held(read)
                    self._finish()
                    self._state = self._tail
                    return True
        half = self._held.endswith("\\") and read < len(self._held)  # of an escape
        self._argue_held(len(self._held) - half)
        return False

    def _argue_held(self, size: int) -> None:
        self._argue(self._held[:size])
        self._held = self._held[size:]

    def _broken_off(self) -> None:
        super()._broken_off()
        self._depth, self._quoted = 0, False

    def _read_tail(self, reader: _Reader) -> None:
        reader.then("}")
        reader.then(CALL_END)


class LlamaCalls(JsonCalls):
    """`llama3_json`: the answer is `{"name": ..., "parameters": {...}}`, more after `;`.

    A call stands at the start of the answer or after `<|python_tag|>`; JSON within text is text.
    """

    mark = PYTHON_TAG

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._state = self._head

    def _read_head(self, reader: _Reader) -> str:
        sign = reader.then(PYTHON_TAG, "{", *([";"] if self._calls else []))
        if sign == ";":
            sign = reader.then(PYTHON_TAG, "{")
        if sign == PYTHON_TAG:
            reader.then("{")
        reader.at -= 1
        return super()._read_head(reader)

    def _read_tail(self, reader: _Reader) -> None:
        reader.then("}")

    def _after_call(self) -> None:
        self._marked = 0
        self._state = self._head


class XmlCalls(ToolParser):
    """`qwen3_coder`: `<function=NAME>` and a `<parameter=NAME>` for each argument.

    Values are text; a parameter's `Slot` says what they are in JSON.
    """

    mark = CALL

    def __init__(self, slots: Mapping[str, Mapping[str, Slot]]) -> None:
        super().__init__([f"{name}>" for name in slots])
        self._slots = slots
        self._parameters: Mapping[str, Slot] = {}
        self._slot = Slot()
        self._before = "{"  # what stands before the next argument

    def _read_head(self, reader: _Reader) -> str:
        reader.then("<function=")
        return reader.one_of(*self._names)[:-1]

    def _begun(self, name: str) -> None:
        self._parameters = self._slots[name]
        self._before = "{"
        self._state = self._between

    def _between(self) -> bool:
        """A parameter begins, or the call ends."""
        reader = _Reader(self._held)
        try:
            parameter = reader.then("<parameter=", "</function>") == "<parameter="
            name = reader.until(">", most=NAME_MAX) if parameter else ""
        except _OtherError:
            self._close()
            self._state = self._text
            return True
        self._held = self._held[reader.at :]
        if parameter:
            self._argue(f"{self._before}{json.dumps(name, ensure_ascii=False)}: ")
            self._slot = self._parameters.get(name) or Slot()
            self._before = ", "
            self._state = self._first
        else:
            self._close()
            self._state = self._tail
        return True

    def _close(self) -> None:
        self._argue("{}" if self._before == "{" else "}")
        self._finish()

    def _first(self) -> bool:
        """One line break before the value is no part of it."""
        self._held = self._held.removeprefix("\n")
        if self._slot.text:
            self._argue('"')
        self._state = self._value
        return True

    def _value(self) -> bool:
        end = self._held.find(VALUE_END)
        if end >= 0:
            value = self._held[:end].removesuffix("\n")
            self._argue(_escaped(value) + '"' if self._slot.text else self._slot.json(value))
            self._held = self._held[end + len(VALUE_END) :]
            self._state = self._between
            return True
        if self._slot.text:
            certain = _certain(self._held, VALUE_END).removesuffix("\n")
            self._argue(_escaped(certain))
            self._held = self._held[len(certain) :]
        return False

    def _broken_off(self) -> None:
        if self._state == self._value:
            self._argue(_escaped(self._held) if self._slot.text else self._held)
        self._held = ""

    def _read_tail(self, reader: _Reader) -> None:
        reader.then(CALL_END)


def _escaped(text: str) -> str:
    """As inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _certain(text: str, mark: str) -> str:
    """The text without an end that may become `mark`, which holds one `<`, its first."""
    at = text.rfind("<", max(0, len(text) - len(mark) + 1))
    return text[:at] if at >= 0 and mark.startswith(text[at:]) else text
