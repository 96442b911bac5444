"""Images of other programs: read as they are, turned where they are turned, and refused by line where they are not."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hemacrypt.errors import InteropError
from hemacrypt.interop.datasets import read_cifar10, read_images, read_npz, read_tsv

SHAPE = (2, 2, 3)


def test_a_label_and_then_pixels(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("7\t" + "\t".join(map(str, range(12))) + "\r\n-1\t" + "\t".join(["0.5", "-2e1"] * 6) + "\n")
    found = read_images(path, SHAPE)
    assert found.labels is not None
    assert found.labels.tolist() == [7, -1]
    np.testing.assert_array_equal(found.images[0], np.arange(12).reshape(SHAPE))
    np.testing.assert_array_equal(found.images[1].ravel(), [0.5, -20] * 6)
    assert len(read_images(path, SHAPE, limit=1).images) == 1


def test_the_label_may_be_elsewhere_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("\t".join(map(str, range(12))) + "\t3\n")
    found = read_tsv(path, SHAPE, label_column=12)
    assert found.labels is not None
    assert found.labels.tolist() == [3]
    np.testing.assert_array_equal(found.images.ravel(), np.arange(12))
    path.write_text("\t".join(map(str, range(12))) + "\n")
    bare = read_tsv(path, SHAPE, label_column=-1)
    assert bare.labels is None
    np.testing.assert_array_equal(bare.images, found.images)


def test_columns_first_as_cryptonets_writes_cifar(tmp_path: Path) -> None:
    image = np.arange(12).reshape(SHAPE)
    path = tmp_path / "cifar-test.tsv"
    path.write_text("\t".join(["1", *(str(image[c, y, x]) for c in range(2) for x in range(3) for y in range(2))]))
    np.testing.assert_array_equal(read_tsv(path, SHAPE, columns_first=True).images[0], image)


def test_sparse_lines_as_cryptonets_writes_mnist(tmp_path: Path) -> None:
    path = tmp_path / "MNIST-28x28-test.txt"
    path.write_text("5\t12\t0:255\t11:3\n0\t12\n")
    found = read_images(path, SHAPE)
    assert found.labels is not None
    assert found.labels.tolist() == [5, 0]
    np.testing.assert_array_equal(found.images[0].ravel(), [255, *[0] * 10, 3])
    assert not found.images[1].any()


BAD_LINES = {
    "too few values": ("1\t2\t3\n", "line 2: 2 values; expected 12"),
    "a word": ("1\t" + "\t".join(["x"] * 12) + "\n", "line 2: could not convert"),
    "no number": ("1\t" + "\t".join(["nan"] * 12) + "\n", "line 2: a value is not a finite number"),
    "beyond float32": ("1\t" + "\t".join(["1e99"] * 12) + "\n", "line 2: a value is not a finite number"),
    "label": ("cat\t" + "\t".join(["0"] * 12) + "\n", "line 2: 'cat' is not the label"),
    "empty": ("\n", "line 2 is empty"),
    "bytes": ("ÿ" + "\t0" * 12 + "\n", "line 2: 'ascii'"),
    "sparse, another size": ("1\t13\t0:1\n", "line 2: an image of 13 values; expected 12"),
    "sparse, index": ("1\t12\t12:1\n", "line 2: '12:1' is no index:value with an index below 12"),
    "sparse, negative": ("1\t12\t-1:1\n", "line 2: '-1:1' is no index:value"),
    "sparse, mixed": ("1\t12\t1:1\t5\n", "line 2: '5' is no index:value"),
    "endless": ("1\t" + "0" * 2000 + "\n", "line 2 is longer than 12 values"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, name: str) -> None:
    line, words = BAD_LINES[name]
    path = tmp_path / "test.tsv"
    path.write_text("1" + "\t0" * 12 + "\n" + line, encoding="utf-8")
    with pytest.raises(InteropError, match=words):
        read_tsv(path, SHAPE)


def records(n: int = 3) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    found = np.random.default_rng(0).integers(0, 256, (n, 3073), dtype=np.uint8)
    found[:, 0] = np.arange(n)
    return found


def test_a_binary_batch_of_cifar_10(tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    path.write_bytes(records().tobytes())
    found = read_images(path, (3, 32, 32))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2]
    # Byte 1 + 1024 c + 32 y + x is the pixel (c, y, x).
    assert found.images[2, 1, 5, 9] == records()[2, 1 + 1024 + 5 * 32 + 9]
    assert found.images.dtype == np.uint8
    assert len(read_images(path, (3, 32, 32), limit=2).images) == 2
    with pytest.raises(InteropError, match="the network reads"):
        read_images(path, (1, 28, 28))


def test_what_is_no_such_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch.bin"
    for content, words in (
        (b"", "has 0 bytes"),
        (records().tobytes()[:-1], r"9,218 bytes, no multiple of 3073; expected"),
        (bytes(3074 * 2), "CIFAR-100 has two labels"),
    ):
        path.write_bytes(content)
        with pytest.raises(InteropError, match=words):
            read_cifar10(path)
    wrong = records()
    wrong[1, 0] = 10
    path.write_bytes(wrong.tobytes())
    with pytest.raises(InteropError, match="record 2: label 10"):
        read_cifar10(path)


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 2)])
def test_arrays_in_either_order(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images if shape == SHAPE else np.moveaxis(images, 1, 3), labels=np.arange(4))
    found = read_images(tmp_path / "a.npz", SHAPE, limit=3)
    np.testing.assert_array_equal(found.images, images[:3])
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2]


def test_grey_arrays_need_no_channel(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((4, 2, 3))
    np.savez_compressed(tmp_path / "a.npz", images=images)
    found = read_npz(tmp_path / "a.npz", (1, 2, 3))
    np.testing.assert_array_equal(found.images[:, 0], images)
    assert found.labels is None


def header_that_lies(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 26, *SHAPE)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue())


BAD_ARRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no zip": (lambda path: path.write_bytes(b"PK"), "is no .npz file"),
    "other name": (lambda path: np.savez(path, pixels=np.zeros((1, *SHAPE))), "holds no array 'images'"),
    "other shape": (lambda path: np.savez(path, images=np.zeros((1, 2, 2, 2))), r"expected \(n, 2, 2, 3\)"),
    "no image": (lambda path: np.savez(path, images=np.zeros((0, *SHAPE))), r"expected \(n, 2, 2, 3\)"),
    "objects": (lambda path: np.savez(path, images=np.array([{}])), "images is of type object"),
    "words": (lambda path: np.savez(path, images=np.array(["a"])), "images is of type <U1"),
    "labels": (
        lambda path: np.savez(path, images=np.zeros((2, *SHAPE)), labels=np.zeros(3, dtype=int)),
        "one integer for each image",
    ),
    "a header that lies": (header_that_lies, "claims the shape"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, name: str) -> None:
    write, words = BAD_ARRAYS[name]
    write(tmp_path / "a.npz")
    with pytest.raises(InteropError, match=words):
        read_npz(tmp_path / "a.npz", SHAPE)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"ends in \.csv; expected"):
        read_images(tmp_path / "a.csv", SHAPE)
    with pytest.raises(InteropError, match="No such file"):
        read_images(tmp_path / "a.tsv", SHAPE)
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(InteropError, match="holds no image"):
        read_images(tmp_path / "empty.tsv", SHAPE)
