"""What the models share: loading from every layout in which Emu3 is saved, and a cache under either of its names."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.utils import TransformersKwargs

from emu3.options import check_folder_or_id
from emu3.quantization import QuantizedLinear

# transformers' own tests read a forward's further arguments from its signature. For type checkers they are Any.
if TYPE_CHECKING:
    Kwargs = Any
else:
    Kwargs = Unpack[TransformersKwargs]

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The name of the cache in the installed transformers: `cache` from 5.24 on, `past_key_values` before."""


def pick_cache(past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache that a forward was called with, as `past_key_values` or as `cache`; None if there is none.

    Before 5.24, `cache` may also be the paged cache of continuous batching. The attention function needs that one, so
    it is put into `others`, the forward's other arguments.

    Raises:
        ValueError: two caches, or a cache under a third name, where it would be ignored.
    """
    if cache is not None and CACHE != "cache" and not isinstance(cache, Cache):
        others["cache"], cache = cache, None
    if stray := [name for name, value in others.items() if isinstance(value, Cache)]:
        raise ValueError(f"a cache was given as {stray[0]}; give it as cache or as past_key_values")
    if past_key_values is None or cache is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError("cache and past_key_values are two names of one argument; give one of them")


# transformers warns that it does not know the scheme of `emu3 quantize`, and advises to delete what says it.
logging.getLogger("transformers.quantizers.auto").addFilter(
    lambda record: "type, got emu3 -" not in record.getMessage()
)


class AnyLayoutModel(PreTrainedModel):
    """A model that also loads from checkpoints in which its weights have other names.

    transformers renames weights for its own classes only. It leaves a weight random if it does not find the name.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    renamed_weights: ClassVar[dict[str, str]] = {}
    """Pattern of a name in a checkpoint -> its replacement."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`. A `key_mapping` replaces `renamed_weights`."""
        check_folder_or_id(*args[:1])
        loaded = super().from_pretrained(*args, **{"key_mapping": cls.renamed_weights, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.use_own_dtypes()
            elif isinstance(getattr(module, "num_batches_tracked", None), Tensor):
                module.num_batches_tracked = module.num_batches_tracked.long()  # transformers made it a float, too
        return loaded

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches the source of a model's module for a certain call. Here that call is in `attention.py`.
        return True
