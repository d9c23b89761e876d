"""Configurations with the documented names and defaults. The defaults are those of the released 8.49 B model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class Emu3VQVAEConfig(PreTrainedConfig):
    """Vision tokenizer. The spatial factor is `2 ** (len(channel_multiplier) - 1)`: 8 by default.

    Args:
        codebook_size: number of visual codes.
        embed_dim: channels of a code vector.
        latent_channels: channels between encoder and quantizer, and between quantizer and decoder.
        double_latent: whether the encoder returns twice `latent_channels`.
        in_channels, out_channels: channels of the pictures.
        temporal_downsample_factor: frames of a clip that share one latent frame; a power of two.
        base_channels, channel_multiplier: stage i has `base_channels * channel_multiplier[i]` channels, a multiple of
            32.
        num_res_blocks: residual blocks of a stage (the decoder has one more).
        attn_resolutions: indices of the stages with attention, which must have `hidden_size` channels.
        hidden_size, num_attention_heads, attention_dropout: of the attention. `hidden_size` is the number of channels
            of the last stage.
    """

    model_type = "emu3_vqgan"
    base_config_key = "vq_config"

    codebook_size: int = 32768
    embed_dim: int = 4
    latent_channels: int = 4
    double_latent: bool = False
    in_channels: int = 3
    out_channels: int = 3
    temporal_downsample_factor: int = 4
    base_channels: int = 256
    channel_multiplier: list[int] | tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: list[int] | tuple[int, ...] = (3,)
    hidden_size: int = 1024
    num_attention_heads: int = 1
    attention_dropout: float | int = 0.0


class Emu3TextConfig(PreTrainedConfig):
    """Language model: a Llama-style decoder over text, structure and visual tokens.

    Args:
        vocab_size: text + structure + visual tokens.
        hidden_size, intermediate_size, num_hidden_layers: width, width of the feed-forward layers, depth.
        num_attention_heads, num_key_value_heads: query heads; key-value heads (None: as many).
        hidden_act: activation of the feed-forward gate, a name or a function.
        max_position_embeddings: the longest sequence.
        rms_norm_eps: epsilon of the normalisation.
        use_cache: whether `forward` returns keys and values by default.
        pad_token_id, bos_token_id, eos_token_id: structure tokens.
        tie_word_embeddings: whether head and embedding share one matrix.
        rope_theta: base of the rotary embedding. It is kept in `rope_parameters`.
        rope_scaling, rope_parameters: two names for a dict with `rope_type` and its factors, see transformers'
            `modeling_rope_utils`.
        mlp_bias, attention_bias: whether the linear layers have biases.
        attention_dropout: dropout of attention weights and, only in Emu3, of both residual branches.
        initializer_range: standard deviation of the initial weights.
    """

    model_type = "emu3_text_model"
    base_config_key = "text_config"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    default_theta = 1000000.0

    vocab_size: int = 184622
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 9216
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151849
    eos_token_id: int | list[int] | None = 151850
    rope_parameters: dict[str, Any] | None = None
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float | int = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


class Emu3Config(PreTrainedConfig):
    """A whole model: vision tokenizer, language model, and the ids of the tokens that both need.

    Args:
        vq_config: `Emu3VQVAEConfig` or its dict.
        text_config: `Emu3TextConfig` or its dict.
        vocabulary_map: surface -> id of control tokens, `<image>` and visual tokens. Where a token is needed and
            missing, a ValueError names it. None: that of the released checkpoints.
    """

    model_type = "emu3"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    sub_configs: ClassVar[dict[str, Any]] = {"vq_config": Emu3VQVAEConfig, "text_config": Emu3TextConfig}

    vq_config: dict[str, Any] | Emu3VQVAEConfig | None = None
    text_config: dict[str, Any] | Emu3TextConfig | None = None
    vocabulary_map: dict[str, int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_token_id = (self.vocabulary_map or {}).get("<image>")
        for name, kind in self.sub_configs.items():
            given = getattr(self, name)
            if not isinstance(given, kind):
                setattr(self, name, kind(**(given or {})))
        super().__post_init__(**kwargs)
