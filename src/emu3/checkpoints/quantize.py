"""Writes a checkpoint in 8 or 4 bits, as these are computed with: mapped files are used as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emu3.checkpoints.adapters import CONFIG, WEIGHTS
from emu3.checkpoints.config import all_finite, build_config, build_on_meta, check_tensors, expected_tensors
from emu3.checkpoints.convert import copy_companions, staged_folder
from emu3.checkpoints.files import INDEX, TensorHeader, read_json, write_json
from emu3.checkpoints.merge import Merge
from emu3.checkpoints.opened import open_checkpoint
from emu3.matrices import Scheme, quantize_matrix, quantize_rows
from emu3.modeling.legacy import documented_name
from emu3.quantization import QuantizedHead, QuantizedLinear, use_scheme

# Of a file of weights, unless one tensor is larger; so much is in memory at a time, beside the files that are mapped.
_SHARD_BYTES = 5 * 10**8
# From so many bytes on, the vision tokenizer is stored in float32, as it is computed with, so that it can be mapped.
_LARGE_VISION = 10**8
_VISION = "model.vqmodel."
_HEAD, _LAYERS = "lm_head", "model.text_model.layers."
_PLAN = "quantization_plan.json"


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` wrote.

    Attributes:
        target: the folder.
        bits, group, head_bits: the scheme.
        matrices: of the layers, how many are quantized.
        kept: matrices that are not, because their size does not fit the scheme, or the head is tied to the embedding.
        bytes_before, bytes_after: of all tensors.
    """

    target: str
    bits: int
    group: int | None
    head_bits: int | None
    matrices: int
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def quantize(
    source: str | Path,
    target: str | Path,
    bits: int = 8,
    group: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizeReport:
    """Write the checkpoint in `source` to the new folder `target` with the matrices of its layers in 8 or 4 bits.

    The head is in 8 bits either way, unless it is tied to the embedding. Embedding and norms keep their bits; so does a
    small vision tokenizer. A large one is stored in float32, as it is computed with. Weights are read tensor by tensor.
    Where it was cut off, the next call with the same arguments goes on behind the last file that is complete.

    Args:
        source: a folder in either layout of transformers, or that of an adapter, which is merged first.
        target: a folder that does not exist yet. It appears when all is written.
        bits: 8, as `int8=True` computes; or 4.
        group: in 4 bits, inputs that share a scale, 32 or 128. None: 32.
        on_progress: is called after each file of weights with the bytes written so far and the bytes in all.

    Raises:
        ValueError: the source has a fault or is quantized already, the target exists, or an argument is wrong.
    """
    scheme = Scheme(bits, 32 if bits == 4 and group is None else group, head_bits=8)
    folder, target = Path(source), Path(target)
    opened = open_checkpoint(folder)
    raw, file = opened.config, opened.weights / "config.json"
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{folder} is quantized already; give the checkpoint that it was made from")
    config = build_config(raw, file)
    headers = {documented_name(name): header for name, header in opened.headers.items()}
    model = build_on_meta(config, headers, file)
    check_tensors(str(folder), expected_tensors(model, headers), headers)
    use_scheme(model, scheme)
    kinds = QuantizedHead | QuantizedLinear
    quantized = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    if _HEAD not in quantized:
        scheme = replace(scheme, head_bits=None)
    matrices = {name.removesuffix(".weight") for name, header in headers.items() if _is_matrix(name, header)}
    widened = {f"{name}.bias" for name in quantized}
    vision = {name for name, header in headers.items() if name.startswith(_VISION) and header.dtype in ("BF16", "F16")}
    if sum(headers[name].bytes for name in vision) >= _LARGE_VISION:
        widened |= vision
    shards = list(_shards(headers, model.state_dict(), quantized, widened))
    total = sum(size for _, size in shards)
    # Files that were changed since are others.
    sources = _files(headers)
    if opened.adapter is not None:
        sources += [folder / CONFIG, folder / WEIGHTS]
    files = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sources]
    plan = {"files": files, "scheme": scheme.to_dict(), "shards": [names for names, _ in shards]}
    with staged_folder(target, resume=True) as staged, Merge(opened) as merge:
        _begin(staged, plan)
        done = 0
        weight_map: dict[str, str] = {}
        for number, (names, size) in enumerate(shards, 1):
            file = staged / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if not file.is_file():
                # Closed after each file, because pages that were read count as memory until then.
                with ExitStack() as stack:
                    by_file = {
                        source: stack.enter_context(safe_open(source, framework="pt"))
                        for source in {headers[name].file for name in names}
                    }
                    tensors: dict[str, Tensor] = {}
                    for name in names:
                        tensor = by_file[headers[name].file].get_tensor(headers[name].name)
                        tensors |= _stored(name, merge.stored(name, tensor), quantized, widened, scheme)
                    save_file(tensors, file.with_suffix(".part"), metadata={"format": "pt"})
                file.with_suffix(".part").replace(file)
            with safe_open(file, framework="numpy") as written:
                weight_map |= dict.fromkeys(written.keys(), file.name)
            done += size
            on_progress(done, total)
        write_json(staged / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copy_companions(folder, staged)
        (staged / _PLAN).unlink()
        write_json(staged / "config.json", {**raw, "quantization_config": scheme.to_dict()})
    before = sum(header.bytes for header in headers.values())
    return QuantizeReport(
        target=str(target),
        bits=scheme.bits,
        group=scheme.group,
        head_bits=scheme.head_bits,
        matrices=len(quantized - {_HEAD}),
        kept=tuple(sorted(matrices - quantized)),
        bytes_before=before,
        bytes_after=total,
    )


def _begin(staged: Path, plan: dict[str, Any]) -> None:
    """Go on with what is there if it was begun by the same plan; else begin anew."""
    if read_json(staged / _PLAN) != plan:
        shutil.rmtree(staged)
        staged.mkdir()
        write_json(staged / _PLAN, plan)


def _files(headers: dict[str, TensorHeader]) -> list[Path]:
    return sorted({header.file for header in headers.values()})


def _is_matrix(name: str, header: TensorHeader) -> bool:
    """Whether it is one of a layer or of the head."""
    return name.startswith((_LAYERS, f"{_HEAD}.")) and name.endswith(".weight") and len(header.shape) == 2


def _shards(
    headers: dict[str, TensorHeader], expected: dict[str, Tensor], quantized: set[str], widened: set[str]
) -> Iterator[tuple[list[str], int]]:
    """Names of the source's tensors that go into one file, and how many bytes they take there."""
    names: list[str] = []
    size = 0
    for name, header in headers.items():
        module = name.removesuffix(".weight")
        own = header.bytes
        if module in quantized:
            own = sum(expected[f"{module}.{part}"].nbytes for part in ("weight", "scales"))
        elif name in widened:
            own = 4 * header.elements
        if names and size + own > _SHARD_BYTES:
            yield names, size
            names, size = [], 0
        names.append(name)
        size += own
    yield names, size


def _stored(name: str, tensor: Tensor, quantized: set[str], widened: set[str], scheme: Scheme) -> dict[str, Tensor]:
    """What becomes of a tensor, with names of the documented layout. ValueError where it is not finite."""
    if not all_finite(tensor):
        raise ValueError(f"{name} holds NaN or infinite values; get the checkpoint again")
    module = name.removesuffix(".weight")
    if module in quantized:
        with torch.inference_mode():
            weight, scales = quantize_rows(tensor) if module == _HEAD else quantize_matrix(tensor, scheme)
        return {name: weight, f"{module}.scales": scales}
    return {name: tensor.float() if name in widened else tensor}
