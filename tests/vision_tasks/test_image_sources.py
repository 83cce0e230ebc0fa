"""Where labelled images come from: .npz files, folders of files, tables on disk and of the Hub; what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from tests.vision_tasks.small import pack, random_images
from vision_tasks.image_parts import Layout
from vision_tasks.image_sources import load_images

PIXELS = np.zeros((3, 4, 4, 1), np.uint8)
LABELS = np.array([0, 1, 0])

# Files


def test_an_npz_file(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz")
    parts = load_images(str(file))
    assert list(parts) == ["train", "test"]
    for number, (part, count) in enumerate({"train": 40, "test": 20}.items(), start=1):
        expected = random_images(count, seed=number, classes=10)
        assert np.array_equal(parts[part].images, expected.images)
        assert np.array_equal(parts[part].labels, expected.labels)
        assert parts[part].labels.dtype == np.int64
        assert parts[part].names == tuple("0123456789")
    coloured = {f"x_{part}": np.zeros((count, 4, 4, 3), np.uint8) for part, count in (("train", 40), ("test", 20))}
    assert load_images(str(pack(tmp_path / "b.npz", **coloured)))["test"].channels == 3


def test_classes_are_those_of_both_parts(tmp_path: Path) -> None:
    parts = load_images(str(pack(tmp_path / "a.npz", y_test=np.arange(20, dtype=np.uint8) % 12)))
    assert [len(part.names) for part in parts.values()] == [12, 12]


def test_class_numbers_may_start_anywhere_and_have_gaps(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz", y_train=3 + 2 * (np.arange(40) % 4), y_test=np.array([5, 9] * 10, np.uint8))
    parts = load_images(str(file))
    assert [part.names for part in parts.values()] == [("3", "5", "7", "9")] * 2
    assert np.array_equal(parts["train"].labels, np.arange(40) % 4)
    assert parts["test"].labels.tolist() == [1, 3] * 10


def test_a_clean_file_may_have_its_training_part_alone(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz", x_test=None, y_test=None)
    assert len(load_images(str(file), parts=["train"])["train"]) == 40
    with pytest.raises(ValueError, match="no array 'x_test'; present: x_train, y_train"):
        load_images(str(file))


@pytest.mark.parametrize("of_test", [True, False])
def test_true_labels_of_an_npz_file(tmp_path: Path, of_test: bool) -> None:
    """A test counts the right ones, where they are known."""
    right, wrong = np.arange(20) % 10, np.zeros(20, int)
    arrays = {"x_train": random_images(20).images, "y_train": wrong, "truth_train": right}
    arrays |= {"y_test": wrong, "truth_test": right} if of_test else {"y_test": right}
    found = load_images(str(pack(tmp_path / "a.npz", **arrays)), Layout(true_label_column="truth"))
    assert found["train"].labels.tolist() == wrong.tolist()
    assert found["train"].true_labels.tolist() == found["test"].labels.tolist() == right.tolist()


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"y_test": None}, r"a.npz has no array 'y_test'; present: x_train, x_test, y_train$"),
    ({"x_train": None}, r"has no array 'x_train'; present: "),
    ({"x_train": np.zeros((40, 8, 8))}, r"a.npz, train: pixels must be uint8 from 0 to 255, not float64"),
    ({"x_test": np.zeros((20, 64), np.uint8)}, r"a.npz, test: images must have the shape .* not \(20, 64\)"),
    ({"x_test": np.zeros((20, 4, 4), np.uint8)}, r"a.npz, train: images of \(8, 8, 1\) pixels, but .*of \(4, 4, 1\)"),
    ({"x_train": np.zeros((40, 8, 8, 3), np.uint8)}, r"a.npz, train: images of \(8, 8, 3\) pixels, but "),
    (
        {"y_train": np.zeros(40)},
        r"a.npz, train: labels must be whole numbers or words, not float64: number the classes",
    ),
    ({"y_test": np.array(["a"] * 20)}, r"a.npz, train: labels are numbers in one place and words in another"),
    ({"y_train": np.arange(39)}, r"40 images and labels of shape \(39,\)"),
    (
        {"y_train": np.r_[np.arange(39) % 10, -1]},
        r"a.npz, train: label -1 is no class: renumber, or take its images out",
    ),
    (
        {"y_train": np.r_[np.arange(39), 2**62]},
        r"a.npz, train: labels go up to 4611686018427387904: number the classes",
    ),
    ({"x_test": np.array([None] * 20)}, r"a.npz cannot be read as .npz \(Object arrays cannot be loaded .*--data$"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(str(pack(tmp_path / "a.npz", **arrays)))


def damaged(file: Path, how: str) -> Path:
    whole = pack(file).read_bytes()
    if how == "no .npz":
        other = io.BytesIO()
        np.save(other, PIXELS)
        whole = other.getvalue()
    elif how == "packed data":
        np.savez_compressed(file, x_train=PIXELS, y_train=LABELS, x_test=PIXELS, y_test=LABELS)
        whole = file.read_bytes()
        whole = whole[:60] + bytes(30) + whole[90:]
    elif how == "a bit":
        at = whole.index(random_images(40, seed=1, classes=10).images.tobytes()) + 500
        whole = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    ends = {"half": len(whole) // 2, "its last byte": -1, "all": 0}
    file.write_bytes(b"hello" if how == "text" else whole[: ends.get(how, len(whole))])
    return file


@pytest.mark.parametrize("how", ["half", "its last byte", "all", "text", "no .npz", "packed data", "a bit"])
def test_damaged_files_are_named(tmp_path: Path, how: str) -> None:
    with pytest.raises(ValueError, match=r"a.npz cannot be read as .npz \(.+\): give another --data$") as error:
        load_images(str(damaged(tmp_path / "a.npz", how)))
    assert "allow_pickle=`" not in str(error.value)


def test_other_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"absent.npz cannot be read as .npz \(.*No such file.*\)"):
        load_images(str(tmp_path / "absent.npz"))
    (tmp_path / "b.npz").mkdir()
    for folder, holds in ((tmp_path, "b.npz"), (tmp_path / "b.npz", "no folder")):
        with pytest.raises(
            ValueError, match=rf"train has no folder of images; .* holds {holds}: it should hold train/CL"
        ):
            load_images(str(folder))
    with pytest.raises(ValueError, match=r"Dataset scripts are no longer supported: use .*ylecun/mnist"):
        load_images("mnist.py")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"neither a folder nor a reachable Hub id .*: use --data FILE.npz, or HF_HUB_OFF"
    ):
        load_images("no-such-organisation-here/absent")


# The Hub


def table(monkeypatch: pytest.MonkeyPatch, pictures: list[Any], labels: list[Any], **columns: Any) -> None:
    """`load_dataset` gives this in both splits."""
    names = {"image": "image", "label": "label"} | columns.pop("named", {})
    kind = columns.pop("kind", ClassLabel(names=["cat", "dog"]))
    features = Features({names["image"]: Image(), names["label"]: kind})
    rows = Dataset.from_dict({names["image"]: pictures, names["label"]: labels}, features=features)
    splits = columns.pop("splits", ("train", "test"))
    monkeypatch.setattr(
        "vision_tasks.image_sources.load_from_hub", lambda name, instead: DatasetDict(dict.fromkeys(splits, rows))
    )
    monkeypatch.setattr("vision_tasks.image_sources.require_reachable", lambda name, instead: None)


def pictures(mode: str = "L", sides: tuple[int, ...] = (4, 4)) -> list[Any]:
    channels = () if mode == "L" else (len(mode),)
    return [
        Picture.fromarray(np.arange(s * s * int(np.prod(channels)), dtype=np.uint8).reshape(s, s, *channels))
        for s in sides
    ]


@pytest.mark.parametrize("named", [{}, {"image": "img", "label": "fine_label"}])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_table_of_the_hub(monkeypatch: pytest.MonkeyPatch, mode: str, channels: int, named: dict[str, str]) -> None:
    table(monkeypatch, pictures(mode), [1, 0], named=named)
    parts = load_images("some/pets")
    assert parts["train"].names == ("cat", "dog")
    assert parts["test"].labels.tolist() == [1, 0]
    expected = np.arange(16 * channels, dtype=np.uint8).reshape(4, 4, channels)
    assert np.array_equal(parts["test"].images[1], expected)


PARTS = ("train", "validation", "test")


def test_a_validation_part_is_read_for_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its usual names, where there is one and it is asked for."""
    table(monkeypatch, pictures(), [1, 0], splits=("train", "dev", "test"))
    assert [found.where for found in load_images("some/pets", None, PARTS).values()] == [
        "some/pets, train",
        "some/pets, dev",
        "some/pets, test",
    ]
    assert list(load_images("some/pets")) == ["train", "test"]
    assert list(load_images("some/pets", Layout(test_split="dev"), PARTS)) == ["train", "test"]
    table(monkeypatch, pictures(), [1, 0], splits=("train", "dev", "val", "test"))
    with pytest.raises(ValueError, match="val and dev are there: set validation_split to one of them"):
        load_images("some/pets", None, PARTS)
    assert load_images("some/pets", Layout(validation_split="val"), PARTS)["validation"].where == "some/pets, val"
    images = random_images(10, seed=3, classes=10)
    file = pack(tmp_path / "a.npz", x_val=images.images[..., 0], y_val=images.labels)
    assert np.array_equal(load_images(str(file), None, PARTS)["validation"].images, images.images)
    with pytest.raises(ValueError, match="has no array 'x_held'"):
        load_images(str(file), Layout(validation_split="held"), PARTS)


