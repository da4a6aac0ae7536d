"""Messages become the prompt that the reference library makes of them, and a template that is
wrong, hostile or endless is stopped with an error that says so."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import transformers

from demo_model import demo_model
from tierline.base.errors import RequestError, SpecError
from tierline.engine.chat import STEPS_MAX, chat_template, render_chat
from tierline.engine.checkpoint import open_checkpoint
from tiny_checkpoints import tiny_checkpoint

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
HEADERS = """\
{% set ns = namespace(first=true) %}
{% for message in messages %}
    {% set text = '<|header|>' ~ message.role ~ '<|end|>\\n\\n'
        ~ message.content | trim ~ '<|eot|>' %}
    {% if loop.index0 == 0 %}
        {% set text = bos_token ~ text %}
    {% endif %}
    {{ text }}
{% endfor %}
{% if add_generation_prompt %}
    {{ '<|header|>assistant<|end|>\\n\\n' }}
{% endif %}
"""
TURNS = """\
{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %} [INST] {{ message['content'] }} [/INST]
{%- else %} {{ message['content'] ~ eos_token }}{% endif %}
{%- endfor %}
"""
TOOLS = """\
{%- if tools %}
    {{- 'Functions:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\\n' }}
    {%- endfor %}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<result>' ~ message.content ~ '</result>' }}
        {%- continue %}
    {%- endif %}
    {{- '<' ~ message.role ~ '>' ~ (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<call>' ~ {'name': call.function.name,
            'arguments': call.function.arguments} | tojson }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}
"""
MACROS = """\
{%- macro show(parts) -%}
  {%- if parts is string -%}{{ parts }}
  {%- else -%}{%- for part in parts if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set last = messages | selectattr('role', 'equalto', 'user')
    | map(attribute='content') | list -%}
{%- for message in messages -%}
  {%- generation -%}
  {{ loop.index }}/{{ loop.length }}{{ '!' if loop.last }}:{{ show(message.content) | upper }}
  {%- endgeneration -%}
  {%- if loop.index > 3 %}{% break %}{% endif -%}
{%- endfor -%}
{{ messages[::-1][0].role }} {{ last | length }} {{ '%s-%d' | format('x', 3) }} {{ 'a' * 3 + 'b' }}
"""
TEMPLATES = {
    "ChatML": CHATML, "headers": HEADERS, "turns": TURNS, "tools": TOOLS, "macros": MACROS
}  # fmt: skip

TALK = [
    {"role": "user", "content": "  What is 2 < 3 & \"é\" 'ü' 漢字? \n"},
    {"role": "assistant", "content": "True.\nIndeed 😀"},
    {"role": "user", "content": "And <b>{{ this }}</b> {% if %}?"},
]
CALLS = [
    {"role": "user", "content": "Wie wird das Wetter in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5}}}],
    },
    {"role": "tool", "content": '{"t": 3}'},
]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "<Wetter> für €", "parameters": {"a": [1]}},
}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hé"}, {"type": "image"}]}] * 5
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def reference(template: str, messages: Any, **variables: Any) -> str:
    """The library's own rendering."""
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), **TOKENS
    )
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **variables
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [
        ("ChatML", TALK, None),
        ("ChatML", [{"role": "system", "content": "Be brief."}, *TALK], None),
        ("headers", TALK, None),
        ("turns", TALK, None),
        ("tools", CALLS, [TOOL, TOOL]),
        ("tools", CALLS, None),
        ("tools", TALK, [TOOL]),
        ("macros", TALK, None),
        ("macros", PARTS, None),
    ],
)
def test_prompts_are_those_of_the_reference(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, ask: bool
) -> None:
    expected = reference(TEMPLATES[name], messages, tools=tools, add_generation_prompt=ask)
    found = render_chat(TEMPLATES[name], messages, tools=tools, add_generation_prompt=ask, **TOKENS)

    assert found == expected
    assert len(found) > 20


def test_without_the_settings_prompts_would_differ() -> None:
    """Negative control: plain Jinja keeps the lines of the template and escapes in JSON."""
    from jinja2 import Environment

    headers = Environment().from_string(HEADERS).render(messages=TALK, **TOKENS)
    escaped = Environment().from_string("{{ messages | tojson }}").render(messages=TALK)

    assert headers != render_chat(HEADERS, TALK, add_generation_prompt=False, **TOKENS)
    assert escaped != render_chat("{{ messages | tojson }}", TALK)


