"""Data sets are split, scaled and made noisy as said; idx files are read, and bad ones refused."""

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from fastlr import data

PARTS = {"train": 12, "t10k": 5}


def write_fashion_mnist(folder, *, packed=False, labels=None):
    """The four files with random contents; returns what is in them."""
    rng = np.random.default_rng(0)
    contents = {}
    for part, n in PARTS.items():
        contents[part] = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10
        if labels is not None:
            contents[part] = contents[part][0], np.asarray(labels, np.uint8)
        for array, name in zip(contents[part], ("images-idx3-ubyte", "labels-idx1-ubyte"), strict=True):
            header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
            raw = header + array.tobytes()
            path = folder / f"{part}-{name}"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                path.write_bytes(raw)
    return contents


def test_digits_hold_every_sample_once():
    from sklearn.datasets import load_digits

    images, _ = load_digits(return_X_y=True)
    digits = data.load("digits")
    assert (digits.x_train.shape, digits.x_test.shape) == ((1347, 64), (450, 64))
    assert (digits.x_train.dtype, digits.y_train.dtype) == (torch.float32, torch.int64)
    scale = (images.max() - images.min()) / float(digits.x_train.max() - digits.x_train.min())
    both = torch.cat([digits.x_train, digits.x_test]).numpy()
    restored = np.rint((both - both.min()) * scale)
    assert sorted(map(tuple, restored)) == sorted(map(tuple, images))


def test_digits_are_standardised_on_the_training_set_alone():
    digits = data.load("digits")
    assert digits.x_train.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert digits.x_train.std().item() == pytest.approx(1.0, abs=1e-6)
    assert digits.x_test.mean().item() != pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_label_noise_replaces_that_part_of_the_training_labels(fraction):
    clean, noisy = data.load("digits"), data.load("digits", label_noise=fraction, seed=3)
    changed = (clean.y_train != noisy.y_train).double().mean().item()
    assert changed == pytest.approx(0.9 * fraction, abs=0.03)  # a tenth is drawn as it was
    assert torch.equal(clean.y_test, noisy.y_test)
    assert torch.equal(clean.x_train, noisy.x_train)
    assert torch.equal(noisy.y_train, data.load("digits", label_noise=fraction, seed=3).y_train)
    other = data.load("digits", label_noise=fraction, seed=4)
    assert torch.equal(noisy.y_train, other.y_train) == (fraction == 0.0)
    assert torch.equal(noisy.x_train, other.x_train)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_idx_files_are_read(tmp_path, packed):
    contents = write_fashion_mnist(tmp_path, packed=packed)
    loaded = data.load("fashion-mnist", tmp_path)
    pixels = contents["train"][0].astype(np.float64)
    mean, deviation = pixels.mean(), pixels.std(ddof=1)
    for part, x, y in (
        ("train", loaded.x_train, loaded.y_train),
        ("t10k", loaded.x_test, loaded.y_test),
    ):
        images, labels = contents[part]
        expected = (images.reshape(PARTS[part], 784) - mean) / deviation
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-4, atol=1e-5)
        assert y.tolist() == labels.tolist()


def damaged(folder, change):
    write_fashion_mnist(folder, packed=change.startswith("gzip"))
    if change == "missing":
        (folder / "t10k-labels-idx1-ubyte").unlink()
    elif change == "cut short":
        path = folder / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "cut in the header":
        (folder / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    elif change == "other type":
        path = folder / "train-labels-idx1-ubyte"
        path.write_bytes(b"\0\0\x09\x01" + path.read_bytes()[4:])
    elif change == "gzip cut short":
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-20])
    elif change == "gzip that is none":
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"<html>not found</html>")
    elif change == "labels beyond 9":
        write_fashion_mnist(folder, labels=[10] * 12)
    elif change == "labels missing":
        write_fashion_mnist(folder, labels=[1, 2, 3])
    elif change == "no samples":
        for name, shape in (("images-idx3", (0, 28, 28)), ("labels-idx1", (0,))):
            header = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
            (folder / f"t10k-{name}-ubyte").write_bytes(header)
    elif change == "sizes below 0":
        path = folder / "train-images-idx3-ubyte"
        path.write_bytes(struct.pack(">I3i", 0x803, -12, -28, 28) + path.read_bytes()[16:])
    elif change == "other sizes to test on":
        images = struct.pack(">I3I", 0x803, 5, 14, 14) + bytes(5 * 14 * 14)
        (folder / "t10k-images-idx3-ubyte").write_bytes(images)
    elif change == "all alike":
        images = struct.pack(">I3I", 0x803, 12, 28, 28) + bytes(12 * 28 * 28)
        (folder / "train-images-idx3-ubyte").write_bytes(images)


DAMAGES = {
    "missing": (FileNotFoundError, "apt install dataset-fashion-mnist"),
    "cut short": (ValueError, "cut short"),
    "cut in the header": (ValueError, "cut short"),
    "other type": (ValueError, "no idx file"),
    "gzip cut short": (ValueError, "damaged"),
    "gzip that is none": (ValueError, "damaged"),
    "labels beyond 9": (ValueError, "10 labels"),
    "labels missing": (ValueError, "one of 10 labels for each image"),
    "no samples": (ValueError, "one of 10 labels for each image"),
    "sizes below 0": (ValueError, "no idx file"),
    "other sizes to test on": (ValueError, "images of 784 pixels, the t10k files of 196"),
    "all alike": (ValueError, "the training images of fashion-mnist in .* are all alike"),
}


@pytest.mark.parametrize(("change", "error"), DAMAGES.items(), ids=DAMAGES.keys())
def test_bad_files_are_refused(tmp_path, change, error):
    damaged(tmp_path, change)
    with pytest.raises(error[0], match=error[1]):
        data.load("fashion-mnist", tmp_path)


