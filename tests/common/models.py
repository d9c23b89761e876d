"""transformers' common model tests on tiny models, of our classes and of transformers' own; run by `run.py`.

Not collected by `make test`: the tests come from transformers' source distribution, which is no package to install.
"""

import unittest

import torch
import transformers
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

import emu3
from emu3.vocabulary import SURFACES

BATCH, LENGTH, SIDE, FACTOR = 3, 40, 32, 8
TEXT_IDS, CODES = 100, 32
IDS = {surface: TEXT_IDS + n for n, surface in enumerate(SURFACES.values())}
IDS |= {f"<|visual token {code:06d}|>": TEXT_IDS + len(SURFACES) + code for code in range(CODES)}
TEXT = {
    "vocab_size": TEXT_IDS + len(IDS),
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 80,
    "attention_dropout": 0.1,
    "pad_token_id": IDS["<|endoftext|>"],
    "bos_token_id": IDS["<|extra_203|>"],
    "eos_token_id": IDS["<|extra_204|>"],
}
VISION = {
    "codebook_size": CODES,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
    "num_attention_heads": 1,
}


# As in transformers' own tests: no control tokens but the two of rows, codes from 2 on, spelled without a space, frames
# that are not joined, pictures that are not whole tokens.
PARTIAL_IDS = {"<image>": IDS["<image>"], "<|extra_200|>": IDS["<|extra_200|>"]}
PARTIAL_IDS |= {f"<|visual token{code:06d}|>": IDS[f"<|visual token {code:06d}|>"] for code in range(2, CODES)}
PARTIAL_VISION = VISION | {"temporal_downsample_factor": 1, "num_res_blocks": 2, "channel_multiplier": [1, 2, 1, 1]}


class Tester:
    """What the mixin asks of a model's tester."""

    batch_size, seq_length, encoder_seq_length = BATCH, LENGTH, LENGTH
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, library, pictures, partial=False):
        self.library, self.pictures = library, pictures
        self.vision, self.ids = (PARTIAL_VISION, PARTIAL_IDS) if partial else (VISION, IDS)
        self.side = SIDE + FACTOR - 1 if partial else SIDE

    def get_config(self):
        if not self.pictures:
            return self.library.Emu3TextConfig(**TEXT)
        return self.library.Emu3Config(text_config=TEXT, vq_config=self.vision, vocabulary_map=self.ids)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([BATCH, LENGTH], TEXT_IDS - 1) + 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.pictures:
            rows = SIDE // FACTOR
            # A picture's rows, with their ends of line, stand at the front of every prompt.
            ids[:, : rows * (rows + 1)] = IDS["<image>"]
            inputs["pixel_values"] = floats_tensor([BATCH, 3, self.side, self.side])
            inputs["image_sizes"] = torch.tensor([[self.side, self.side]] * BATCH)
        return self.get_config(), inputs


class CausalLM(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a header that our files lack

    def setUp(self):
        self.model_tester = Tester(self.library, pictures=False)


class Multimodal(ModelTesterMixin):
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    partial = False

    def setUp(self):
        self.model_tester = Tester(self.library, pictures=True, partial=self.partial)

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        return 1  # in the middle of the encoder

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        stages, blocks = len(VISION["channel_multiplier"]), self.model_tester.vision["num_res_blocks"]
        return stages * blocks + 2 + blocks + 1  # downwards, in the middle, in time, and what goes in


class OurCausalLM(CausalLM, unittest.TestCase):
    library = emu3
    all_model_classes = (emu3.Emu3ForCausalLM,)


class OurMultimodal(Multimodal, unittest.TestCase):
    library = emu3
    all_model_classes = (emu3.Emu3Model, emu3.Emu3ForConditionalGeneration)


class OurPartial(OurMultimodal):
    partial = True


class TheirCausalLM(CausalLM, unittest.TestCase):
    library = transformers
    all_model_classes = (transformers.Emu3ForCausalLM,)


class TheirMultimodal(Multimodal, unittest.TestCase):
    library = transformers
    all_model_classes = (transformers.Emu3Model, transformers.Emu3ForConditionalGeneration)


class TheirPartial(TheirMultimodal):
    partial = True
