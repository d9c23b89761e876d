"""The language model: a Llama-style decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

Emu3 adds a dropout on both residual branches (arXiv 2409.18869, table 3). Parameters have the names of transformers'
Emu3. Plain modules hold the mathematics; `Emu3TextModel` and `Emu3ForCausalLM` follow the conventions of transformers.

The trainer calls `Emu3TextModel.run_layers`, which takes embeddings, mask and positions. The decode engine calls none
of these modules: it computes the same from their weights, in `generation/runtime/forward.py`.

Letters: B, S, E, N, K, D, L, V, see CONTRIBUTING.md.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from emu3.configuration import Emu3TextConfig
from emu3.modeling.attention import AttentionFunction, get_attention
from emu3.modeling.parallel import processes_of
from emu3.modeling.pretrained import CACHE, AnyLayoutModel, Kwargs, pick_cache
from emu3.quantization import QuantizedHead, QuantizedLinear

SILU = {type(ACT2FN[name]) for name in ("silu", "swish")}
"""Types of the modules that compute the default activation."""


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, for all rope types that transformers knows."""

    inv_freq: Tensor
    original_inv_freq: Tensor
    attention_scaling: float

    def __init__(self, config: Emu3TextConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = cast(dict[str, Any], config.rope_parameters)["rope_type"]
        default = self.compute_default_rope_parameters
        compute = default if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        inverse, self.attention_scaling = compute(config)
        self.inv_freq = nn.Buffer(inverse, persistent=False)
        self.original_inv_freq = nn.Buffer(inverse.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Emu3TextConfig, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies of rope type "default", (D / 2,), and the scale 1. transformers calls it by this name."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        theta = cast(dict[str, Any], config.rope_parameters)["rope_theta"]
        return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, S) to cosines and sines, (B, S, D) each, in the dtype and on the device of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.float().to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def rotate(x: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotate queries (B, N, S, D) or keys (B, K, S, D): each pair (d, d + D / 2) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos_BSD[:, None] + torch.cat((-second, first), dim=-1) * sin_BSD[:, None]


class Emu3Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, config: Emu3TextConfig, layer_idx: int) -> None:
        super().__init__()
        heads, key_heads = config.num_attention_heads, cast(int, config.num_key_value_heads)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.num_key_value_groups = heads // key_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        attend: AttentionFunction | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = pick_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None), kwargs)
        batch_and_length = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*batch_and_length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            # From transformers 5.24 on, a paged cache reads `kwargs`, and adds arguments for the attention function.
            arguments = {"kwargs": kwargs} if CACHE == "cache" else {}
            key, value = cache.update(key, value, self.layer_idx, **arguments)
        attend = attend or get_attention(self.config)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.reshape(*batch_and_length, -1)), weights


