"""Every option that a user can set: its name, default, help text and check, written down once.

`Emu3Pipeline`, the command line and the settings in a PNG take the options from here. A check raises a ValueError that
names the option, the value and what is allowed. Nothing here imports torch, so a wrong value is reported at once.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

MOST_GUIDANCE = 1e6
"""Beyond it, guided logits could overflow."""

LEAST_TEMPERATURE = 1e-6
"""Below it, logits divided by the temperature could overflow. It chooses the most likely id anyway."""

GUIDANCE = ("guidance_scale", "guidance_floor", "guidance_agreement")
"""Options of how guidance leads, which a checkpoint may recommend."""
MOST_AGREEMENT = 100.0
MOST_SEED = 2**63 - 1
MOST_TOP_K = 2**31 - 1

DECODINGS = ("predictive", "raster", "jacobi", "zipar")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`. ValueError for anything else, True and 1.0 included."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        upper = "2**63 - 1" if most == MOST_SEED else most
        bounds = f"at least {least}" if most is None else f"from {least} to {upper}"
        raise ValueError(f"{name} must be a whole number, {bounds}, got {value!r:.80}")
    return number


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number from `least` to `most`."""
    # The numbers of numpy and torch have `item`.
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    try:
        number = math.nan if isinstance(plain, bool) or not isinstance(plain, int | float) else float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not least <= number <= most:
        lower = "" if least == -math.inf else f" of at least {least:g}"
        bounds = lower if most == math.inf else f" from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r:.80}")
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


def check_seed(name: str, value: object) -> int | list[int]:
    """A whole number, or a list of them."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [check_whole(name, each, 0, MOST_SEED) for each in value]
    return check_whole(name, value, 0, MOST_SEED)


def check_ratio(name: str, value: object) -> str:
    """ "width:height" in whole numbers from 1."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", value) if isinstance(value, str) else None
    if match is None or 0 in map(int, match.groups()):
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


def check_words(name: str, value: object) -> str:
    """A text that says something: not empty, and not only spaces."""
    text = check_text(name, value)
    if not text.strip():
        raise ValueError(f"{name} must not be empty, got {text!r:.80}; say in words what you want")
    return text


def check_key(name: str, value: object) -> str:
    """A secret that a header can hold."""
    key = check_text(name, value)
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{name} must have at least 8 letters, digits or signs, and no spaces; make one with `openssl rand -hex 16`"
        )
    return key


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """One of a few names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")
    return value


def check_folder_or_id(name: object = None) -> None:
    """ValueError for "nano", which transformers would look for on the hub; unless there is a folder of that name."""
    if name == "nano" and not os.path.isdir("nano"):
        raise ValueError('"nano" is a name for Emu3Pipeline; here give its folder, emu3.checkpoints.resolve("nano")')


ABILITIES = {
    "draw": "draw pictures",
    "read": "answer or read pictures",
    "edit": "draw pictures from pictures",
    "film": "make clips",
    "tell": "put pictures into its answers",
}
"""What a checkpoint may be trained for, as config.json lists it, and how it is said."""


def check_ability(ability: str, abilities: Sequence[str] | None) -> None:
    """ValueError where a checkpoint's config.json lists its abilities, and one of `ABILITIES` is not among them."""
    if abilities is not None and ability not in abilities:
        other = {"draw": ", as Emu3-Gen", "read": ", as Emu3-Chat"}.get(ability, "")
        raise ValueError(
            f"this checkpoint does not {ABILITIES[ability]}, says its config.json; load one that does{other}"
        )


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


def only_for_cpus(device: str, version: str) -> str:
    """What to tell who asks for a GPU of a PyTorch that knows none."""
    return f"device={device!r}, but PyTorch {version} is for CPUs only; install its build for your GPU"


def check_device_map(name: str, value: object) -> Any:
    """How transformers spreads a model over devices: a strategy, or a dict of module -> device."""
    strategies = ("auto", "balanced", "balanced_low_0", "sequential")
    if not (isinstance(value, str) and value in strategies) and not (isinstance(value, dict) and value):
        raise ValueError(f"{name} must be {', '.join(strategies)} or a dict, got {value!r:.80}")
    return value


