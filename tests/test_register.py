"""`emu3.register`, in processes of their own, because registering cannot be taken back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version

ROOT = Path(__file__).parent.parent

NAMES = """
import json, sys, torch, transformers, emu3, emu3.auto_classes
transformers.logging.set_verbosity_error()
folder = sys.argv[1]
def name(kind):
    return f"{kind.__module__}.{kind.__name__}"
def loaded(*autos):
    found = []
    for auto in autos:
        try:
            found.append(name(type(getattr(transformers, auto).from_pretrained(folder))))
        except ImportError:  # older releases have no AutoImageProcessor without torchvision
            found.append(None)
    return found
"""
UNREGISTERED = """
emu3.Emu3Processor, emu3.Emu3ForConditionalGeneration
print(json.dumps(loaded("AutoConfig", "AutoProcessor", "AutoImageProcessor")))
"""
REGISTERED = """
emu3.register()
emu3.register()
found = {"settings": loaded("AutoConfig", "AutoProcessor", "AutoImageProcessor")}
found["models"] = loaded(
    "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"
)
text, vision = (kind.from_pretrained(folder) for kind in (emu3.Emu3TextConfig, emu3.Emu3VQVAEConfig))
found["configs"] = [name(type(transformers.AutoConfig.for_model(c.model_type))) for c in (text, vision)]
with torch.device("meta"):
    found["parts"] = [
        name(type(transformers.AutoModel.from_config(text))),
        name(type(transformers.AutoModelForCausalLM.from_config(text))),
        name(type(transformers.AutoModel.from_config(vision))),
    ]
names = "Emu3Config", "Emu3ForConditionalGeneration", "Emu3Processor", "Emu3ImageProcessor"
found["theirs"] = [name(getattr(transformers, each)) for each in names]
print(json.dumps(found))
"""


def run(code: str, folder: Path) -> Any:
    """What a script prints."""
    command = [sys.executable, "-c", NAMES + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "src")}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def settings(found: list[str | None]) -> list[str]:
    """The classes of config, processor and image processor, of which older releases load the first only."""
    assert found[0] is not None
    assert None not in found or Version(transformers.__version__) < Version("5.20")
    return [name for name in found if name is not None]


def test_nothing_is_registered_until_asked(tiny_checkpoint: Path) -> None:
    found = settings(run(UNREGISTERED, tiny_checkpoint))
    expected = [
        "transformers.models.emu3.configuration_emu3.Emu3Config",
        "transformers.models.emu3.processing_emu3.Emu3Processor",
        "transformers.models.emu3.image_processing_emu3.Emu3ImageProcessor",
    ]
    assert found == expected[: len(found)]


def test_auto_classes_give_ours_when_asked(tiny_checkpoint: Path) -> None:
    found = run(REGISTERED, tiny_checkpoint)
    registered = settings(found.pop("settings"))
    expected = [
        "emu3.configuration.Emu3Config",
        "emu3.processing.Emu3Processor",
        "emu3.image_processing.Emu3ImageProcessor",
    ]
    assert registered == expected[: len(registered)]
    assert found == {
        "models": [
            "emu3.modeling.multimodal.Emu3Model",
            "emu3.modeling.text.Emu3ForCausalLM",
            "emu3.modeling.multimodal.Emu3ForConditionalGeneration",
            "emu3.modeling.multimodal.Emu3ForConditionalGeneration",
        ],
        "configs": ["emu3.configuration.Emu3TextConfig", "emu3.configuration.Emu3VQVAEConfig"],
        "parts": [
            "emu3.modeling.text.Emu3TextModel",
            "emu3.modeling.text.Emu3ForCausalLM",
            "emu3.modeling.vision.Emu3VQVAE",
        ],
        "theirs": [
            "transformers.models.emu3.configuration_emu3.Emu3Config",
            "transformers.models.emu3.modeling_emu3.Emu3ForConditionalGeneration",
            "transformers.models.emu3.processing_emu3.Emu3Processor",
            "transformers.models.emu3.image_processing_emu3.Emu3ImageProcessor",
        ],
    }
