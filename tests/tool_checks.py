"""What tests of tool calls share: grammars run letter by letter, calls read back, pieces joined."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import llguidance

from tierline.server.tool_messages import untemplated
from tierline.server.tools import CallArguments, CallStart, Piece, TextPiece, Tool, ToolFormat

EOS = 256


class _Letters:
    """A vocabulary of bytes, then special tokens."""

    eos_token_id = EOS
    bos_token_id = None

    def __init__(self, special: Sequence[str]) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.tokens += [token.encode() for token in ("<eos>", *special)]
        self.special_token_ids = list(range(EOS, len(self.tokens)))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def vocabulary(special: Sequence[str] = ()) -> Any:
    """An llguidance tokenizer whose tokens are bytes."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Letters(special)))


_BYTES = vocabulary()


def compile_error(lark: str) -> str:
    """Why a grammar does not compile; empty when it does."""
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    return str(llguidance.LLMatcher(_BYTES, grammar).get_error() or "")


def accepts(lark: str, answer: str | Sequence[int], *, tokens: Any = None) -> bool:
    """Whether `answer` is whole under the grammar."""
    matcher = llguidance.LLMatcher(tokens or _BYTES, llguidance.LLMatcher.grammar_from_lark(lark))
    assert not matcher.is_error(), matcher.get_error()
    ids = list(answer.encode()) if isinstance(answer, str) else list(answer)
    taken = matcher.try_consume_tokens(ids)
    return bool(taken == len(ids) and matcher.is_accepting())


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    made: list[Piece] = []
    for piece in pieces:
        last = made[-1] if made else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            made[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            made[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            made.append(piece)
    return made


def read(form: ToolFormat, tools: Sequence[Tool], parts: Iterable[str]) -> list[Piece]:
    """The pieces of an answer that comes in these parts."""
    parser = form.parser(tools)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined(pieces + parser.end())


def calls_of(pieces: Iterable[Piece]) -> list[tuple[str, Any]]:
    """Names and arguments; raises `ValueError` for arguments that are no JSON."""
    names, arguments = [], []
    for piece in pieces:
        if isinstance(piece, CallStart):
            names.append(piece.name)
            arguments.append("")
        elif isinstance(piece, CallArguments):
            arguments[piece.index] += piece.text
    return [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def text_of(pieces: Iterable[Piece]) -> str:
    """What is no call."""
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


def rendered(form: str, calls: Sequence[tuple[str, Any]]) -> str:
    """Calls as a model of this format writes them."""
    made = [
        {"id": str(at), "function": {"name": name, "arguments": json.dumps(arguments)}}
        for at, (name, arguments) in enumerate(calls)
    ]
    message = {"role": "assistant", "tool_calls": made}
    return str(untemplated([message], [], format=form)[0]["content"])
