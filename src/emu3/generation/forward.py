"""The decoder layers as the engine runs them: the weights of the model, without what only training needs.

Fewer and cheaper operations than `Emu3TextModel.run_layers`, because a step of a small batch is mostly their overhead:
matrices of the same input are one, cosines and sines are looked up, queries and keys are turned together, and the heads
that share keys and values become further queries, so that no key is copied and no kernel has to know of groups. On a
CPU only the products with weights are in 16 bits if these are, as its other kernels are slower in them.

B rows, S tokens a row, E model width, N query heads, K key-value heads, G = N / K, Q = G * S, C slots, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.generation.cache import SlotCache
from emu3.quantization import Int8Linear

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3DecoderLayer, Emu3TextModel, RMSNorm

Product = Callable[[Tensor], Tensor]

# Rope types whose angles depend on the length of what is there so far.
_ANGLES_CHANGE = ("dynamic", "longrope")
# With so many queries a fused kernel is faster than two products; with few, its preparations take longer than they.
_MANY_QUERIES = 256
_FEW_LAYERS = 8
_SMALL_MATRIX = 2**20


class Layer(NamedTuple):
    """What a layer computes with. A matrix that is not a plain one (quantized, adapted) is called as a module."""

    attention_norm: RMSNorm
    scaling: float
    query_key_value: Product
    output: Product
    feed_forward_norm: RMSNorm
    gate_up: Product
    down: Product
    activation: Product

    @classmethod
    def of(cls, layer: Emu3DecoderLayer, compiled: bool) -> Layer:
        """Of the model's own layer."""
        attention, mlp = layer.self_attn, layer.mlp
        dtype = layer.input_layernorm.weight.dtype
        return cls(
            layer.input_layernorm,
            attention.scaling,
            joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype, compiled),
            joined([attention.o_proj], dtype, compiled),
            layer.post_attention_layernorm,
            joined([mlp.gate_proj, mlp.up_proj], dtype, compiled),
            joined([mlp.down_proj], dtype, compiled),
            mlp.act_fn,
        )


