"""Conversations under a model's own chat template: what `llm` and servers turn into prompts."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tierline.engine.chat import chat_template, render_chat
from tierline.engine.checkpoint import Checkpoint
from tierline.engine.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


class Chat:
    """A model's templates, and the tokenizer that reads what they write."""

    __slots__ = ("_template", "_tokenizer", "_tool_template")

    def __init__(self, tokenizer: Tokenizer, template: str, tool_template: str) -> None:
        self._tokenizer = tokenizer
        self._template, self._tool_template = template, tool_template

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: Tokenizer) -> "Chat | None":
        """The conversations of a checkpoint; None: it was made for plain text."""
        template = chat_template(checkpoint)
        if template is None:
            return None
        return cls(tokenizer, template, chat_template(checkpoint, tools=True) or template)

    @property
    def template(self) -> str:
        """The template for conversations with tools."""
        return self._tool_template

    def text(
        self,
        messages: Messages,
        *,
        now: datetime,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text; raises what `render_chat` raises."""
        return render_chat(
            self._tool_template if tools else self._template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            now=now,
            **self._tokenizer.special_tokens,
            **variables,
        )

    def encode(self, messages: Messages, *, now: datetime, **options: Any) -> list[int]:
        """The prompt as tokens; a template writes its special tokens itself."""
        return self._tokenizer.encode(self.text(messages, now=now, **options), special=False)
