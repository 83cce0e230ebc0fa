"""Images as pixels: files, bytes of files, columns of tables, and folders CLASS/IMAGE."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from metaxl_evo.messages import one_line

GREY_MODES, COLOUR_MODES = ("1", "L", "LA"), ("RGB", "RGBA", "P", "CMYK", "YCbCr")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # of a file, whatever its name; EPS is a program
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def as_array(image: Any, where: str) -> np.ndarray:
    """A PIL image as a viewer shows it: turned as its EXIF data say, what is transparent on white.

    Returns:
        uint8 (H, W, 1) where it is grey, else (H, W, 3).

    Raises:
        ValueError: for what is not an image of 8 bits a channel.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{where} holds {type(image).__name__}, not an image: name a data set of images")
    if image.mode not in (*GREY_MODES, *COLOUR_MODES):
        raise ValueError(f"{where} has mode {image.mode}: convert it to 8 bits a channel, grey or RGB")
    shown = ImageOps.exif_transpose(image)
    if shown.has_transparency_data:  # the colours of invisible pixels are whatever an editor left there
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown.convert("RGBA"))
    array = np.array(shown.convert("L" if image.mode in GREY_MODES else "RGB"))
    return array if array.ndim == 3 else array[..., None]


def decode(source: Path | bytes, name: str, mode: str | None = None) -> np.ndarray:
    """An image file, or the bytes of one, as `as_array` gives it.

    Args:
        mode: that of PIL to convert it to first.

    Raises:
        ValueError: for what is damaged, or is not an image of 8 bits a channel.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    with opening(name), Image.open(opened, formats=FORMATS) as image:
        return as_array(image if mode is None else image.convert(mode), name)


@contextmanager
def opening(name: str) -> Iterator[None]:
    """One line for what PIL raises of a damaged file."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image ({one_line(error)}): replace or remove it") from error


@dataclass(frozen=True, eq=False)
class EncodedImages(Sequence[Any]):
    """Images decoded on access, from files or from the bytes of files."""

    sources: Sequence[Path | bytes]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        return decode(self.sources[index], self.names[index])


@dataclass(frozen=True, eq=False)
class TableImages(Sequence[Any]):
    """The image column of a `datasets.Dataset`, decoded on access: of bytes, or of files, which are not fetched."""

    rows: Any
    column: str
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        name = f"{self.where}, column {self.column}, row {index}"
        if not 0 <= index < len(self):
            raise IndexError(name)
        held = self._encoded[int(index)][self.column]
        if not isinstance(held, dict):
            return as_array(held, name)
        source = held["bytes"] or Path(held["path"] or "no image")
        return decode(source, name, self.rows.features[self.column].mode)

    @cached_property
    def _encoded(self) -> Any:
        if not isinstance(self.rows.features[self.column], ImageFeature):
            return self.rows
        return self.rows.cast_column(self.column, ImageFeature(decode=False))  # it would open whatever a path names


def subfolders(folder: Path) -> list[Path]:
    """In sorted order, without hidden ones."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class of a folder CLASS/IMAGE, all in sorted order; hidden ones are no images.

    Raises:
        ValueError: for a class without images, or with folders of its own.
    """
    found = {}
    for place in subfolders(folder):
        if inner := subfolders(place):
            raise ValueError(f"{place} holds the folder {inner[0].name!r}: {folder} should hold CLASS/IMAGE alone")
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        found[place.name] = [file for file in files if not file.name.startswith(".")]  # macOS leaves ._NAME.png
        if not found[place.name]:
            raise ValueError(f"{place} has no images ({' '.join(IMAGE_SUFFIXES)}): fill or remove the folder")
    return found