def joined(modules: Sequence[nn.Module], dtype: torch.dtype, compiled: bool) -> Product:
    """The outputs of several linear modules of the same input, one behind the other, by one product if they are plain.

    Their weights move into one piece of memory then, of which each keeps its part: no module notices, and nothing large
    is stored twice.

    Args:
        modules: (..., I) to (..., O), each its own O.
        dtype: in which modules that are not plain take their input.
        compiled: whether this will be compiled.
    """
    plain = all(
        type(module) is nn.Linear
        and module.bias is None
        and "forward" not in vars(module)  # how accelerate offloads
        and type(module.weight) is nn.Parameter
        and module.weight.device.type != "meta"
        for module in modules
    )
    quantized = [module for module in modules if isinstance(module, Int8Linear)]
    whole = Int8Linear.fuse(quantized) if len(quantized) == len(modules) else None
    if whole is not None:
        return whole
    if not plain:
        return lambda x: torch.cat([module(x.to(dtype)) for module in modules], -1).to(x.dtype)
    weight = _in_one_piece([cast(nn.Parameter, module.weight) for module in modules])
    if not compiled and weight.numel() <= _SMALL_MATRIX and _in_onednn(weight):
        # As its kernels read it: to bring a small matrix in that order takes about as long as a product of a few rows.
        return partial(_onednn_product, dtype=weight.dtype, weight=torch.ops.mkldnn._reorder_linear_weight(weight))
    return partial(product, weight=weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` without a bias, in the dtype of the weight: (..., I) to (..., O), in the dtype of x."""
    # In float32, `linear` picks kernels that take up to three times as long for a few rows. What is compiled cannot
    # call oneDNN by this name.
    if weight.dtype == torch.float32 and not torch.compiler.is_compiling() and _in_onednn(weight):
        return _onednn_product(x, weight, weight.dtype)
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def _onednn_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, None, "none", [], "")).to(x.dtype)


def _in_onednn(weight: Tensor) -> bool:
    """Whether oneDNN has kernels for it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def working_dtype(weight: Tensor) -> torch.dtype:
    """Of everything between the products with weights such as this one, keys and values among it."""
    return torch.float32 if weight.device.type == "cpu" and weight.dtype.itemsize < 4 else weight.dtype


def _in_one_piece(weights: Sequence[nn.Parameter]) -> Tensor:
    first, together = weights[0], (sum(len(weight) for weight in weights), weights[0].shape[1])
    starts = [weight.data_ptr() for weight in weights]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    if all(weight.is_contiguous() for weight in weights) and starts[1:] == ends[:-1]:
        storage = {weight.untyped_storage().data_ptr() for weight in weights}
        if len(storage) == 1:
            return first.detach().as_strided(together, (together[1], 1))
    # What inference mode makes cannot be trained any more.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
    return whole


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward of a text model over some slots of a cache.

    Attributes:
        layers: of the model.
        cos_CD, sin_CD: of every slot; the sine of the first half of a head is negative, as turning it needs it.
            None where they change with the length.
        run: `run_layers`, perhaps compiled.
    """

    text_model: Emu3TextModel
    layers: tuple[Layer, ...]
    cos_CD: Tensor | None
    sin_CD: Tensor | None
    run: Callable[..., Tensor]

    @classmethod
    def of(cls, text_model: Emu3TextModel, slots: int, compiled: bool = False) -> Forward:
        """The forward of a model for caches of so many slots; compiled, it needs a C++ compiler."""
        run: Callable[..., Tensor] = run_layers
        if compiled:
            on_cpu = text_model.embed_tokens.weight.device.type == "cpu"
            options: dict[str, Any] = {"cpp_wrapper": on_cpu}  # kernels called from C++; a GPU's are recorded instead
            compile_ = partial(torch.compile, dynamic=True, options=options)
            # All layers as one are faster where calls cost most, but compiling takes minutes for many.
            few = len(text_model.layers) <= _FEW_LAYERS
            run = compile_(run_layers) if few else partial(run_layers, run=compile_(run_layer))
        layers = tuple(
            Layer.of(cast("Emu3DecoderLayer", layer), compiled)
            for layer in text_model.layers[: text_model.config.num_hidden_layers]
        )
        if text_model.rotary_emb.rope_type in _ANGLES_CHANGE:
            return cls(text_model, layers, None, None, run)
        weight = text_model.embed_tokens.weight
        like = torch.empty(0, dtype=working_dtype(weight), device=weight.device)
        cos_CD, sin_CD = _angles(text_model, torch.arange(slots, device=weight.device)[None], like)
        return cls(text_model, layers, cos_CD[0], sin_CD[0], run)

    def __call__(
        self,
        cache: SlotCache,
        ids_BS: Tensor,
        slots_BS: Tensor,
        turns_BS: Tensor,
        rows: Sequence[int] | None,
        end: int,
    ) -> Tensor:
        """Run tokens and put their keys and values into the cache.

        Args:
            cache: what was there before.
            ids_BS, slots_BS, turns_BS: the tokens, where they stand, and in what turn they go in, on the CPU.
            rows: of the cache; None for the first B.
            end: attention reads the slots before this one.

        Returns:
            Hidden states (B, S, E) after the last norm.
        """
        device = cache.turns_BC.device
        ids_BS, slots_BS = ids_BS.to(device), slots_BS.to(device)
        embeddings = self.text_model.embed_tokens
        hidden_BSE: Tensor = embeddings(ids_BS).to(working_dtype(embeddings.weight))
        rows_B = torch.arange(len(ids_BS), device=device) if rows is None else torch.tensor(rows, device=device)
        places_N, mask_BSC = cache.fill(rows_B, slots_BS, turns_BS.to(device), end)
        if self.cos_CD is None or self.sin_CD is None:
            cos_BSD, sin_BSD = _angles(self.text_model, slots_BS, hidden_BSE)
        else:
            cos_BSD, sin_BSD = self.cos_CD[slots_BS], self.sin_CD[slots_BS]
        bias_BSC = torch.zeros_like(mask_BSC, dtype=hidden_BSE.dtype).masked_fill_(~mask_BSC, -torch.inf)
        heads, groups = cache.keys[0].shape[1], self.groups
        bias_BQC = bias_BSC.repeat(1, groups, 1) if groups > 1 else bias_BSC
        bias = bias_BQC[:, None]
        if bias_BQC.shape[1] < _MANY_QUERIES:
            bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)
        run = self.run if rows is None else run_layers
        hidden_BSE = run(
            self.layers,
            hidden_BSE,
            cos_BSD[:, :, None],
            sin_BSD[:, :, None],
            bias,
            places_N,
            cache.keys,
            cache.values,
            None if rows is None else rows_B,
        )
        return _normed(hidden_BSE, self.text_model.norm)

    @property
    def groups(self) -> int:
        """Query heads for each key-value head."""
        return cast("Emu3DecoderLayer", self.text_model.layers[0]).self_attn.num_key_value_groups


def _angles(text_model: Emu3TextModel, slots_BS: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    cos_BSD, sin_BSD = text_model.rotary_emb(like, slots_BS)
    half = sin_BSD.shape[-1] // 2
    return cos_BSD, torch.cat((-sin_BSD[..., :half], sin_BSD[..., half:]), -1)


def run_layers(
    layers: Sequence[Layer],
    hidden_BSE: Tensor,
    cos_BS1D: Tensor,
    sin_BS1D: Tensor,
    bias: Tensor,
    places_N: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows_B: Tensor | None,
    run: Callable[..., Tensor] | None = None,
) -> Tensor:
    """One layer after the other: hidden states (B, S, E). Arguments as of `run_layer`, or what `run` names instead.

    Args:
        keys, values: the cache's of each layer.
    """
    for layer, keys_BKCD, values_BKCD in zip(layers, keys, values, strict=True):
        hidden_BSE = (run or run_layer)(
            layer, hidden_BSE, cos_BS1D, sin_BS1D, bias, places_N, keys_BKCD, values_BKCD, rows_B
        )
    return hidden_BSE


def run_layer(
    layer: Layer,
    hidden_BSE: Tensor,
    cos_BS1D: Tensor,
    sin_BS1D: Tensor,
    bias: Tensor,
    places_N: Tensor,
    keys_BKCD: Tensor,
    values_BKCD: Tensor,
    rows_B: Tensor | None,
) -> Tensor:
    """Attention and feed-forward: hidden states (B, S, E).

    Args:
        layer: of the model.
        hidden_BSE: embeddings, or what the layer before gave.
        cos_BS1D, sin_BS1D: of the tokens' slots; see `Forward`.
        bias: added to the scores, 0 or -inf: (B * K, Q, end), or for many queries (B, 1, Q, end).
        places_N, keys_BKCD, values_BKCD: where keys and values go; see `SlotCache.fill`.
        rows_B: of the cache; None for the first B.
    """
    batch, length = hidden_BSE.shape[:2]
    heads, width, queries, end = keys_BKCD.shape[1], keys_BKCD.shape[3], bias.shape[-2], bias.shape[-1]
    groups = queries // length
    mixed_BSE = layer.query_key_value(_normed(hidden_BSE, layer.attention_norm))
    both_BSND, value_BSKD = mixed_BSE.view(batch, length, (groups + 2) * heads, width).split(
        ((groups + 1) * heads, heads), 2
    )
    halves = both_BSND[..., width // 2 :], both_BSND[..., : width // 2]  # `roll` costs several times as much
    both_BSND = torch.addcmul(both_BSND * cos_BS1D, torch.cat(halves, -1), sin_BS1D)
    query_BSND, key_BSKD = both_BSND.split((groups * heads, heads), 2)
    keys_BKCD.view(-1, width).index_copy_(0, places_N, key_BSKD.reshape(-1, width))
    values_BKCD.view(-1, width).index_copy_(0, places_N, value_BSKD.reshape(-1, width))
    keys_BKCD, values_BKCD = (
        cached[:batch, :, :end] if rows_B is None else cached[rows_B, :, :end] for cached in (keys_BKCD, values_BKCD)
    )
    # (B, S, K * G, D) -> (B, K, G * S, D)
    query_BKQD = query_BSND.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4)
    query_BKQD = query_BKQD.reshape(batch, heads, queries, width)
    if bias.ndim == 3:
        query_MQD, keys_MCD = query_BKQD.flatten(0, 1), keys_BKCD.flatten(0, 1)
        scores_MQC = torch.baddbmm(bias, query_MQD, keys_MCD.transpose(1, 2), alpha=layer.scaling)
        mixed_BKQD = torch.bmm(scores_MQC.softmax(-1), values_BKCD.flatten(0, 1))
    else:
        mixed_BKQD = F.scaled_dot_product_attention(
            query_BKQD, keys_BKCD, values_BKCD, attn_mask=bias.expand(-1, heads, -1, -1), scale=layer.scaling
        )
    mixed_BSE = mixed_BKQD.view(batch, heads, groups, length, width).permute(0, 3, 1, 2, 4)
    hidden_BSE = hidden_BSE + layer.output(mixed_BSE.reshape(batch, length, groups * heads * width))
    gate_BSF, up_BSF = layer.gate_up(_normed(hidden_BSE, layer.feed_forward_norm)).chunk(2, -1)
    return hidden_BSE + layer.down(layer.activation(gate_BSF) * up_BSF)


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    weight = norm.weight
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)
    # On a CPU several times as fast as `rms_norm`, which does the same by more operations.
    mean = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]
    return x * (mean + norm.variance_epsilon).rsqrt() * weight
