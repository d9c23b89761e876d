"""The decoder layers as the engine runs them: the model's own weights, with fewer and cheaper operations.

A step of a small batch is mostly the overhead of its operations. So, compared with `emu3.modeling.text`:

- Linear layers that share their input are one product (`fuse_linears`).
- Cosines and sines are computed once for all slots, then looked up.
- Attention is one kernel on a CPU; see `attention.py`. All quantized layers are one there; see `fused.py`.
- On a CPU with 16-bit weights, products with weights use 16 bits, and so do keys and values, where the kernel reads
  them. All else is faster in float32.

Hooks are called on the embeddings, the activation and special linear layers only. Small matrices on a CPU, and fused
ones in 8 or 4 bits, are copies. So after a change of the model's weights `Engine.refresh` must pack them anew.

Tests compare the two: greedy decoding by the engine and by `generate`, token for token.

Shapes: B lanes, S tokens of a lane, E model width, N query heads, K key-value heads, L slots, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3 import kernels
from emu3.generation.runtime.attention import Packed, Padded, attend
from emu3.generation.runtime.cache import SlotCache
from emu3.generation.runtime.fused import FusedLayers
from emu3.modeling.parallel import is_split, own_part, summed
from emu3.quantization import Int8Linear, QuantizedLinear

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3DecoderLayer, Emu3TextModel, RMSNorm

Linear = Callable[[Tensor], Tensor]

# Rope types whose angles depend on the length of the sequence so far.
_ANGLES_CHANGE = ("dynamic", "longrope")
# From so many queries on, the fused attention kernel is faster than two products. Below, its preparations cost more.
_MANY_QUERIES = 256
# Up to so many layers are compiled as one, which is faster but takes minutes for many; else layer by layer.
_FEW_LAYERS = 8
# Matrices up to this size are stored a second time, in oneDNN's order. Reordering at each call would cost as much as
# a product of a few rows.
SMALL_MATRIX = 2**20


class Layer(NamedTuple):
    """The weights of a layer, as functions. Plain matrices become products; quantized or adapted ones stay modules."""

    attention_norm: RMSNorm
    scaling: float
    query_key_value: Linear
    output: Linear
    feed_forward_norm: RMSNorm
    gate_up: Linear
    down: Linear
    activation: Linear

    @classmethod
    def pack(cls, layer: Emu3DecoderLayer, compiled: bool) -> Layer:
        """Pack one of the model's layers."""
        attention, mlp = layer.self_attn, layer.mlp
        dtype = layer.input_layernorm.weight.dtype
        return cls(
            layer.input_layernorm,
            attention.scaling,
            fuse_linears([attention.q_proj, attention.k_proj, attention.v_proj], dtype, compiled),
            fuse_linears([attention.o_proj], dtype, compiled),
            layer.post_attention_layernorm,
            fuse_linears([mlp.gate_proj, mlp.up_proj], dtype, compiled),
            fuse_linears([mlp.down_proj], dtype, compiled),
            mlp.act_fn,
        )


