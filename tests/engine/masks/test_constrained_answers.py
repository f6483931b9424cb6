"""Constrained answers of real engines: the tokens of a plain loop over one shard, whatever the cut, and after moves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from peerllm.builtin import MODEL_DIR
from peerllm.engine.backends import Backends
from peerllm.engine.base import Draw, Shard
from peerllm.engine.messages import Constraint, Inspect, Unload
from peerllm.engine.sampler import SeededSampler
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.architectures import stage
from tests.engine.engines import WAIT_S, Cut, Deployed, Device, deploy, devices, redeploy
from tests.sizes import FULL

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]
TOKENIZER = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
END = TOKENIZER.token_to_id("<|end|>")
LAST = 13  # 12 blocks between embedding and head
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_pattern": " ?"})
PROMPT = tuple(TOKENIZER.encode("<|begin|><|user|>Who are you?<|end|><|assistant|>", add_special_tokens=False).ids)
SAMPLINGS = [
    Sampling(),
    *([Sampling(temperature=1.0, seed=7)] if FULL else []),
    Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.5, seed=3),
]
CUTS: dict[str, Cut] = {
    "one device": ((0, 0, LAST),),
    "head elsewhere": ((0, 0, 4), (1, 5, LAST)),
    "three devices": ((0, 0, 3), (1, 4, 8), (2, 9, LAST)),
    "embedding alone": ((0, 0, 0), (1, 1, LAST)),
    "head at home": ((0, 0, 3), (1, 4, 9), (0, 10, LAST)),
}


SHARE = ("three devices", "head at home")
ROOM = {"context": 256, "chunk": 64}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Device]]:
    async with devices(3, tmp_path_factory.mktemp("devices"), in_process=True) as made:
        yield made


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """What one shard, one matcher and the sampler say, one after the other."""
    backend = Backends()
    inspected = backend.inspect(Inspect(1, str(MODEL_DIR), "auto", "none"))
    shard = backend.load(stage(inspected, 0, LAST, context=256), lambda done, total: None)
    tokenizer = LLTokenizer((MODEL_DIR / "tokenizer.json").read_text(), n_vocab=shard.vocabulary, eos_token=[END])
    said = [plain_loop(shard, LLMatcher(tokenizer, GRAMMAR), sampling) for sampling in SAMPLINGS]
    shard.close()
    return said


def constraint(grammar: str = GRAMMAR) -> Constraint:
    return Constraint(grammar, str(MODEL_DIR / "tokenizer.json"))


def text_of(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids)))


def plain_loop(shard: Shard, matcher: LLMatcher, sampling: Sampling) -> list[int]:
    run, inputs, said = TokenRun(1, 0, 0, len(PROMPT), True), list(PROMPT), list[int]()
    while True:
        logits = shard.forward(np.array(inputs, np.int64), [run])
        mask = matcher.compute_bitmask()[: shard.vocabulary // 8]
        (token,) = SeededSampler()(logits, [Draw(sampling, run.position + run.length, said, mask)])
        if token == END:
            return said
        assert matcher.consume_token(token)
        said.append(token)
        run, inputs = TokenRun(1, 0, len(PROMPT) + len(said) - 1, 1, True), [token]


async def change(deployed: Deployed, cut: Cut) -> None:
    deployed.epoch += 1
    await redeploy(deployed, cut, **ROOM)
    await deployed.switch()


async def test_the_plain_answers_differ_and_fit(plain: list[list[int]]) -> None:
    assert len({tuple(ids) for ids in plain}) == len(SAMPLINGS)
    for ids in plain:
        Draft202012Validator(SCHEMA).validate(json.loads(text_of(ids)))


@pytest.mark.parametrize("cut", [CUTS[name] for name in CUTS if FULL or name in SHARE])
async def test_every_cut_says_what_a_plain_loop_does(made: list[Device], plain: list[list[int]], cut: Cut) -> None:
    deployed = await deploy(made, MODEL_DIR, cut, **ROOM)
    running = [deployed.submit(PROMPT, 60, one, [END], constraint=constraint()) for one in SAMPLINGS]
    free = deployed.submit(PROMPT, 20, stop_ids=[END])  # beside them
    for number, expected in zip(running, plain, strict=True):
        ids, end = await deployed.finished(number)
        assert (ids, end.finish) == (expected, "stop"), end
    assert (await deployed.finished(free))[1].finish in ("stop", "length")
    await deployed.until_free()
    await deployed.unload()


async def test_what_is_cut_by_max_tokens_says_length(made: list[Device], plain: list[list[int]]) -> None:
    deployed = await deploy(made, MODEL_DIR, CUTS["head elsewhere"], **ROOM)
    ids, end = await deployed.finished(deployed.submit(PROMPT, 9, stop_ids=[END], constraint=constraint()))
    assert (ids, end.finish) == (plain[0][:9], "length")
    await deployed.unload()


async def test_a_model_without_end_tokens_ends_where_nothing_can_follow(made: list[Device]) -> None:
    deployed = await deploy(made, MODEL_DIR, CUTS["head elsewhere"], **ROOM)
    grammar = LLMatcher.grammar_from_regex("(yes|no), (yes|no)")
    ids, end = await deployed.finished(deployed.submit(PROMPT, 60, constraint=constraint(grammar)))
    assert end.finish == "stop" and text_of(ids) in [f"{a}, {b}" for a in ("yes", "no") for b in ("yes", "no")]
    await deployed.unload()


async def test_an_answer_goes_on_after_ids_that_are_known(made: list[Device], plain: list[list[int]]) -> None:
    deployed = await deploy(made, MODEL_DIR, CUTS["three devices"], **ROOM)
    for expected, sampling in list(zip(plain, SAMPLINGS, strict=True))[0 if FULL else -1 :]:
        for known in (1, len(expected) // 2, len(expected))[0 if FULL else 1 :]:
            order = deployed.submit(PROMPT, 60, sampling, [END], answer=expected[:known], constraint=constraint())
            end = await deployed.ended(order)
            assert end.finish == "stop"
            assert [*expected[:known], *deployed.said(order)] == expected
    await deployed.unload()


@pytest.mark.parametrize("sampling", SAMPLINGS[1:])
async def test_moves_and_losses_change_no_token(made: list[Device], plain: list[list[int]], sampling: Sampling) -> None:
    """The head moves to another device, to the source, away again; and a device loses all that it had."""
    expected = plain[SAMPLINGS.index(sampling)]
    deployed = await deploy(made, MODEL_DIR, CUTS["three devices"], **ROOM)
    running = deployed.submit(PROMPT, 60, sampling, [END], constraint=constraint())
    for number, cut in enumerate(("head elsewhere", "head at home", "embedding alone", "three devices"), 1):
        await deployed.some(running, 3 * number)
        if number == 3:
            await made[1].host.ask(Unload(made[1].host.next_request(), deployed.id), WAIT_S)
        await change(deployed, CUTS[cut])
    ids, end = await deployed.finished(running)
    assert (ids, end.finish) == (expected, "stop")
    await deployed.unload()


@pytest.mark.parametrize(
    ("grammar", "tokenizer", "answer", "words"),
    [
        ("{}", "tokenizer.json", (), "the answer cannot be kept in its form"),
        (GRAMMAR, "no such file", (), "the answer's form"),
        (GRAMMAR, "config.json", (), "the answer's form"),
        (GRAMMAR, "tokenizer.json", (5, 5, 5), "the answer cannot be kept in its form"),
    ],
)
async def test_what_cannot_be_kept_in_its_form_ends_with_a_reason(
    made: list[Device], grammar: str, tokenizer: str, answer: tuple[int, ...], words: str
) -> None:
    deployed = await deploy(made, MODEL_DIR, CUTS["one device"], **ROOM)
    wanted = Constraint(grammar, str(MODEL_DIR / tokenizer))
    order = deployed.submit(PROMPT, 60, stop_ids=[END], answer=answer, constraint=wanted)
    end = await deployed.ended(order)
    assert end.finish == "error" and words in end.error and "\n" not in end.error
    assert len(await deployed.generate(PROMPT, 5)) == 5, "the engine goes on"
    await deployed.unload()
