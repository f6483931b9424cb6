"""A model directory: its configuration, and which tensors there are in which files. No weights are read."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.settled import settled
from peerllm.engine.weights.tensor_list import listed_tensors
from peerllm.errors import BadInputError, ModelError
from peerllm.regular_files import open_regular, read_regular
from peerllm.stored_types import TENSOR_LIST, stored_bytes
from peerllm.types import BITS, STORED
from peerllm.wrapped_models import WRAPPERS, text_tensor, text_values

FILE_DTYPES = {
    "F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "BOOL": np.dtype("?"),
    "I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
}  # fmt: skip
COMPUTED = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}  # file dtype: compute dtype
COMPUTE_DTYPE_KEY = "peerllm_compute_dtype"  # in config.json: this model's "auto", whatever its files hold
STACKED_EXPERTS_KEY = "peerllm_stacked_experts"  # there: the files hold the experts of a layer as two tensors
STACKED_EXPERTS = "mlp.experts.gate_up_proj"
MAX_HEADER_BYTES = 100 << 20  # the format's own limit
MAX_JSON_BYTES = 64 << 20  # an index of some hundred thousand tensors
MAX_DIMENSIONS = 8
PREFIXES = re.compile(r"^(?:(?:model|transformer|gpt_neox|decoder)\.)+")  # that only some checkpoints have
Wanted = Callable[[str], str | None]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def plain_name(name: str) -> str:
    """A tensor's name without the prefixes that only some checkpoints have."""
    return PREFIXES.sub("", name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if it is missing, too large or no object."""
    try:
        value = json.loads(read_regular(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing from {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return value


def weight_files(model_dir: Path, wanted: Wanted = lambda name: name) -> list[Path]:
    """The directory's safetensors files: those in which the index names a tensor that is wanted, else all there are.

    ModelError if there are none.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{index.name} has no usable weight_map")
        files = {file for tensor, file in names.items() if wanted(tensor) is not None}
        return [_inside(model_dir, name) for name in sorted(files)]
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    if found := sorted(model_dir.glob("*.safetensors")):
        return found
    if any(True for pattern in PICKLES for _ in model_dir.glob(pattern)):
        raise ModelError(
            f"{model_dir} holds pickles, which peerllm never reads; take the model's safetensors or GGUF files instead"
        )
    raise ModelError(f"{model_dir} holds no weights (*.safetensors)")


def _inside(model_dir: Path, name: str) -> Path:
    """The path of a plain file name in the directory. It may be a link elsewhere, as in the hub's cache."""
    path = model_dir / name
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name or path.suffix != ".safetensors":
        raise ModelError(f"the index names {name!r}, which is no safetensors file of the model's directory")
    if not path.is_file():
        raise ModelError(f"{name} is missing from {model_dir}")
    return path


def read_tensors(model_dir: Path, wanted: Wanted = lambda name: name) -> dict[str, TensorAt]:
    """The tensors of the directory by name, from tensors.json or headers; ModelError if a file is damaged.

    `wanted` gives the name under which a tensor is known, None for one to leave out.
    """
    listed = model_dir / TENSOR_LIST
    found: Iterable[TensorAt]
    if listed.is_file():
        found = listed_tensors(listed)
    else:
        found = (tensor for path in weight_files(model_dir, wanted) for tensor in read_header(path))
    tensors: dict[str, TensorAt] = {}
    for tensor in found:
        if (name := wanted(tensor.name)) is None:
            continue
        if name in tensors:
            raise ModelError(f"tensor {name} stands in {Path(tensors[name].path).name} and {Path(tensor.path).name}")
        tensors[name] = replace(tensor, name=name)
    return tensors


def read_header(path: Path) -> list[TensorAt]:
    """The tensors of one file; ModelError if its header lies about sizes or the file is cut short."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path.name} is no complete safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path.name} has no readable safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path.name} has no readable safetensors header")
    start = 8 + length
    return [_tensor(path, name, entry, start, size) for name, entry in header.items() if name != "__metadata__"]


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> TensorAt:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelError(f"{path.name}: the header's entry for {name} is malformed") from None
    numbers = (*shape, begin, end)
    if len(shape) > MAX_DIMENSIONS or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ModelError(f"{path.name}: the header's entry for {name} is malformed")
    if dtype not in FILE_DTYPES:
        raise ModelError(f"{path.name}: tensor {name} has the unsupported dtype {dtype!r}")
    if end - begin != math.prod(shape) * FILE_DTYPES[dtype].itemsize:
        raise ModelError(f"{path.name}: tensor {name} claims {end - begin} bytes for shape {list(shape)} of {dtype}")
    if start + end > size:
        raise ModelError(
            f"{path.name} is cut short: tensor {name} ends at byte {start + end} of {size}; fetch it again"
        )
    return TensorAt(name, dtype, shape, str(path.absolute()), start + begin, end - begin)


def mapped(tensor: TensorAt) -> npt.NDArray[Any]:
    """The tensor mapped from its file: the pages belong to the system. Writes to the array never reach the file.

    Numbers in blocks are uint8 [..., rows, bytes of a row].
    """
    name = Path(tensor.path).name
    try:
        with open_regular(tensor.path) as file:
            if os.fstat(file.fileno()).st_size < tensor.offset + tensor.nbytes:
                raise ModelError(f"{name} ends in the middle of tensor {tensor.name}; fetch it again")
            if tensor.dtype in FILE_DTYPES:
                return np.memmap(file, FILE_DTYPES[tensor.dtype], "c", tensor.offset, tensor.shape)
            if not tensor.shape or stored_bytes(tensor.dtype, tensor.shape) != tensor.nbytes:
                raise ModelError(f"tensor {tensor.name} of shape {list(tensor.shape)} in {tensor.dtype} makes no sense")
            shape = (*tensor.shape[:-1], tensor.nbytes // math.prod(tensor.shape[:-1]))
            return np.memmap(file, np.uint8, "c", tensor.offset, shape)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model directory without its weights, and the form in which it was asked for."""

    directory: Path
    values: Mapping[str, Any]  # config.json; of a wrapper, what it says of its language model
    tensors: Mapping[str, TensorAt]
    dtype: str  # to compute in
    quantize: str  # STORED, or see `resolve`

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def config(self) -> str:
        """The values as JSON."""
        return json.dumps(self.values)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of config.json and generation_config.json, which have a number or a list."""
        generation = self.directory / "generation_config.json"
        given = [self.values, read_json(generation) if generation.is_file() else {}]
        ids = [values.get("eos_token_id") for values in given]
        found = [one for some in ids for one in (some if isinstance(some, list) else [some])]
        return tuple(sorted({one for one in found if type(one) is int}))


def read_model(model_dir: str | Path, dtype: str, quantize: str, accelerator: bool) -> ModelFiles:
    """Read a model directory; of a wrapper (wrapped_models.WRAPPERS) its language model alone.

    "auto" for `dtype` or `quantize` chooses by the files and by where they are computed. A quantized checkpoint is
    computed from its own numbers, unless float32 or a rounding is asked for.
    """
    directory = Path(model_dir).expanduser()
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory")
    values = read_json(directory / "config.json")
    if str(values.get("model_type")) in WRAPPERS:
        tensors = read_tensors(directory, text_tensor)
        values = text_values(values, headed="lm_head.weight" in tensors)
    else:
        tensors = read_tensors(directory)
    if any(name.endswith(STACKED_EXPERTS) for name in tensors):
        values = {**values, STACKED_EXPERTS_KEY: True}
    if values.get("quantization_config") and dtype != "float32" and quantize in ("auto", "none"):
        dtype, quantize = "float32", STORED
    else:
        dtype = compute_dtype(dtype, values, tensors.values())
        quantize = resolve(quantize, dtype, accelerator)
    if isinstance(about := values.get("quantization_config"), dict) and about.get("quant_method") != "gguf":
        values = settled(values, ((plain_name(name), tensor) for name, tensor in tensors.items()))
    return ModelFiles(directory, values, tensors, dtype, quantize)


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """ModelError if the checkpoint was published with rounded weights, which torch is not given."""
    if about := config.get("quantization_config"):
        method = about.get("quant_method", "?") if isinstance(about, dict) else "?"
        raise ModelError(f"the checkpoint is quantized ({method}), and what torch computes must be in floats")


def compute_dtype(wanted: str, config: Mapping[str, Any], tensors: Iterable[TensorAt]) -> str:
    """The dtype to compute in; "auto" is config.json's COMPUTE_DTYPE_KEY, else the dtype of most bytes in the files."""
    if wanted == "auto":
        held: Counter[str] = Counter()
        for tensor in tensors:
            if tensor.dtype in COMPUTED:
                held[COMPUTED[tensor.dtype]] += tensor.nbytes
        wanted = config.get(COMPUTE_DTYPE_KEY) or max(held, key=held.__getitem__, default="float32")
    if wanted not in COMPUTED.values():
        raise ModelError(f"dtype must be one of auto, {', '.join(dict.fromkeys(COMPUTED.values()))}, not {wanted!r}")
    return wanted


def resolve(quantize: str, dtype: str, accelerator: bool) -> str:
    """What matrices are rounded to ("": they are not) if "auto", "none" or a key of BITS is asked for.

    "auto" rounds 16-bit models to int8 on processors, where that is twice as fast.
    """
    if quantize == "auto":
        return "" if accelerator or dtype == "float32" else "int8"
    if quantize in ("none", ""):
        return ""
    if quantize not in BITS:
        raise BadInputError(f"weights can be rounded to {' or '.join(BITS)}, not {quantize!r}")
    return quantize
