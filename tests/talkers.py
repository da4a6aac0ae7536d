"""A tiny model that talks: random weights, a chat template with tools, a byte-level tokenizer.

What it says means nothing, so that nothing but forms and mechanisms can be tested with it.
"""

from pathlib import Path
from typing import Any

from tiny_checkpoints import tiny_checkpoint

TEMPLATE = """\
{{- mark }}
{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '</tools><tool_call></tool_call><|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>
{%- else %}{{ message.content or '' }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def tiny_talker(folder: Path, architecture: str = "qwen3", **changes: Any) -> Path:
    """A tiny checkpoint with a chat template; 2,048 positions, for tools take many bytes."""
    path = tiny_checkpoint(architecture, folder, **{"max_position_embeddings": 2048, **changes})
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path
