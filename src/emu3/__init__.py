"""Pictures from words, and words from pictures: one decoder-only transformer over text and visual tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emu3.quiet import quiet_imports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from emu3.auto_classes import register
    from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig
    from emu3.generation.engine import Engine
    from emu3.generation.grammar import GridGrammar
    from emu3.generation.request import Guidance, Request
    from emu3.generation.sampling import Sampling
    from emu3.image_processing import Emu3ImageProcessor
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration, Emu3Model
    from emu3.modeling.text import Emu3ForCausalLM, Emu3PreTrainedModel, Emu3TextModel
    from emu3.modeling.vision import Emu3VQVAE
    from emu3.pipeline import Emu3Pipeline
    from emu3.processing import Emu3Processor
    from emu3.video_processing import Emu3VideoProcessor
    from emu3.vocabulary import Vocabulary

# torch and transformers take seconds to import, so each public name loads its module on first use (PEP 562).
_NAMES = {
    "emu3.auto_classes": "register",
    "emu3.configuration": "Emu3Config Emu3TextConfig Emu3VQVAEConfig",
    "emu3.generation.engine": "Engine",
    "emu3.generation.grammar": "GridGrammar",
    "emu3.generation.request": "Guidance Request",
    "emu3.generation.sampling": "Sampling",
    "emu3.image_processing": "Emu3ImageProcessor",
    "emu3.modeling.multimodal": "Emu3ForConditionalGeneration Emu3Model",
    "emu3.modeling.text": "Emu3ForCausalLM Emu3PreTrainedModel Emu3TextModel",
    "emu3.modeling.vision": "Emu3VQVAE",
    "emu3.pipeline": "Emu3Pipeline",
    "emu3.processing": "Emu3Processor",
    "emu3.video_processing": "Emu3VideoProcessor",
    "emu3.vocabulary": "Vocabulary",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Emu3Config",
    "Emu3ForCausalLM",
    "Emu3ForConditionalGeneration",
    "Emu3ImageProcessor",
    "Emu3Model",
    "Emu3Pipeline",
    "Emu3PreTrainedModel",
    "Emu3Processor",
    "Emu3TextConfig",
    "Emu3TextModel",
    "Emu3VQVAE",
    "Emu3VQVAEConfig",
    "Emu3VideoProcessor",
    "Engine",
    "GridGrammar",
    "Guidance",
    "Request",
    "Sampling",
    "Vocabulary",
    "__version__",
    "register",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use; AttributeError for any other name."""
    if name not in _MODULES:
        raise AttributeError(f"module 'emu3' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    with quiet_imports():
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