def test_a_palette_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = [Picture.new("RGB", (4, 4), colour) for colour in ((200, 30, 10), (5, 100, 255))]
    table(monkeypatch, [one.convert("P", palette=Picture.Palette.ADAPTIVE) for one in colours], [1, 0])
    found = load_images("some/pets")["train"]
    assert [image[0, 0].tolist() for image in found.images] == [[200, 30, 10], [5, 100, 255]]


@pytest.mark.parametrize(
    ("pixels", "labels", "settings", "message"),
    [
        (
            pictures(),
            [1, 0],
            {"splits": ("train", "valid")},
            "some/pets has no split 'test'; present: train, valid: set train_split and test_split",
        ),
        (
            pictures(sides=(4, 5)),
            [1, 0],
            {},
            r"some/pets, train: its images differ in size \(0: 4 x 4, 1: 5 x 5 pixels\): .* resize them first",
        ),
        (
            [Picture.new("I;16", (4, 4))] * 2,
            [1, 0],
            {},
            r"some/pets, train, column image, row 0 has mode I;16: convert it to 8 bits a channel",
        ),
        (pictures(), [1, -1], {}, "some/pets, train: label -1 is none of the 2 classes"),
        (
            pictures(),
            [1, 0.5],
            {"kind": Value("float32")},
            "some/pets, train, label: labels must be whole numbers or wo",
        ),
        (
            pictures(),
            [1, None],
            {"kind": Value("int64")},
            "some/pets, train, label: labels must be whole numbers or wo",
        ),
        (
            pictures(),
            [1, 0],
            {"named": {"image": "photo"}},
            "train: unknown column 'image': Valid: photo, label: set image_column",
        ),
        (
            pictures(),
            [1, 0],
            {"named": {"label": "coarse"}},
            "train: unknown column 'label': Valid: image, coarse: set label_column",
        ),
    ],
)
def test_tables_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, pixels: Any, labels: Any, settings: dict[str, Any], message: str
) -> None:
    table(monkeypatch, pixels, labels, **settings)
    with pytest.raises(ValueError, match=message):
        load_images("some/pets")


