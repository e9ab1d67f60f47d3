"""The candidate bank: grouping, files, memory, interrupts, and what bad input gets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.small_nets import DEVICE, Flat, PooledNet, images, seeded
from torch import Tensor

import finecf
from finecf.models import BankInterrupted, CandidateBank, Classifier

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
NAMES = ["waxwing", "oriole", "grebe", "tanager", "bunting"]


@pytest.fixture
def clf() -> Classifier:
    return finecf.wrap(seeded(PooledNet), class_names=NAMES)


def labelled(clf: Classifier, count: int = 24, wrong: int = 4, side: int = 32, seed: int = 0) -> list[tuple[Any, ...]]:
    """Batches of images whose labels are the predictions spread over classes, the first `wrong` of them false."""
    x = images(count, side, seed=seed) * torch.linspace(0.2, 3, count, device=DEVICE)[:, None, None, None]
    # The weights are random: shifting the bias makes every class come up.
    with torch.no_grad():
        free = clf.logits(x) - clf.model.fc.bias
        clf.model.fc.bias.copy_(-free.mean(0))
    labels = clf.logits(x).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 5
    return [
        (x[i : i + 7], labels[i : i + 7], [f"bird {j}" for j in range(i, min(i + 7, count))])
        for i in range(0, count, 7)
    ]


def flat(batches: list[tuple[Any, ...]]) -> tuple[Tensor, Tensor, list[str]]:
    x, y, sources = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y), [s for part in sources for s in part]


def assert_same(a: CandidateBank, b: CandidateBank) -> None:
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.rows(), b.rows())
    torch.testing.assert_close(a.norms, b.norms)
    for name in ("grid", "sources", "classes", "class_names", "fingerprint", "seen", "image_size", "complete", "dtype"):
        assert getattr(a, name) == getattr(b, name), name
    for row in range(0, len(a), a.cells):
        one, two = a.patch_image(row)[0], b.patch_image(row)[0]
        assert (one is None) == (two is None)
        if one is not None:
            assert np.array_equal(one, two)


def test_rows_are_the_cells_of_correctly_classified_images_in_class_order(clf: Classifier) -> None:
    batches = labelled(clf)
    bank = CandidateBank.from_loader(clf, batches)
    x, labels, sources = flat(batches)
    features, logits = clf.features_and_logits(x)
    right = logits.argmax(1) == labels
    assert int(right.sum()) == 20
    assert bank.grid == (8, 8)
    assert len(bank) == 20 * 64
    assert bank.width == 12
    place = 0
    for label in sorted(set(labels.tolist())):
        start, stop = bank.class_range(label)
        assert start == place
        assert bank.class_range(NAMES[label]) == (start, stop)
        place = stop
        wanted = [i for i in range(len(x)) if right[i] and labels[i] == label]
        want = features[wanted].flatten(2).transpose(1, 2).reshape(-1, 12)
        torch.testing.assert_close(bank.rows(start, stop), want.cpu())
        for i, row in zip(wanted, range(start, stop, 64), strict=True):
            assert bank.source(row + 5) == sources[i]
            assert int(bank.image_index[row + 5]) == row // 64
            assert int(bank.cell_index[row + 5]) == 5
            picture, cell = bank.patch_image(row + 13)
            assert cell == (1, 5)
            assert picture is not None
            assert picture.dtype == np.uint8
            assert picture.shape == (32, 32, 3)
    assert place == len(bank)
    torch.testing.assert_close(bank.norms, bank.rows().norm(dim=1))
    assert sum(bank.seen.values()) == 24


def test_pictures_are_the_images(clf: Classifier) -> None:
    x = images(3)
    labels = clf.logits(x).argmax(1)
    mean, deviation = (torch.tensor(v, device=DEVICE).view(3, 1, 1) for v in IMAGENET)
    for shown in (
        x,
        (x - mean) / deviation,
    ):
        bank = CandidateBank.from_loader(clf, [(shown, labels)], correct_only=False)
        order = labels.argsort(stable=True).tolist()
        for place, i in enumerate(order):
            picture, _ = bank.patch_image(place * 64)
            assert picture is not None
            difference = picture.astype(float) / 255 - x[i].permute(1, 2, 0).cpu().numpy()
            assert np.abs(difference).max() < 0.6 / 255


def test_false_images_may_stay(clf: Classifier) -> None:
    assert len(CandidateBank.from_loader(clf, labelled(clf), correct_only=False).labels) == 24


def test_some_classes(clf: Classifier) -> None:
    batches = labelled(clf)
    whole = CandidateBank.from_loader(clf, batches)
    some = CandidateBank.from_loader(clf, batches, classes=["grebe", 0])
    assert some.classes == [0, 2]
    for label in (0, 2):
        assert torch.equal(some.rows(*some.class_range(label)), whole.rows(*whole.class_range(label)))
    with pytest.raises(ValueError, match="no cells of class 'bunting'; it was built for 'waxwing', 'grebe'"):
        some.class_range(4)
    with pytest.raises(ValueError, match=r"unknown class 'grebes'.*'grebe'"):
        some.class_range("grebes")


def test_class_of_which_nothing_is_right_has_an_empty_range(clf: Classifier) -> None:
    x, labels, _ = flat(labelled(clf, wrong=0))
    labels[labels == 1] = 2
    bank = CandidateBank.from_loader(clf, [(x, labels)], classes=range(5))
    start, stop = bank.class_range("oriole")
    assert start == stop
    assert bank.rows(start, stop).shape == (0, 12)
    assert bank.seen.get(1, 0) == 0


def test_single_images_as_a_dataset_gives_them(clf: Classifier) -> None:
    x, labels, sources = flat(labelled(clf))
    single = CandidateBank.from_loader(clf, [(x[i], int(labels[i]), sources[i]) for i in range(len(x))])
    batched = CandidateBank.from_loader(clf, [(x, labels, sources)])
    assert single.sources == batched.sources
    torch.testing.assert_close(single.rows(), batched.rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keep_images", ["auto", False, 40_000])
def test_file_round_trip(clf: Classifier, tmp_path: Path, dtype: torch.dtype, keep_images: Any) -> None:
    bank = CandidateBank.from_loader(clf, labelled(clf), dtype=dtype, keep_images=keep_images)
    bank.save(tmp_path / "bank.safetensors")
    for memory_map in (True, False):
        loaded = CandidateBank.load(tmp_path / "bank.safetensors", memory_map=memory_map)
        assert_same(bank, loaded)
        assert torch.equal(loaded.features, bank.features)
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]
    # A bank saved over the file it is read from stays readable, and so does the new file.
    loaded = CandidateBank.load(tmp_path / "bank.safetensors")
    loaded.save(tmp_path / "bank.safetensors")
    assert_same(loaded, CandidateBank.load(tmp_path / "bank.safetensors"))


def test_files_are_ordinary_safetensors(clf: Classifier, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    bank = CandidateBank.from_loader(clf, labelled(clf))
    bank.save(tmp_path / "bank.safetensors")
    tensors = safetensors.load_file(tmp_path / "bank.safetensors")
    assert torch.equal(tensors["features"], bank.features)
    assert torch.equal(tensors["labels"], bank.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_built_on_the_disk_is_the_same(clf: Classifier, tmp_path: Path, dtype: torch.dtype) -> None:
    batches = labelled(clf)
    disk = CandidateBank.from_loader(clf, batches, dtype=dtype, path=tmp_path / "new" / "bank.safetensors")
    assert_same(CandidateBank.from_loader(clf, batches, dtype=dtype), disk)
    assert "bank.safetensors" in repr(disk)


@pytest.mark.parametrize("on_disk", [False, True])
def test_extend_is_as_if_built_at_once(clf: Classifier, tmp_path: Path, on_disk: bool) -> None:
    batches = labelled(clf)
    whole = CandidateBank.from_loader(clf, batches)
    bank = CandidateBank.from_loader(clf, batches[:2], path=tmp_path / "bank.safetensors" if on_disk else None)
    assert bank.extend(clf, batches[2:]) is bank
    assert_same(whole, bank)
    if on_disk:
        assert_same(whole, CandidateBank.load(tmp_path / "bank.safetensors"))
    with pytest.raises(ValueError, match="other weights"):
        bank.extend(finecf.wrap(seeded(PooledNet, seed=1)), batches)
    small = labelled(clf, side=16)
    bank.fingerprint = clf.fingerprint()
    with pytest.raises(ValueError, match="images of the same size"):
        bank.extend(clf, small)


def stop_after(batches: list[tuple[Any, ...]], count: int) -> Iterator[tuple[Any, ...]]:
    yield from batches[:count]
    raise KeyboardInterrupt


@pytest.mark.parametrize("on_disk", [False, True])
def test_interrupt_leaves_a_loadable_partial_bank(clf: Classifier, tmp_path: Path, on_disk: bool) -> None:
    batches = labelled(clf)
    path = tmp_path / "bank.safetensors" if on_disk else None
    with pytest.raises(KeyboardInterrupt) as caught:
        CandidateBank.from_loader(clf, stop_after(batches, 2), path=path)
    assert isinstance(caught.value, BankInterrupted)
    partial = caught.value.bank
    assert not partial.complete
    assert "not complete" in repr(partial)
    assert_rows = CandidateBank.from_loader(clf, batches[:2]).rows()
    assert torch.equal(partial.rows(), assert_rows)
    if path is not None:
        loaded = CandidateBank.load(path)
        assert not loaded.complete
        assert torch.equal(loaded.rows(), assert_rows)
        assert str(path) in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]


def test_interrupt_before_anything_is_plain(clf: Classifier, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        CandidateBank.from_loader(clf, stop_after(labelled(clf), 0), path=tmp_path / "bank")
    assert not isinstance(caught.value, BankInterrupted)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_in_the_middle_of_a_batch_loses_that_batch(clf: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = labelled(clf)
    real, calls = clf.features_and_logits, 0

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(x)

    monkeypatch.setattr(clf, "features_and_logits", forward)
    with pytest.raises(BankInterrupted) as caught:
        CandidateBank.from_loader(clf, batches)
    monkeypatch.undo()
    assert_same_rows = CandidateBank.from_loader(clf, batches[:2])
    assert torch.equal(caught.value.bank.rows(), assert_same_rows.rows())


def test_interrupt_while_extending_keeps_what_is_done(clf: Classifier) -> None:
    batches = labelled(clf)
    bank = CandidateBank.from_loader(clf, batches[:1])
    with pytest.raises(BankInterrupted) as caught:
        bank.extend(clf, stop_after(batches[1:], 2))
    assert caught.value.bank is bank
    assert not bank.complete
    assert torch.equal(bank.rows(), CandidateBank.from_loader(clf, batches[:3]).rows())


def test_failed_save_leaves_the_old_file(clf: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = CandidateBank.from_loader(clf, labelled(clf))
    bank.save(tmp_path / "bank")
    before = (tmp_path / "bank").read_bytes()

    def fail(_: int) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(bank, "_block", fail)
    with pytest.raises(KeyboardInterrupt):
        bank.save(tmp_path / "bank")
    assert (tmp_path / "bank").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file_gets_a_sentence(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("bank")
    bank = CandidateBank(torch.rand(12, 5), [0, 0, 3], (2, 2), sources=["a", "b", "c"])
    bank.save(folder / "whole")
    data = (folder / "whole").read_bytes()
    (folder / "cut").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"cut is (truncated: its header promises|not a safetensors file)"):
        CandidateBank.load(folder / "cut")


def test_other_files_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        CandidateBank.load(tmp_path / "none")
    (tmp_path / "text").write_text("not a bank at all, but long enough to have a header")
    with pytest.raises(ValueError, match="not a safetensors file"):
        CandidateBank.load(tmp_path / "text")
    (tmp_path / "damaged").write_bytes((8).to_bytes(8, "little") + b"{broken}")
    with pytest.raises(ValueError, match="header is damaged"):
        CandidateBank.load(tmp_path / "damaged")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="is no candidate bank"):
        CandidateBank.load(tmp_path / "weights")


def test_damaged_description_gets_a_sentence(tmp_path: Path) -> None:
    CandidateBank(torch.rand(4, 5), [0], (2, 2)).save(tmp_path / "bank")
    data = (tmp_path / "bank").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for break_it in (lambda m: m.update(bank="{}"), lambda m: m.update(bank="nothing")):
        changed = json.loads(json.dumps(header))
        break_it(changed["__metadata__"])
        text = json.dumps(changed).encode().ljust(length)
        (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(ValueError, match="is damaged"):
            CandidateBank.load(tmp_path / "bad")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_bank_is_refused(tmp_path: Path, value: float) -> None:
    features = torch.rand(8, 5)
    features[6, 2] = value
    with pytest.raises(ValueError, match=r"NaN or inf .row 6, cell 2 of image 1"):
        CandidateBank(features, [0, 1], (2, 2))
    good = CandidateBank(torch.rand(8, 5), [0, 1], (2, 2))
    good.save(tmp_path / "bank")
    data = bytearray((tmp_path / "bank").read_bytes())
    at = data.find(good.features.numpy().tobytes())
    data[at : at + 4] = np.float32(value).tobytes()
    (tmp_path / "bank").write_bytes(data)
    with pytest.raises(ValueError, match=r"NaN or inf in rows 0\.\.4"):
        CandidateBank.load(tmp_path / "bank").rows(0, 4)


def test_bad_banks_get_a_sentence(clf: Classifier) -> None:
    rows = torch.rand(8, 5)
    for words, arguments in [
        ("the bank is empty", (rows[:0], [], (2, 2))),
        ("labels of the bank fall", (rows, [1, 0], (2, 2))),
        ("has 8 rows; 1 images of 2 x 2", (rows, [1], (2, 2))),
        (r"float64 of shape \[8, 5\]; expected float32 or float16", (rows.double(), [0, 1], (2, 2))),
        ("2 images and 1 sources", (rows, [0, 1], (2, 2), ["a"])),
    ]:
        with pytest.raises(ValueError, match=words):
            CandidateBank(*arguments)
    bank = CandidateBank(rows, [0, 1], (2, 2))
    with pytest.raises(ValueError, match=r"rows 4\.\.9 are not in the bank's 0\.\.8"):
        bank.rows(4, 9)
    with pytest.raises(ValueError, match="row 8 is not in the bank"):
        bank.patch_image(8)
    with pytest.raises(ValueError, match="rows have 5 features, and layer 'body' gives 12"):
        bank.check(clf, clf.features(images(1)))
    fold = clf.fold(clf.features(images(1)))
    assert fold is not None
    with pytest.raises(ValueError, match="rows have 5 features; the head takes 12"):
        bank.candidate_logits(fold)


def test_bad_loaders_get_a_sentence(clf: Classifier) -> None:
    x = images(2)
    for words, loader in [
        ("the loader gave no images", []),
        ("a Tensor; expected .images, labels.", [x]),
        ("label 5; the classifier has classes 0..4", [(x, torch.tensor([0, 5]))]),
        ("2 images, 1 labels", [(x, torch.tensor([0]))]),
        (r"labels is torch.float32 of shape \[2\]; expected integers", [(x, torch.zeros(2))]),
        ("NaN or inf", [(x * float("nan"), torch.tensor([0, 1]))]),
    ]:
        with pytest.raises(ValueError, match=words):
            CandidateBank.from_loader(clf, loader)
    predicted = clf.logits(x).argmax(1)
    with pytest.raises(ValueError, match="none of the 2 images of the wanted classes is classified as its label"):
        CandidateBank.from_loader(clf, [(x, (predicted + 1) % 5)])
    with pytest.raises(ValueError, match="none of the 2 images is labelled bunting"):
        CandidateBank.from_loader(clf, [(x, torch.zeros(2, dtype=torch.int64))], classes=["bunting"])
    with pytest.raises(ValueError, match="maps of different shapes"):
        CandidateBank.from_loader(clf, [(x, predicted), (images(2, 48), predicted)], correct_only=False)
    with pytest.raises(ValueError, match=r"keep_images is 'yes'; expected"):
        CandidateBank.from_loader(clf, [(x, predicted)], keep_images="yes")
    with pytest.raises(ValueError, match=r"keeps torch\.float32 or torch\.float16"):
        CandidateBank.from_loader(clf, [(x, predicted)], dtype=torch.bfloat16)


def test_features_beyond_half_precision_are_refused(clf: Classifier) -> None:
    with torch.no_grad():
        clf.model.body[0].weight.mul_(1e7)
    x = images(2)
    with pytest.raises(ValueError, match=r"larger than float16 holds.*dtype=torch\.float32"):
        CandidateBank.from_loader(clf, [(x, clf.logits(x).argmax(1))], dtype=torch.float16)


def test_another_classifier_is_refused(clf: Classifier) -> None:
    bank = CandidateBank.from_loader(clf, labelled(clf))
    bank.check(clf, clf.features(images(1)))
    for other, words in [
        (finecf.wrap(seeded(PooledNet, seed=1)), "other weights"),
        (finecf.wrap(clf.model, layer="body.0"), "layer 'body'; this classifier has 'body.0'"),
        (finecf.wrap(seeded(PooledNet, classes=7)), "number of classes 5; this classifier has 7"),
    ]:
        other.logits(images(1))  # then the number of classes is known
        with pytest.raises(ValueError, match=words):
            bank.check(other)
    bank.check(finecf.wrap(clf.model))  # and before that it is not compared


def test_pictures_that_were_not_kept_are_read_from_their_files(clf: Classifier, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "bird.png")
    (tmp_path / "broken.png").write_text("no image")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    label = clf.logits(x).argmax(1)
    loader = [(x, label, [tmp_path / "bird.png"]), (x, label, [tmp_path / "broken.png"]), (x, label)]
    bank = CandidateBank.from_loader(clf, loader, keep_images=False)
    first, second, third = (bank.patch_image(row)[0] for row in (0, 64, 128))
    assert first is not None
    assert np.array_equal(first, pixels)
    assert second is None
    assert third is None


def test_candidate_logits_are_kept_until_the_weights_change(clf: Classifier) -> None:
    bank = CandidateBank.from_loader(clf, labelled(clf))
    features = clf.features(images(1))

    def logits() -> Tensor:
        fold = clf.fold(features)
        assert fold is not None
        return bank.candidate_logits(fold, 3, 90)

    first = logits()
    fc = clf.model.fc
    torch.testing.assert_close(first, bank.rows(3, 90).to(DEVICE) @ fc.weight.detach().T / 64)
    assert logits() is first
    with torch.no_grad():
        fc.weight.mul_(2)
    torch.testing.assert_close(logits(), first * 2)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), height=st.integers(1, 3), width=st.integers(1, 3), features=st.integers(1, 9))
def test_ranges_slices_and_rows(data: st.DataObject, height: int, width: int, features: int) -> None:
    labels = sorted(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=12)))
    rows = torch.rand(len(labels) * height * width, features)
    bank = CandidateBank(rows, labels, (height, width), classes=range(7))
    covered = 0
    for label in range(7):
        start, stop = bank.class_range(label)
        assert stop - start == labels.count(label) * height * width
        assert start == covered
        assert all(labels[i] == label for i in bank.image_index[start:stop].tolist())
        covered = stop
    budget = data.draw(st.integers(1, 400))
    pieces = list(bank.slices(max_bytes=budget))
    assert [a for a, _ in pieces] + [len(bank)] == [0] + [b for _, b in pieces]
    assert all(b - a == 1 or (b - a) * features * 4 <= budget for a, b in pieces)
    assert torch.equal(torch.cat([bank.rows(a, b) for a, b in pieces]), rows)


_STREAM = """
import resource, sys, torch
from finecf.models import CandidateBank

