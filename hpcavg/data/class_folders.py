"""Images in ImageNet's layout: a folder of JPEG files per class, ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``."""

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
"""The largest ratio of sides. Longer images are not photographs and would become huge when they are scaled up."""


class File(NamedTuple):
    """An image file.

    Attributes
    ----------
    path : relative to the source folder.
    label : the number of its class.
    """

    path: str
    label: int


class BadImageError(ValueError):
    """A file is not a whole image; the message says why in a few words."""


def find(source: Path) -> tuple[list[str], dict[str, list[File]]]:
    """Return the sorted names of the classes, and the files of each part, sorted by path.

    Raises
    ------
    InputError
        A folder is missing or empty, or has other classes than the other part. The message names it.
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
    """Read an image and scale it.

    Parameters
    ----------
    path : Path
        A JPEG file, grey, RGB or CMYK.
    size : int
        The length of the shorter side in pixels, after scaling.

    Returns
    -------
    height : int
        In pixels.
    width : int
        In pixels.
    pixels : bytes
        Red, green and blue of each pixel, row by row.

    Raises
    ------
    BadImageError
        The file is not a whole image.
    InputError
        The file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("data_dir", path, f"a file that can be read: {reason(error)}") from error
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on metadata, which is not used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # One of ImageNet's files is a PNG in spite of its name.
            with Image.open(BytesIO(data), formats=("JPEG", "PNG")) as image:
                width, height = scaled(image.width, image.height, size)
                # Pillow decodes a large JPEG at a half, a quarter or an eighth, if that is still twice the size needed.
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
    """Return width and height, scaled so that the shorter of them is `size`."""
    shorter, longer = sorted((width, height))
    if longer > MAX_ASPECT * shorter:
        raise BadImageError(f"{width}x{height} pixels, one side more than {MAX_ASPECT} times the other")
    other = round(size * longer / shorter)
    return (size, other) if width <= height else (other, size)
