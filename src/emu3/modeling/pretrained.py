"""What every model here shares: loading from any of the layouts in which Emu3 is saved."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedModel


class AnyLayoutModel(PreTrainedModel):
    """A model that says how the names of its weights begin in other layouts.

    transformers renames for its own classes only, and a weight whose name it does not know it leaves random.
    """

    # Pattern -> replacement.
    renamed_weights: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of `PreTrainedModel`; a `key_mapping` takes the place of `renamed_weights`."""
        return super().from_pretrained(*args, **{"key_mapping": cls.renamed_weights, **kwargs})
