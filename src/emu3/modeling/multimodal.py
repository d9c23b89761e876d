"""The whole model: pictures become visual tokens, which are embedded like words; one decoder reads and writes both.

Shapes: B batch, S sequence, E model width, V vocabulary, h w rows and columns of visual tokens.
"""

import re
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from emu3.configuration import Emu3Config
from emu3.generation.grammar import GridGrammar, close_rows
from emu3.matrices import Scheme
from emu3.modeling.legacy import LEGACY_PREFIXES
from emu3.modeling.pretrained import Kwargs
from emu3.modeling.text import Emu3PreTrainedModel, Emu3TextModel, apply_head
from emu3.modeling.vision import Emu3VQVAE, Emu3VQVAEModelOutput
from emu3.quantization import use_scheme
from emu3.vocabulary import EMU3, SURFACES, VISUAL_PREFIX, Vocabulary, visual_codes

logger = logging.get_logger(__name__)


class Emu3ImageVocabularyMapping:
    """The documented view of the vocabulary: `vocabulary_mapping.image_tokens` and the conversions beside it.

    Attributes:
        vocab_map: surface -> id.
        eol_token_id, image_token_id: ids of the end of a row and of `<image>`; None where the map lacks them.
    """

    def __init__(self, vocab_map: dict[str, int]) -> None:
        self.vocab_map = vocab_map
        self.eol_token_id = vocab_map.get(SURFACES["eol"])
        self.image_token_id = vocab_map.get(SURFACES["image_placeholder"])

    @cached_property
    def image_tokens(self) -> list[int]:
        """Ids of all visual tokens, ascending."""
        return sorted(self.vocab_map[surface] for surface in self.image_tokens_str)

    @cached_property
    def image_tokens_str(self) -> list[str]:
        """Surfaces of all visual tokens, in the order of their characters."""
        return sorted(surface for surface in self.vocab_map if surface.startswith(VISUAL_PREFIX))

    @cached_property
    def img2bpe(self) -> dict[int, int]:
        """Code -> id."""
        return visual_codes(self.vocab_map)

    @cached_property
    def bpe2img(self) -> dict[int, int]:
        """Id -> code."""
        return {identifier: code for code, identifier in self.img2bpe.items()}

    @cached_property
    def img2bpe_mapping_tensor(self) -> Tensor:
        """`img2bpe` as a tensor: id at [code]; 0 where the map has no token for a code."""
        return _tensor_of(self.img2bpe)

    @cached_property
    def bpe2img_mapping_tensor(self) -> Tensor:
        """`bpe2img` as a tensor: code at [id]; 0 where an id is no visual token."""
        return _tensor_of(self.bpe2img)

    def convert_img2bpe(self, img_batch: Tensor) -> Tensor:
        """Codes (..., h, w) to ids (..., h, w + 1), each row closed by its end-of-row token.

        A map with gaps gives id 0 for a code that it lacks, as in transformers, and logs a warning.

        Raises:
            ValueError: the map has no end-of-row token, or a code is larger than any that it has.
        """
        if self.eol_token_id is None:
            raise ValueError(f"the vocabulary map has no {SURFACES['eol']}, which closes the rows of a picture; add it")
        ids = self._look_up(img_batch, self.img2bpe, self.img2bpe_mapping_tensor, "codes")
        return cast(Tensor, close_rows(ids, self.eol_token_id))

    def convert_bpe2img(self, img_batch: Tensor) -> Tensor:
        """Ids (..., h, w + 1) to codes (..., h, w).

        A map with gaps gives code 0 for an id that is no visual token, as in transformers, and logs a warning. From any
        other map, such an id raises ValueError.
        """
        return self._look_up(img_batch[..., :-1], self.bpe2img, self.bpe2img_mapping_tensor, "visual token ids")

    def _look_up(self, keys: Tensor, known: dict[int, int], mapping: Tensor, name: str) -> Tensor:
        keys = keys.long()
        outside = (keys < 0) | (keys >= len(mapping))
        if outside.any():
            raise ValueError(f"{name} must be in {min(known, default=0)}..{len(mapping) - 1}, got {keys[outside][0]}")
        values = mapping.to(keys)[keys]
        # 0 stands for a missing key, but may also be the value of a known one.
        if unknown := {key for key in keys[values == 0].unique().tolist() if key not in known}:
            if len(self.img2bpe) == len(self.img2bpe_mapping_tensor):
                raise ValueError(f"{sorted(unknown)[:5]} are no {name}; only visual tokens become pixels")
            logger.warning_once(f"the vocabulary map lacks {name}, such as {min(unknown)}; they become 0")
        return values


