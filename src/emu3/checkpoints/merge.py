"""Merges an adapter into its base, tensor by tensor."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import torch
from safetensors import safe_open
from torch import Tensor, nn

from emu3.checkpoints.adapters import WEIGHTS
from emu3.checkpoints.config import all_finite
from emu3.checkpoints.files import TensorHeader
from emu3.checkpoints.opened import Opened
from emu3.modeling.legacy import documented_name

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Merge:
    """Adds what an adapter has learned to tensors of its base. Without an adapter, tensors stay as they are.

    The adapter's file is open within the block of a `with`, and mapped, not read.
    """

    def __init__(self, opened: Opened) -> None:
        adapter = opened.adapter
        self._opened = opened
        self._updates = adapter.updates if adapter is not None else {}
        self._changed = {*adapter.updates, *adapter.replaced} if adapter is not None else set()
        self._dtypes = {documented_name(name): header.dtype for name, header in opened.headers.items()}
        self._stack = ExitStack()

    def __enter__(self) -> Merge:
        if self._opened.adapter is not None:
            self._file = self._stack.enter_context(safe_open(self._opened.adapter.folder / WEIGHTS, framework="pt"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name`, of the documented layout, with its update: in float32, and on the same device.

        Raises:
            ValueError: the adapter's numbers are NaN or infinite, or the tensor is not in memory.
        """
        update = self._updates.get(name)
        if update is None:
            return tensor
        if tensor.is_meta:
            raise ValueError(
                f"{name} does not fit into memory, so that nothing can be merged into it; merge it first: "
                f"`emu3 convert {self._opened.folder} TARGET`"
            )
        with torch.no_grad():
            # The order in which PEFT computes it, for the same bits.
            product = self._read(update.up, tensor.device) @ self._read(update.down, tensor.device)
            merged = tensor.float() + (product.T if update.is_transposed else product) * update.scale
            if update.magnitude is not None:
                lengths = torch.linalg.norm(merged, dim=1)
                merged = (self._read(update.magnitude, tensor.device) / lengths).view(-1, 1) * merged
        return merged

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """What a merged checkpoint holds of the tensor that is found under `name`: the same in the header's dtype."""
        return self.merged(name, tensor).to(_TORCH[self._dtypes[name]]) if name in self._changed else tensor

    def change(self, prefix: str, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Merge the parameters of a module of the model in place. `prefix` is its name; `dtype` None leaves float32."""
        for own, parameter in module.named_parameters():
            if (name := f"{prefix}.{own}") in self._updates:
                merged = self.merged(name, parameter.data)
                parameter.data = merged if dtype is None else merged.to(dtype)

    def _read(self, header: TensorHeader, device: torch.device) -> Tensor:
        tensor: Tensor = self._file.get_tensor(header.name)
        if not all_finite(tensor):
            raise ValueError(f"{header.file} holds NaN or infinite values in {header.name}; train the adapter again")
        return tensor.to(device, torch.float32)
