"""Generated domains: symbols of two strokes, drawn in several looks."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE, OVERSAMPLED = 32, 4  # pixels of an image, and times as many that it is drawn with


@dataclass(frozen=True)
class Look:
    """How the symbols of a domain are drawn: colours, the width of the pen, blur, noise, and the size of a pixel."""

    paper: tuple[int, int, int]
    ink: tuple[int, int, int]
    pen: float = 2.0
    blur: float = 0.0
    noise: float = 0.0
    pixel: int = 1


LOOKS = {
    "ink": Look(paper=(250, 248, 240), ink=(20, 20, 40)),
    "chalk": Look(paper=(30, 60, 45), ink=(235, 235, 220), pen=2.5, noise=18),
    "neon": Look(paper=(10, 5, 25), ink=(250, 60, 200), pen=1.5, blur=0.8),
    "sand": Look(paper=(215, 180, 120), ink=(130, 90, 50), pen=3.0, noise=25),
    "mosaic": Look(paper=(180, 200, 230), ink=(160, 30, 20), pen=3.0, pixel=2),
}


def draw_symbols(look: str, classes: int = 24, images: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Images (classes * images, SIDE, SIDE, 3) uint8 of symbols that no other look has, and their labels.

    A symbol is two strokes through random points; each image of it moves the points, turns and scales it.
    """
    style, own = LOOKS[look], zlib.crc32(look.encode())
    drawn = []
    for label in range(classes):
        strokes = np.random.default_rng([own, label]).uniform(-0.8, 0.8, (2, 4, 2))
        for number in range(images):
            rng = np.random.default_rng([own, label, number + 1])
            drawn.append(_draw(_moved(strokes, rng), style, rng))
    return np.stack(drawn), np.repeat(np.arange(classes, dtype=np.int64), images)


def _moved(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle, size = rng.uniform(-0.25, 0.25), rng.uniform(0.8, 1.1)
    turn = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved: np.ndarray = (strokes + rng.normal(0, 0.05, strokes.shape)) @ turn + rng.uniform(-0.1, 0.1, 2)
    return moved


def _draw(strokes: np.ndarray, style: Look, rng: np.random.Generator) -> np.ndarray:
    """Strokes in [-1, 1] as pixels (SIDE, SIDE, 3); they are drawn larger, so that their edges are smooth."""
    canvas = Image.new("RGB", (SIDE * OVERSAMPLED, SIDE * OVERSAMPLED), style.paper)
    for stroke in (strokes + 1) / 2 * SIDE * OVERSAMPLED:
        width = round(style.pen * OVERSAMPLED)
        ImageDraw.Draw(canvas).line([tuple(point) for point in stroke], fill=style.ink, width=width, joint="curve")
    small = canvas.resize((SIDE // style.pixel, SIDE // style.pixel), Image.Resampling.BOX)
    image = small.resize((SIDE, SIDE), Image.Resampling.NEAREST).filter(ImageFilter.GaussianBlur(style.blur))
    pixels = np.asarray(image) + rng.normal(0, 1, (SIDE, SIDE, 3)) * style.noise
    return pixels.clip(0, 255).astype(np.uint8)
