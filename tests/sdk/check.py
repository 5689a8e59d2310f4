"""OpenAI's client for Python, unmodified, against a running stack: what it reads is what it expects."""

import asyncio
import json
import os
import time
import urllib.request

import openai
from openai import AsyncOpenAI, OpenAI

URL, KEY, LIMITED_KEY = os.environ["URL"], os.environ["KEY"], os.environ["LIMITED_KEY"]
MODEL = "claude-haiku-4-5-20251001"
QUESTION = [{"role": "user", "content": "How many days of paid annual leave does an employee have?"}]

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
limited = OpenAI(base_url=f"{URL}/v1", api_key=LIMITED_KEY)


def fault(**what):
    body = json.dumps(what).encode()
    headers = {"content-type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{os.environ['MODEL_URL']}/_faults", body, headers))


def fails(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def ask(of=client, **more):
    return of.chat.completions.create(**({"model": MODEL, "messages": QUESTION} | more))


def check_models():
    models = client.models.list().data
    assert MODEL in [model.id for model in models], models
    assert all(model.object == "model" and model.created > 0 and model.owned_by for model in models), models


def check_answer():
    answer = ask()
    assert answer.object == "chat.completion" and answer.created > 0 and answer._request_id, answer
    (choice,) = answer.choices
    assert "25 days" in choice.message.content and choice.message.role == "assistant", choice
    assert choice.finish_reason == "stop" and choice.message.refusal is None, choice
    usage = answer.usage
    assert usage.prompt_tokens > 50 and usage.completion_tokens > 5, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert usage.prompt_tokens_details.cached_tokens == 0 and usage.cost_nano_usd > 0, usage
    (annotation,) = choice.message.annotations
    cited = annotation.url_citation
    assert (cited.title, cited.url) == ("Staff handbook", "/v1/documents/handbook"), cited
    assert cited.end_index == len(choice.message.content), cited
    assert answer.citations[0]["document_id"] == "handbook", answer
    assert ask(max_completion_tokens=3).choices[0].finish_reason == "length"
    return choice.message


def check_history(answered):
    messages = [{"role": "system", "content": "Speak plainly."}, *QUESTION, answered]
    messages.append({"role": "user", "content": [{"type": "text", "text": "How many may be carried over?"}]})
    assert "March" in ask(messages=messages, max_tokens=200, n=1, temperature=1).choices[0].message.content


def joined(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def check_stream(answered):
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == answered.content, chunks
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    *others, last, used = chunks
    assert last.choices[0].finish_reason == "stop" and last.citations[0]["document_id"] == "handbook", last
    assert last.choices[0].delta.annotations[0]["url_citation"]["title"] == "Staff handbook", last
    assert used.choices == [] and used.usage.total_tokens > 50, used
    assert all(chunk.usage is None for chunk in [*others, last])
    plain = list(ask(stream=True))
    assert plain[-1].choices[0].finish_reason == "stop" and plain[-1].usage is None, plain[-1]
    with client.chat.completions.stream(model=MODEL, messages=QUESTION) as stream:
        assert stream.get_final_completion().choices[0].message.content == answered.content


async def check_async(answered):
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
        create = client.chat.completions.create
        asked = (create(model=MODEL, messages=QUESTION) for _ in range(3))
        for answer in await asyncio.gather(*asked):
            assert answer.choices[0].message.content == answered.content, answer
        stream = await create(model=MODEL, messages=QUESTION, stream=True)
        assert joined([chunk async for chunk in stream]) == answered.content
        assert (await client.models.list()).data


def check_errors():
    wrong = OpenAI(base_url=f"{URL}/v1", api_key=KEY[:-1])
    error = fails(openai.AuthenticationError, lambda: ask(wrong))
    assert (error.code, error.type) == ("invalid_key", "authentication_error") and error.request_id, error
    tool = {"type": "function", "function": {"name": "f"}}
    for name, value in [("tools", [tool]), ("temperature", 0.2), ("user", "ann"), ("model", "gpt-4o")]:
        error = fails(openai.BadRequestError, lambda: ask(**{name: value}))
        assert (error.code, error.param, error.type) == ("invalid_request", name, "invalid_request_error"), error
        assert error.request_id and name in error.message, error
    error = fails(openai.BadRequestError, lambda: ask(messages=[{"role": "tool", "content": "x"}]))
    assert error.param == "messages[0].role", error
    error = fails(openai.PermissionDeniedError, lambda: ask(model="claude-opus-4-6"))
    assert (error.code, error.param) == ("model_not_allowed", "model"), error
    error = fails(openai.NotFoundError, lambda: client.embeddings.create(model="x", input="x"))
    assert error.code == "not_found", error


def check_faults(answered):
    fault(mode="cut_after_deltas", n=2, count=1)
    error = fails(openai.APIError, lambda: list(ask(stream=True)))
    assert (error.code, error.type) == ("model_unavailable", "server_error"), error
    fault(mode="cut_after_deltas", n=2, count=1)
    error = fails(openai.InternalServerError, lambda: ask(client.with_options(max_retries=0)))
    assert error.status_code == 502 and error.code == "model_unavailable", error
    # It is asked again by the client, by itself.
    fault(mode="cut_after_deltas", n=2, count=1)
    assert ask().choices[0].message.content == answered.content


def check_repeats():
    headers = {"Idempotency-Key": "once-and-again"}
    first, again = ask(extra_headers=headers), ask(extra_headers=headers)
    assert first.id == again.id and first.choices == again.choices, (first, again)
    # A key is for one request, and a stream is another.
    error = fails(openai.BadRequestError, lambda: ask(stream=True, extra_headers=headers))
    assert error.param == "Idempotency-Key", error
    headers = {"Idempotency-Key": "streamed-once-and-again"}
    usage = {"include_usage": True}
    first, again = (list(ask(stream=True, stream_options=usage, extra_headers=headers)) for _ in range(2))
    assert joined(first) == joined(again) and first[-2:] == again[-2:], (first, again)


def check_limit():
    """The limit is used up since `main` began."""
    # The client waits for a minute at most, and the limit frees after up to 61 s.
    time.sleep(2)
    error = fails(openai.RateLimitError, lambda: ask(limited.with_options(max_retries=0)))
    assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error"), error
    assert 0 < int(error.response.headers["retry-after"]) <= 60, error.response.headers
    assert "x-should-retry" not in error.response.headers
    # It waits as long as it is told to, and is answered.
    assert ask(limited).choices[0].message.content


def main():
    ask(limited)
    check_models()
    answered = check_answer()
    check_history(answered)
    check_stream(answered)
    asyncio.run(check_async(answered))
    check_errors()
    check_faults(answered)
    check_repeats()
    check_limit()
    print("all is as the client expects")


main()
