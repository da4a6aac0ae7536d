"""litellm and LangChain at work: asks a server, prints one JSON object of what came back.

    python tests/other_clients.py litellm URL KEY MODEL

In a process of its own, for these libraries warn about themselves and keep sockets open.
"""

import asyncio
import json
import sys
from typing import Any

from pydantic import BaseModel, Field


class Place(BaseModel):
    """What an answer is parsed into."""

    city: str = Field(max_length=8)
    people: int = Field(ge=0, le=9999)
    kind: str = Field(pattern="^(town|village)$")


def function(name: str, **properties: Any) -> Any:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
TOOLS = [
    function("weather", city={"type": "string", "maxLength": 3}),
    function("add", a=DIGIT, b=DIGIT),
]
LONG = {"max_tokens": 300}  # enough for a call


def with_litellm(url: str, key: str, model: str) -> dict[str, Any]:
    import litellm

    server = {"api_base": f"{url}/v1", "api_key": key, "model": f"openai/{model}"}
    said = [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {**server, "messages": said, "temperature": 0, "max_tokens": 24}
    asked["num_retries"] = 0
    whole = litellm.completion(**asked)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**asked, **usage))
    called = litellm.completion(**(asked | LONG), tools=TOOLS, tool_choice="required")
    vectors = litellm.embedding(**server, input=["one"], encoding_format="float")
    try:
        litellm.completion(**(asked | {"api_key": "wrong"}))
        refused = ""
    except litellm.AuthenticationError as error:
        refused = str(error)
    return {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "tokens": [whole.usage.completion_tokens, chunks[-1].usage.completion_tokens],
        "calls": [
            [call.function.name, json.loads(call.function.arguments)]
            for call in called.choices[0].message.tool_calls
        ],
        "vector": vectors.data[0]["embedding"],
        "refused": refused,
    }


def with_langchain(url: str, key: str, model: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI

    def chat(**options: Any) -> Any:
        server = {"model": model, "base_url": f"{url}/v1", "api_key": key, "max_retries": 0}
        return ChatOpenAI(**(server | LONG | options))

    plain = chat(temperature=0)
    whole = plain.invoke("hi")
    bound = chat().bind_tools(TOOLS, tool_choice="required")
    joined: Any = None
    for piece in bound.stream("hi"):
        joined = piece if joined is None else joined + piece
    return {
        "whole": whole.content,
        "streamed": "".join(piece.content for piece in plain.stream("hi")),
        "async": asyncio.run(plain.ainvoke("hi")).content,
        "responses": chat(use_responses_api=True, temperature=0).invoke("hi").text,
        "batch": [answer.content for answer in plain.batch(["hi", "hi"])],
        "tokens": [whole.usage_metadata["output_tokens"]],
        "calls": [[call["name"], call["args"]] for call in bound.invoke("hi").tool_calls],
        "streamed calls": [[call["name"], call["args"]] for call in joined.tool_calls],
        "places": [
            chat().with_structured_output(Place, method=method).invoke("hi").model_dump()
            for method in ("json_schema", "function_calling")
        ],
    }


if __name__ == "__main__":
    name, *server_asked = sys.argv[1:]
    found = {"litellm": with_litellm, "langchain": with_langchain}[name](*server_asked)
    print(json.dumps(found))  # noqa: T201
