"""Fashion-MNIST's reader, its net, and decoders trained by recipe; on a small file in the real layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finecf
from finecf.data import fashion_mnist
from finecf.training import (
    load_fashion_net,
    mirror_classifier,
    mirror_data,
    mirror_recipe,
    predict,
    train_decoder,
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
    files = f"--data {folder.name} --classifier {net_file.name}"
    told = f"finecf train mirror --on fashion {files} --seed 0 --precision float32 --steps 3 --images 90"
    assert meta["command"] == told
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


def test_a_decoder_of_ones_own_by_a_recipe(tmp_path: Path) -> None:
    """Images that are prepared, previews of them as they were given, and a file that explains as the explainer does."""
    held_out = finecf.data.digits("train")
    x, labels = held_out.batch(), torch.from_numpy(held_out.labels)
    net, meta = finecf.training.load_digits_net()
    classifier = finecf.wrap(_Scaled(net).eval(), class_names=meta["classes"], preprocess=_scaled)
    out, strips = tmp_path / "m.safetensors", tmp_path / "strips"
    shown = x[(labels == 4) | (labels == 9)][:6], labels[(labels == 4) | (labels == 9)][:6]
    settings = {"steps": 2, "learning_rate": 1e-4, "weights": {"feature": 0.5}, "image_range": (-1.0, 1.0)}
    previews = {"previews": strips, "preview_images": shown, "preview_every": 1}
    about = {"photographer": "nobody", "pairs": "none", "threads": 99}
    recipe = replace(mirror_recipe("digits"), shift="per_cell")
    own = train_decoder(classifier, (x, labels), [("4", "9")], out, recipe, **settings, **previews, about=about)
    read = finecf.MirrorCFE(classifier, out)
    assert (own.reflection, own.shift) == (read.reflection, read.shift) == ("two_class", "per_cell")
    assert (own.meta["photographer"], own.meta["pairs"]) == ("nobody", [(4, 9)])
    assert own.meta["threads"] == torch.get_num_threads()
    trained = own.meta["recipe"]
    assert (trained["steps"], trained["learning_rate"], trained["augment"]) == (2, 1e-4, recipe.settings["augment"])
    assert (trained["weights"]["feature"], trained["weights"]["adversarial"]) == (0.5, 0.3)
    assert [file.name for file in sorted(strips.iterdir())] == ["step_000001.png", "step_000002.png"]
    with Image.open(strips / "step_000002.png") as strip:
        drawn = torch.from_numpy(np.array(strip)).float() / 255
    known = [
        x
        for x, label in zip(*shown, strict=True)
        if int(classifier.logits(classifier.prepare(x[None])).argmax()) in (4, 9)
    ]
    # Behind the image, as it was before it was prepared, stand what the decoder draws of it, once for each k.
    once = finecf.MirrorCFE(classifier, own.decoder, shift="per_cell", corrections=0)
    said = classifier.logits(classifier.prepare(torch.stack(known))).argmax(1)
    paths = once.explain(torch.stack(known), torch.where(said == 4, 9, 4), steps=9)
    rows = [torch.cat([image[None], (path.images + 1) / 2]) for image, path in zip(known, paths, strict=True)]
    expected = torch.cat([row.permute(2, 0, 3, 1).flatten(1, 2) for row in rows])
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1 / 255)

    small = train_decoder(classifier, (x, labels), [(4, 9)], out, steps=1, image_range=(-1.0, 1.0), reflection="lbfgs")
    assert small.meta["recipe"]["kl_order"] == "latent"  # that for pictures
    assert (small.reflection, small.shift) == ("lbfgs", "uniform")
    assert finecf.MirrorCFE(classifier, out).reflection == "lbfgs"
    with pytest.raises(ValueError, match="previews: give preview_images"):
        train_decoder(classifier, (x, labels), [(4, 9)], out, previews=strips)
    with pytest.raises(
        ValueError, match="there are recipes for digits, birds, fashion, photographs, pictures; got 'x'"
    ):
        mirror_recipe("x")


class _Scaled(torch.nn.Module):
    """A net for images from 0 to 1 that is given them from -1 to 1."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net((x + 1) / 2)


def _scaled(images: torch.Tensor) -> torch.Tensor:
    return 2 * images - 1


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
