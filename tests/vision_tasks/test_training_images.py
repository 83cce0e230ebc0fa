"""The table of training images and the picture of the worst, against the model's own logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import expit, log_softmax

from tests.vision_tasks.small import random_images, small_module
from vision_tasks.images import ImageSet
from vision_tasks.noisy_labels import NoisyLabels
from vision_tasks.training_images import COLUMNS, LINE, SHOWN, TILE, contact_sheet, table_of


def noisy(wrong: int = 3) -> NoisyLabels:
    images = random_images(12)
    ids = np.array([f"train/{name}.png" for name in "kjihgfedcbal"])
    labels = np.r_[(images.labels[:wrong] + 1) % 4, images.labels[wrong:]]
    return NoisyLabels(replace(images, labels=labels, ids=ids), images.labels, images)


@pytest.mark.parametrize(("weighted", "wrong"), [(True, 3), (False, 0)])
def test_a_row_an_image_the_largest_loss_first(weighted: bool, wrong: int) -> None:
    module, data = small_module(weighted=weighted, dtype=torch.float32), noisy(wrong)
    table = table_of(module, data)
    pixels = torch.from_numpy(data.train.images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = module.base.eval()(pixel_values=(pixels - 0.375) / 0.25).logits.numpy()
    losses = -log_softmax(logits, 1)[np.arange(12), data.train.labels]
    order = np.argsort(-losses)
    assert table.index.tolist() == order.tolist()
    np.testing.assert_allclose(table.loss, losses[order], rtol=1e-4)
    names = np.array(list("abcd"))
    assert table.image.tolist() == data.train.ids[order].tolist()
    assert table.label.tolist() == names[data.train.labels][order].tolist()
    assert table.predicted.tolist() == names[logits.argmax(1)][order].tolist()
    assert ("weight" in table, "true_label" in table) == (weighted, wrong > 0)
    if weighted:
        net = {name: value.detach().numpy() for name, value in module.meta.named_parameters()}
        hidden = np.maximum(losses[order, None] @ net["hidden.weight"].T + net["hidden.bias"], 0)
        np.testing.assert_allclose(table.weight, expit(hidden @ net["out.weight"][0] + net["out.bias"]), rtol=1e-4)
    if wrong:
        assert table.true_label.tolist() == names[data.true_labels][order].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_worst_images_stand_row_by_row(tmp_path: Path, channels: int) -> None:
    levels = np.arange(60, dtype=np.uint8)
    images = ImageSet(
        np.tile(levels[:, None, None, None], (1, 8, 8, channels)), levels.astype(np.int64) % 2, ("a", "ü")
    )
    index = np.random.default_rng(0).permutation(60)
    table = pd.DataFrame({"image": index, "label": "a", "predicted": "ü"}, index=index)
    contact_sheet(images, table, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    height = TILE + 4 * LINE
    assert sheet.shape == (SHOWN // COLUMNS * height, COLUMNS * TILE)
    assert sheet[TILE // 2 :: height, TILE // 2 :: TILE].flatten().tolist() == index[:SHOWN].tolist()
    captions = sheet[TILE:height].reshape(-1, COLUMNS, TILE)
    assert (captions.min((0, 2)) < 128).all()
