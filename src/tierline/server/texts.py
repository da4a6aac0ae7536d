"""/tokenize and /detokenize: what a text is to the model, and back."""

import asyncio
from typing import Any

import orjson

from tierline.server.calls import Call, Endpoint
from tierline.server.chat import LONG_CHARACTERS, as_dict, prompt_of
from tierline.server.completions import no_tokenizer
from tierline.server.errors import ApiError
from tierline.server.shapes import DetokenizeAsked, TokenizeAsked


async def tokenize(call: Call, asked: TokenizeAsked) -> None:
    """A text or a conversation as tokens."""
    engine = call.server.engine.engine
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise no_tokenizer("prompt")
    if asked.messages is not None:
        messages = [as_dict(message) for message in asked.messages]
        shape = asked.add_generation_prompt
        tokens = prompt_of(call, messages, (), add_generation_prompt=shape)
    else:
        text, special = asked.prompt or "", asked.add_special_tokens
        if len(text) > LONG_CHARACTERS:
            tokens = await asyncio.to_thread(tokenizer.encode, text, special=special)
        else:
            tokens = tokenizer.encode(text, special=special)
    told: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": engine.positions_max,
        "tokens": tokens,
    }
    if asked.return_token_strs:
        told["token_strs"] = [tokenizer.token_text(token) for token in tokens]
    await call.answer(orjson.dumps(told))


async def detokenize(call: Call, asked: DetokenizeAsked) -> None:
    """Tokens as text."""
    engine = call.server.engine.engine
    if engine.tokenizer is None:
        raise no_tokenizer("tokens")
    unknown = next((token for token in asked.tokens if token >= engine.vocabulary), None)
    if unknown is not None:
        raise ApiError(
            400,
            f"token {unknown} is not in the vocabulary of {engine.vocabulary}",
            code="invalid_value",
            param="tokens",
        )
    text = engine.tokenizer.decode(asked.tokens, skip_special=False)
    await call.answer(orjson.dumps({"prompt": text}))


TOKENIZE = Endpoint(TokenizeAsked, tokenize)
DETOKENIZE = Endpoint(DetokenizeAsked, detokenize)
