"""The grammar of calls: what a model may write when it has to call, or may.

`ToolFormat.wanted` asks for it. A grammar is text for llguidance, in its kind of Lark. The
arguments of a call are `%json` with the tool's own schema, so they are valid as they are made;
in `qwen3_coder` each value that is no text is. Tools are alternatives: a name that was not
offered cannot be written.

`auto` leaves text free until a call begins: a lazy rule ends at the first mark, and from there
on only a call is possible. Where a mark is a special token of the vocabulary, both the token
and its letters begin a call.

White space inside calls is bounded, or a weak model fills an answer with it. A schema's keywords
that llguidance does not know, and patterns with look-around, are left out, unless the tool is
strict: then compiling fails and names them.

Invariants
    INV-SRV-32  a call within the grammar is of an offered tool, with arguments that its schema
                allows
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tierline.base.errors import RequestError
from tierline.engine.schema_size import softened
from tierline.server.tool_parser import CALL, CALL_END, NAME_MAX, PYTHON_TAG, VALUE_END
from tierline.server.tool_slots import Schema, Slot, closed, slots, written

SPACE = r" |\r?\n[ \t]{0,40}"  # what pretty-printers write, and no more
_COMMON = r"""
ANY: /(?s:.*)/
GAP: /( |\r?\n[ \t]{0,16})?/
"""
_JSON_HEAD = r"""
OPEN: GAP "{" GAP "\"name\"" GAP ":" GAP
MID: GAP "," GAP "\"%s\"" GAP ":" GAP
SHUT: GAP "}" GAP
"""
_NO_END = r"""
PLAIN: /(?s:.*)/ & ~/(?s:.*)<\/parameter>(?s:.*)/
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A tool as grammars and parsers need it."""

    name: str
    parameters: Schema
    strict: bool


def hermes(offers: Sequence[Offer], *, free: bool, parallel: bool, special: Collection[str]) -> str:
    """Calls between marks, as JSON."""
    bodies = [_json_body(offer) for offer in offers]
    rules = [_COMMON, _JSON_HEAD.strip() % "arguments", *_named(bodies)]
    close = _mark(CALL_END, special)
    rules.append(f"body: OPEN ({_choice(bodies)}) SHUT {close}")
    return _marked_calls(rules, free=free, parallel=parallel, special=special)


def qwen3_coder(
    offers: Sequence[Offer], *, free: bool, parallel: bool, special: Collection[str]
) -> str:
    """Calls between marks, as a list of parameters."""
    functions, rules = [], [_COMMON, _NO_END.strip()]
    for number, offer in enumerate(offers):
        body, values = _xml_body(offer, number)
        functions.append(body)
        rules += values
    rules += _named(functions)
    close = _mark(CALL_END, special)
    rules.append(f'body: "\\n" ({_choice(functions)}) "\\n" {close}')
    return _marked_calls(rules, free=free, parallel=parallel, special=special)


def llama3_json(
    offers: Sequence[Offer], *, free: bool, parallel: bool, special: Collection[str]
) -> str:
    """Calls as the whole answer, or after a mark."""
    bodies = [_json_body(offer) for offer in offers]
    rules = [_COMMON, _JSON_HEAD.strip() % "parameters", *_named(bodies)]
    rules.append(f"call: OPEN ({_choice(bodies)}) CLOSE")
    rules.append('CLOSE: GAP "}"')
    rules.append('calls: call (NEXT call)*\nNEXT: GAP ";"' if parallel else "calls: call")
    tag = _mark(PYTHON_TAG, special)
    if not free:
        return _joined([f"start: {tag}? calls", *rules])
    # Text begins with no bracket: a terminal that could go on would hide the end of a call's.
    rules.append(r"OTHER: /[ \n\r\t]*([^ \n\r\t{](?s:.*))?/")
    rules.append(_announced(PYTHON_TAG, special, after="OTHER"))
    return _joined(["start: OTHER | calls | announced calls", *rules])


def _marked_calls(rules: list[str], *, free: bool, parallel: bool, special: Collection[str]) -> str:
    if free:
        start = "start: call* ANY" if parallel else "start: call | ANY"
        rules = [*rules, "call: announced body", _announced(CALL, special, after="ANY")]
    else:
        # One line break, as templates write it: the way out of an answer is found faster.
        start = 'start: call ("\\n" call)*' if parallel else "start: call"
        rules = [*rules, f"call: {_mark(CALL, special)} body"]
    return _joined([start, *rules])


def _announced(mark: str, special: Collection[str], *, after: str) -> str:
    """Text up to a mark, whichever way the vocabulary writes it."""
    as_token = f" | {after} {mark}" if mark in special else ""
    return f"announced: spelled{as_token}\nspelled[lazy]: {after} {_text(mark)}"


def _mark(mark: str, special: Collection[str]) -> str:
    return f"({mark} | {_text(mark)})" if mark in special else _text(mark)


def _json_body(offer: Offer) -> str:
    """A name and its arguments; none at all may be left out."""
    schema = _guided(offer.parameters, strict=offer.strict)
    if closed(offer.parameters) and "additionalProperties" not in schema:
        schema = {"type": "object", "properties": {}} | schema | {"additionalProperties": False}
    schema.setdefault("type", "object")
    return f"{_text(json.dumps(offer.name, ensure_ascii=False))} MID %json {json.dumps(schema)}"


def _xml_body(offer: Offer, number: int) -> tuple[str, list[str]]:
    """The call of one function, and the rules of its values."""
    _check_name(offer.name, "tool")
    known, others = slots(offer.parameters)
    parts, rules = [], []
    for place, (name, slot) in enumerate(known.items()):
        _check_name(name, "parameter")
        rule = f"value_{number}_{place}"
        rules += _value(rule, slot, offer, name)
        head = _text(f"<parameter={name}>\n")
        parts.append(f"({head} {rule}){'' if slot.required else '?'}")
    if others is not None:
        rule = f"value_{number}_other"
        rules += _value(rule, others, offer, "any other")
        rules.append(_other_names(f"NAME_{number}", known))
        parts.append(f'("<parameter=" NAME_{number} ">\\n" {rule})*')
    return f'{_text(f"<function={offer.name}>" + chr(10))} {" ".join(parts)} "</function>"', rules


def _value(rule: str, slot: Slot, offer: Offer, name: str) -> list[str]:
    """What may stand in a slot, with the end of the parameter."""
    end = _text(f"\n{VALUE_END}\n")
    if offer.strict and not slot.exact:
        raise RequestError(
            f"tool {offer.name!r}: what parameter {name!r} may be cannot be enforced in the "
            "format of this model's calls, which writes values as text",
            hint="leave strict out, or ask for less: a type, an enumeration, a length",
        )
    if slot.values is not None:
        if not slot.values:
            raise RequestError(
                f"tool {offer.name!r}: parameter {name!r} can have no value",
                hint="its enumeration and its type exclude each other",
            )
        texts = " | ".join(_text(written(value)) for value in slot.values)
        return [f"{rule}: ({texts}) {end}"]
    if slot.text:
        bounds = slot.schema if isinstance(slot.schema, Mapping) else {}
        return [
            f"{rule}[lazy]: {rule.upper()} {end}",
            f"{rule.upper()}: {_bounded(bounds, offer, name)}",
        ]
    if "string" in slot.types:
        return [f"{rule}[lazy]: PLAIN {end}"]
    schema = slot.schema if isinstance(slot.schema, Mapping) else {}
    shared = {k: offer.parameters[k] for k in ("$defs", "definitions") if k in offer.parameters}
    guided = json.dumps(_guided({**schema, **shared}, strict=offer.strict))
    return [f"{rule}: %json {guided} {end}"]


def _bounded(schema: Schema, offer: Offer, name: str) -> str:
    """A terminal for text of a length, or that matches a pattern."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    terminal = "PLAIN"
    if least or most != "":
        terminal += f" & /(?s:.{{{least},{most}}})/"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        body = pattern.removeprefix("^").removesuffix("$")
        if any(sign in body for sign in "^$") or ("|" in body and body != pattern):
            if offer.strict:
                raise RequestError(
                    f"tool {offer.name!r}: the pattern of parameter {name!r} cannot be enforced",
                    hint="anchors belong at the ends of a pattern without alternatives",
                )
            return terminal
        before = "" if pattern.startswith("^") else "(?s:.*)"
        after = "" if pattern.endswith("$") else "(?s:.*)"
        terminal += f" & /{before}({_slashes(body)}){after}/"
    return terminal