def fuse_linears(modules: Sequence[nn.Module], dtype: torch.dtype, compiled: bool) -> Linear:
    """One function for several linear modules of the same input; it gives their outputs one behind the other.

    Plain `nn.Linear` modules become one product. Their weights move into one piece of memory, and each module keeps its
    part of it: the modules work as before, and nothing large is stored twice. Other modules are called one by one.

    Args:
        modules: each from (..., inputs) to its own (..., outputs).
        dtype: what modules that are not plain get as input.
        compiled: whether the result will be compiled.
    """
    for kind in (Int8Linear, QuantizedLinear):
        if all(isinstance(module, kind) for module in modules) and (whole := kind.fuse(cast(Any, modules))) is not None:
            return whole
    if not all(map(_is_plain, modules)):
        return lambda x: torch.cat([module(x.to(dtype)) for module in modules], -1).to(x.dtype)
    weights = [cast(nn.Parameter, module.weight) for module in modules]
    weight = _in_one_piece([own_part(each) for each in weights])
    product: Linear = partial(linear, weight=weight)
    if not compiled and weight.numel() <= SMALL_MATRIX and _onednn_supports(weight):
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
        product = partial(_onednn_linear, dtype=weight.dtype, weight=reordered)
    return summed(product, weights[0])


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or module.bias is not None:
        return False
    if is_split(module.weight):  # its own `forward` does what `summed` does
        return True
    return (
        "forward" not in vars(module)  # accelerate offloads weights by a `forward` of its own
        and type(module.weight) is nn.Parameter
        and module.weight.device.type != "meta"
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` without a bias, in the dtype of the weight: (..., inputs) to (..., outputs), in the dtype of x."""
    # For a few rows in float32, `F.linear` picks kernels that take up to three times as long. Inside `torch.compile`
    # oneDNN's operator has no name.
    if weight.dtype == torch.float32 and not torch.compiler.is_compiling() and _onednn_supports(weight):
        return _onednn_linear(x, weight, weight.dtype)
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def _onednn_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, None, "none", [], "")).to(x.dtype)


def _onednn_supports(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of all between the products with weights like this one; of keys and values, see `ModelRunner`."""
    return torch.float32 if weight.device.type == "cpu" and weight.dtype.itemsize < 4 else weight.dtype


def can_pack(text_model: Emu3TextModel) -> bool:
    """Whether `Forward.run_packed` can run: on a CPU with kernels, and heads as wide as these need."""
    weight, attention = text_model.embed_tokens.weight, cast("Emu3DecoderLayer", text_model.layers[0]).self_attn
    on_cpu = weight.device.type == "cpu" and working_dtype(weight) == torch.float32
    return on_cpu and attention.head_dim % kernels.FLOATS == 0 and kernels.library() is not None


def _in_one_piece(weights: Sequence[Tensor]) -> Tensor:
    """The weights one behind the other in one tensor; moved there, unless they lie so already."""
    rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
    starts = [weight.data_ptr() for weight in weights]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    if all(weight.is_contiguous() for weight in weights) and starts[1:] == ends[:-1]:
        storage = {weight.untyped_storage().data_ptr() for weight in weights}
        if len(storage) == 1:
            return weights[0].detach().as_strided((rows, columns), (columns, 1))
    # Outside of inference mode, because tensors that are made in it cannot be trained.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
    return whole


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward of a text model over some slots of a cache.

    Attributes:
        text_model: the model.
        layers: its layers, packed.
        cos_LD, sin_LD: of every slot. The sine of the first half of a head is negative, as the rotation needs it.
            None where they change with the length.
        decode: `run_layers` for lanes that decode, compiled if asked for. Prompts use it uncompiled.
        fused: what `run_packed` uses in their place, if it can be had.
    """

    text_model: Emu3TextModel
    layers: tuple[Layer, ...]
    cos_LD: Tensor | None
    sin_LD: Tensor | None
    decode: Callable[..., Tensor]
    fused: FusedLayers | None

    @classmethod
    def pack(cls, text_model: Emu3TextModel, slots: int, compiled: bool = False) -> Forward:
        """Pack a model for caches of up to so many slots. To compile it needs a C++ compiler on a CPU."""
        decode: Callable[..., Tensor] = run_layers
        if compiled:
            on_cpu = text_model.embed_tokens.weight.device.type == "cpu"
            options: dict[str, Any] = {"cpp_wrapper": on_cpu}  # kernels called from C++; a GPU's are recorded instead
            compile_ = partial(torch.compile, dynamic=True, options=options)
            few = len(text_model.layers) <= _FEW_LAYERS
            decode = compile_(run_layers) if few else partial(run_layers, run=compile_(run_layer))
        layers = tuple(
            Layer.pack(cast("Emu3DecoderLayer", layer), compiled)
            for layer in text_model.layers[: text_model.config.num_hidden_layers]
        )
        fused = FusedLayers.of(text_model) if can_pack(text_model) else None
        return cls(text_model, layers, None, None, decode, fused).for_slots(slots)

    def for_slots(self, slots: int) -> Forward:
        """The same for caches of up to so many slots."""
        if self.text_model.rotary_emb.rope_type in _ANGLES_CHANGE:
            return self
        weight = self.text_model.embed_tokens.weight
        example = torch.empty(0, dtype=working_dtype(weight), device=weight.device)
        cos_BLD, sin_BLD = _angles(self.text_model, torch.arange(slots, device=weight.device)[None], example)
        return replace(self, cos_LD=cos_BLD[0], sin_LD=sin_BLD[0])

    def __call__(
        self,
        cache: SlotCache,
        ids_BS: Tensor,
        slots_BS: Tensor,
        turns_BS: Tensor,
        lanes: Sequence[int] | None,
        end: int,
    ) -> Tensor:
        """Run tokens and put their keys and values into the cache.

        Args:
            cache: what was there before.
            ids_BS, slots_BS, turns_BS: the tokens, their slots and their turns, on the CPU.
            lanes: of the cache; None for the first B.
            end: attention reads the slots before this one.

        Returns:
            Hidden states (B, S, E) after the last norm.
        """
        device = cache.turns_BL.device
        ids_BS, slots_BS = ids_BS.to(device), slots_BS.to(device)
        embeddings = self.text_model.embed_tokens
        hidden_BSE: Tensor = embeddings(ids_BS).to(working_dtype(embeddings.weight))
        lanes_B = torch.arange(len(ids_BS), device=device) if lanes is None else torch.tensor(lanes, device=device)
        indices, seen_BSL = cache.fill(lanes_B, slots_BS, turns_BS.to(device), end)
        cos_BSD, sin_BSD = self._angles_of(slots_BS, hidden_BSE)
        bias_BSL = torch.zeros_like(seen_BSL, dtype=hidden_BSE.dtype).masked_fill_(~seen_BSL, -torch.inf)
        heads, groups = cache.keys[0].shape[1], self.groups
        # The rows of a key-value head are the tokens of its first query head, then those of its second, ...
        bias = (bias_BSL.repeat(1, groups, 1) if groups > 1 else bias_BSL)[:, None]
        if bias.shape[2] < _MANY_QUERIES:
            bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)
        tokens = Padded(cos_BSD[:, :, None], sin_BSD[:, :, None], bias, indices, None if lanes is None else lanes_B)
        # `lanes` is given for prompts only.
        hidden_BSE = self._run(lanes is not None)(self.layers, hidden_BSE, tokens, cache.keys, cache.values)
        return _normalize(hidden_BSE, self.text_model.norm)

    def run_packed(
        self,
        cache: SlotCache,
        ids_T: Tensor,
        slots_T: Tensor,
        turns_T: Tensor,
        lanes_B: Tensor,
        starts: Tensor,
        prompts: bool,
    ) -> Tensor:
        """The same for tokens one lane behind the other: hidden states (T, E) after the last norm.

        Args:
            cache, ids_T, slots_T, turns_T: see `__call__`.
            lanes_B: of the cache.
            starts: (B + 1,), the first token of each lane, and T.
            prompts: whether these are tokens of prompts.
        """
        cache.mark(lanes_B.repeat_interleave(starts.diff()), slots_T, turns_T)
        hidden_TE: Tensor = self.text_model.embed_tokens(ids_T).float()
        cos_BTD, sin_BTD = self._angles_of(slots_T[None], hidden_TE)
        tokens = Packed(cos_BTD[0], sin_BTD[0], slots_T, turns_T, lanes_B, starts, cache.turns_BL)
        if self.fused is not None:
            hidden_TE = self.fused(hidden_TE, tokens, cache.keys, cache.values)
        else:
            hidden_TE = self._run(prompts)(self.layers, hidden_TE, tokens, cache.keys, cache.values)
        return _normalize(hidden_TE, self.text_model.norm)

    @property
    def groups(self) -> int:
        """Query heads for each key-value head."""
        return cast("Emu3DecoderLayer", self.text_model.layers[0]).self_attn.num_key_value_groups

    def _angles_of(self, slots_BS: Tensor, example: Tensor) -> tuple[Tensor, Tensor]:
        if self.cos_LD is None or self.sin_LD is None:
            return _angles(self.text_model, slots_BS, example)
        return self.cos_LD[slots_BS], self.sin_LD[slots_BS]

    def _run(self, prompts: bool) -> Callable[..., Tensor]:
        """Prompts run uncompiled, because their shapes hardly come back."""
        return run_layers if prompts else self.decode


def _angles(text_model: Emu3TextModel, slots_BS: Tensor, example: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, S, D) as `Forward` has them, in the dtype and on the device of `example`."""
    cos_BSD, sin_BSD = text_model.rotary_emb(example, slots_BS)
    half = sin_BSD.shape[-1] // 2
    return cos_BSD, torch.cat((-sin_BSD[..., :half], sin_BSD[..., half:]), -1)


def run_layers(
    layers: Sequence[Layer],
    hidden: Tensor,
    tokens: Padded | Packed,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    run: Callable[..., Tensor] | None = None,
) -> Tensor:
    """One layer after the other: hidden states (..., E).

    Args:
        layers: of the model.
        hidden: embeddings.
        tokens: how they attend.
        keys, values: of the cache, for each layer.
        run: `run_layer`, compiled; None: as it is.
    """
    for layer, keys_BKLD, values_BKLD in zip(layers, keys, values, strict=True):
        hidden = (run or run_layer)(layer, hidden, tokens, keys_BKLD, values_BKLD)
    return hidden


def run_layer(layer: Layer, hidden: Tensor, tokens: Padded | Packed, keys_BKLD: Tensor, values_BKLD: Tensor) -> Tensor:
    """Attention and feed-forward; see `run_layers`."""
    query_key_value = layer.query_key_value(_normalize(hidden, layer.attention_norm))
    hidden = hidden + layer.output(attend(tokens, query_key_value, keys_BKLD, values_BKLD, layer.scaling))
    gate, up = layer.gate_up(_normalize(hidden, layer.feed_forward_norm)).chunk(2, -1)
    return hidden + layer.down(layer.activation(gate) * up)


def _normalize(x: Tensor, norm: RMSNorm) -> Tensor:
    weight = norm.weight
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)
    # On a CPU several times as fast as `rms_norm`, which does the same by more operations.
    mean = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]
    return x * (mean + norm.variance_epsilon).rsqrt() * weight
