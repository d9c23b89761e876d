"""Registers this package's classes with the Auto classes of transformers."""

from contextlib import suppress

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig
from emu3.image_processing import Emu3ImageProcessor
from emu3.modeling.multimodal import Emu3ForConditionalGeneration, Emu3Model
from emu3.modeling.text import Emu3ForCausalLM, Emu3TextModel
from emu3.modeling.vision import Emu3VQVAE
from emu3.processing import Emu3Processor


def register() -> None:
    """Make `AutoConfig`, `AutoModel...`, `AutoProcessor` and `AutoImageProcessor` use our classes for Emu3.

    This holds for the whole process and cannot be undone. A second call changes nothing. The classes of
    `transformers.models.emu3` are not changed.
    """
    configs: tuple[type[PreTrainedConfig], ...] = (Emu3Config, Emu3TextConfig, Emu3VQVAEConfig)
    for config, model in zip(configs, (Emu3Model, Emu3TextModel, Emu3VQVAE), strict=True):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageTextToText.register(Emu3Config, Emu3ForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(Emu3Config, Emu3ForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(Emu3TextConfig, Emu3ForCausalLM, exist_ok=True)
    # Loads the language model out of a whole checkpoint. The public `register` refuses a model with another
    # configuration class, so this goes to the mapping behind it.
    MODEL_FOR_CAUSAL_LM_MAPPING.register(Emu3Config, Emu3ForCausalLM, exist_ok=True)
    # transformers looks for a processor's class by its name, in its own list first, and ours has the same name.
    PROCESSOR_MAPPING_NAMES.pop(Emu3Config.model_type, None)
    AutoProcessor.register(Emu3Config, Emu3Processor, exist_ok=True)
    backends = dict.fromkeys(("pil", "torchvision"), Emu3ImageProcessor)
    with suppress(ImportError):  # older releases have no AutoImageProcessor without torchvision
        AutoImageProcessor.register(Emu3Config, image_processor_classes=backends, exist_ok=True)
