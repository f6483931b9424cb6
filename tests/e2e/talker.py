"""A client in a process of its own: the official openai package streams an answer and prints each piece as it comes.

`python -m tests.e2e.talker URL TOKEN MODEL MAX_TOKENS QUESTION`
"""

from __future__ import annotations

import sys

from openai import OpenAI

url, token, model, max_tokens, question = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    stream=True,
    max_tokens=int(max_tokens),
    temperature=0,
    stream_options={"include_usage": True},
)
for event in stream:
    if event.choices and event.choices[0].delta.content:
        print(repr(event.choices[0].delta.content), flush=True)
    if event.usage:
        print(f"usage {event.usage.completion_tokens}", flush=True)