def check_dtype(name: str, value: object) -> str:
    """The name of a dtype, or a `torch.dtype`."""
    dtype = str(value).removeprefix("torch.")
    if dtype == "int8":
        raise ValueError(
            f"{name} is that of the weights outside the layers; for layers in 8 bits give int8=True, or --int8"
        )
    return check_choice(name, dtype, DTYPES)


def _option(
    default: Any,
    help_: str,
    check: Callable[..., Any],
    *bounds: Any,
    type_: type | None = None,
    flags: Sequence[str] = (),
) -> Any:
    """A field with what the command line needs of it: type, help text, and flags beside its own name.

    Where the default is None, None is allowed, and `type_` is the type of other values.
    """
    metadata = {"type": type_ or type(default), "help": help_, "flags": flags, "check": check, "bounds": bounds}
    return field(default=default, metadata=metadata)


_SIDE = (check_whole, 1, 2**20)


class _Options:
    """Options of one kind. Each is checked when they are made; the help texts become the docstring of the class."""

    def __init_subclass__(cls) -> None:
        texts = [f"    {name}: {each.metadata['help']}" for name, each in vars(cls).items() if isinstance(each, Field)]
        cls.__doc__ = "\n".join([f"{cls.__doc__}\n", "Args:", *texts])

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, each.name)
            if value is None and each.default is None:
                continue
            checked = each.metadata["check"](each.name, value, *each.metadata["bounds"])
            object.__setattr__(self, each.name, checked)


