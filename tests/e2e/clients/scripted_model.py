"""A model that says what a script has for it: calls of a tool, what came of one, what it thinks.

Each token has one that always follows: embedding and head are permutations, and the layers add nothing. The chat
template looks at the conversation and ends the prompt with the mark of the script that answers it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CALL = {"city": "Oslo", "days": 2}
CALLS = [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
RESULT, LOST = "It is 7 degrees in Oslo.", "Nothing came back."
THOUGHT, SAID, UNTHOUGHT = "Two and two make four.", "Four it is.", "Two and two are four."
END, UNKNOWN = "<|im_end|>", "<unk>"
SCRIPTS = {  # no piece in two places
    "<|call|>": [
        "<tool_call>",
        '\n{"name": "weather", "arguments": {"city": ',
        '"Os',
        'lo", "days"',
        ": 2}}",
        "\n</tool_call>",
    ],
    "<|calls|>": [
        "<tool_call>\n",
        '{"name": "weather", "arguments": {"city": "Oslo"}}',
        "\n</tool_call>\n",
        "\n<tool_call>\n",
        '{"name": "weather", "arguments": {"city": "Rome"}}',
        "</tool_call>",
    ],
    "<|result|>": ["It", " is 7", " degrees in", " Oslo."],
    "<|lost|>": ["Nothing", " came back."],
    "<|think|>": ["<think>", "\nTwo and two", " make", " four.", "\n</think>", "\n\nFour", " it", " is."],
    "<|unthought|>": ["Two", " and two are", " four", "."],
}  # fmt: skip
TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nCall them so:\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(called=false, returned=false) %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- set seen.called = call.function.name == 'weather' and call.function.arguments.city == 'Oslo' %}
{%- endfor %}
{%- if message.role == 'tool' %}{%- set seen.returned = seen.called and '7' in message.content %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if messages[-1].role == 'tool' %}{{- '<|result|>' if seen.returned else '<|lost|>' }}
{%- elif tools %}{{- '<|calls|>' if 'Rome' in messages[-1].content else '<|call|>' }}
{%- elif enable_thinking is defined and not enable_thinking %}{{- '<|unthought|>' }}
{%- else %}{{- '<|think|>' }}{#- </think> -#}{%- endif %}{%- endif %}"""
BLOCKS = 3
HEADS, HEAD_SIZE, INTERMEDIATE = 1, 8, 32
CONTEXT = 512


def make(directory: Path) -> Path:
    """A model directory in Hugging Face layout."""
    directory.mkdir(parents=True)
    size, follows = _save_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": follows[-1],
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": follows[-1]}))
    head = np.zeros((size, size), np.float32)
    head[follows, np.arange(size)] = 1.0
    weights = {
        "model.embed_tokens.weight": np.eye(size, dtype=np.float32),
        "model.norm.weight": np.ones(size, np.float32),
        "lm_head.weight": head,
    }
    attention, width = HEADS * HEAD_SIZE, INTERMEDIATE
    shapes = {"self_attn.q_proj": (attention, size), "self_attn.k_proj": (attention, size)}
    shapes |= {"self_attn.v_proj": (attention, size), "self_attn.o_proj": (size, attention)}
    shapes |= {"mlp.gate_proj": (width, size), "mlp.up_proj": (width, size), "mlp.down_proj": (size, width)}
    for block in range(BLOCKS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{block}.{name}.weight"] = np.ones(size, np.float32)
        for name, shape in shapes.items():
            weights[f"model.layers.{block}.{name}.weight"] = np.zeros(shape, np.float32)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _save_tokenizer(directory: Path) -> tuple[int, list[int]]:
    """How many tokens there are, a multiple of 32, and which one follows each; END follows the last."""
    tokenizer = Tokenizer(models.WordLevel({UNKNOWN: 0}, UNKNOWN))  # what is asked is read by the template
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in ("<|im_start|>", END, *SCRIPTS)])
    pieces = [piece for script in SCRIPTS.values() for piece in script]
    assert len(set(pieces)) == len(pieces)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    ids = {name: tokenizer.token_to_id(name) for name in (END, *SCRIPTS, *pieces)}
    size = -(-tokenizer.get_vocab_size() // 32) * 32
    follows = [ids[END]] * size
    for mark, script in SCRIPTS.items():
        for here, there in zip([mark, *script], [*script, END], strict=True):
            follows[ids[here]] = ids[there]
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": END, "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return size, follows
