"""The whole model: pictures become visual tokens, visual tokens are embedded like words, one decoder reads and writes
both.

Shapes: B batch, S sequence, E model width, V vocabulary, h w rows and columns of visual tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from emu3.configuration import Emu3Config, Emu3TextConfig
from emu3.modeling.text import Emu3PreTrainedModel, Emu3TextModel, kept_positions
from emu3.modeling.vision import Emu3VQVAE, Emu3VQVAEModelOutput
from emu3.vocabulary import EMU3, Vocabulary


class Emu3ImageVocabularyMapping:
    """The documented view of the vocabulary: `vocabulary_mapping.image_tokens` and the conversions beside it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.eol_token_id = vocabulary.eol
        self.image_token_id = vocabulary.image_placeholder

    @cached_property
    def image_tokens(self) -> list[int]:
        """Ids of all visual tokens, ascending."""
        return sorted(self.img2bpe.values())

    @cached_property
    def img2bpe(self) -> dict[int, int]:
        """Code -> id."""
        return {code: self.vocabulary.ids_of(code) for code in range(self.vocabulary.codebook_size)}

    @cached_property
    def bpe2img(self) -> dict[int, int]:
        """Id -> code."""
        return {identifier: code for code, identifier in self.img2bpe.items()}

    def convert_img2bpe(self, img_batch: Tensor) -> Tensor:
        """Codes (..., h, w) to ids (..., h, w + 1), each row closed by its end-of-row token."""
        ids = self.vocabulary.ids_of(img_batch)
        return torch.cat((ids, ids.new_full((*ids.shape[:-1], 1), self.vocabulary.eol)), dim=-1)

    def convert_bpe2img(self, img_batch: Tensor) -> Tensor:
        """Ids (..., h, w + 1) to codes (..., h, w); ValueError where an id is no visual token."""
        return self.vocabulary.codes_of(img_batch[..., :-1])


class Emu3Model(Emu3PreTrainedModel):
    """Vision tokenizer and language model without a head."""

    config: Emu3Config
    config_class = Emu3Config
    renamed_weights: ClassVar[dict[str, str]] = {r"^text_model\.model\.": "text_model."}
    # Codes must not depend on the precision of the language model.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["vqmodel"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["vqmodel"]  # what quantizers leave as it is

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config)
        self.text_model = Emu3TextModel._from_config(config.text_config)
        self.vqmodel = Emu3VQVAE._from_config(config.vq_config)
        self.vocabulary = Vocabulary.from_map(config.vocabulary_map) if config.vocabulary_map else EMU3
        self.vocabulary_mapping = Emu3ImageVocabularyMapping(self.vocabulary)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.text_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def _encode(self, pixel_values: Tensor, image_sizes: Tensor) -> tuple[Emu3VQVAEModelOutput, list[Tensor]]:
        """The vision tokenizer's output, and the ids of each picture, rows closed and flattened."""
        encoded = cast(Emu3VQVAEModelOutput, self.vqmodel.encode(pixel_values, image_sizes))
        assert encoded.image_tokens is not None
        return encoded, [self.vocabulary_mapping.convert_img2bpe(codes).flatten() for codes in encoded.image_tokens]

    def get_image_tokens(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        """Token ids of pictures, one after the other: visual tokens, an end-of-row token behind each row.

        Args:
            pixel_values: (B, C, H, W), as by the image processor.
            image_sizes: (B, 2), height and width in pixels of each picture.

        Returns:
            1-D tensor of ids.
        """
        return torch.cat(self._encode(pixel_values, image_sizes)[1])

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor, **kwargs: Any) -> Emu3VQVAEModelOutput:
        """Embeddings of the token ids of pictures.

        Args:
            pixel_values, image_sizes: as of `get_image_tokens`.

        Returns:
            The vision tokenizer's output, or a tuple with `return_dict=False`; `pooler_output` is a tuple with
            (tokens, E) for each picture.
        """
        encoded, ids = self._encode(pixel_values, image_sizes)
        encoded.pooler_output = cast(Any, tuple(self.get_input_embeddings()(picture) for picture in ids))
        return encoded

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: Tensor, height: int, width: int) -> Tensor:
        """Pixels of generated pictures.

        Args:
            image_tokens: (B, height * (width + 1) + 3) ids: rows closed by end-of-row, then end-of-frame,
                end-of-image and end-of-sequence.
            height, width: of the pictures, in tokens.

        Returns:
            (B, C, H, W), in the image processor's normalised space.

        Raises:
            ValueError: another number of tokens, or an id that is no visual token.
        """
        expected = height * (width + 1) + 3
        if image_tokens.shape[1] != expected:
            raise ValueError(
                f"a picture of {height}x{width} tokens is {expected} ids, got {image_tokens.shape[1]}: "
                "pass the generated ids only, without the prompt"
            )
        rows = image_tokens[:, :-3].reshape(-1, height, width + 1)
        return self.vqmodel.decode(self.vocabulary_mapping.convert_bpe2img(rows))

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where the embeddings of pictures go.

        Args:
            input_ids: (B, S), or None to find the placeholders by their embedding.
            inputs_embeds: (B, S, E).
            image_features: (tokens, E), of all pictures together.

        Returns:
            Bool (B, S, 1).

        Raises:
            ValueError: the prompts hold another number of placeholders than there are picture tokens.
        """
        placeholder = self.vocabulary.image_placeholder
        if input_ids is None:
            embedding = self.get_input_embeddings()(torch.tensor(placeholder, device=inputs_embeds.device))
            mask = (inputs_embeds == embedding).all(-1)
        else:
            mask = input_ids == placeholder
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
        **kwargs: Any,
    ) -> Any:
        """Hidden states of text and pictures. Arguments as of `Emu3TextModel.forward`, and:

        Args:
            pixel_values: (pictures, C, H, W), for the image placeholders in `input_ids` in order.
            image_sizes: (pictures, 2), height and width in pixels.

        Returns:
            `BaseModelOutputWithPast`, or a tuple with `return_dict=False`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; pictures that do not fit the placeholders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = cast(Tensor, self.get_input_embeddings()(input_ids))
        if pixel_values is not None:
            if image_sizes is None:
                raise ValueError("pixel_values need image_sizes: pass on both from the processor")
            pictures = self.get_image_features(pixel_values, image_sizes, return_dict=True)
            features = torch.cat(cast(Any, pictures.pooler_output))
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features.to(inputs_embeds))
        return self.text_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            return_dict=True,
            **kwargs,
        )