@dataclass(frozen=True)
class Load(_Options):
    """How a checkpoint is loaded."""

    device: str = _option("auto", "Where it runs: auto (a GPU if there is one), cpu, cuda, mps.", check_device)
    dtype: str = _option(
        "auto", "Of the weights: auto (the checkpoint's own), float32, bfloat16, float16.", check_dtype
    )
    device_map: Any = _option(
        None, "Spread over several GPUs, in place of a device: auto; needs accelerate.", check_device_map, type_=str
    )
    int8: bool = _option(False, "Run the layers in 8 bits, on a CPU.", check_flag)
    compiled: bool = _option(False, "Compile the layers first; pays for many pictures.", check_flag)
    draft: bool = _option(True, "Use the draft head, if the checkpoint has one: fewer steps, as good.", check_flag)
    download: bool = _option(False, "Allow a hub id to be downloaded.", check_flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8 and (self.device_map is not None or not self.device.startswith(("auto", "cpu"))):
            where = f"device={self.device!r}" if self.device_map is None else f"device_map={self.device_map!r}"
            raise ValueError(f"int8 is for one CPU, and {where} is not; leave out one of them")


@dataclass(frozen=True)
class Draw(_Options):
    """How pictures are drawn."""

    negative_prompt: str | None = _option(
        None, "What to stay away from. Default: the empty prompt.", check_text, type_=str, flags=("--negative",)
    )
    ratio: str | None = _option(
        None, "Width to height. Default: 1:1, or that of what is given.", check_ratio, type_=str
    )
    image_area: int | None = _option(
        None, "Pixels, with the ratio. Default: as trained.", check_whole, 1, 2**40, type_=int
    )
    height: int | None = _option(None, "Pixels; with the width, in place of ratio and area.", *_SIDE, type_=int)
    width: int | None = _option(None, "Pixels; with the height, in place of ratio and area.", *_SIDE, type_=int)
    guidance_scale: float | Callable[[float], float] | None = _option(
        None,
        "How closely to follow the words. 1: no guidance, half the work; 0: only the negative prompt is drawn. "
        "Default: the checkpoint's own, or 3.",
        check_guidance,
        type_=float,
        flags=("--guidance",),
    )
    guidance_floor: float | None = _option(
        None,
        "Guidance leaves out what the words alone make less likely than this share of the likeliest; 0: nothing. "
        "Default: the checkpoint's own, or 0.",
        check_number,
        0,
        1,
        type_=float,
    )
    guidance_agreement: float | None = _option(
        None,
        "Where words and negative prompt expect the same token, with odds this near (in nats), it stays as likely as "
        "by the words alone, so that guidance decides what is drawn and not where; 0: never. Default: the "
        "checkpoint's own, or 0.",
        check_number,
        0,
        MOST_AGREEMENT,
        type_=float,
    )
    top_k: int = _option(2048, "Sample among the k likeliest tokens; 0: all.", check_whole, 0, MOST_TOP_K)
    top_p: float = _option(1.0, "Sample among the likeliest, up to this mass.", check_probability)
    temperature: float = _option(1.0, "0 takes the likeliest token.", check_temperature)
    seed: int | Sequence[int] | None = _option(
        None, "Same seed, same picture; picture i has seed + i. Default: a new one.", check_seed, type_=int
    )
    decoding: Any = _option(
        "predictive",
        "predictive, raster: same pictures; jacobi: others, as good; zipar: faster, a little worse.",
        check_decoding,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.height is None) != (self.width is None):
            raise ValueError(f"give both height and width, or neither; got height={self.height}, width={self.width}")


@dataclass(frozen=True)
class DrawSamples(Draw):
    """How the samples of a suite are drawn: as pictures are, but for the seed."""

    seed: int = _option(
        0,
        "Of the whole run. A sample's own seed follows from it, the prompt's place and the sample's number.",
        check_whole,
        0,
        MOST_SEED,
    )


@dataclass(frozen=True)
class Answer(_Options):
    """How questions are answered."""

    max_new_tokens: int = _option(1024, "The longest answer, in tokens; the context may end it sooner.", check_whole)
    temperature: float = _option(0.0, "0 takes the likeliest token.", check_temperature)
    top_k: int = _option(0, "Sample among the k likeliest tokens; 0: all.", check_whole, 0, MOST_TOP_K)
    top_p: float = _option(1.0, "Sample among the likeliest, up to this mass.", check_probability)
    seed: int | Sequence[int] | None = _option(
        None, "Above temperature 0: same seed, same answer. Default: a new one.", check_seed, type_=int
    )


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Serve(_Options):
    """How a server listens, and who may use it."""

    host: str = _option("127.0.0.1", "Address to listen on; others than this machine's own need a key.", check_words)
    port: int = _option(8000, "0: a free one.", check_whole, 0, 65535)
    api_key: str | None = _option(None, "Which clients must send, and browsers as the password.", check_key, type_=str)
    allow_host: str | None = _option(
        None, "Names under which it is reached, by commas; * for any.", check_words, type_=str
    )
    allow_origin: str | None = _option(
        None, "Sites whose pages may use it, by commas, as https://example.com.", check_words, type_=str
    )
    picture_host: str | None = _option(
        None, "Hosts from which pictures are fetched, by commas; .example.com for all below.", check_words, type_=str
    )
    queue_tokens: int | None = _option(
        None, "The most tokens that wait; more is refused. Default: 64 contexts.", check_whole, type_=int
    )
    drain_seconds: int = _option(30, "The longest that it finishes work when it is stopped.", check_whole, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host not in LOOPBACK and self.api_key is None:
            raise ValueError(
                f"host={self.host!r} lets other machines in, so it needs a key: --api-key KEY; 127.0.0.1 needs none"
            )
        for name in ("allow_host", "picture_host"):
            if wrong := next((host for host in self.names(name) if "/" in host or host.count(":") == 1), None):
                raise ValueError(f"{name} {wrong!r:.80} must be the name of a host, as example.com")
        for origin in self.names("allow_origin"):
            if not re.fullmatch(r"https?://[^/?#\s]+", origin):
                raise ValueError(f"allow_origin {origin!r:.80} must be a scheme and a host, as https://example.com")
        if "*" in self.names("allow_host") and self.api_key is None:
            raise ValueError(
                "allow_host='*' lets pages of other sites in, by names of their own, so it needs a key: --api-key KEY"
            )

    def names(self, option: str) -> list[str]:
        """An option that holds names by commas, as a list in lower case."""
        return [name.strip().lower() for name in (getattr(self, option) or "").split(",") if name.strip()]


OptionsType = TypeVar("OptionsType", bound=_Options)
Function = TypeVar("Function", bound=Callable[..., Any])


def make(kind: type[OptionsType], given: Mapping[str, Any]) -> OptionsType:
    """Options from keywords. ValueError for a name that is no option, beside the checks."""
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise ValueError(f"unknown option {name!r:.80}; the options are {', '.join(known)}")
    return kind(**given)


def takes(kind: type[_Options]) -> Callable[[Function], Function]:
    """Show the options of a kind, with their defaults, in the signature of a function that takes `**options`."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        options = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(kind)  # type: ignore[arg-type]
        ]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return function

    return decorate
