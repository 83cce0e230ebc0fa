"""Which training images are labelled wrong, as the trained model sees it: a table, the worst first, and a picture.

Names that begin with `_` stay out of an upload: they show images of the user's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from vision_tasks.classification import logits_of
from vision_tasks.images import ImageSet
from vision_tasks.noisy_labels import NoisyLabels
from vision_tasks.weight_net import WeightedClassifier

TABLE, SHEET = "_training_images.csv", "_worst_images.png"
SHOWN, COLUMNS, TILE, LINE, LONGEST = 48, 8, 96, 12, 15  # images, images a row, pixels, pixels, letters


def judge(module: WeightedClassifier, images: ImageSet, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """The loss and the likeliest class of every image, not augmented, in evaluation mode; (N,) each."""
    logits = logits_of(module, images, batch_size)
    labels = torch.from_numpy(images.labels).to(logits.device)
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1)


def table_of(module: WeightedClassifier, noisy: NoisyLabels, batch_size: int = 500) -> pd.DataFrame:
    """A row a training image, the largest loss first; the index is its place in `noisy.train`.

    Columns: image (its id), label (as trained on), predicted, loss; weight where it is learned, true_label where
    some are known to be wrong.
    """
    losses, likeliest = judge(module, noisy.train, batch_size)
    names = np.array(noisy.train.names)
    columns: dict[str, Any] = {
        "image": noisy.train.ids,
        "label": names[noisy.train.labels],
        "predicted": names[likeliest.cpu().numpy()],
        "loss": losses.cpu().numpy(),
    }
    if module.weighted:
        with torch.no_grad():
            columns["weight"] = module.meta(losses).cpu().numpy()
    if noisy.wrong.any():
        columns["true_label"] = names[noisy.true_labels]
    return pd.DataFrame(columns).sort_values("loss", ascending=False, kind="stable")


def contact_sheet(images: ImageSet, table: pd.DataFrame, file: Path) -> None:
    """The first images of a table, row by row, each above its id, its label and what the model takes it for."""
    shown = table.head(SHOWN)
    height = TILE + 4 * LINE
    sheet = Image.new("RGB", (COLUMNS * TILE, math.ceil(len(shown) / COLUMNS) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(shown.itertuples()):
        left, top = place % COLUMNS * TILE, place // COLUMNS * height
        pixels = images.images[row.Index]
        picture = Image.fromarray(pixels[..., 0] if images.channels == 1 else pixels)
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BOX), (left, top))
        lines = [str(row.image)[-LONGEST:], f"label: {row.label}"[:LONGEST], f"model: {row.predicted}"[:LONGEST]]
        draw.text((left + 2, top + TILE), "\n".join(lines), fill="black", spacing=0)
    sheet.save(file)
