"""What parameters, headers and error codes mean, in words: for `/openapi.json` and the reference.

`openapi` puts these beside the shapes.  A parameter that stands in no table here, or an error
code that is not in `ERRORS`, fails a test, so that nothing is taken or told undocumented.
"""

OPENAI, VLLM, OURS = "OpenAI", "vLLM", "Tierline"

# name -> (whose it is, what it does)
PARAMETERS: dict[str, tuple[str, str]] = {
    "model": (OPENAI, "One of the names that /v1/models lists."),
    "messages": (OPENAI, "The conversation so far. Parts of messages are texts."),
    "input": (OPENAI, "A text, or several; see the schema."),
    "prompt": (
        OPENAI,
        "A text or its tokens, or a list of either: each is continued. /tokenize takes one text.",
    ),
    "instructions": (OPENAI, "A system message before the input."),
    "temperature": (OPENAI, "0 takes the likeliest token; 1 draws as the model says."),
    "top_p": (OPENAI, "Draws from the likeliest tokens that together have this probability."),
    "top_k": (VLLM, "Draws from so many likeliest tokens; -1 or 0: from all."),
    "min_p": (VLLM, "Leaves out tokens less likely than this share of the likeliest one."),
    "seed": (OPENAI, "The same seed and request draw the same tokens."),
    "stop": (OPENAI, "Texts at which an answer ends; up to 10,000 (OpenAI takes 4)."),
    "stop_token_ids": (VLLM, "Tokens at which an answer ends."),
    "frequency_penalty": (OPENAI, "Lowers a token's logit by this for each time it was answered."),
    "presence_penalty": (OPENAI, "Lowers a token's logit by this once it was answered."),
    "repetition_penalty": (VLLM, "Divides logits of tokens in prompt and answer; 1 is off."),
    "logit_bias": (OPENAI, "Added to logits, by token id; -100 bans, 100 all but forces."),
    "n": (OPENAI, "So many answers to one prompt, which is computed once."),
    "max_tokens": (
        OPENAI,
        "The longest answer. Chats that do not say end where the model's positions do; "
        "completions after 16 tokens.",
    ),
    "max_completion_tokens": (OPENAI, "Goes before `max_tokens`."),
    "max_output_tokens": (OPENAI, "The longest answer, arguments of calls included."),
    "min_tokens": (VLLM, "No end-of-text token and no stop token before so many tokens."),
    "ignore_eos": (VLLM, "Go on past the end-of-text token."),
    "skip_special_tokens": (VLLM, "Leave special tokens out of the text."),
    "include_stop_str_in_output": (VLLM, "Keep the stop text that ended the answer."),
    "stream": (OPENAI, "Server-sent events as tokens are made."),
    "stream_options": (OPENAI, "`include_usage`: a last chunk with `usage`."),
    "structured_outputs": (
        VLLM,
        "Exactly one of `json` (a schema), `json_object`, `regex`, `choice`, `grammar`; every "
        "answer keeps it.",
    ),
    "response_format": (
        OPENAI,
        "`json_object`, or `json_schema`, which is enforced whether or not it says `strict`.",
    ),
    "text": (OPENAI, "`format`: text, json_object or json_schema, which is enforced."),
    "logprobs": (
        OPENAI,
        "Log-probabilities of what was answered, before penalties and temperature. A chat takes "
        "true or false; a completion how many alternatives to tell.",
    ),
    "top_logprobs": (OPENAI, "So many alternatives at each token."),
    "include": (OPENAI, "`message.output_text.logprobs`."),
    "echo": (OPENAI, "Repeat the prompt before the answer; not together with `logprobs`."),
    "tools": (OPENAI, "Functions that the model may call."),
    "tool_choice": (OPENAI, "`none`, `auto`, `required` or one function; enforced by a grammar."),
    "parallel_tool_calls": (OPENAI, "false: one call at most."),
    "service_tier": (
        OPENAI,
        "`priority` and `fast` mean our most urgent class, `flex` the least urgent one.",
    ),
    "chat_template_kwargs": (VLLM, "Variables for the model's chat template."),
    "add_generation_prompt": (VLLM, "End the prompt where the assistant's turn begins."),
    "truncation": (OPENAI, "Only `disabled`: an input that is too long is refused."),
    "encoding_format": (OPENAI, "`float`, or `base64` of little-endian float32."),
    "dimensions": (OPENAI, "Only the number that the model has."),
    "priority": (
        OURS,
        "Larger is more urgent. Where no class is named it takes that whose priority is nearest, "
        "and so its promises, by which the default policy orders; within a class it is the last to "
        "be preempted. With the policy `priority` it is the order.",
    ),
    "deadline_ms": (
        OURS,
        "The first token within so many milliseconds: 400 where nobody could be so fast, 429 at "
        "once when the scheduler predicts that it would be late, 504 when it has passed.",
    ),
    "slo": (OURS, "A service class by name, or `ttft_ms` and `itl_ms` of its own."),
    "tokens": (VLLM, "Token ids."),
    "add_special_tokens": (VLLM, "Whether the text gets the tokens that begin a prompt."),
    "return_token_strs": (VLLM, "Tell each token's text, too."),
    # /admin
    "tenant": (OURS, "Who it counts for."),
    "name": (OURS, "What lists call it."),
    "models": (OURS, "The models it opens; else every one."),
    "budget_tokens": (OURS, "So many tokens, prompts and answers together; then 402."),
    "expires_s": (OURS, "Unix time from which on it opens nothing."),
    "by": (OURS, "Any of day, tenant, key_id, model, with commas between."),
    "since": (OURS, "The first day, UTC: 2026-01-31."),
    "until": (OURS, "The last day."),
    "key_id": (OURS, "Only of this key."),
    "before": (OURS, "The `next_before` of the page before."),
    "limit": (OURS, "So many at most."),
    "level": (OURS, "debug, info, warning or error."),
    "device_bytes": (OURS, "The new size; at most what was allocated at the start."),
    "id": (OURS, "A key's public id."),
}

