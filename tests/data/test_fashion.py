"""Fashion-MNIST's reader, its net, and decoders trained by recipe; on a small file in the real layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import finecf
from finecf.data import fashion_mnist
from finecf.training import (
    load_fashion_net,
    mirror_classifier,
    mirror_data,
    mirror_recipe,
    predict,
    train_fashion,
    train_mirror,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Garments that are told apart by how far their stripes are apart."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 400), ("test", 60)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 40, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[np.arange(28) % (label + 2) == 0] += 200
        arrays |= {f"{split}_x": images.astype(np.uint8), f"{split}_y": labels.astype(np.uint8)}
    place = tmp_path_factory.mktemp("data") / "fashion_mnist"
    place.mkdir()
    np.savez_compressed(place / "fashion_mnist.npz", **arrays)
    return place.parent


@pytest.fixture(scope="module")
def net_file(folder: Path) -> Path:
    out = folder / "fashion.safetensors"
    meta = train_fashion(folder, out, epochs=25, batch=40, width=16)
    assert meta["accuracy"] > 0.7
    return out


def test_garments_are_read(folder: Path) -> None:
    test = fashion_mnist(folder)
    image, label, source = test[13]
    assert (len(test), label, source) == (60, 3, "fashion-mnist/test/13")
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    assert float(image.max()) <= 1
    assert torch.equal((image * 255).round().to(torch.uint8), test.batch()[13])
    assert test.class_names[3] == "Dress"
    assert len(fashion_mnist(folder / "fashion_mnist" / "fashion_mnist.npz", "train")) == 400


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"looked for .*fashion_mnist\.npz"):
        fashion_mnist(tmp_path)
    broken = tmp_path / "fashion_mnist.npz"
    broken.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"fashion_mnist\.npz cannot be read"):
        fashion_mnist(tmp_path)
    np.savez(broken, train_x=np.zeros((2, 28, 28)))
    with pytest.raises(ValueError, match=r"expected train_x, train_y, test_x, test_y"):
        fashion_mnist(tmp_path, "train")
    np.savez(broken, test_x=np.zeros((2, 32, 32)), test_y=np.zeros(2))
    with pytest.raises(ValueError, match=r"images \[2, 32, 32\] and 2 labels; expected \[N,28,28\]"):
        fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match="expected train or test, got 'val'"):
        fashion_mnist(tmp_path, "val")


def test_the_net_is_read_back(folder: Path, net_file: Path) -> None:
    net, meta = load_fashion_net(net_file)
    test = fashion_mnist(folder)
    right = (predict(net, test.batch()) == torch.from_numpy(test.labels)).double().mean()
    assert float(right) == pytest.approx(meta["accuracy"], abs=1e-4)


def test_a_decoder_is_trained_by_recipe(folder: Path, net_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "mirror.safetensors"
    meta = train_mirror("fashion", out, folder, net_file, steps=3, images=90, previews=tmp_path / "strips")
    assert [tuple(pair) for pair in meta["pairs"]] == [(0, 2), (4, 6), (7, 9)]
    assert meta["recipe"]["steps"] == 3
    assert meta["command"] == "finecf train mirror --on fashion --seed 0 --precision float32 --steps 3 --images 90"
    assert not out.with_name(out.name + ".resume").exists()
    classifier = mirror_classifier("fashion", net_file)
    mirror = finecf.MirrorCFE(classifier, out)
    pictures, labels = mirror_data("fashion", "test", classifier, folder)
    assert set(labels.tolist()) == {0, 2, 4, 6, 7, 9}
    (found,) = mirror.explain(pictures[:1], "Pullover", source="T-shirt")
    assert found.images.shape == (11, 1, 28, 28)


def test_how_a_set_is_drawn_is_in_the_file(
    folder: Path, net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(mirror_recipe("fashion"), reflection="two_class", shift="per_cell", soften=0.7)
    monkeypatch.setattr("finecf.training.mirror.mirror_recipe", lambda _: recipe)
    out = tmp_path / "mirror.safetensors"
    meta = train_mirror("fashion", out, folder, net_file, steps=1, images=90)
    read = finecf.MirrorCFE(mirror_classifier("fashion", net_file), out)
    assert (read.reflection, read.shift, read.soften) == ("two_class", "per_cell", 0.7)
    assert meta["soften"] == 0.7
    assert (meta["reflection"], meta["recipe"]["reflection"]) == ("two_class", "closed_form")


def test_previews_are_strips_of_every_so_many_steps(tmp_path: Path) -> None:
    folder = tmp_path / "strips"
    train_mirror("digits", tmp_path / "m.safetensors", steps=1, images=80, previews=folder, preview_every=1)
    (file,) = folder.iterdir()
    assert file.name == "step_000001.png"


def test_birds_are_paired_within_their_families() -> None:
    recipe = mirror_recipe("birds")
    assert len(recipe.pairs) == 30
    assert all(p // 4 == q // 4 for p, q in recipe.pairs)
    pictures, labels = mirror_data("birds", "test", mirror_classifier("birds"), images=3)
    assert pictures.shape == (3, 3, 128, 128)
    assert float(pictures.max()) <= 1
    assert len(labels) == 3


def test_unknown_sets_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained on digits, birds, fashion; got 'dogs'"):
        train_mirror("dogs", tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="make one with `finecf train fashion`"):
        train_mirror("fashion", tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="unknown loss 'beauty'"):
        train_mirror("digits", tmp_path / "m.safetensors", images=80, weights={"beauty": 1})
