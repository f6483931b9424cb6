"""The chat format: special tokens, the template, and dialogues as token ids with marks on what to learn."""

from __future__ import annotations

from tokenizers import Tokenizer

from peerllm.builtin.exchanges.dialogues import Dialogue

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)  # in the order of their ids, from 0

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render(dialogue: Dialogue) -> str:
    """The dialogue as the template writes it; a test compares the two."""
    text = BEGIN + (f"{SYSTEM}{dialogue.system}{END}" if dialogue.system else "")
    for said, answer in dialogue.exchanges:
        text += f"{USER}{said}{END}{ASSISTANT}{answer}{END}"
    return text


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of rendered dialogues, and for each token whether the model is to say it."""
    assistant, end = tokenizer.token_to_id(ASSISTANT), tokenizer.token_to_id(END)
    rows = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        spoken, speaking = [], False
        for token in encoding.ids:
            spoken.append(speaking)
            if token == assistant:
                speaking = True
            elif token == end:
                speaking = False
        rows.append((encoding.ids, spoken))
    return rows
