"""Which GGUF files of a repository are meant: by quantisation, by file, or, where nothing is said, by preference."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peerllm.errors import BadInputError, NotFoundError
from peerllm.planner.cost.byte_sizes import human_bytes

SUFFIX = ".gguf"
# Where a repository is named without a quantisation, the first of these that it has, as llama.cpp and Ollama begin;
# then whatever else it has, the smallest first.
PREFERRED = (
    "Q4_K_M", "Q4_0", "Q8_0", "MXFP4", "MXFP4_MOE", "Q5_K_M", "Q6_K", "UD-Q4_K_XL", "Q4_K_S", "Q4_K_L", "Q4_1",
    "Q5_K_S", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "BF16", "F16", "F32",
)  # fmt: skip
BESIDE = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # no language models: image projectors, statistics
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANTISATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d(?:_(?:[01]|K(?:_(?:XS|S|M|L|XL))?|NL|XXS|XS|S|M|XL))?|TQ\d_\d|B?F16|F32|FP16|FP32"
    r"|MXFP4(?:_MOE)?))(?=$|[-./])",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """One model in GGUF form: `files` are its parts in order; `quantisation` is "" where their names tell none."""

    quantisation: str
    files: tuple[str, ...]
    nbytes: int

    @property
    def tag(self) -> str:
        """What stands behind the colon of a name that means this one."""
        return self.quantisation or self.files[0]


def stem(file: str) -> str:
    """A file's name without its ending and its number among parts."""
    return _PART.sub("", file[: -len(SUFFIX)] if file.lower().endswith(SUFFIX) else file)


def quantisation(file: str) -> str:
    """The quantisation that a file's name tells, in capitals; "" if none."""
    found = _QUANTISATION.findall(stem(file))
    return found[-1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else ""


def gguf_models(sizes: Mapping[str, int]) -> list[GgufModel]:
    """The models among files (name: bytes), preferred ones first; a model of which a part is missing is none."""
    groups: dict[str, list[str]] = defaultdict(list)
    for file in sorted(sizes):
        if file.lower().endswith(SUFFIX) and not BESIDE.search(file.rpartition("/")[2]):
            groups[stem(file)].append(file)
    found = [
        GgufModel(quantisation(files[0]), tuple(files), sum(sizes[file] for file in files))
        for files in groups.values()
        if len(files) == _parts(files[0])
    ]
    order = {name: number for number, name in enumerate(PREFERRED)}
    return sorted(found, key=lambda one: (order.get(one.quantisation, len(order)), one.nbytes))


def _parts(file: str) -> int:
    found = _PART.search(file[: -len(SUFFIX)])
    return int(found[2]) if found else 1


def chosen(repository: str, models: Sequence[GgufModel], tag: str) -> GgufModel:
    """The one that `tag` means (a quantisation in any case, or a file), the preferred one for "".

    NotFoundError lists what there is, BadInputError the files among which the tag does not choose.
    """
    if not models:
        raise NotFoundError(f"{repository} holds no GGUF files{f'; leave out :{tag}' if tag else ''}")
    wanted = (models[0].tag if tag.lower() in ("", "latest") else tag).lower().removesuffix(SUFFIX)
    for names in (_quantisation_of, _without_maker, _files):
        if found := [one for one in models if wanted in names(one)]:
            break
    else:
        there = dict.fromkeys(f"{one.tag} ({human_bytes(one.nbytes)})" for one in models)
        raise NotFoundError(f"{repository} has no {tag}; there {_are(there)}")
    if len(found) > 1:
        files = (one.files[0] for one in found)
        raise BadInputError(
            f"{repository} has several models in {found[0].tag}; name a file: "
            f"{', '.join(f'{repository}:{file}' for file in files)}"
        )
    return found[0]


def _are(names: Mapping[str, None]) -> str:
    return f"{'is' if len(names) == 1 else 'are'} {', '.join(names)}"


def _quantisation_of(one: GgufModel) -> set[str]:
    return {one.quantisation.lower()} - {""}


def _without_maker(one: GgufModel) -> set[str]:
    return {one.quantisation.lower().removeprefix("ud-")} - {""}


def _files(one: GgufModel) -> set[str]:
    whole = {stem(one.files[0]), *(file[: -len(SUFFIX)] for file in one.files)}
    return {name.lower() for path in whole for name in (path, path.rpartition("/")[2])}