def test_the_demo_models_own_template() -> None:
    template = chat_template(open_checkpoint(demo_model()))

    assert template is not None
    assert render_chat(template, TALK[:1]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{TALK[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(template, TALK) == reference(template, TALK, add_generation_prompt=True)


def test_the_time_is_an_argument() -> None:
    template = "{{ strftime_now('%d %b %Y') }}"

    assert render_chat(template, TALK, now=datetime(2024, 2, 29, tzinfo=UTC)) == "29 Feb 2024"
    with pytest.raises(RequestError, match="asks for the time"):
        render_chat(template, TALK)


# Where templates lie


def test_templates_of_a_folder(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path)
    checkpoint = open_checkpoint(folder)
    settings = folder / "tokenizer_config.json"

    settings.unlink(missing_ok=True)
    assert chat_template(checkpoint) is None
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert chat_template(checkpoint) == "one"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert chat_template(checkpoint) == "plain"
    assert chat_template(checkpoint, tools=True) == "tools"
    settings.write_text(json.dumps({"chat_template": named[:1]}))
    assert chat_template(checkpoint, tools=True) == "plain"
    (folder / "chat_template.jinja").write_text("file")
    assert chat_template(checkpoint) == "file"


# What is refused


def test_wrong_roles_are_the_requests_mistake() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render_chat(TURNS, TALK[1:], **TOKENS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"content": "x"}], "message 0 is not an object with a role"),
        ([TALK[0], {"role": 3}], "message 1 is not an object with a role"),
        (["hello"], "message 0 is not an object with a role"),
        ([{"role": "user", "content": object()}], "must be JSON values"),
        ([{"role": "user"}], "cannot render these messages"),
    ],
)
def test_wrong_messages_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render_chat(CHATML, messages)


DOUBLING = "{%% set ns = namespace(s='ab') %%}{%% for i in range(60) %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "wrong in line 1"),
        ("a\n{{ 'x' | nofilter }}", "wrong in line 2"),
        ("{{" + "(" * 5_000 + "}}", "template is wrong"),
        ("{% include 'x' %}", "cannot render|stopped|wrong"),
        ("{{ ''.__class__.__mro__ }}", "stopped: access to attribute"),
        ("{{ messages.append(1) }}", "stopped: access to attribute"),
        ("{{ render_chat.__globals__ }}", "cannot render|stopped"),
        ("{% for i in range(10**9) %}x{% endfor %}", "stopped"),
        (
            "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}",
            f"more than {STEPS_MAX} steps",
        ),
        (
            "{% set _budget = 0 %}{% for i in range(9000) %}{% for j in range(9000) %}"
            "{% endfor %}{% endfor %}",
            f"more than {STEPS_MAX} steps",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(60) }}",
            f"more than {STEPS_MAX} steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (DOUBLING % "{% set ns.s = ns.s + ns.s %}", "builds a value of size"),
        (DOUBLING % "{% set ns.s = ns.s ~ ns.s %}", "builds a value of size"),
        (DOUBLING % "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}", "builds a value of size"),
        ("{{ 'a' * 10**12 }}", "builds a value of size"),
        ("{{ 7 ** (10**12) }}", "builds a value of size"),
        ("{{ 'a'.center(10**12) }}", "builds a value of size"),
        ("{{ '{:99999999999}'.format(1) }}", "formats with a width"),
        ("{{ '%99999999999d' % 1 }}", "formats with a width"),
        ("{{ '%99999999999d' | format(1) }}", "formats with a width"),
    ],
)
def test_bad_templates_are_stopped(template: str, message: str) -> None:
    with pytest.raises((SpecError, RequestError), match=message):
        render_chat(template, TALK)


def test_what_a_template_is_given_stays_as_it_was() -> None:
    before = json.dumps(TALK)
    render_chat("{% for m in messages %}{% set m = {'role': 'x'} %}{% endfor %}", TALK)

    assert json.dumps(TALK) == before
