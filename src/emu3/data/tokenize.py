"""Samples with pictures to samples with codes: what decides the codes, as a value, and the network that finds them.

Letters: B, C, H, T, V, W, see CONTRIBUTING.md. H and W count pixels for pictures, and codes for codes.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emu3.checkpoints import resolve
from emu3.checkpoints.settings import VISION
from emu3.checkpoints.vision import PictureSettings, load_vision_tokenizer, read_picture_settings_of
from emu3.data.media import open_clip, open_picture_of
from emu3.data.samples import Broken, Media, Part, Sample
from emu3.data.shards import ShardInfo
from emu3.data.sizes import Sizes, drawing_sizes
from emu3.data.sources import Source
from emu3.modeling.vision import Emu3VQVAE
from emu3.segments import Visual

VERSION = 2
"""Raised when other codes come of the same pictures, tokenizer and settings."""

BATCH_PIXELS = {"cpu": 40_000, "cuda": 2**20}
"""Pixels of the pictures that are encoded at once. A CPU gains nothing by more."""

LARGEST_BATCH = 64

INDEPENDENT = "independent groups"
"""In the settings of shards whose groups of frames are encoded on their own."""

MAX_FRAMES = 64
"""Of a clip; what comes later is left out."""

_IRRELEVANT = {"dtype", "torch_dtype", "id2label", "label2id", "num_labels", "return_dict", "attention_dropout"}


def tokenizer_hash(tokenizer: Emu3VQVAE) -> str:
    """16 hex digits of a vision tokenizer's weights and configuration, however it was stored: by it shards know theirs.

    Weights count as the float32 in which they are loaded.
    """
    fields = {name: getattr(tokenizer.config, name, None) for name in sorted(VISION.keys() - _IRRELEVANT)}
    fields = {name: value for name, value in fields.items() if "attn_imp" not in name and "output_" not in name}
    digest = hashlib.sha256(json.dumps(fields, default=list, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What decides the codes of a picture. It can be pickled; each process loads the weights itself.

    Attributes:
        model: name of the checkpoint, or of the vision tokenizer's own folder.
        hash: `tokenizer_hash` of its vision tokenizer.
        codebook_size: how many codes there are.
        pictures: how pictures become pixels.
        sizes: the sizes that pictures get.
        max_frames: of a clip.
        independent_groups: whether each group of frames that share a code is a clip of its own, which sees no earlier
            frame.
    """

    model: str
    hash: str
    codebook_size: int
    pictures: PictureSettings
    sizes: Sizes
    max_frames: int = MAX_FRAMES
    independent_groups: bool = False

    @classmethod
    def of(cls, model: str | Path, area: int | None = None, independent_groups: bool | None = None) -> Tokenizer:
        """That of a checkpoint.

        Args:
            model: "nano", a folder, or a hub id in the local cache. The folder may hold only a vision tokenizer.
            area: pixels of a picture that is drawn; by default the checkpoint's own.
            independent_groups: by default what the checkpoint's config.json says under "clips".

        Raises:
            ValueError: the checkpoint cannot be used, has no area of its own, or the area is too small.
        """
        folder = resolve(model)
        pictures = read_picture_settings_of(folder)
        if area is None and pictures.image_area is None:
            raise ValueError(f"{folder} does not say how large its pictures are; give --area, such as --area 262144")
        area = area or pictures.image_area or 0
        sizes = Sizes(
            factor=pictures.spatial_factor,
            draw=drawing_sizes(area, pictures.spatial_factor),
            min_pixels=pictures.min_pixels or area,
            max_pixels=pictures.max_pixels or area,
            resample=pictures.resample,
        )
        network = load_vision_tokenizer(folder)
        if independent_groups is None:
            independent_groups = pictures.independent_groups
        return cls(
            str(model),
            tokenizer_hash(network),
            network.config.codebook_size,
            pictures,
            sizes,
            independent_groups=independent_groups,
        )

    @property
    def settings(self) -> str:
        """In short what decides the codes beside the tokenizer, and a hash of all of it."""
        whole = asdict(self.sizes) | {
            "version": VERSION,
            "levels": hashlib.sha256(self.pictures.levels_VC.tobytes()).hexdigest(),
            "temporal_factor": self.pictures.temporal_factor,
            "max_frames": self.max_frames,
        }
        groups = ""
        if self.independent_groups:  # said only then, so that shards of others keep their settings
            whole["independent_groups"] = True
            groups = f"{INDEPENDENT}, "
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
        height, width = self.sizes.draw[0]
        return f"draw {height}x{width}, read {self.sizes.min_pixels}..{self.sizes.max_pixels} pixels, {groups}{digest}"

    def info(self, source: Source, piece: int) -> ShardInfo:
        """What a piece's shard says that it was made by: so one of a source that was changed is not taken for done.

        A source may have a method `fingerprint(piece)`, whose value changes with what is in the piece.
        """
        fingerprint = getattr(source, "fingerprint", None)
        state = f", {fingerprint(piece)}" if fingerprint else ""
        return ShardInfo(
            tokenizer=self.hash,
            codebook_size=self.codebook_size,
            settings=self.settings,
            source=f"{source.name}, piece {piece + 1} of {source.pieces}{state}",
        )

    def load(self, device: str = "cpu", threads: int = 1) -> Encoder:
        """The network on a device, and `threads` that decode files for it.

        ValueError where another vision tokenizer is found under the name, as on another machine.
        """
        network = with_channels_last(load_vision_tokenizer(resolve(self.model), device))
        if (found := tokenizer_hash(network)) != self.hash:
            raise ValueError(f"{self.model!r} is another vision tokenizer here: {found}, not {self.hash}")
        return Encoder(self, network, device, threads)


