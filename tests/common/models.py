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


class Tester:
    """What the mixin asks of a model's tester."""

    batch_size, seq_length, encoder_seq_length = BATCH, LENGTH, LENGTH
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, library, pictures):
        self.library, self.pictures = library, pictures

    def get_config(self):
        if not self.pictures:
            return self.library.Emu3TextConfig(**TEXT)
        return self.library.Emu3Config(text_config=TEXT, vq_config=VISION, vocabulary_map=IDS)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([BATCH, LENGTH], TEXT_IDS - 1) + 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.pictures:
            rows = SIDE // FACTOR
            # A picture's rows, with their ends of line, stand at the front of every prompt.
            ids[:, : rows * (rows + 1)] = IDS["<image>"]
            inputs["pixel_values"] = floats_tensor([BATCH, 3, SIDE, SIDE])
            inputs["image_sizes"] = torch.tensor([[SIDE, SIDE]] * BATCH)
        return self.get_config(), inputs


class CausalLM(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a header that our files lack

    def setUp(self):
        self.model_tester = Tester(self.library, pictures=False)


class Multimodal(ModelTesterMixin):
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = Tester(self.library, pictures=True)


class OurCausalLM(CausalLM, unittest.TestCase):
    library = emu3
    all_model_classes = (emu3.Emu3ForCausalLM,)


class OurMultimodal(Multimodal, unittest.TestCase):
    library = emu3
    all_model_classes = (emu3.Emu3Model, emu3.Emu3ForConditionalGeneration)


class TheirCausalLM(CausalLM, unittest.TestCase):
    library = transformers
    all_model_classes = (transformers.Emu3ForCausalLM,)


class TheirMultimodal(Multimodal, unittest.TestCase):
    library = transformers
    all_model_classes = (transformers.Emu3Model, transformers.Emu3ForConditionalGeneration)
