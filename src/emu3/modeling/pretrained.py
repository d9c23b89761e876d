"""What every model here shares: loading from any of the layouts in which Emu3 is saved, and the two names that
transformers has had for a cache."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.utils import TransformersKwargs

# Libraries read from a forward's signature what else it takes; type checkers do not see into transformers.
if TYPE_CHECKING:
    Kwargs = Any
else:
    Kwargs = Unpack[TransformersKwargs]

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The name by which the installed transformers hands on a cache: `cache` from 5.24 on, `past_key_values` before."""


def one_cache(past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache that a forward was given, under either of its names.

    Args:
        past_key_values, cache: what the forward was given under these names.
        others: its remaining arguments. Before 5.24, `cache` may also be the paged cache of continuous batching. That
            one is for the attention function, and is put back here.

    Raises:
        ValueError: two caches, or a cache under a third name, which would be ignored.
    """
    if cache is not None and CACHE != "cache" and not isinstance(cache, Cache):
        others["cache"], cache = cache, None
    if stray := [name for name, value in others.items() if isinstance(value, Cache)]:
        raise ValueError(f"a cache was given as {stray[0]}; give it as cache or as past_key_values")
    if past_key_values is None or cache is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError("cache and past_key_values are two names of one argument; give one of them")


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

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for a call in the source of a model's module; here `attention.py` makes it for all.
        return True