def _slashes(pattern: str) -> str:
    return pattern.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")


def _other_names(rule: str, known: Mapping[str, Slot]) -> str:
    names = f"{rule}: /[^>\\n]{{1,{NAME_MAX}}}/"
    return names + (f" & ~({' | '.join(map(_text, known))})" if known else "")


def _guided(schema: Schema, *, strict: bool) -> dict[str, Any]:
    """The schema with what llguidance should do about white space and unknown keywords."""
    guided = schema if strict else softened(schema)
    return {**guided, "x-guidance": {"whitespace_pattern": SPACE, "lenient": not strict}}


def _check_name(name: str, kind: str) -> None:
    if not name or len(name) > NAME_MAX or ">" in name or "\n" in name:
        raise RequestError(
            f"the name of {kind} {name!r} cannot be written in the format of this model's calls",
            hint="use letters, digits, dots and dashes",
        )


def _named(bodies: Sequence[str]) -> list[str]:
    return [f"call_{number}: {body}" for number, body in enumerate(bodies)]


def _choice(bodies: Sequence[str]) -> str:
    return " | ".join(f"call_{number}" for number in range(len(bodies)))


def _text(text: str) -> str:
    """A literal: Lark's escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _joined(rules: Sequence[str]) -> str:
    return "\n".join(rule.strip("\n") for rule in rules) + "\n"