# Taken, for clients send them, and without effect: why nothing is lost.
WITHOUT_EFFECT: dict[str, str] = {
    "user": "tenants come from keys",
    "safety_identifier": "tenants come from keys",
    "metadata": "answers are not kept (a response repeats it)",
    "prompt_cache_key": "prefixes are cached by what they say",
    "prompt_cache_retention": "prefixes are cached for as long as they fit",
}

# header -> what it does
REQUEST_HEADERS: dict[str, str] = {
    "X-Tierline-Priority": "As `priority` in a body, which goes first.",
    "X-Tierline-Deadline-Ms": "As `deadline_ms` in a body, which goes first.",
    "X-Tierline-SLO": "The name of a service class, as `slo` in a body, which goes first.",
}

# header -> what it says
RESPONSE_HEADERS: dict[str, str] = {
    "x-request-id": "The `id` of the answer: in logs, usage records and the dashboard, too.",
    "x-tierline-pooling": "How embeddings came to be: `mean`.",
    "Retry-After": "The whole seconds after which another try makes sense.",
    "retry-after-ms": "The same, finer; `openai` reads it.",
    "Allow": "The methods that the path takes.",
}

# code -> (status, what happened)
ERRORS: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "The body is not JSON."),
    "invalid_encoding": (400, "The body is not UTF-8."),
    "invalid_value": (400, "A value is not what its parameter takes; `param` names it."),
    "unknown_parameter": (400, "No endpoint of this kind knows it; `param` names it."),
    "unsupported_parameter": (400, "OpenAI knows it and this server cannot honour it."),
    "unknown_service_class": (400, "No class of that name is configured."),
    "context_length_exceeded": (400, "The input has more tokens than the model can read."),
    "does_not_fit": (400, "It needs more KV memory than there will ever be."),
    "invalid_grammar": (400, "A schema, regex or grammar is wrong, too large or not supported."),
    "no_chat_template": (400, "The model came without a chat template; send completions."),
    "no_tokenizer": (400, "The model came without a tokenizer; send token ids."),
    "invalid_http": (400, "It is not a request of HTTP/1.1."),
    "invalid_host": (400, "A request has exactly one Host header."),
    "missing_api_key": (401, "This server needs an API key."),
    "invalid_api_key": (401, "The API key is not known here."),
    "revoked_api_key": (401, "The API key was revoked."),
    "expired_api_key": (401, "The API key has expired."),
    "invalid_admin_token": (401, "/admin needs the admin token; no API key is one."),
    "budget_exhausted": (402, "The key has spent its budget."),
    "model_not_allowed": (403, "The key is not for this model."),
    "admin_disabled": (403, "The server has no admin token."),
    "host_not_allowed": (403, "A server on loopback answers to its own names only."),
    "origin_not_allowed": (403, "A page of another origin may change nothing."),
    "model_not_found": (404, "The model is not served here; the hint names those that are."),
    "key_not_found": (404, "No key has this id."),
    "not_found": (404, "There is nothing at this path."),
    "method_not_allowed": (405, "The path takes other methods; `Allow` names them."),
    "request_timeout": (408, "The request did not come to its end in time."),
    "input_too_long": (413, "The input has more tokens than the operator allows."),
    "request_too_large": (413, "The body has more bytes than the server takes."),
    "unsupported_media_type": (415, "The body has to be application/json, not compressed."),
    "overloaded": (
        429,
        "There is no room now, or its deadline could not be kept. `Retry-After` is when the "
        "scheduler predicts that another try makes sense.",
    ),
    "head_too_large": (431, "The request's head is too large."),
    "internal_error": (500, "A bug of ours; the log says where."),
    "generation_failed": (500, "The engine broke the answer off."),
    "draining": (503, "The server takes nothing new; ask another instance."),
    "stopping": (503, "The server stopped before the answer was complete."),
    "unavailable": (503, "The engine, or something it needs, has failed."),
    "usage_not_recorded": (503, "Usage cannot be recorded now, and this key's must be."),
    "too_many_connections": (503, "Every connection is taken."),
    "deadline_passed": (504, "No token came before the deadline."),
}
