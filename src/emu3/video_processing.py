"""From clips of every kind to the pixels that the vision tokenizer encodes, and back.

    a list of frames, an array, a GIF, a video file  --read-->  frames  --sample-->  frames at a rate, a whole number of
    codes  --each as a picture-->  pixel_values_videos (B, T, C, H, W)

Which frames are kept: at a rate of `fps`, frame k is the one that is shown at k / fps seconds. Of these, the last ones
that fill no code of `temporal_factor` frames are left out. A clip that is too short for one code stands still at its
end until it fills one; so a picture is a clip that does not move.

Letters: B, C, H, T, W, see CONTRIBUTING.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import BatchFeature

from emu3.clips import MAX_FRAMES, Clip, check_pixels, read_clip
from emu3.image_processing import Emu3ImageProcessor
from emu3.options import check_number, check_whole
from emu3.pictures import to_array

_OF_PICTURES = (
    *("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("do_convert_rgb", "min_pixels", "max_pixels", "spatial_factor"),
)


SAVED_AS = "video_preprocessor_config.json"


class Emu3VideoProcessor(Emu3ImageProcessor):
    """Turns clips into pixels. Every frame is treated as `Emu3ImageProcessor` treats a picture.

    Args:
        fps: frames a second that are kept; None: all of them.
        temporal_factor: frames that share a code, as the vision tokenizer's `temporal_downsample_factor` says.
        max_frames: of a clip; what comes later is left out.
        **kwargs: those of `Emu3ImageProcessor`.
    """

    model_input_names = ["pixel_values_videos", "video_sizes"]  # noqa: RUF012  # as in transformers

    def __init__(
        self, fps: float | None = None, temporal_factor: int = 4, max_frames: int = MAX_FRAMES, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.fps = None if fps is None else check_number("fps", fps, 1e-3)
        self.temporal_factor = check_whole("temporal_factor", temporal_factor)
        self.max_frames = check_whole("max_frames", max_frames, temporal_factor)

    @classmethod
    def of(cls, pictures: Emu3ImageProcessor, temporal_factor: int = 4, fps: float | None = None) -> Emu3VideoProcessor:
        """One that treats frames as an image processor treats pictures."""
        return cls(fps, temporal_factor, **{name: getattr(pictures, name) for name in _OF_PICTURES})

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The saved settings, which lie beside those of pictures under a name of their own."""
        return super().get_image_processor_dict(
            pretrained_model_name_or_path, **{"image_processor_filename": SAVED_AS} | kwargs
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> list[str]:
        """Writes the settings beside those of pictures, as transformers names the file."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAVED_AS).write_text(self.to_json_string())
        return [str(folder / SAVED_AS)]

    def to_dict(self) -> dict[str, Any]:
        """The settings to save."""
        saved = super().to_dict()
        saved.pop("image_processor_type", None)
        return saved | {"video_processor_type": type(self).__name__}

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(videos, **kwargs)

    def preprocess(  # type: ignore[override]  # it takes clips
        self,
        videos: Any,
        fps: float | None = None,
        source_fps: float | None = None,
        temporal_factor: int | None = None,
        max_frames: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Turn one clip, or a list of clips, into pixels. None means the constructor's value.

        Args:
            videos: a clip as `read_clip` takes it, or a list of such clips. A list of pictures is one clip.
            fps: frames a second that are kept.
            source_fps: those of a clip that does not say its own. Without it, all frames of such a clip are kept.
            **options: those of `Emu3ImageProcessor.preprocess` for each frame, but for `do_pad` and `data_format`.

        Returns:
            `pixel_values_videos`: an array (B, T, C, H, W) where all clips have one shape, else a list of arrays.
            `video_sizes` (B, 3): frames, height and width of each. `frames_per_second`: of each, or None.

        Raises ValueError for what is no clip, and as `Emu3ImageProcessor.preprocess` does for its frames.
        """
        fps = self.fps if fps is None else check_number("fps", fps, 1e-3)
        factor = self.temporal_factor if temporal_factor is None else check_whole("temporal_factor", temporal_factor)
        most = self.max_frames if max_frames is None else check_whole("max_frames", max_frames, factor)
        pixels, sizes, rates = [], [], []
        for video in clips_in(videos):
            clip = read_clip(video, most)
            rate = clip.frames_per_second or source_fps
            if fps and rate and rate > fps and len(clip) == most:  # of which fewer are kept
                clip = read_clip(video, math.ceil(most * rate / fps))
            if clip.frames_per_second is None and source_fps is not None:
                clip = Clip(clip.frames_THWC, check_number("source_fps", source_fps, 1e-3))
            clip = sample_frames(clip, fps, factor, most)
            frames = list(clip.frames_THWC)
            done = super().preprocess(frames, **(options | {"do_pad": False, "return_tensors": None}))
            pixels.append(np.stack(done["pixel_values"]))
            sizes.append((len(frames), *(int(side) for side in done["image_sizes"][0])))
            rates.append(clip.frames_per_second)
        if not pixels:
            raise ValueError("videos is empty; give at least one clip")
        is_one_shape = len({each.shape for each in pixels}) == 1
        if return_tensors is not None and not is_one_shape:
            raise ValueError(f"clips of the sizes {sizes} make no tensor; give clips of one size, or one at a time")
        data = {"pixel_values_videos": np.stack(pixels) if is_one_shape else pixels, "video_sizes": sizes}
        made = BatchFeature(data, tensor_type=return_tensors)
        made["frames_per_second"] = rates
        return made

    def postprocess(self, videos: Any, fps: float | None = None, **options: Any) -> list[Clip]:  # type: ignore[override]
        """Clips of normalised pixels: (B, T, C, H, W), (T, C, H, W), or a list of the latter."""
        arrays = [to_array_of_clip(each) for each in (videos if _is_batch(videos) else [videos])]
        clips = []
        for pixels_TCHW in arrays:
            frames = super().postprocess(list(pixels_TCHW), **options)["pixel_values"]
            clips.append(Clip(np.stack([np.asarray(frame) for frame in frames]), fps))
        return clips


def sample_frames(clip: Clip, fps: float | None, factor: int, most: int = 2**31) -> Clip:
    """The frames of a clip that are kept; see the module's docstring for the rule.

    `most` is how many there may be. A clip whose rate is not known keeps all frames, and gets the rate `fps`.
    """
    source, count = clip.frames_per_second, len(clip)
    places = np.arange(count)
    if fps is not None and source is not None and fps != source:
        wanted = min(most, max(1, int(count * fps / source + 1e-6)))
        check_pixels(clip.frames_THWC.shape[1] * clip.frames_THWC.shape[2], wanted)
        places = np.minimum((np.arange(wanted) * source / fps + 1e-6).astype(int), count - 1)
    places = places[: max(factor, min(most, len(places)) // factor * factor)]
    if len(places) < factor:
        places = np.concatenate([places, np.full(factor - len(places), places[-1])])
    return Clip(clip.frames_THWC[places], source if fps is None else fps)


def clips_in(videos: Any) -> list[Any]:
    """One clip, or several, as a list of clips."""
    if isinstance(videos, list | tuple) and videos:
        first = videos[0]
        is_frame = isinstance(first, Image.Image) and not getattr(first, "is_animated", False)
        is_frame = is_frame or getattr(first, "ndim", None) in (2, 3)
        if is_frame or (isinstance(first, str | os.PathLike) and _is_picture(first)):
            return [list(videos)]
        return list(videos)
    if getattr(videos, "ndim", None) == 5:
        return list(videos)
    return [videos]


def _is_picture(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).lower().endswith((".png", ".jpg", ".jpeg", ".bmp"))


def _is_batch(videos: Any) -> bool:
    if isinstance(videos, Sequence):
        return getattr(videos[0], "ndim", None) == 4 if len(videos) else False
    return getattr(videos, "ndim", None) == 5


def to_array_of_clip(video: Any) -> NDArray[Any]:
    """A numpy array (T, C, H, W) of an array, a tensor or a list of frames. ValueError for anything else."""
    frames = [to_array(frame) for frame in video]
    if not frames or any(frame.ndim != 3 for frame in frames):
        raise ValueError("pixels of a clip are (T, C, H, W); give those")
    return np.stack(frames)