# -- CIFAR-10 ----------------------------------------------------------------------------------------

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def write_cifar10(folder, **changes):
    """The six files with random contents; returns their pixels and classes. changes: of the second one."""
    rng = np.random.default_rng(0)
    contents = []
    for i, name in enumerate(BATCHES):
        pixels, labels = rng.integers(0, 256, (4, 3072), np.uint8), [int(k) for k in rng.integers(0, 10, 4)]
        contents.append((pixels, labels))
        batch = {b"data": pixels, b"labels": labels, b"batch_label": b"of", b"filenames": [b"a.png"] * 4}
        batch |= {key.encode(): value for key, value in changes.items()} if i == 1 else {}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return contents


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"], ids=["folder", "folder above"])
def test_cifar10_is_read(tmp_path, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    contents = write_cifar10(tmp_path / inner)
    loaded = data.load("cifar10", tmp_path)
    pixels = np.concatenate([pixels for pixels, _ in contents[:-1]]).astype(np.float64)
    mean, deviation = pixels.mean(), pixels.std(ddof=1)
    np.testing.assert_allclose(loaded.x_train.numpy(), (pixels - mean) / deviation, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        loaded.x_test.numpy(), (contents[-1][0] - mean) / deviation, rtol=1e-4, atol=1e-4
    )
    assert loaded.y_train.tolist() == [label for _, labels in contents[:-1] for label in labels]
    assert loaded.y_test.tolist() == contents[-1][1]


class Code:
    def __reduce__(self):
        return print, ("this is code",)


BAD_BATCHES = {
    "code": ({"data": Code()}, "no batch of CIFAR-10's python version"),
    "no array": ({"data": b"pixels"}, "no batch of CIFAR-10's python version"),
    "other pixels": ({"data": np.zeros((4, 784), np.uint8)}, "image of 3072 bytes"),
    "floats": ({"data": np.zeros((4, 3072))}, "image of 3072 bytes"),
    "a label too many": ({"labels": [0] * 5}, "image of 3072 bytes"),
    "an eleventh class": ({"labels": [0, 1, 2, 10]}, "one of 10 labels"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_bad_batches_of_cifar10_are_refused(tmp_path, changes, message, capsys):
    write_cifar10(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"data_batch_2 .*{message}"):
        data.load("cifar10", tmp_path)
    assert capsys.readouterr().out == ""


def test_missing_and_cut_batches_of_cifar10_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cifar10 needs a path"):
        data.load("cifar10")
    with pytest.raises(FileNotFoundError, match=r"no data_batch_1 in .*; name the folder of CIFAR-10's"):
        data.load("cifar10", tmp_path)
    write_cifar10(tmp_path)
    path = tmp_path / "test_batch"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="test_batch is no batch"):
        data.load("cifar10", tmp_path)
    write_cifar10(tmp_path)
    path.write_bytes(pickle.dumps({b"data": "pixels"}, protocol=0).replace(b"data", b"dat\xff"))
    with pytest.raises(ValueError, match="test_batch is no batch"):
        data.load("cifar10", tmp_path)


def test_a_sixth_is_held_out():
    digits = data.load("digits")
    x, y, x_val, y_val = digits.held_out()
    assert (len(x), len(x_val)) == (1347 - 224, 224)
    assert torch.equal(torch.cat([x_val, x]), digits.x_train)
    assert torch.equal(torch.cat([y_val, y]), digits.y_train)


def test_a_data_set_goes_to_a_device():
    moved = data.load("digits").to("meta")
    assert {t.device.type for t in (moved.x_train, moved.y_train, moved.x_test, moved.y_test)} == {"meta"}


BAD_ARGUMENTS = {
    "name": ({"name": "mnist"}, "name must be one of digits, fashion-mnist"),
    "label_noise above 1": ({"label_noise": 1.1}, "label_noise"),
    "label_noise below 0": ({"label_noise": -0.1}, "label_noise"),
    "label_noise a word": ({"label_noise": "much"}, "label_noise must be .* got 'much'"),
    "seed": ({"seed": 1.5}, "seed must be an integer >= 0, got 1.5"),
    "digits from a path": ({"path": "/tmp"}, "not read from a path"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("seed", [None, 0])
def test_batches_cover_every_sample_once(size, seed):
    x = torch.arange(size)
    batches = data.Batches(x, -x, batch_size=8, seed=seed)
    passes = [list(batches) for _ in range(3)]
    for batch_list in passes:
        assert len(batch_list) == len(batches)
        assert all(len(inputs) == 8 for inputs, _ in batch_list[:-1])
        assert torch.equal(torch.cat([inputs for inputs, _ in batch_list]).sort().values, x)
        assert all(torch.equal(inputs, -targets) for inputs, targets in batch_list)
    orders = [torch.cat([inputs for inputs, _ in batch_list]).tolist() for batch_list in passes]
    if seed is None:
        assert orders == [x.tolist()] * 3
    elif size > 4:
        assert orders[0] != orders[1]
    again = torch.cat([inputs for inputs, _ in data.Batches(x, -x, batch_size=8, seed=seed)]).tolist()
    assert again == orders[0]


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        data.Batches(torch.zeros(2), torch.zeros(3), 1)
    for size in (0, 2.5, "2", True):
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got"):
            data.Batches(torch.zeros(2), torch.zeros(2), size)
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        data.Batches(torch.zeros(2), torch.zeros(2), 1, seed=-1)
    with pytest.raises(TypeError, match="y must be a tensor of samples, got None"):
        data.Batches(torch.zeros(2), None, 1)
