"""How each family of byte-level BPE cuts text into words before it merges: `tokenizer.ggml.pre` names the way."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peerllm.errors import ModelError

_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_QWEN35 = _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _REST
_LOWER_LAST = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_FIRST = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_TEKKEN = rf"{_LOWER_LAST}|{_UPPER_FIRST}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _REST
_GPT4O = rf"{_LOWER_LAST}{_SHORT}?|{_UPPER_FIRST}{_SHORT}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _REST
_SEED = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _REST
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    _SHORT
    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    + r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"
# Letters of scripts with two cases, as the makers of DeepSeek LLM list them; escaped are those that NFC would replace.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄ"
    "ῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _REST,
)


@dataclass(frozen=True, slots=True)
class TextSplit:
    """Cuts by each pattern in turn; pieces between matches are words too."""

    patterns: tuple[str, ...]
    composed: bool = False  # text is brought to Unicode's form NFC first
    whole_words: bool = False  # a word that is a token is not built by merges
    starts_with_bos: bool = False  # where the file does not say


_BY_GPT2 = TextSplit((_GPT2,))
_BY_DIGITS = TextSplit((r"\p{N}", _GPT2))
_BY_LLAMA3 = TextSplit((_LLAMA3,))
_BY_LLAMA3_WORDS = TextSplit((_LLAMA3,), whole_words=True, starts_with_bos=True)
_BY_QWEN2 = TextSplit((_QWEN2,))
_BY_GPT4O = TextSplit((_GPT4O,))
_BY_DEEPSEEK_V3 = TextSplit(_DEEPSEEK_V3)
_BY_BAILING = TextSplit((_BAILING,))

_SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion"), _BY_GPT2),
    **dict.fromkeys(("olmo", "mpt"), replace(_BY_GPT2, composed=True)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _BY_DIGITS,
    ),
    "command-r": replace(_BY_DIGITS, composed=True),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _BY_LLAMA3),
    **dict.fromkeys(("glm4", "glm5"), replace(_BY_LLAMA3, whole_words=True)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _BY_LLAMA3_WORDS
    ),
    "minicpm5": TextSplit((r"\p{N}{1,3}", _QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")), whole_words=True),
    "qwen2": replace(_BY_QWEN2, composed=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "solar-open", "grok-2"), _BY_QWEN2),
    "qwen35": TextSplit((_QWEN35,), composed=True),
    "tekken": TextSplit((_TEKKEN,), whole_words=True, starts_with_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _BY_GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _BY_DEEPSEEK_V3),
    "deepseek-llm": TextSplit(
        (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")
    ),
    "deepseek-coder": TextSplit((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "falcon": TextSplit((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BY_BAILING),
    "seed-coder": TextSplit((_SEED,)),
    "exaone-moe": TextSplit((_EXAONE_MOE,)),
}


def text_split(name: object) -> TextSplit:
    """The way that a file names; ModelError for one that is not known."""
    if name is None or name == "default":
        raise ModelError(
            "the GGUF file does not say how its tokenizer splits words (tokenizer.ggml.pre): "
            "take a newer conversion of this model"
        )
    if not isinstance(name, str) or name not in _SPLITS:
        raise ModelError(
            f"the GGUF file's tokenizer splits words in an unknown way: tokenizer.ggml.pre is {str(name)[:80]!r}"
        )
    return _SPLITS[name]