def test_columns_and_splits_of_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"image": "photo", "label": "noisy"}
    table(monkeypatch, pictures(), ["b", "a"], named=named, kind=Value("string"), splits=("all", "valid"))
    parts = load_images("some/pets", Layout("photo", "noisy", "noisy", "all", "valid"))
    assert [(part.names, part.labels.tolist()) for part in parts.values()] == [(("a", "b"), [1, 0])] * 2


def test_a_grey_image_among_coloured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    (grey,), (coloured,) = pictures(sides=(4,)), pictures("RGB", sides=(4,))
    table(monkeypatch, [grey, coloured], [1, 0])
    found = load_images("some/pets")["test"].images
    assert np.array_equal(found[0], np.asarray(grey)[..., None].repeat(3, 2))
    assert np.array_equal(found[1], np.asarray(coloured))


# Folders


def album(folder: Path, *names: str, side: int = 4) -> dict[str, np.ndarray]:
    """Grey files of random pixels, and what they hold."""
    held = dict(zip(names, random_images(len(names), seed=len(names), side=side).images, strict=True))
    for name, pixels in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Picture.fromarray(pixels[..., 0]).save(folder / name)
    return held


def test_a_folder_of_files(tmp_path: Path) -> None:
    names = [
        "train/cat/1.png",
        "train/cat/2.png",
        "train/cat/3.png",
        "train/ant/1.png",
        "test/ant/1.png",
        "test/bee/1.png",
    ]
    held = album(tmp_path, *names)
    parts = load_images(str(tmp_path))
    assert parts["train"].names == parts["test"].names == ("ant", "bee", "cat")
    assert parts["train"].ids.tolist() == [names[3], *names[:3]]  # classes by turns
    assert parts["train"].labels.tolist() == [0, 2, 2, 2]
    assert np.array_equal(parts["train"].images, [held[name] for name in parts["train"].ids])
    alone = load_images(str(tmp_path / "test"), parts=["train"])["train"]
    assert (alone.names, alone.ids.tolist()) == (("ant", "bee"), ["ant/1.png", "bee/1.png"])
    assert len(load_images(str(tmp_path), Layout(train_split="test", test_split="train"))["train"]) == 2
    (tmp_path / "test").rename(tmp_path / "valid")
    with pytest.raises(
        ValueError, match=r"test has no folder of images; .* holds train, valid: it should hold train/CLASS"
    ):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"true_label_column: .* holds image files"):
        load_images(str(tmp_path), Layout(true_label_column="clean"))
    album(tmp_path, "train/dog/9.png", side=5)
    with pytest.raises(
        ValueError, match=r"train: its images differ in size \(.*ant/1.png: 4 x 4, .*dog/9.png: 5 x 5 pix"
    ):
        load_images(str(tmp_path), parts=["train"])