bank = CandidateBank.load(sys.argv[1])
bank.rows(0, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0.0
for start, stop in bank.slices(max_bytes=8 << 20):
    total += float(bank.rows(start, stop).sum())
bank.save(sys.argv[1] + ".copy")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, total)
"""


def test_reading_and_writing_a_loaded_bank_takes_little_memory(tmp_path: Path) -> None:
    """80 MB of float16 on the disk, read in slices of 8 MB and written again."""
    images_, cells, width = 400, 49, 2048
    features = torch.ones(images_ * cells, width, dtype=torch.float16)
    CandidateBank(features, [0] * images_, (7, 7)).save(tmp_path / "bank")
    answer = subprocess.run(
        [sys.executable, "-c", _STREAM, str(tmp_path / "bank")], capture_output=True, text=True, check=True
    )
    kilobytes, total = answer.stdout.split()
    assert float(total) == features.numel()
    assert int(kilobytes) < 40 << 10


def test_progress_bar(clf: Classifier, capsys: pytest.CaptureFixture[str]) -> None:
    batches = labelled(clf)
    CandidateBank.from_loader(clf, batches, progress=True)
    assert "bank" in capsys.readouterr().err
    CandidateBank.from_loader(clf, batches, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.cuda
@pytest.mark.parametrize("net", [PooledNet, Flat])
def test_on_cuda(net: type[PooledNet], tmp_path: Path) -> None:
    """A bank built on the device is the one built on the CPU, and folds work there."""
    here, there = finecf.wrap(seeded(net).cpu(), layer="body"), finecf.wrap(seeded(net).cuda(), layer="body")
    assert here.fingerprint()["weights"] == there.fingerprint()["weights"]
    loader = [(images(6), torch.arange(6) % 5)]
    cpu = CandidateBank.from_loader(here, loader, correct_only=False)
    gpu = CandidateBank.from_loader(there, loader, correct_only=False, path=tmp_path / "bank")
    gpu.check(there)
    torch.testing.assert_close(gpu.rows(), cpu.rows(), atol=1e-2, rtol=1e-2)
    features, logits = there.features_and_logits(there.prepare(images(6)))
    assert features.is_cuda
    fold = there.fold(features)
    assert fold is not None, there.fold_reason
    if fold.kind == "linear":
        got = fold.base_logits(6) + fold.cell_logits(features).sum(1)
        assert gpu.candidate_logits(fold, 0, 3).is_cuda
    else:
        got = fold.tail(fold.bias + fold.cell_preactivations(features).sum(1))
        assert fold.candidate_preactivations(gpu.rows(0, 3).cuda(), 2).is_cuda
    torch.testing.assert_close(got, logits, atol=1e-2, rtol=1e-2)
    assert there.cam(features, torch.zeros(6, dtype=torch.int64)).is_cuda
