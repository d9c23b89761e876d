"""What a run of a language model leaves: a whole checkpoint, or an adapter."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from emu3.checkpoints.opened import WORDS, open_checkpoint, own_dtype, read_learned
from emu3.configuration import Emu3TextConfig, Emu3VQVAEConfig
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.processing import Emu3Processor

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights in a checkpoint's files."""
    counts = Counter(header.dtype for header in open_checkpoint(folder).headers.values())
    return _DTYPES.get(counts.most_common(1)[0][0], torch.float32)


def configured_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a checkpoint is loaded where every dtype is fast."""
    opened = open_checkpoint(folder)
    return cast(torch.dtype, getattr(torch, own_dtype(opened.config, opened.headers, "cuda")))


def whole_weights(model: torch.nn.Module) -> dict[str, Any]:
    """All weights on the CPU, in the first process; the others get nothing."""
    if not dist.is_initialized():
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def is_first_process() -> bool:
    """Whether this is the only process, or the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def save_checkpoint(
    model: Emu3ForConditionalGeneration,
    processor: Emu3Processor,
    folder: Path,
    dtype: torch.dtype,
    beside: Path | None = None,
    computed: torch.dtype | None = None,
) -> None:
    """Writes a checkpoint whose weights are stored in `dtype`, and loaded in `computed`, by default their own dtype.

    `beside` is the checkpoint that it came from, whose list of words it keeps.
    """
    weights = whole_weights(model)
    if not is_first_process():
        return
    config, computed = model.config, computed or next(model.parameters()).dtype
    config.name_or_path = ""  # it would name a folder of the machine that trained
    stored = {name: each.to(dtype) if each.is_floating_point() else each for name, each in weights.items()}
    model.save_pretrained(folder, state_dict=stored)
    for part in (config, cast(Emu3TextConfig, config.text_config), cast(Emu3VQVAEConfig, config.vq_config)):
        part.dtype = computed
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if beside is not None and (beside / WORDS).is_file() and beside != folder:
        shutil.copy(beside / WORDS, folder / WORDS)


def add_words(source: Path, folder: Path, words: Iterable[str]) -> None:
    """Writes the list of words of the checkpoint that this one came from, and more behind them; nothing without one."""
    known = dict.fromkeys(read_learned(source).words)
    if known and is_first_process():
        (folder / WORDS).write_text("\n".join(known | dict.fromkeys(words)) + "\n", encoding="utf-8")


def save_adapter(adapted: Any, base: str, folder: Path) -> None:
    """Writes PEFT's two files. `base` is the name of the checkpoint that they adapt."""
    weights = whole_weights(adapted)
    if not is_first_process():
        return
    for config in adapted.peft_config.values():
        # A folder is named so that it is found from anywhere on this machine.
        config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    # PEFT leaves a card that is an empty form, or writes into the one that is there.
    card = folder / "README.md"
    own = card.read_bytes() if card.is_file() else None
    # PEFT would ask a hub for the base by its name, to see whether its embeddings were resized.
    adapted.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    card.unlink(missing_ok=True)
    if own is not None:
        card.write_bytes(own)
