"""Decoders by name: "raster", or "predictive", "jacobi", "zipar", perhaps with a window behind a colon ("zipar:7")."""

from __future__ import annotations

from typing import Any

from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.protocol import Decoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.options import parse_decoding

_WITH_WINDOW: dict[str, type[PredictiveDecoder] | type[JacobiDecoder] | type[ZipARDecoder]] = {
    "predictive": PredictiveDecoder,
    "jacobi": JacobiDecoder,
    "zipar": ZipARDecoder,
}


def decoder_named(name: str) -> Decoder[Any]:
    """The decoder of a name. ValueError for an unknown one, or a window that is no number above 0."""
    kind, window = parse_decoding(name)
    if kind == "raster":
        return RasterDecoder()
    return _WITH_WINDOW[kind]() if window is None else _WITH_WINDOW[kind](window)
