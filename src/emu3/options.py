"""Every option that a user can set, once: its name, default, help text and check.

`Emu3Pipeline` and the command line read the options from here, and so do the settings in a PNG. Checks raise ValueError
with the option's name, the value and what would do. Nothing here imports torch, so a wrong value is told at once.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

MOST_GUIDANCE = 1e6
"""Beyond it, guided logits could overflow."""

LEAST_TEMPERATURE = 1e-6
"""Below it, logits divided by the temperature could overflow. It chooses the most likely id anyway."""

MOST_SEED = 2**63 - 1
MOST_TOP_K = 2**31 - 1

DECODINGS = ("predictive", "raster", "jacobi", "zipar")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`. ValueError for anything else, True and 1.0 included."""
    number = None if isinstance(value, bool) else _index(value)
    if number is None or number < least or (most is not None and number > most):
        bounds = (
            f"at least {least}" if most is None else f"from {least} to {'2**63 - 1' if most == MOST_SEED else most}"
        )
        raise ValueError(f"{name} must be a whole number, {bounds}, got {value!r:.80}")
    return number


def _index(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number from `least` to `most`."""
    # The numbers of numpy and torch have `item`.
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    try:
        number = math.nan if isinstance(plain, bool) or not isinstance(plain, int | float) else float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not least <= number <= most:
        bounds = {(True, True): "", (False, True): f" of at least {least:g}", (True, False): f" of at most {most:g}"}
        wanted = bounds.get((least == -math.inf, most == math.inf), f" from {least:g} to {most:g}")
        raise ValueError(f"{name} must be a finite number{wanted}, got {value!r:.80}")
    return number


def check_flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r:.80}")
    return value


def check_temperature(name: str, value: object) -> float:
    """0, or a number that logits can be divided by."""
    number = check_number(name, value, least=0)
    if 0 < number < LEAST_TEMPERATURE:
        raise ValueError(
            f"{name} must be 0 or at least {LEAST_TEMPERATURE:g}, got {value!r}; 0 takes the likeliest token"
        )
    return number


def check_probability(name: str, value: object) -> float:
    """A number above 0, and at most 1."""
    number = check_number(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return number


def check_guidance(name: str, value: object) -> float | Callable[[float], float]:
    """A number, or a function of progress."""
    return value if callable(value) else check_number(name, value, -MOST_GUIDANCE, MOST_GUIDANCE)


def check_seed(name: str, value: object) -> int | list[int] | None:
    """A whole number, a list of them, or None."""
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [check_whole(name, each, 0, MOST_SEED) for each in value]
    return check_whole(name, value, 0, MOST_SEED)


def check_ratio(name: str, value: object) -> str:
    """ "width:height" in whole numbers from 1."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", value) if isinstance(value, str) else None
    if match is None or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
        raise ValueError(f'{name} must be "width:height" in positive integers, such as "16:9", got {value!r:.80}')
    return str(value)


def check_text(name: str, value: object) -> str:
    """A string of valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {value!r:.80} is not valid Unicode; remove the lone surrogate") from error
    return value


def check_decoding(name: str, value: object) -> Any:
    """The name of a decoder, perhaps with a window as in "zipar:7", or a decoder."""
    if isinstance(value, str):
        parse_decoding(value)
    elif isinstance(value, type) or not all(hasattr(value, method) for method in ("begin", "propose", "accept")):
        raise ValueError(f"{name} must be one of {', '.join(DECODINGS)}, or a decoder, got {value!r:.80}")
    return value


def parse_decoding(text: str) -> tuple[str, int | None]:
    """Name and window of "NAME" or "NAME:WINDOW"."""
    kind, colon, window = text.partition(":")
    if kind not in DECODINGS or (kind == "raster" and colon):
        raise ValueError(
            f"unknown decoding {text!r:.80}: give one of {', '.join(DECODINGS)}, "
            "all but raster perhaps with a window, as in zipar:7"
        )
    if colon and not re.fullmatch(r"[1-9]\d{0,5}", window, re.ASCII):
        raise ValueError(f"decoding {text!r:.80}: the window must be a whole number above 0, as in {kind}:8")
    return kind, int(window) if colon else None


def check_device(name: str, value: object) -> str:
    """The name of a device: auto, cpu, cuda, cuda:1, mps; or a `torch.device`."""
    text = str(value) if isinstance(value, str) or type(value).__name__ == "device" else ""
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", text) or text.startswith("auto:"):
        raise ValueError(
            f"{name} must be one of {', '.join(DEVICES)}, perhaps with a number as in cuda:1, got {value!r:.80}"
        )
    return text


def check_device_map(name: str, value: object) -> Any:
    """How transformers spreads a model over devices: a strategy, or a dict of module -> device."""
    strategies = ("auto", "balanced", "balanced_low_0", "sequential")
    if not (isinstance(value, str) and value in strategies) and not (isinstance(value, dict) and value):
        raise ValueError(f"{name} must be auto, balanced, balanced_low_0, sequential or a dict, got {value!r:.80}")
    return value


def check_dtype(name: str, value: object) -> str:
    """The name of a dtype, or a `torch.dtype`."""
    text = str(value).removeprefix("torch.") if isinstance(value, str) or type(value).__name__ == "dtype" else ""
    if text not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r:.80}")
    return text


def _option(
    type_: type,
    default: Any,
    help_: str,
    check: Callable[..., Any],
    *bounds: Any,
    optional: bool = False,
    flags: tuple[str, ...] = (),
) -> Any:
    """A field with what the command line needs of it: type, help text, check, and flags beside its own name.

    An optional one may be None.
    """

    def run(name: str, value: object) -> Any:
        return None if optional and value is None else check(name, value, *bounds)

    return field(default=default, metadata={"type": type_, "help": help_, "check": run, "flags": flags})


_SIDE = (check_whole, 1, 2**20)


class _Options:
    """Checks every field when it is made, and keeps what the check returns."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            object.__setattr__(self, each.name, each.metadata["check"](each.name, getattr(self, each.name)))