# Tables on disk


def parts_of(kind: Any = None) -> DatasetDict:
    kind = ClassLabel(names=["cat", "dog"]) if kind is None else kind
    features = Features({"image": Image(), "label": kind, "clean": kind})
    rows = {"image": pictures(sides=(4, 4, 4)), "label": [1, 0, 1], "clean": [1, 1, 0]}
    return DatasetDict(dict.fromkeys(("train", "test"), Dataset.from_dict(rows, features=features)))


def saved(folder: Path, how: str) -> Path:
    tables, folder = parts_of(Value("int64") if how == "plain" else None), folder / how
    if how == "save_to_disk":
        tables.save_to_disk(str(folder))
        return folder
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        tables["train"].shard(2, number, contiguous=True).to_parquet(
            folder / f"data/train-0000{number}-of-00002.parquet"
        )
    tables["test"].to_parquet(folder / "data/test-00000-of-00001.parquet")
    if how == "plain":  # as pandas and others write it, without the features of `datasets`
        for file in folder.rglob("*.parquet"):
            pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    return folder


@pytest.mark.parametrize("how", ["save_to_disk", "parquet", "plain"])
def test_tables_on_disk(tmp_path: Path, how: str) -> None:
    parts = load_images(str(saved(tmp_path, how)), Layout(true_label_column="clean"))
    expected = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    for part in parts.values():
        assert part.names == (("0", "1") if how == "plain" else ("cat", "dog"))
        assert part.ids.tolist() == [0, 1, 2]
        assert np.array_equal(part.images, [expected] * 3)
    assert (parts["train"].labels.tolist(), parts["train"].true_labels.tolist()) == ([1, 0, 1], [1, 1, 0])
    assert parts["test"].labels.tolist() == [1, 1, 0]  # the right ones


def test_a_test_split_without_noisy_labels(tmp_path: Path) -> None:
    tables = parts_of()
    tables["test"] = tables["test"].remove_columns("label")
    tables.save_to_disk(str(tmp_path / "a"))
    found = load_images(str(tmp_path / "a"), Layout(label_column="label", true_label_column="clean"))
    assert (found["train"].labels.tolist(), found["test"].labels.tolist()) == ([1, 0, 1], [1, 1, 0])


def test_a_table_alone_and_damaged_tables(tmp_path: Path) -> None:
    folder = saved(tmp_path, "parquet")
    assert len(load_images(str(folder / "data/test-00000-of-00001.parquet"), parts=["train"])["train"]) == 3
    with pytest.raises(
        ValueError, match="parquet has no split 'train'; present: test: set train_split and test_split"
    ):
        load_images(str(folder / "data/test-00000-of-00001.parquet"))
    (folder / "data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="1 parquet files of train, not 2: fetch one set of all"):
        load_images(str(folder))
    (folder / "data/test-00000-of-00001.parquet").write_bytes(b"PAR1")
    (folder / "data/train-00000-of-00002.parquet").unlink()
    other = saved(tmp_path, "save_to_disk")
    (other / "test/state.json").unlink()
    for place in (folder, other):
        with pytest.raises(ValueError, match=rf"{place} cannot be read as a table \(.*\): write or fetch it again"):
            load_images(str(place))


def test_parts_that_declare_other_classes_are_refused(tmp_path: Path) -> None:
    tables = parts_of()
    tables["test"] = tables["test"].cast_column("label", ClassLabel(names=["dog", "cat"]))
    tables.save_to_disk(str(tmp_path / "a"))
    with pytest.raises(
        ValueError, match=r"a, train and .*a, test declare other classes: give them the same ClassLabel"
    ):
        load_images(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="a, test: label and clean name other classes"):
        load_images(str(tmp_path / "a"), Layout(train_split="test", true_label_column="clean"), ["train"])
