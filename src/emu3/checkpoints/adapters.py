"""Adapters: folders that PEFT's `save_pretrained` writes, which hold what training changed of another checkpoint.

    adapter_config.json         which checkpoint is the base, the rank, how strongly the adapter counts
    adapter_model.safetensors   for an adapted matrix W two narrow ones, A and B: W + scale * B @ A takes its place;
                                or a whole tensor, which takes the place of the base's
    words.txt, processor files  where they are not those of the base

Read here are settings and headers, and no weight; `emu3.checkpoints.merge` reads those. PEFT is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu3.checkpoints.files import FLOATS, INDEX, TensorHeader, read_header, read_json
from emu3.checkpoints.names import resolve
from emu3.checkpoints.settings import ADAPTER, check_fields
from emu3.modeling.legacy import documented_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"

_TENSOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_A\.weight|lora_embedding_A)|(?P<up>lora_B\.weight|lora_embedding_B)"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_PREFIX = "base_model.model."
_MERGE = "merge it into its base with PEFT's merge_and_unload, and save the whole model"
# Settings of PEFT that leave what an adapter computes as it is, or are handled here. Any other setting that is not
# off may change it, those of later versions too.
_HARMLESS = {
    *("auto_mapping", "inference_mode", "task_type", "peft_version", "megatron_core", "lora_dropout"),
    *("qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # see _STARTS
    *("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save"),  # the tensors tell
    "fan_in_fan_out",  # PEFT itself ignores it for the layers of these models
    *ADAPTER,
}
# How training began. With the other ways, it began from a base whose weights were changed.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# A pattern comes from a file, and some expressions take forever.
_MAX_PATTERN, _MAX_REPEATS = 200, 3


@dataclass(frozen=True)
class Update:
    """What one matrix of the base gets: `scale` times the product of two narrow ones.

    Attributes:
        down: header of A, of shape (rank, inputs).
        up: header of B, of shape (outputs, rank).
        magnitude: header of the lengths that DoRA gives to the rows of the sum, of shape (outputs,); or None.
        is_transposed: whether the product has inputs and outputs the other way round, as that of an embedding has.
    """

    down: TensorHeader
    up: TensorHeader
    magnitude: TensorHeader | None
    scale: float
    is_transposed: bool

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it belongs to."""
        shape = (self.up.shape[0], self.down.shape[1])
        return shape[::-1] if self.is_transposed else shape


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter's folder, by the names that its base's tensors have in the documented layout.

    Attributes:
        base: the base's folder.
        base_name: what adapter_config.json calls the base.
        updates: of which matrices low-rank products are added.
        replaced: which tensors are replaced as a whole.
        targets: how names of modules end which are all adapted; () where adapter_config.json says it in another way.
        keeps_tie: whether a head that is tied to the embedding stays so.
    """

    folder: Path
    base: Path
    base_name: str
    updates: Mapping[str, Update] = field(default_factory=dict)
    replaced: Mapping[str, TensorHeader] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    keeps_tie: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, in ascending order."""
        return tuple(sorted({update.rank for update in self.updates.values()}))

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        parts = [each for update in self.updates.values() for each in (update.down, update.up, update.magnitude)]
        whole = [header for name, header in self.replaced.items() if name not in self.updates]
        return sum(header.elements for header in (*parts, *whole) if header is not None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter. ValueError where a whole checkpoint is in the same folder."""
    if not (folder / CONFIG).is_file():
        return False
    if weights := next((name for name in ("model.safetensors", INDEX) if (folder / name).is_file()), None):
        raise ValueError(f"{folder} holds {weights} and {CONFIG}; move the adapter to a folder of its own")
    return True


def base_of(folder: Path, download: bool = False) -> Path:
    """The folder of the base of an adapter: that of a checkpoint, as `resolve` finds it.

    A relative path is looked up in the adapter's own folder first.

    Raises:
        ValueError: no base is named, it cannot be had, or it is an adapter itself.
    """
    file = folder / CONFIG
    config = read_json(file)
    check_fields(config, ADAPTER, file)
    name = config.get("base_model_name_or_path")
    remedy = f"write the folder or hub id of the base as base_model_name_or_path into {file}"
    if not name:
        raise ValueError(f"{file} names no base; {remedy}")
    try:
        own = folder / name
        base = own if name != "nano" and own.is_dir() else resolve(name, download)
    except (ValueError, OSError, RuntimeError) as error:  # a name may be no path at all
        raise ValueError(
            f"the base {name!r:.200} of the adapter in {folder} cannot be had: {error}; {remedy}"
        ) from error
    if is_adapter(base):
        raise ValueError(
            f"the base {name!r:.200} of the adapter in {folder} is an adapter itself; merge that one first: "
            f"`emu3 convert {base} TARGET`, and {remedy}"
        )
    revision = config.get("revision")
    if revision not in (None, "main") and not Path(name).expanduser().exists():
        raise ValueError(
            f"{file} names the revision {revision!r:.60} of its base; download that to a folder, and {remedy}"
        )
    return base


def read_adapter(folder: Path) -> Adapter:
    """Read the settings and the headers of an adapter.

    Raises:
        ValueError: a file is missing or damaged, its base cannot be had, or it is of a kind that cannot be merged.
    """
    file = folder / CONFIG
    base, config = base_of(folder), read_json(file)
    _check_kind(config, file)
    weights = folder / WEIGHTS
    if not weights.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} holds adapter_model.bin, and no pickle is read; save the adapter again with a PEFT that "
                f"writes {WEIGHTS}"
            )
        raise ValueError(f"{folder} holds no {WEIGHTS}; get the adapter again")
    parts: dict[str, dict[str, TensorHeader]] = {}
    replaced: dict[str, TensorHeader] = {}
    for header in read_header(weights):
        if not header.name.startswith(_PREFIX):
            raise ValueError(
                f"{weights} holds {header.name!r:.200}, which is no tensor of a LoRA; get the adapter again"
            )
        if header.dtype not in FLOATS:
            raise ValueError(
                f"{weights} holds {header.name!r:.200} as {header.dtype}, which is no floating-point number"
            )
        name = header.name.removeprefix(_PREFIX)
        if match := _TENSOR.fullmatch(name):
            part = next(part for part in ("down", "up", "magnitude") if match[part])
            parts.setdefault(match["module"], {})[part] = header
        else:
            replaced[documented_name(name.replace(".base_layer.", "."))] = header
    if not parts and not replaced:
        raise ValueError(f"{weights} holds no tensor; get the adapter again")
    updates = {documented_name(f"{module}.weight"): _update(module, own, config, file) for module, own in parts.items()}
    targets = config.get("target_modules")
    is_whole = not any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    return Adapter(
        folder,
        base,
        str(config["base_model_name_or_path"]),
        updates,
        replaced,
        tuple(targets) if isinstance(targets, list) and is_whole else (),
        bool(config.get("ensure_weight_tying")),
    )


def _check_kind(config: Mapping[str, Any], file: Path) -> None:
    """ValueError where an adapter computes something else than a LoRA that can be merged."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file} says peft_type={kind!r:.60}, and only LORA is read; {_MERGE}")
    if config.get("init_lora_weights", True) not in _STARTS:
        raise ValueError(
            f"{file} says init_lora_weights={config['init_lora_weights']!r:.60}, so that its base is not the one that "
            f"was trained on; {_MERGE}"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{file} says bias={config['bias']!r:.60}, which must be none, all or lora_only")
    for name, value in config.items():
        if value and name not in _HARMLESS:
            raise ValueError(f"{file} says {name:.60}={value!r:.60}, which is not read here; {_MERGE}")


def _update(module: str, parts: Mapping[str, TensorHeader], config: Mapping[str, Any], file: Path) -> Update:
    """What a module gets. ValueError where its tensors do not fit together, or not to the settings."""
    if missing := [name for part, name in (("down", "A"), ("up", "B")) if part not in parts]:
        raise ValueError(f"{WEIGHTS} beside {file} holds no {missing[0]} of {module:.200}; get the adapter again")
    down, up, magnitude = parts["down"], parts["up"], parts.get("magnitude")
    rank = _of_pattern(config, "rank_pattern", module, config.get("r", 8), file)
    alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8), file)
    shapes = f"A is {list(down.shape)} and B {list(up.shape)} of {module:.200}"
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise ValueError(f"{file.parent}: {shapes}, which is no adapter of a matrix; {_MERGE}")
    if (down.shape[0], up.shape[1]) != (rank, rank):
        raise ValueError(f"{file.parent}: {shapes}, and {file.name} says rank {rank}; get the adapter again")
    is_embedding = down.name.endswith("lora_embedding_A")
    if magnitude is not None and (is_embedding or magnitude.shape != up.shape[:1]):
        raise ValueError(f"{file.parent}: DoRA of {module:.200} is none of the rows of a layer; {_MERGE}")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise ValueError(
            f"{file} says use_dora={bool(config.get('use_dora'))}, which {WEIGHTS} contradicts for {module:.200}; get "
            "the adapter again"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Update(down, up, magnitude, scale, is_embedding)


def _of_pattern(config: Mapping[str, Any], key: str, module: str, default: Any, file: Path) -> Any:
    """A module's value in a setting of regular expressions for the end of a name; the first that fits counts."""
    for pattern, value in (config.get(key) or {}).items():
        # A repeated group may take exponential time, and n repeated characters the n-th power of a name's length.
        repeats = len(re.findall(r"[*+?{]", pattern))
        if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+?{]", pattern):
            raise ValueError(f"{file} says {key} for {pattern!r:.200}, which is too intricate; write names of modules")
        try:
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return value
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{file} says {key} for {pattern!r:.200}, which is no pattern of names: {error}"
            ) from error
    return default


def missing_targets(adapter: Adapter, names: Iterable[str]) -> list[str]:
    """Of the base's tensors, given by `names`, those whose modules the adapter should adapt and does not."""
    ends = tuple(f".{target}.weight" for target in adapter.targets)
    known = {*adapter.updates, *adapter.replaced}
    return [name for name in names if ends and f".{name}".endswith(ends) and name not in known]