class Emu3ForConditionalGeneration(Emu3PreTrainedModel, GenerationMixin):
    """The whole model with its head: reads text and pictures, writes text and pictures."""

    config: Emu3Config
    config_class = Emu3Config
    renamed_weights: ClassVar[dict[str, str]] = {
        r"^text_model\.model\.": "model.text_model.",
        r"^text_model\.lm_head\.": "lm_head.",
        r"^vqmodel\.": "model.vqmodel.",
    }
    output_modalities = ("image", "text")
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["vqmodel"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["model.vqmodel"]  # what quantizers leave as it is
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.text_model.embed_tokens.weight"}

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config)
        self.model = Emu3Model(config)
        text_config = cast(Emu3TextConfig, config.text_config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

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
        # The inherited method repeats picture by picture: A A B B, where two copies of a prompt need A B A B.
        pictures = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if name in inputs}
        if expand_size > 1 and input_ids is not None and pictures.get("image_sizes") is not None:
            tokens = torch.as_tensor(pictures["image_sizes"]) // self.model.vqmodel.spatial_scale_factor
            ends = (tokens[:, 0] * (tokens[:, 1] + 1)).cumsum(0)
            placeholders = (input_ids == self.model.vocabulary.image_placeholder).sum(1).cumsum(0)
            prompt_of_picture = torch.searchsorted(placeholders.to(ends.device), ends)
            copies = [
                (prompt_of_picture == prompt).nonzero()[:, 0].repeat(expand_size) for prompt in range(len(input_ids))
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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits over text, structure and visual tokens. Arguments as of `Emu3Model.forward`, and:

        Args:
            labels: (B, S) ids; -100 is ignored. Shifted here: label i is the target of position i - 1.
            logits_to_keep: compute the logits of the last n positions only (0: all), or of the positions in a 1-D
                tensor.

        Returns:
            `CausalLMOutputWithPast`, or a tuple with `return_dict=False`.
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
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs[0][:, kept_positions(logits_to_keep)])
        loss = None
        if labels is not None:
            vocab_size = cast(Emu3TextConfig, self.config.text_config).vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
