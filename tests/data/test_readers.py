"""The readers on small folders in the real layouts, and the sentences they give for missing and broken files."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finecf.data import CUB200, ImageFolderDataset, StanfordDogs, digits


def picture(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name, colour in (("wren", (255, 0, 0)), ("Robin", (0, 255, 0)), ("jay", (0, 0, 255))):
        for k in range(3):
            picture(root / name / f"bird {k}.png", colour)
    (root / "wren" / "notes.txt").write_text("not an image")
    return root


def test_image_folder(folder: Path) -> None:
    data = ImageFolderDataset(folder, size=16)
    assert data.class_names == ["Robin", "jay", "wren"]
    assert len(data) == 9
    tensor, label, source = data[8]
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert label == 2
    assert source == str(folder / "wren" / "bird 2.png")
    assert torch.equal(tensor.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    assert ImageFolderDataset(folder, size=(20, 10))[0][0].shape == (3, 20, 10)
    assert ImageFolderDataset(folder, size=None)[0][0].shape == (3, 30, 40)
    assert data.images([0, 5]).shape == (2, 3, 16, 16)
    assert ImageFolderDataset(folder, size=16, transform=lambda x: x - 1)[8][0].min() == -1


def test_image_folder_of_some_classes(folder: Path) -> None:
    data = ImageFolderDataset(folder, classes=["wren", "jay"])
    assert data.labels == [0] * 3 + [1] * 3
    with pytest.raises(ValueError, match=r"classes: expected subfolders of .*Robin, jay, wren.*\['dodo'\]"):
        ImageFolderDataset(folder, classes=["dodo"])


def test_image_folder_split(folder: Path) -> None:
    lines = [f"{name}/bird {k}.png {int(k < 2)}" for name in ("Robin", "jay", "wren") for k in range(3)]
    listing = folder.parent / "split.txt"
    listing.write_text("\n".join(lines) + "\n")
    train, test = (ImageFolderDataset(folder, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 3)
    assert {p.name for p in test.paths} == {"bird 2.png"}
    assert ImageFolderDataset(folder, split_file=listing, split="0").paths == test.paths
    with pytest.raises(ValueError, match="split: expected one of the flags"):
        ImageFolderDataset(folder, split="2")
    with pytest.raises(ValueError, match="split: expected 'train'"):
        ImageFolderDataset(folder, split_file=listing)
    listing.write_text("jay/gone.png 1\n")
    with pytest.raises(FileNotFoundError, match=r"lists 1 file\(s\) that are not there.*gone.png"):
        ImageFolderDataset(folder, split="train")
    listing.write_text("jay\n")
    with pytest.raises(ValueError, match="without a flag"):
        ImageFolderDataset(folder, split="train")
    listing.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected split.txt .* found neither"):
        ImageFolderDataset(folder, split="train")


def test_flat_folder_is_one_class(tmp_path: Path) -> None:
    picture(tmp_path / "dogs" / "a.jpg")
    data = ImageFolderDataset(tmp_path / "dogs")
    assert data.class_names == ["dogs"]
    assert len(data) == 1


def test_image_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"expected images \(.jpg, .*found none in 1 folder"):
        ImageFolderDataset(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"expected a folder at .*nowhere"):
        ImageFolderDataset(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="found a file"):
        ImageFolderDataset(picture(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="size: expected a positive side"):
        ImageFolderDataset(tmp_path, size=0)


def test_broken_image_is_named(folder: Path) -> None:
    broken = folder / "jay" / "bird 1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = ImageFolderDataset(folder)
    with pytest.raises(ValueError, match=r"expected a readable image at .*jay/bird 1.png"):
        data[4]
    broken.write_text("no image at all")
    with pytest.raises(ValueError, match="cannot be decoded"):
        data[4]
    broken.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a file at .*bird 1.png"):
        data[4]


@pytest.mark.realdata
def test_real_birds(realdata: Path) -> None:
    data = ImageFolderDataset(realdata / "birds" / "images")
    assert len(data) == 1725
    assert len(data.class_names) == 29
    assert data.class_names == sorted(data.class_names)
    test = ImageFolderDataset(realdata / "birds" / "images", split="test")
    train = ImageFolderDataset(realdata / "birds" / "images", split="train")
    assert len(test) + len(train) == 1725
    assert not set(test.paths) & set(train.paths)
    assert test[0][0].shape == (3, 224, 224)


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    root = tmp_path / "CUB_200_2011"
    files = ["001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg", "001.Black_footed_Albatross/b.jpg"]
    files += ["002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg"]
    for file in files:
        picture(root / "images" / file)
    tables = {
        "images.txt": [f"{i} {file}" for i, file in enumerate(files, 1)],
        "image_class_labels.txt": ["1 1", "2 1", "3 2"],
        "train_test_split.txt": ["1 0", "2 1", "3 0"],
        "bounding_boxes.txt": ["1 60.0 27.0 325.0 304.0", "2 1.0 2.0 3.0 4.0", "3 5.5 6.0 7.0 8.0"],
        "classes.txt": ["1 001.Black_footed_Albatross", "2 002.Laysan_Albatross"],
        "parts/parts.txt": ["1 back", "2 beak", "3 left eye"],
        "parts/part_locs.txt": [f"{i} {p} {10.0 * p} 5.0 {int(p != 2)}" for i in (1, 2, 3) for p in (1, 2, 3)],
    }
    (root / "parts").mkdir()
    for name, lines in tables.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def test_cub(cub: Path) -> None:
    test, train = CUB200(cub, "test", size=8), CUB200(cub.parent, "train", size=8)
    assert (len(test), len(train), len(CUB200(cub, "all"))) == (2, 1, 3)
    assert test.class_names == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert test.labels == [0, 1]
    assert test[0][0].shape == (3, 8, 8)
    assert test[1][2].endswith("Laysan_Albatross_0002_1027.jpg")
    note = test.annotations[0]
    assert note.image_id == 1
    assert note.box == (60.0, 27.0, 325.0, 304.0)
    assert note.parts == {"back": (10.0, 5.0), "beak": None, "left eye": (30.0, 5.0)}
    only = CUB200(cub, "all", classes=[1])
    assert only.labels == [0]
    assert only.class_names == ["002.Laysan_Albatross"]


def test_cub_without_parts(cub: Path) -> None:
    for file in (cub / "parts").iterdir():
        file.unlink()
    (cub / "parts").rmdir()
    assert CUB200(cub, "all").annotations[0].parts == {}


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("images.txt", None, FileNotFoundError, "expected a file at .*images.txt"),
        ("bounding_boxes.txt", None, FileNotFoundError, "expected a file at .*bounding_boxes.txt"),
        (
            "bounding_boxes.txt",
            "1 60.0 27.0\n",
            ValueError,
            "expected 5 fields in line 1 of .*bounding_boxes.txt, got 3",
        ),
        (
            "image_class_labels.txt",
            "1 1\n2 one\n3 2\n",
            ValueError,
            "expected a number in .*image_class_labels.txt, got 'one'",
        ),
        ("train_test_split.txt", "1 0\n", ValueError, "expected a line for image 2 in .*train_test_split.txt"),
        ("parts/part_locs.txt", None, FileNotFoundError, "expected a file at .*part_locs.txt"),
        ("parts/part_locs.txt", "1 1 2.0 3.0 yes\n", ValueError, "visibility 0 or 1"),
        ("images/001.Black_footed_Albatross/b.jpg", None, FileNotFoundError, "lists 1 image.*b.jpg"),
    ],
)
def test_broken_cub_gets_a_sentence(
    cub: Path, file: str, text: str | None, error: type[Exception], message: str
) -> None:
    if text is None:
        (cub / file).unlink()
    else:
        (cub / file).write_text(text)
    with pytest.raises(error, match=message):
        CUB200(cub, "all")


def test_cub_bad_arguments(cub: Path) -> None:
    with pytest.raises(ValueError, match="split: expected"):
        CUB200(cub, "val")
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        CUB200(cub, classes=[2])


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    scipy_io = pytest.importorskip("scipy.io", reason="scipy writes the lists of this test")
    root = tmp_path / "dogs"
    files = [
        "n02085620-Chihuahua/n02085620_10074.jpg",
        "n02085620-Chihuahua/n02085620_7.jpg",
        "n02086240-Shih-Tzu/n02086240_1.jpg",
    ]
    for file in files:
        picture(root / "Images" / file)
    for split, chosen in (("train", files[:1]), ("test", files[1:])):
        cells = np.empty((len(chosen), 1), dtype=object)
        cells[:, 0] = chosen
        scipy_io.savemat(root / f"{split}_list.mat", {"file_list": cells})
    note = root / "Annotation" / "n02086240-Shih-Tzu" / "n02086240_1"
    note.parent.mkdir(parents=True)
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    note.write_text(f"<annotation><object><name>Shih-Tzu</name>{box}</object></annotation>")
    return root


def test_dogs(dogs: Path) -> None:
    test = StanfordDogs(dogs, "test", size=8)
    assert test.class_names == ["Chihuahua", "Shih-Tzu"]
    assert test.labels == [0, 1]
    assert test[1][0].shape == (3, 8, 8)
    assert test.boxes(1) == [(1, 2, 30, 20)]
    assert len(StanfordDogs(dogs, "train")) == 1
    assert len(StanfordDogs(dogs, "all")) == 3
    with pytest.raises(FileNotFoundError, match=r"expected a file at .*n02085620_7"):
        test.boxes(0)
    (dogs / "Annotation" / "n02086240-Shih-Tzu" / "n02086240_1").write_text("<annotation>")
    with pytest.raises(ValueError, match="expected boxes"):
        test.boxes(1)


def test_dogs_text_lists(dogs: Path) -> None:
    (dogs / "lists").mkdir()
    (dogs / "lists" / "test_list.txt").write_text("n02086240-Shih-Tzu/n02086240_1.jpg\n")
    assert StanfordDogs(dogs, "test").labels == [1]


def test_broken_dogs_get_a_sentence(dogs: Path) -> None:
    with pytest.raises(ValueError, match="split: expected"):
        StanfordDogs(dogs, "val")
    (dogs / "test_list.mat").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"expected the variable 'file_list' in .*test_list.mat"):
        StanfordDogs(dogs, "test")
    (dogs / "test_list.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected one of .*test_list.txt.*test_list.mat.*found none"):
        StanfordDogs(dogs, "test")
    (dogs / "test_list.txt").write_text("n02086240-Shih-Tzu/gone.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"that are not there, the first .*gone.jpg"):
        StanfordDogs(dogs, "test")
    (dogs / "test_list.txt").write_text("n0-Dodo/gone.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"class.* without a folder .*n0-Dodo"):
        StanfordDogs(dogs, "test")


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes the import of a package fail, as where it is not installed."""
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_dogs_without_scipy(dogs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "scipy")
    with pytest.raises(ImportError, match=r"expected scipy, to read .*pip install scipy"):
        StanfordDogs(dogs, "test")


def test_digits() -> None:
    train, test, everything = digits("train"), digits("test"), digits("all")
    assert (len(train), len(test), len(everything)) == (1000, 797, 1797)
    image, label, source = test[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert torch.equal(image[0], image[2])
    assert source == "digits/1000"
    assert torch.equal(everything[1000][0], image)
    assert everything[1000][1] == label
    assert torch.equal(test.batch()[0], image)
    assert test.class_names == list("0123456789")
    assert np.bincount(test.labels).min() > 50
    with pytest.raises(ValueError, match="split: expected one of"):
        digits("validation")
    with pytest.raises(IndexError):
        test[797]


def test_digits_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sklearn")
    with pytest.raises(ImportError, match=r"expected scikit-learn.*pip install scikit-learn"):
        digits()