class Emu3MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: Emu3TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = config.hidden_act if callable(config.hidden_act) else ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Emu3DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and with a dropout and a residual."""

    def __init__(self, config: Emu3TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Emu3Attention(config, layer_idx)
        self.mlp = Emu3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return cast(Tensor, hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states))))


class Emu3PreTrainedModel(AnyLayoutModel):
    """The base of all models but the vision tokenizer. It tells transformers what they support."""

    base_model_prefix = "model"
    input_modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Emu3DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": Emu3DecoderLayer, "attentions": Emu3Attention}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `AnyLayoutModel`; with a plan for tensor parallelism, each process loads its part of the layers.

        Raises:
            ValueError: the layers cannot be split over so many processes, or not at all because they are quantized.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # `output_loading_info=True` gives two results
        heads = model.config.get_text_config().num_key_value_heads
        processes = processes_of(model.get_input_embeddings())
        if heads % processes:
            raise ValueError(
                f"{heads} key-value heads cannot be split over {processes} processes; start as many as divide them"
            )
        if processes > 1 and any(isinstance(module, QuantizedHead | QuantizedLinear) for module in model.modules()):
            raise ValueError(
                f"quantized layers cannot be split over {processes} processes; load the checkpoint they were made of"
            )
        return loaded


class Emu3TextModel(Emu3PreTrainedModel):
    """Token embeddings, decoder layers and the final norm. It also loads from the checkpoint of a whole model."""

    config: Emu3TextConfig
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    # The other parts of a whole model's checkpoint.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(?:^|\.)vqmodel\.", r"(?:^|\.)lm_head\."]
    # transformers strips "model.", the base model's prefix, from the names that it loads. So the new names have it.
    renamed_weights: ClassVar[dict[str, str]] = {r"^text_model\.model\.": "model.", r"^model\.text_model\.": "model."}

    def __init__(self, config: Emu3TextConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(Emu3DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def run_layers(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run all layers and the final norm: hidden states (B, S, E).

        Args:
            inputs_embeds: (B, S, E).
            attention_mask: as the attention function takes it: (B, 1, S, L), True where a query may look, for "sdpa"
                and "eager". None, without a cache, means causal attention.
            position_ids: (B, S), or (1, S) for the whole batch.
            cache: keys and values of earlier tokens, to which the layers add those of the new tokens.
            **kwargs: for the attention. `attend` replaces the function that the configuration names.
        """
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache}
        kwargs["position_embeddings"] = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, **kwargs)
        return cast(Tensor, self.norm(hidden_states))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Kwargs,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of a batch.

        Args:
            input_ids, inputs_embeds: (B, S), or (B, S, E). Exactly one of the two.
            attention_mask: (B, past + S), 0 for padding.
            position_ids: (B, S). Default: `cache_position`.
            past_key_values, cache: two names for the keys and values of earlier tokens. With them, `input_ids` holds
                the new tokens only.
            cache_position: (S,), positions of the new tokens in the sequence. Default: counted from the cache's length.
                New keys and values follow the cached ones whatever it says.
            use_cache: whether to make a cache if none is given. The cache is returned.
            **kwargs: `output_hidden_states`, `output_attentions`; `return_dict=False` returns a tuple.
        """
        cache = pick_cache(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            if cache_position is None:
                seen = cache.get_seq_length() if cache is not None else 0
                cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = cache_position[None]
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        hidden_states = self.run_layers(inputs_embeds, mask, position_ids, cache, use_cache=use_cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})


def select_states(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Select some positions of hidden states (B, S, E): (B, n, E), or (positions, E) for booleans.

    A number n keeps the last n positions, and 0 keeps all. A tensor names positions: (n,) the same for every sequence
    of the batch, (B, n) others for each, or (B, S) booleans.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


def apply_head(
    model: Emu3PreTrainedModel, outputs: Any, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
) -> CausalLMOutputWithPast:
    """The logits of a model's head, and the loss if there are labels, beside the `outputs` of its layers."""
    logits = model.lm_head(select_states(outputs.last_hidden_state, logits_to_keep))
    loss = None
    if labels is not None:
        vocab_size = model.config.get_text_config().vocab_size
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
    others = {name: outputs.get(name) for name in (CACHE, "hidden_states", "attentions")}
    return CausalLMOutputWithPast(loss=loss, logits=logits, **others)


class Emu3ForCausalLM(Emu3PreTrainedModel, GenerationMixin):
    """The language model and its head, without vision. It also loads from the checkpoint of a whole model."""

    config: Emu3TextConfig
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    renamed_weights: ClassVar[dict[str, str]] = {
        r"^text_model\.model\.": "model.",
        r"^text_model\.lm_head\.": "lm_head.",
        r"^model\.text_model\.": "model.",
    }
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(?:^|\.)vqmodel\."]  # in a whole model's checkpoint
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, Any]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: Emu3TextConfig) -> None:
        super().__init__(config)
        self.model = Emu3TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute the logits (B, S, V), and the loss if labels are given. Arguments as of `Emu3TextModel.forward`, and:

        Args:
            labels: (B, S) ids; -100 is ignored. The loss shifts them: label i is the target of position i - 1.
            logits_to_keep: the positions whose logits are computed, see `select_states`. Default: all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        return apply_head(self, outputs, labels, logits_to_keep, **kwargs)
