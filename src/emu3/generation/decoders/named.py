"""Decoders by name: "raster", or "predictive", "jacobi", "zipar", perhaps with a window behind a colon ("zipar:7")."""

from __future__ import annotations

from emu3.generation.decoders import Decoder
from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder

_WITH_WINDOW: dict[str, type[PredictiveDecoder] | type[JacobiDecoder] | type[ZipARDecoder]] = {
    "predictive": PredictiveDecoder,
    "jacobi": JacobiDecoder,
    "zipar": ZipARDecoder,
}


def decoder_named(name: str) -> Decoder:
    """The decoder of a name. ValueError for an unknown one, or a window that is no number above 0."""
    kind, colon, window = name.partition(":")
    if kind == "raster" and not colon:
        return RasterDecoder()
    if kind not in _WITH_WINDOW:
        known = ", ".join(_WITH_WINDOW)
        raise ValueError(f"unknown decoding {name!r}: give raster, {known}, the last three perhaps as NAME:WINDOW")
    if not colon:
        return _WITH_WINDOW[kind]()
    if not window.isdecimal() or int(window) == 0:
        raise ValueError(f"decoding {name!r}: the window must be a whole number above 0, as in {kind}:8")
    return _WITH_WINDOW[kind](int(window))
