"""Images as pixels: what a viewer shows, hidden files, and damaged ones by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from vision_tasks.image_files import TableImages, as_array, class_files, decode

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (4, 6, 3), np.uint8)
UPRIGHT: dict[int, Callable[[Any], Any]] = {  # what the EXIF standard wants done with the stored rows and columns
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_photo_is_turned_as_its_exif_data_say(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    upright = UPRIGHT[orientation](COLOURS)
    assert np.array_equal(decode(tmp_path / "a.png", "a"), upright)
    table = Dataset.from_dict({"image": [str(tmp_path / "a.png")]}, features=Features({"image": ImageFeature()}))
    assert np.array_equal(TableImages(table, "image", "pets")[0], upright)  # once, though `datasets` turns it too


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode: str) -> None:
    pixels = RNG.integers(0, 256, (40, 40, len(mode)), np.uint8)
    pixels[0, :, -1], pixels[1, :, -1] = 0, 255
    found = as_array(Image.fromarray(pixels, mode), "here").astype(float)
    colours, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    np.testing.assert_allclose(found, alpha * colours + (1 - alpha) * 255, atol=1)
    assert (found[0] == 255).all()
    assert np.array_equal(found[1], colours[1])


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 200, 30, 10])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert decode(tmp_path / "a.png", "a").tolist() == [[[255, 255, 255], [200, 30, 10]]]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/1.png", ".cache/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("b/._1.png", "b/.DS_Store", "b/notes.txt"):
        (tmp_path / name).touch()
    found = {name: [file.name for file in files] for name, files in class_files(tmp_path).items()}
    assert found == {"a": ["1.png"], "b": ["1.JPG", "2.png"]}
    (tmp_path / "a/1.png").rename(tmp_path / "a/._1.png")
    with pytest.raises(ValueError, match=r"/a has no images .*: fill or remove the folder"):
        class_files(tmp_path)
    (tmp_path / "a/b").mkdir()
    with pytest.raises(ValueError, match=r"/a holds the folder 'b': .* should hold CLASS/IMAGE alone"):
        class_files(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_damaged_image_is_named(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    whole = file.read_bytes()
    table = Dataset.from_dict({"image": [{"bytes": whole}] * 2}, features=Features({"image": ImageFeature()}))
    assert len(list(TableImages(table, "image", "pets"))) == 2
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"a.{suffix} cannot be read as an image \(.+\): replace or remove it$"):
        decode(file, str(file))
    pair = [{"bytes": whole}, {"bytes": file.read_bytes()}]
    table = Dataset.from_dict({"image": pair}, features=Features({"image": ImageFeature()}))
    with pytest.raises(ValueError, match="pets, column image, row 1 cannot be read as an image"):
        list(TableImages(table, "image", "pets"))
    file.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(ValueError, match=r"cannot be read as an image .*decompression bomb"):
        decode(file, str(file))
