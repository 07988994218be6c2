"""ImageNet's own layout: JPEG files in a folder per class, ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``."""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from hpcavg.data.shards import PARTS
from hpcavg.errors import InputError, reason

WHERE = "https://www.image-net.org"
SUFFIXES = (".jpeg", ".jpg")
MAX_ASPECT = 32
"""Longer images are no photographs, and grow large where their shorter side does."""


class File(NamedTuple):
    """An image's path below the source folder and the number of its class."""

    path: str
    label: int


class BadImageError(ValueError):
    """A file that is no whole image; the message says why in a few words."""


def find(source: Path) -> tuple[list[str], dict[str, list[File]]]:
    """Return the classes, sorted, and the files of every part, sorted by path.

    Raises `InputError` naming the folder that is not as it should be: missing, empty, or with other classes.
    """
    if not any((source / part).is_dir() for part in PARTS):
        raise InputError("data_dir", source, f"a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, from {WHERE}")
    found = {part: _class_names(source / part) for part in PARTS}
    if found["train"] != found["val"]:
        only = {part: sorted(set(found[part]) - set(found[other])) for part, other in (PARTS, PARTS[::-1])}
        says = ", ".join(f"{part} alone has {names[0]} (of {len(names)})" for part, names in only.items() if names)
        raise InputError("data_dir", source, f"a folder with the same classes in train and val; {says}")
    classes = found["train"]
    return classes, {part: _files(source, part, classes) for part in PARTS}


def _class_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise InputError("data_dir", folder, f"a folder of class folders: {reason(error)}") from error
    names = sorted(name for name, is_folder in kinds.items() if is_folder)
    if not names:
        flat = "; its images must be moved into the folders of their classes" if any(map(_is_image, kinds)) else ""
        raise InputError("data_dir", folder, f"a folder with a folder of JPEG files per class, from {WHERE}{flat}")
    return names


def _files(source: Path, part: str, classes: list[str]) -> list[File]:
    files = []
    for label, name in enumerate(classes):
        try:
            images = sorted(filter(_is_image, os.listdir(source / part / name)))
        except OSError as error:
            raise InputError("data_dir", source / part / name, f"a folder that can be read: {reason(error)}") from error
        if not images:
            raise InputError("data_dir", source / part / name, "a folder with at least one file *.JPEG or *.jpg")
        files += [File(f"{part}/{name}/{image}", label) for image in images]
    return files


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def decode(path: Path, size: int) -> tuple[int, int, bytes]:
    """Return height, width and the rows of red, green and blue bytes of an image whose shorter side is made `size`.

    Grey and CMYK images are converted. Raises `BadImageError` for what is no whole image, and `InputError` for a file
    that cannot be read at all.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("data_dir", path, f"a file that can be read: {reason(error)}") from error
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, of which nothing is used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # PNG, because ImageNet has one under the name of a JPEG.
            with Image.open(BytesIO(data), formats=("JPEG", "PNG")) as image:
                width, height = scaled(image.width, image.height, size)
                # A large JPEG is decoded at a half, a quarter or an eighth, as long as that is twice what is needed.
                drafted = image.draft("RGB", (2 * width, 2 * height))
                box = drafted[1] if drafted else None
                pixels = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, box)
        except BadImageError:
            raise
        except UnidentifiedImageError as error:
            raise BadImageError("no JPEG file") from error
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error
    return height, width, pixels.tobytes()


def scaled(width: int, height: int, size: int) -> tuple[int, int]:
    """Return width and height in the same proportion, the shorter of them `size`."""
    shorter, longer = sorted((width, height))
    if longer > MAX_ASPECT * shorter:
        raise BadImageError(f"{width}x{height} pixels, one side more than {MAX_ASPECT} times the other")
    other = round(size * longer / shorter)
    return (size, other) if width <= height else (other, size)