Pixels = NDArray[np.uint8]
"""A picture (H, W, C), or a clip (T, H, W, C)."""


@dataclass
class _Slot:
    """The place of a picture in its sample, which gets its codes later: in place."""

    part: Part
    codes_THW: NDArray[Any] | None = None
    frames_per_second: float | None = None

    def fill(self) -> Part:
        """The part with its codes."""
        assert self.codes_THW is not None, self.part
        return replace(self.part, content=Visual(self.codes_THW, self.frames_per_second))


@dataclass
class _Draft:
    """A sample whose pictures are not all encoded yet."""

    key: str
    parts: list[Part | _Slot]


def with_channels_last(network: Emu3VQVAE) -> Emu3VQVAE:
    """The network with the channels of its convolutions last in memory, which is faster on a CPU."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return network


@dataclass
class Encoder:
    """A vision tokenizer at work.

    Pictures of one size are encoded together, always in the same number: a batch that is not full is filled up with
    black. So on one kind of machine the codes of a picture depend on nothing but the picture: not on others beside it,
    and not on the number of processes. Another processor, another release of torch, or a picture that is encoded alone
    rounds otherwise in the last bits; a code differs where two are equally near up to that.

    Attributes:
        tokenizer: what decides the codes.
        network: the vision tokenizer.
        device: where it is.
        threads: decode files, where the device leaves the processor free.
        on_codes: is called with the codes of one batch, and how many pictures and clips they are of.
    """

    tokenizer: Tokenizer
    network: Emu3VQVAE
    device: str = "cpu"
    threads: int = 1
    on_codes: Callable[[NDArray[Any], int], None] = field(default=lambda codes, pictures: None)

    def tokenize(self, source: Source, piece: int) -> tuple[list[Sample], list[Broken]]:
        """The samples of a piece with codes for pictures, and what is broken; both in the order of the source.

        At any time, in memory are the files that the source hands over, and the pixels of one batch of each size.
        """
        drafts: list[_Draft] = []
        broken: list[Broken] = []
        waiting: dict[tuple[int, ...], list[tuple[_Slot, Pixels]]] = {}
        for item, pixels in self._decode_all(source.read(piece)):
            if isinstance(item, Broken):
                broken.append(item)
                continue
            if isinstance(pixels, str):
                broken.append(Broken(item.key, pixels))
                continue
            draft, decoded = _Draft(item.key, []), iter(pixels)
            for part in item.parts:
                if not isinstance(part.content, Media):
                    draft.parts.append(part)
                    continue
                picture, rate = next(decoded)
                # The bytes of the file are not needed any more.
                slot = _Slot(replace(part, content=replace(part.content, file="")), frames_per_second=rate)
                draft.parts.append(slot)
                same = waiting.setdefault(picture.shape, [])
                same.append((slot, picture))
                if len(same) == self.count(picture.shape):
                    self._encode_into(waiting.pop(picture.shape))
            drafts.append(draft)
        for same in waiting.values():
            self._encode_into(same)
        whole = [
            Sample(draft.key, tuple(each.fill() if isinstance(each, _Slot) else each for each in draft.parts))
            for draft in drafts
        ]
        return whole, broken

    def count(self, shape: tuple[int, ...]) -> int:
        """How many pictures of a shape are encoded together. A clip is encoded alone."""
        if len(shape) == 4:
            return 1
        pixels = BATCH_PIXELS.get(torch.device(self.device).type, BATCH_PIXELS["cpu"])
        return max(1, min(LARGEST_BATCH, pixels // (shape[0] * shape[1])))

    @torch.inference_mode()
    def encode(self, pictures: list[Pixels]) -> NDArray[Any]:
        """Codes (B, T, H, W) of pictures or clips that have one shape, at most `count` of them."""
        shape = pictures[0].shape
        bytes_BTHWC = np.zeros((self.count(shape), *(() if len(shape) == 4 else (1,)), *shape), np.uint8)
        for index, picture in enumerate(pictures):
            bytes_BTHWC[index] = picture
        levels_CV = torch.from_numpy(self.tokenizer.pictures.levels_VC).to(self.device).T
        bytes_ = torch.from_numpy(bytes_BTHWC).to(self.device).int()
        pixels_BTCHW = torch.stack([levels[bytes_[..., channel]] for channel, levels in enumerate(levels_CV)], 2)
        # Products of GPUs must have all bits of float32, and come out the same every time.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            pictures_BCHW = pixels_BTCHW[:, 0].contiguous(memory_format=torch.channels_last)
            if len(shape) == 4 and self.tokenizer.independent_groups:
                codes_BTHW = torch.cat(list(self.network.encode_stream([pixels_BTCHW], independent=True)), 1)
            else:
                latents = self.network.latents(pixels_BTCHW if len(shape) == 4 else pictures_BCHW)[1]
                codes_BTHW = self.network.quantize(latents)
        return codes_BTHW[: len(pictures)].cpu().numpy()

    def _encode_into(self, waiting: list[tuple[_Slot, Pixels]]) -> None:
        codes_BTHW = self.encode([pixels for _, pixels in waiting])
        for (slot, _), codes_THW in zip(waiting, codes_BTHW, strict=True):
            slot.codes_THW = codes_THW.astype(np.int32)
        self.on_codes(codes_BTHW, len(waiting))

    def _decode_all(self, items: Iterable[Sample | Broken]) -> Iterator[tuple[Sample | Broken, Any]]:
        """Each item with what `_decode` makes of it, in order; a few ahead where there are threads for it."""
        if self.threads <= 1:
            yield from ((item, self._decode(item)) for item in items)
            return
        ahead: deque[tuple[Sample | Broken, Future[Any]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for item in items:
                ahead.append((item, pool.submit(self._decode, item)))
                if len(ahead) > 4 * self.threads:
                    first, decoded = ahead.popleft()
                    yield first, decoded.result()
            while ahead:
                first, decoded = ahead.popleft()
                yield first, decoded.result()

    def _decode(self, item: Sample | Broken) -> list[tuple[Pixels, float | None]] | str:
        """The pixels of each picture and clip of a sample, or why there are none."""
        if isinstance(item, Broken):
            return []
        sizes, factor = self.tokenizer.sizes, self.tokenizer.pictures.temporal_factor
        found: list[tuple[Pixels, float | None]] = []
        try:
            for part in item.parts:
                if not isinstance(part.content, Media):
                    continue
                if part.content.kind == "picture":
                    fit = sizes.fit_for_drawing if part.role == "draw" else sizes.fit_for_reading
                    found.append((fit(open_picture_of(part.content)), None))
                    continue
                clip = open_clip(part.content, self.tokenizer.max_frames)
                frames = len(clip.frames_THWC) // factor * factor
                if not frames:
                    count = len(clip.frames_THWC)
                    raise ValueError(f"a clip of {count} frames is too short; it needs {factor}, which share a code")
                fitted = [sizes.fit_for_drawing(Image.fromarray(each)) for each in clip.frames_THWC[:frames]]
                found.append((np.stack(fitted), clip.frames_per_second))
        except ValueError as error:
            return str(error)
        return found