@dataclass(frozen=True)
class Load(_Options):
    """How a checkpoint is loaded."""

    device: str = _option(str, "auto", "Where it runs: auto (a GPU if there is one), cpu, cuda, mps.", check_device)
    dtype: str = _option(
        str, "auto", "Of the weights: auto (the checkpoint's own), float32, bfloat16, float16.", check_dtype
    )
    device_map: Any = _option(
        str,
        None,
        "Spread over several GPUs, in place of a device: auto; needs accelerate.",
        check_device_map,
        optional=True,
    )
    int8: bool = _option(bool, False, "Run the layers in 8 bits, on a CPU.", check_flag)
    compiled: bool = _option(bool, False, "Compile the layers first; pays for many pictures.", check_flag)
    download: bool = _option(bool, False, "Allow a hub id to be downloaded.", check_flag)


@dataclass(frozen=True)
class Draw(_Options):
    """How pictures are drawn."""

    negative_prompt: str | None = _option(
        str, None, "What to stay away from.", check_text, optional=True, flags=("--negative",)
    )
    ratio: str = _option(str, "1:1", "Width to height.", check_ratio)
    image_area: int | None = _option(
        int, None, "Pixels, with --ratio. Default: as trained.", check_whole, 1, 2**40, optional=True
    )
    height: int | None = _option(int, None, "Pixels; with the width, in place of the ratio.", *_SIDE, optional=True)
    width: int | None = _option(int, None, "Pixels; with the height, in place of the ratio.", *_SIDE, optional=True)
    guidance_scale: float | Callable[[float], float] = _option(
        float, 3.0, "How closely to follow the words; 1: no guidance.", check_guidance, flags=("--guidance",)
    )
    top_k: int = _option(int, 2048, "Sample among the k likeliest tokens; 0: all.", check_whole, 0, MOST_TOP_K)
    top_p: float = _option(float, 1.0, "Sample among the likeliest, up to this mass.", check_probability)
    temperature: float = _option(float, 1.0, "0 takes the likeliest token.", check_temperature)
    seed: int | Sequence[int] | None = _option(
        int, None, "Same seed, same picture; prompt i has seed + i. Default: a new one.", check_seed
    )
    decoding: Any = _option(
        str,
        "predictive",
        "predictive, raster: same pictures; jacobi: lossless; zipar: fast; see docs/draw.md.",
        check_decoding,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.height is None) != (self.width is None):
            raise ValueError(f"give both height and width, or neither; got height={self.height}, width={self.width}")


@dataclass(frozen=True)
class Answer(_Options):
    """How questions are answered."""

    max_new_tokens: int = _option(int, 1024, "The longest answer, in tokens.", check_whole)
    temperature: float = _option(float, 0.0, "0 takes the likeliest token.", check_temperature)
    top_k: int = _option(int, 0, "Sample among the k likeliest tokens; 0: all.", check_whole, 0, MOST_TOP_K)
    top_p: float = _option(float, 1.0, "Sample among the likeliest, up to this mass.", check_probability)
    seed: int | Sequence[int] | None = _option(
        int, None, "Above temperature 0: same seed, same answer. Default: a new one.", check_seed
    )


OptionsType = TypeVar("OptionsType", bound=_Options)
Function = TypeVar("Function", bound=Callable[..., Any])


def make(kind: type[OptionsType], given: Mapping[str, Any]) -> OptionsType:
    """Options from keywords. ValueError for a name that is no option, beside the checks."""
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown option {unknown[0]!r:.80}; the options are {', '.join(known)}")
    return kind(**given)


def takes(kind: type[_Options]) -> Callable[[Function], Function]:
    """Show the options of a kind, with their defaults, in the signature of a function that takes `**options`."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        options = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(kind)  # type: ignore[arg-type]
            if each.name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return function

    return decorate