def _tensor_of(mapping: dict[int, int]) -> Tensor:
    """Value at [key], 0 elsewhere."""
    values = torch.zeros(max(mapping, default=-1) + 1, dtype=torch.int)
    values[list(mapping)] = torch.tensor(list(mapping.values()), dtype=torch.int)
    return values


class Emu3Model(Emu3PreTrainedModel):
    """Vision tokenizer and language model without a head."""

    config: Emu3Config
    renamed_weights: ClassVar[dict[str, str]] = {r"^text_model\.model\.": "text_model."}
    # Codes must not depend on the precision of the language model; nor scales of quantized layers, which get their own
    # dtype back in `from_pretrained`.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["vqmodel", "scales"]
    # Quantizers leave these modules as they are. The pattern matches from the beginning of a name. It differs from the
    # entry above because transformers wants no entry in both lists.
    _keep_in_fp32_modules: ClassVar[list[str]] = [r"(?:model\.)?vqmodel"]

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config)
        self.text_model = Emu3TextModel._from_config(config.text_config)
        self.vqmodel = Emu3VQVAE._from_config(config.vq_config, dtype=torch.float32)
        vocabulary_map = config.vocabulary_map or EMU3.to_map()
        # The control tokens that the configuration names itself. It may also have several or none for a role.
        ids = {role: getattr(config.text_config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        ids = {role: identifier for role, identifier in ids.items() if isinstance(identifier, int)}
        self.vocabulary = Vocabulary.from_map(vocabulary_map, **ids)
        self.vocabulary_mapping = Emu3ImageVocabularyMapping(vocabulary_map)
        config.image_token_id = self.vocabulary_mapping.image_token_id  # `generate` asks the config for it
        self.post_init()
        # `post_init` took over what the parts ignore in a whole checkpoint. Only the head is no part of this model.
        self._keys_to_ignore_on_load_unexpected = {r"(?:^|\.)lm_head\."}

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.text_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def _encode(self, pixel_values: Tensor, image_sizes: Tensor, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """The vision tokenizer's output, and the ids of each picture, rows closed and flattened."""
        encoded = self.vqmodel.encode(pixel_values, image_sizes, **kwargs | {"return_dict": True})
        return encoded, [self.vocabulary_mapping.convert_img2bpe(codes).flatten() for codes in encoded.image_tokens]

    def get_image_tokens(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        """Token ids of all pictures in one dimension: visual tokens, and an end-of-row token behind each row.

        Args:
            pixel_values: (B, C, H, W), as the image processor returns them.
            image_sizes: (B, 2), height and width in pixels of each picture.
        """
        return torch.cat(self._encode(pixel_values, image_sizes)[1])

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor, **kwargs: Any) -> Emu3VQVAEModelOutput:
        """The vision tokenizer's output, in which `pooler_output` is a tuple of each picture's embeddings (tokens, E).

        Arguments as of `get_image_tokens`, and `output_hidden_states`, `output_attentions` and `return_dict` as of
        `Emu3VQVAE.encode`.
        """
        encoded, ids = self._encode(pixel_values, image_sizes, **kwargs)
        encoded.pooler_output = tuple(self.get_input_embeddings()(picture) for picture in ids)
        return cast(Emu3VQVAEModelOutput, encoded)

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: Tensor, height: int, width: int) -> Tensor:
        """Pixels (B, C, H, W) of generated pictures, in the image processor's normalised space.

        Args:
            image_tokens: (B, height * (width + 1) + 3) ids: rows closed by end-of-row, then end-of-frame,
                end-of-image and end-of-sequence.
            height, width: of the pictures, in tokens.

        Raises:
            ValueError: another number of tokens, or an id that is no visual token.
        """
        grammar = GridGrammar(height, width, vocabulary=self.vocabulary)
        if image_tokens.shape[1] != grammar.length:
            raise ValueError(
                f"a picture of {height}x{width} tokens is {grammar.length} ids, got {image_tokens.shape[1]}: "
                "pass all generated ids, max_new_tokens=grammar.length of them, and no prompt"
            )
        return self.vqmodel.decode(self.vocabulary_mapping.convert_bpe2img(grammar.rows_of(image_tokens)[:, 0]))

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Bool (B, S): where `<image>` stands, by its id, or by its embedding where there are no ids."""
        placeholder = self.vocabulary.image_placeholder
        if input_ids is not None and (input_ids.numel() or inputs_embeds is None):
            return input_ids == placeholder
        assert inputs_embeds is not None
        embedding = self.get_input_embeddings()(torch.tensor(placeholder, device=inputs_embeds.device))
        return cast(Tensor, (inputs_embeds == embedding).all(-1))

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Bool (B, S, 1): where the embeddings of pictures go.

        Args:
            input_ids: (B, S), or None to find the placeholders by their embedding.
            inputs_embeds: (B, S, E).
            image_features: (tokens, E), of all pictures together.

        Raises:
            ValueError: the prompts do not have one placeholder for each picture token.
        """
        mask = self.placeholders(input_ids, inputs_embeds)
        found, expected = int(mask.sum()), image_features.shape[0]
        if found != expected:
            raise ValueError(
                f"the prompts have {found} image placeholders, the pictures {expected} tokens: "
                "prepare both with one call of the processor"
            )
        return mask[..., None].to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        cache: Cache | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Kwargs,
    ) -> Any:
        """Hidden states of text and pictures. Arguments and result as of `Emu3TextModel.forward`, and:

        Args:
            pixel_values: (pictures, C, H, W), for the image placeholders in `input_ids` in order.
            image_sizes: (pictures, 2), height and width in pixels.
            mm_encoder_outputs: {"image": what `get_image_features` returned}, in place of `pixel_values`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; pictures twice, without `image_sizes`, or
                with other numbers of tokens than placeholders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = cast(Tensor, self.get_input_embeddings()(input_ids))
        pictures = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if mm_encoder_outputs is not None:
                raise ValueError("give the pictures once: as pixel_values, or encoded as mm_encoder_outputs")
            if image_sizes is None:
                raise ValueError("pixel_values need image_sizes: pass on both from the processor")
            pictures = self.get_image_features(pixel_values, image_sizes, return_dict=True)
        if pictures is not None:
            features = torch.cat(pictures.pooler_output)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features.to(inputs_embeds))
        return self.text_model(
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


class Emu3ForConditionalGeneration(Emu3PreTrainedModel, GenerationMixin):
    """The whole model with its head: reads text and pictures, writes text and pictures."""

    config: Emu3Config
    renamed_weights: ClassVar[dict[str, str]] = {f"^{re.escape(old)}": new for old, new in LEGACY_PREFIXES.items()}
    output_modalities = ("image", "text")
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.text_model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config)
        self.model = Emu3Model(config)
        text_config = self.model.text_model.config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()
        if (scheme := Scheme.of(getattr(config, "quantization_config", None))) is not None:
            use_scheme(self, scheme)
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    @property
    def vocabulary_mapping(self) -> Emu3ImageVocabularyMapping:
        """Codes and ids of visual tokens."""
        return self.model.vocabulary_mapping

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor, **kwargs: Any) -> Emu3VQVAEModelOutput:
        """See `Emu3Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    def decode_image_tokens(self, image_tokens: Tensor, height: int, width: int) -> Tensor:
        """See `Emu3Model.decode_image_tokens`."""
        return self.model.decode_image_tokens(image_tokens, height, width)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Each prompt `expand_size` times, for beams and several samples, each copy with all of its pictures."""
        # Before transformers 5.23, the inherited method repeats picture by picture: for two copies of a prompt, A A B B
        # in place of A B A B. Since 5.23, `generate` encodes the pictures before it calls this method.
        pictures = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if name in inputs}
        if expand_size > 1 and pictures.get("image_sizes") is not None:
            tokens = torch.as_tensor(pictures["image_sizes"]) // self.model.vqmodel.spatial_scale_factor
            ends = (tokens[:, 0] * (tokens[:, 1] + 1)).cumsum(0)
            placeholders = self.model.placeholders(input_ids, inputs.get("inputs_embeds")).sum(1).cumsum(0)
            prompt_of_picture = torch.searchsorted(placeholders.to(ends.device), ends)
            copies = [
                (prompt_of_picture == prompt).nonzero()[:, 0].repeat(expand_size) for prompt in range(len(placeholders))
            ]
            pictures = {name: value[torch.cat(copies)] for name, value in pictures.items()}
        input_ids, inputs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **inputs)
        return input_ids, inputs | pictures

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits over text, structure and visual tokens. Arguments as of `Emu3Model.forward`.

        `labels`, `logits_to_keep` and the result are as of `Emu3ForCausalLM.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            cache=cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        return apply_head(self, outputs, labels, logits_to_keep, **kwargs)
