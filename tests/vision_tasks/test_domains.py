"""Reading domains: packed arrays, folders, Omniglot's archives, the Hub, drawn symbols; and what is refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from vision_tasks import domains
from vision_tasks.domains import read_domain
from vision_tasks.symbols import LOOKS, draw_symbols


def picture(value: int, mode: str = "RGB", size: int = 8) -> Image.Image:
    return Image.new("L", (size, size), value).convert(mode)


def png(value: int, mode: str = "L") -> bytes:
    written = io.BytesIO()
    picture(value, mode).save(written, "PNG")
    return written.getvalue()


def folder_of(path: Path, files: Mapping[str, int]) -> Path:
    for name, value in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path / name)
    return path


def values(domain: Any) -> list[int]:
    return [int(image[0, 0, 0]) for image in domain.images]


def refusal(text: str) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        read_domain(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def packed(path: Path, **arrays: Any) -> Path:
    held: dict[str, Any] = {
        "x_train": np.arange(6, dtype=np.uint8).repeat(16).reshape(6, 4, 4),
        "y_train": np.array([0, 1, 2, 3, 0, 1], dtype=np.uint8),
        "x_test": np.full((2, 4, 4), 9, dtype=np.uint8),
        "y_test": np.array([3, 0]),
    }
    np.savez(path, **{name: array for name, array in (held | arrays).items() if array is not None})
    return path


# Packed arrays -------------------------------------------------------------------------------------------------------


def test_packed_arrays_are_one_domain(tmp_path: Path) -> None:
    domain = read_domain(str(packed(tmp_path / "digits.npz")))
    assert domain.name == "digits"
    assert domain.images[0].shape == (4, 4, 1)
    assert dict(zip(domain.classes, map(len, domain.members), strict=True)) == {"0": 3, "1": 2, "2": 1, "3": 2}
    assert sorted(values(domain)) == [0, 1, 2, 3, 4, 5, 9, 9]
    assert domain.splits == {"base": (0, 2), "val": (1,), "novel": (3,)}


def test_options_choose_classes_and_images(tmp_path: Path) -> None:
    path = packed(tmp_path / "digits.npz")
    few = read_domain(f"{path}?images_per_class=1&name=few&classes=whole")
    assert (few.name, values(few), few.labels.tolist()) == ("few", [0, 1, 2, 3], [0, 1, 2, 3])
    assert set(few.splits.values()) == {(0, 1, 2, 3)}
    large = read_domain(f"{path}?largest_classes=3")
    assert large.classes == ("0", "1", "3")
    assert large.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"y_test": None}, "y_test"),
        ({"x_train": np.zeros((6, 4, 4))}, "uint8"),
        ({"x_train": np.zeros((6, 4), np.uint8)}, "shape"),
        ({"x_test": np.zeros((2, 4, 4, 2), np.uint8)}, "shape"),
        ({"x_test": np.zeros((2, 5, 5), np.uint8)}, "differ in shape"),
        ({"y_test": np.array([0, 1, 2])}, "labels"),
        ({"y_train": np.array([0.5] * 6)}, "whole numbers"),
        ({"y_train": np.array([0, 1, -4, 3, 0, 1])}, "label -4 is no class"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], part: str) -> None:
    assert part in refusal(str(packed(tmp_path / "digits.npz", **arrays)))


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK not a zip file")
    for name in ("a.npz", "b.npz"):
        assert f"{name} cannot be read as .npz" in refusal(str(tmp_path / name))


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_classes_is_read_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/2.png", "a/10.png", "c/1.jpg", "a/9.png", "b/1.png", "d/1.png"]
    domain = read_domain(str(folder_of(tmp_path / "birds", {name: 10 * k for k, name in enumerate(names)})))
    assert (domain.name, domain.classes) == ("birds", ("a", "b", "c", "d"))
    assert values(domain) == [10, 30, 40, 0, 20, 50]  # a/10 a/9 b/1 b/2 c/1 d/1
    assert domain.splits == {"base": (0, 2), "val": (1,), "novel": (3,)}
    assert domain.images[0].shape == (8, 8, 3)


def test_a_folder_may_say_its_split(tmp_path: Path) -> None:
    names = ["novel/x/1.png", "base/z/1.png", "base/y/1.png", "base/y/2.png", "val/w/1.png"]
    path = folder_of(tmp_path / "mini", {name: k for k, name in enumerate(names)})
    domain = read_domain(str(path))
    assert domain.classes == ("y", "z", "w", "x")
    assert domain.splits == {"base": (0, 1), "val": (2,), "novel": (3,)}
    assert values(domain) == [2, 3, 1, 4, 0]
    assert read_domain(f"{path}?classes=whole").splits["novel"] == (0, 1, 2, 3)


def test_splits_may_have_their_usual_names_and_then_are_of_different_classes(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "mini", {"train/a/1.png": 0, "val/b/1.png": 1, "test/c/1.png": 2, "test/d/1.png": 3})
    domain = read_domain(str(path))
    assert domain.classes == ("a", "b", "c", "d")
    assert domain.splits == {"base": (0,), "val": (1,), "novel": (2, 3)}
    folder_of(path, {"test/a/1.png": 4})
    assert refusal(str(path)).endswith(
        "mini: class 'a' is in several of test, train, val, and few-shot tests are of other classes than training: "
        "name one of these folders as the domain"
    )
    assert read_domain(f"{path / 'test'}?classes=whole").classes == ("a", "c", "d")


def test_grey_palette_and_transparent_images(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGBA", "LA"):
        (tmp_path / mode).mkdir()
        picture(255, mode).save(tmp_path / mode / "1.png")
    domain = read_domain(str(tmp_path))
    shapes = {domain.classes[label]: image.shape for label, image in zip(domain.labels, domain.images, strict=True)}
    assert shapes == {"1": (8, 8, 1), "L": (8, 8, 1), "LA": (8, 8, 1), "P": (8, 8, 3), "RGBA": (8, 8, 3)}


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(str(tmp_path / "nowhere"))
    path = folder_of(tmp_path / "birds", {"a/1.png": 1})
    (path / "b").mkdir()
    assert "b has no images" in refusal(str(path))
    (path / "b/1.png").write_bytes(b"no image")
    assert "b/1.png cannot be read as an image" in refusal(str(path))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path / "b/1.png")
    (tmp_path / "empty").mkdir()
    assert "no folder of images" in refusal(str(tmp_path / "empty"))
    assert "b/1.png has mode I;16: convert it to 8 bits" in refusal(str(path))
    picture(1).save(path / "b/1.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)).save(path / "a/1.png")
    (path / "b/1.png").write_bytes((path / "a/1.png").read_bytes()[:500])
    assert "b/1.png cannot be read as an image" in refusal(str(path))  # the last one, cut off behind its head


# Omniglot ------------------------------------------------------------------------------------------------------------


def archive(path: Path, characters: Sequence[str], value: int) -> None:
    with zipfile.ZipFile(path, "w") as opened:
        for number, character in enumerate(characters):
            opened.writestr(f"{path.stem}/{character}/._{number:04}_01.png", b"what macOS leaves")
            for drawing in (2, 1):
                opened.writestr(f"{path.stem}/{character}/{number:04}_0{drawing}.png", png(value + drawing))


def test_archives_are_one_domain_without_counting_twice(tmp_path: Path) -> None:
    archive(tmp_path / "small2.zip", ["Latin/character01", "Tagalog/character01"], 100)
    archive(tmp_path / "small1.zip", ["Latin/character02", "Latin/character01", "Korean/character01"], 10)
    domain = read_domain(str(tmp_path))
    assert domain.classes == (
        "Korean/character01",
        "Latin/character01",
        "Latin/character02",
        "Tagalog/character01",
    )
    assert values(domain) == [11, 12, 11, 12, 11, 12, 101, 102]
    assert domain.images[0].shape == (8, 8, 1)
    one = read_domain(f"{tmp_path / 'small2.zip'}")
    assert (one.name, one.classes) == ("small2", ("Latin/character01", "Tagalog/character01"))
    chosen = read_domain(f"{tmp_path}?alphabets=Korean,Tagalog")
    assert chosen.classes == ("Korean/character01", "Tagalog/character01")
    assert "did you mean 'Korean'" in refusal(f"{tmp_path}?alphabets=Koran")


def test_bad_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no archive")
    assert "a.zip cannot be read as a zip file" in refusal(str(tmp_path / "a.zip"))
    archive(tmp_path / "b.zip", [], 0)
    assert "b.zip holds no" in refusal(str(tmp_path / "b.zip"))


def test_the_real_archives(shared: Path) -> None:
    folder = shared / "data/images/omniglot"
    both = read_domain(str(folder))
    assert len(both.classes) == 242
    assert {len(members) for members in both.members} == {20}
    parts = [read_domain(str(file)) for file in sorted(folder.glob("*.zip"))]
    assert [len(part.classes) for part in parts] == [136, 156]
    assert both.images[0].shape == (105, 105, 1)
    assert set(np.unique(both.images[0])) == {0, 255}


# The Hub -------------------------------------------------------------------------------------------------------------


def on_the_hub(monkeypatch: pytest.MonkeyPatch, held: DatasetDict) -> None:
    monkeypatch.setattr(domains, "require_reachable", lambda *arguments: None)
    monkeypatch.setattr(domains, "load_from_hub", lambda *arguments, **options: held)


def table(image: str = "img", label: str = "fine_label", kind: Any = None) -> Dataset:
    names = ["ant", "bee", "cat", "dog"]
    features = Features({image: ImageFeature(), label: ClassLabel(names=names) if kind is None else kind})
    rows = {image: [picture(k) for k in range(4)], label: [3, 2, 1, 0] if kind is None else ["x", "z", "y", "x"]}
    return Dataset.from_dict(rows, features=features)


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_hub(monkeypatch, DatasetDict(train=table(), test=table()))
    domain = read_domain("someone/pets?name=pets")
    assert domain.classes == ("ant", "bee", "cat", "dog")
    assert values(domain) == [3, 3, 2, 2, 1, 1, 0, 0]
    on_the_hub(monkeypatch, DatasetDict(train=table("image", "label", Value("string"))))
    domain = read_domain("someone/pets")
    assert (domain.name, domain.classes, domain.labels.tolist()) == ("pets", ("x", "y", "z"), [0, 0, 1, 2])


def test_bad_hub_data_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_hub(monkeypatch, DatasetDict(train=table(image="photo")))
    assert "no column image or img: it has photo, fine_label" in refusal("someone/pets")
    rows = Dataset.from_dict({"image": ["a.png"], "label": [0]})
    on_the_hub(monkeypatch, DatasetDict(train=rows))
    assert "column image, row 0 holds str, not an image" in refusal("someone/pets")


def test_an_unreachable_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "require_reachable", lambda *arguments: None)

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("'someone/pets' is neither a folder nor a reachable Hub id")

    monkeypatch.setattr(domains, "load_from_hub", unreachable)
    assert "neither a folder nor a reachable Hub id" in refusal("someone/pets")


# Drawn symbols, and the text -----------------------------------------------------------------------------------------


def test_drawn_domains_differ_in_look_and_symbols() -> None:
    assert len(LOOKS) >= 4
    means = set()
    for look in LOOKS:
        images, labels = draw_symbols(look, 3, 4)
        assert images.shape == (12, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert np.array_equal(images, draw_symbols(look, 3, 4)[0])
        assert len({image.tobytes() for image in images}) == 12
        means.add(tuple(images.mean((0, 1, 2)).round()))
    assert len(means) == len(LOOKS)


def test_a_drawn_domain_has_classes_for_every_split() -> None:
    domain = read_domain("synthetic:neon")
    assert domain.name == "neon"
    assert {split: len(classes) for split, classes in domain.splits.items()} == {"base": 12, "val": 6, "novel": 6}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("synthetic:nein", "unknown look 'nein': did you mean 'neon'?"),
        ("synthetic:neon?clases=whole", "did you mean 'classes'?"),
        ("synthetic:neon?classes=hole", "did you mean 'whole'?"),
        ("synthetic:neon?images_per_class=many", "images_per_class must be a whole number, got 'many'"),
        ("synthetic:neon?largest_classes=0", "largest_classes must be at least 1, got 0"),
    ],
)
def test_bad_texts_are_refused(text: str, part: str) -> None:
    assert part in refusal(text)
