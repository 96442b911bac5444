"""From an image file to the network's input: exact arithmetic, and a clear refusal of everything else."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from hemacrypt.errors import ImageError
from hemacrypt.model.preprocess import LARGEST_FILE, ArrayPreprocessing, Preprocessing

Pixels = npt.NDArray[np.uint8]
PREPROCESS = Preprocessing()


def random_pixels(seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (450, 450, 3), dtype=np.uint8)


def independent_reduce(image: Pixels, crop: int, block: int) -> list[list[list[int]]]:
    edge = (len(image) - crop) // 2
    rows = image.tolist()
    reduced = []
    for top in range(edge, edge + crop, block):
        line = []
        for left in range(edge, edge + crop, block):
            pixel = []
            for channel in range(3):
                total = sum(rows[y][x][channel] for y in range(top, top + block) for x in range(left, left + block))
                # Half up: 2 * total / area + 1, halved, rounded down.
                pixel.append((2 * total + block * block) // (2 * block * block))
            line.append(pixel)
        reduced.append(line)
    return reduced


def test_block_means_of_a_whole_image_equal_an_independent_integer_implementation() -> None:
    image = random_pixels(1)
    np.testing.assert_array_equal(PREPROCESS.reduce(image), independent_reduce(image, 320, 10))


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**16))
def test_block_means_of_any_geometry(size: int, block: int, edge: int, seed: int) -> None:
    crop = size * block
    preprocess = Preprocessing(image_size=crop + 2 * edge, crop=crop, block=block)
    # Few distinct levels make means that fall exactly on a half frequent.
    image = np.random.default_rng(seed).integers(0, 3, (crop + 2 * edge,) * 2 + (3,), dtype=np.uint8)
    np.testing.assert_array_equal(preprocess.reduce(image), independent_reduce(image, crop, block))


@pytest.mark.parametrize(("ones", "mean"), [(49, 0), (50, 1), (51, 1)])
def test_a_mean_of_exactly_a_half_is_rounded_up(ones: int, mean: int) -> None:
    image = np.zeros((450, 450, 3), dtype=np.uint8)
    block = np.zeros(100, dtype=np.uint8)
    block[:ones] = 1
    image[65:75, 65:75] = block.reshape(10, 10, 1)
    assert (PREPROCESS.reduce(image)[0, 0] == mean).all()
    assert PREPROCESS.reduce(image)[1:].max() == 0


def test_the_largest_pixels_do_not_overflow() -> None:
    assert (PREPROCESS.reduce(np.full((450, 450, 3), 255, dtype=np.uint8)) == 255).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("line", "block"), [(64, None), (65, 0), (74, 0), (75, 1), (384, 31), (385, None)])
def test_the_crop_is_rows_and_columns_65_to_384(axis: int, line: int, block: int | None) -> None:
    image = np.zeros((450, 450, 3), dtype=np.uint8)
    np.moveaxis(image, axis, 0)[line] = 200
    lit = np.moveaxis(PREPROCESS.reduce(image), axis, 0).reshape(32, -1).max(axis=1)
    assert lit.tolist() == [20 if index == block else 0 for index in range(32)]


def test_input_is_channel_first_float32_in_the_declared_range() -> None:
    image = np.zeros((450, 450, 3), dtype=np.uint8)
    image[..., 0], image[..., 2] = 255, 51
    values = PREPROCESS(image)
    assert values.dtype == np.float32
    assert values.shape == PREPROCESS.input_shape == (3, 32, 32)
    np.testing.assert_allclose(values[:, 0, 0], [1.0, 0.0, 0.2], rtol=1e-6)
    assert values.max() <= PREPROCESS.input_range[1] * (1 + 2**-23)
    assert PREPROCESS.input_range == (0.0, 1.0)


def test_reduced_pixels_and_originals_give_the_same_input() -> None:
    image = random_pixels(2)
    np.testing.assert_array_equal(PREPROCESS(PREPROCESS.reduce(image)), PREPROCESS(image))


@pytest.mark.parametrize("reduced", [True, False])
def test_an_image_brighter_than_any_training_cell_is_refused(reduced: bool) -> None:
    preprocess = Preprocessing(image_size=4, crop=4, block=2, largest_mean=100.5)
    size = 2 if reduced else 4
    image = np.full((size, size, 3), 100, dtype=np.uint8)
    image[: size // 2] += 1
    assert preprocess(image).shape == (3, 2, 2)
    image[0, 0] += 16
    with pytest.raises(ImageError, match="mean level"):
        preprocess(image)


def test_a_batch_is_normalised_image_by_image() -> None:
    batch = np.stack([PREPROCESS.reduce(random_pixels(seed)) for seed in (3, 4)])
    np.testing.assert_array_equal(PREPROCESS.normalise(batch)[1], PREPROCESS.normalise(batch[1]))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_every_lossless_format_gives_the_input_of_its_pixels(tmp_path: Path, suffix: str) -> None:
    image = random_pixels(5)
    path = tmp_path / f"cell.{suffix}"
    Image.fromarray(image).save(path)
    expected = PREPROCESS(image)
    np.testing.assert_array_equal(PREPROCESS(path), expected)
    np.testing.assert_array_equal(PREPROCESS(str(path)), expected)


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    image = random_pixels(6)
    path = tmp_path / "cell.txt"
    Image.fromarray(image).save(path, "BMP")
    np.testing.assert_array_equal(PREPROCESS(path), PREPROCESS(image))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *extra: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data


def saved(pixels: npt.NDArray[np.generic], form: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, form)
    return buffer.getvalue()


def _text() -> bytes:
    return b"this is no image, whatever its name says\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "is no PNG/BMP/TIFF image"),
        (_text, "is no PNG/BMP/TIFF image"),
        (lambda: saved(random_pixels(), "GIF"), "is no PNG/BMP/TIFF image"),
        (lambda: saved(random_pixels(), "JPEG"), "is no PNG/BMP/TIFF image"),
        (lambda: saved(random_pixels())[:300_000], "is damaged"),
        (lambda: saved(random_pixels())[:100], "is damaged|is no PNG"),
        (lambda: saved(random_pixels(), "BMP")[:300_000], "is damaged"),
        (lambda: saved(random_pixels()[:449]), "is 450x449 pixels; expected 450x450"),
        (lambda: saved(random_pixels()[:, :449]), "is 449x450 pixels; expected 450x450"),
        (lambda: saved(random_pixels()[..., 0].astype(np.uint16) * 257), "pixel type I;16"),
        (lambda: saved(random_pixels()[..., 0]), "pixel type L"),
        (lambda: saved(random_pixels(), mode="1"), "pixel type 1"),
        (lambda: saved(random_pixels(), "TIFF", "CMYK"), "pixel type CMYK"),
        (lambda: saved(random_pixels()[..., 0].astype(np.float32), "TIFF"), "pixel type F"),
        (lambda: png(450, 450, 16, 2, (b"\0" + b"\x12\x34" * 1350) * 450), "16"),
        (lambda: png(450, 450, 16, 6, (b"\0" + b"\x12\x34" * 1800) * 450), "16"),
        (lambda: png(10_000, 10_000, 8, 2, b"\0"), "10000x10000|is no PNG"),
        (lambda: png(60_000, 60_000, 8, 2, b"\0"), "60000x60000|is no PNG"),
    ],
    ids=[
        "empty", "text", "gif", "jpeg", "truncated-png", "header-only", "truncated-bmp", "449-rows", "449-columns",
        "16-bit-grey", "8-bit-grey", "bilevel", "cmyk", "float", "16-bit-rgb", "16-bit-rgba",
        "100-megapixel", "3600-megapixel",
    ],
)  # fmt: skip
def test_a_file_that_is_no_cell_image_is_refused(tmp_path: Path, content: Callable[[], bytes], message: str) -> None:
    path = tmp_path / "cell.png"
    path.write_bytes(content())
    with pytest.raises(ImageError, match=message):
        PREPROCESS(path)


def test_a_palette_with_transparency_is_read_as_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "cell.png"
    palette = _chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    path.write_bytes(png(450, 450, 8, 3, (b"\0" + b"\1" * 450) * 450, palette, _chunk(b"tRNS", bytes([0, 9]))))
    values = PREPROCESS(path)
    np.testing.assert_array_equal(np.unique(values), np.array([40, 50, 60], dtype=np.float32) * np.float32(1 / 255))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        PREPROCESS(tmp_path / "absent.png")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not a file"):
        PREPROCESS(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is not a file"):
        PREPROCESS(tmp_path / "pipe.png")


def test_an_impossible_path_is_refused() -> None:
    with pytest.raises(ImageError):
        PREPROCESS("no\0such.png")
    with pytest.raises(ImageError):
        PREPROCESS("x" * 5000)


@pytest.mark.parametrize("size", [LARGEST_FILE + 1, 1 << 30])
def test_a_huge_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    path = tmp_path / "cell.png"
    path.write_bytes(saved(random_pixels()))
    os.truncate(path, size)
    opened: list[object] = []
    monkeypatch.setattr(Image, "open", lambda *arguments, **_: opened.append(arguments))
    with pytest.raises(ImageError, match=f"{size:,} bytes"):
        PREPROCESS(path)
    assert opened == []


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((450, 450, 3), dtype=np.float64),
        np.zeros((450, 450, 3), dtype=np.int16),
        np.zeros((450, 450), dtype=np.uint8),
        np.zeros((450, 450, 4), dtype=np.uint8),
        np.zeros((3, 450, 450), dtype=np.uint8),
        np.zeros((449, 450, 3), dtype=np.uint8),
        np.zeros((1, 450, 450, 3), dtype=np.uint8),
        np.zeros((32, 32, 3), dtype=np.float32),
        np.zeros((3, 32, 32), dtype=np.uint8),
        np.zeros((), dtype=np.uint8),
        np.zeros((0, 0, 3), dtype=np.uint8),
    ],
    ids=lambda array: f"{array.shape}-{array.dtype}",
)
def test_arrays_of_another_shape_or_type_are_refused(array: Pixels) -> None:
    with pytest.raises(ImageError, match="expected"):
        PREPROCESS(array)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_no_damage_raises_anything_but_an_image_error(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(7)
    original = saved(np.full((450, 450, 3), 99, dtype=np.uint8), form)
    path = tmp_path / "cell"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(150):
        damaged = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            # The structure stands in the first and, in a TIFF, in the last bytes.
            near = int(rng.integers(0, min(300, len(damaged))))
            damaged[near if rng.random() < 0.5 else len(damaged) - 1 - near] = int(rng.integers(0, 256))
        if rng.random() < 0.2:
            del damaged[int(rng.integers(0, len(damaged))) :]
        path.write_bytes(damaged)
        try:
            assert PREPROCESS(path).shape == (3, 32, 32)
            outcomes["read"] += 1
        except ImageError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 10


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": 452},
        {"crop": 321},
        {"block": 7},
        {"block": 0},
        {"image_size": 0},
        {"image_size": 5000},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"kind": "other"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_impossible_declarations_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing.model_validate(settings)


ARRAY = ArrayPreprocessing(shape=(3, 4, 5), scale=0.5)


def test_an_array_is_scaled_and_nothing_else() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    np.testing.assert_array_equal(ARRAY(pixels), pixels.astype(np.float32) / 2)
    np.testing.assert_array_equal(ARRAY(pixels.astype(np.float64)), ARRAY(pixels))
    np.testing.assert_array_equal(ARRAY.normalise(np.stack([pixels, pixels]))[1], ARRAY(pixels))
    assert ARRAY.input_range == (0.0, 127.5)
    assert ARRAY.input_shape == (3, 4, 5)


def test_an_image_file_of_the_networks_size_is_an_array(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(ARRAY(tmp_path / "colour.png"), pixels.transpose(2, 0, 1) / np.float32(2))
    grey = ArrayPreprocessing(shape=(1, 4, 5), scale=1)
    np.testing.assert_array_equal(grey(str(tmp_path / "grey.png")), pixels[None, :, :, 0])
    np.testing.assert_array_equal(grey.read(tmp_path / "grey.png"), pixels[None, :, :, 0])
    with pytest.raises(ImageError, match="pixel type RGB; expected 8-bit grey"):
        grey(tmp_path / "colour.png")
    with pytest.raises(ImageError, match="pixel type L; expected 8-bit RGB"):
        ARRAY(tmp_path / "grey.png")
    with pytest.raises(ImageError, match="5x4 pixels; expected 4x5"):
        ArrayPreprocessing(shape=(1, 5, 4))(tmp_path / "grey.png")
    with pytest.raises(ImageError, match="2 channels; give arrays"):
        ArrayPreprocessing(shape=(2, 4, 5))(tmp_path / "grey.png")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5, 3)), "expected numbers of shape"),
        (np.zeros((1, 3, 4, 5)), "expected one image"),
        (np.full((3, 4, 5), np.nan), "not between 0 and 255"),
        (np.full((3, 4, 5), 256.0), "not between 0 and 255"),
        (np.full((3, 4, 5), -1), "not between 0 and 255"),
        (np.zeros((3, 4, 5), dtype=complex), "expected numbers"),
        (np.zeros((3, 4, 5), dtype=object), "expected numbers"),
    ],
)
def test_an_array_that_is_no_such_image_is_refused(image: npt.NDArray[np.generic], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        ARRAY(image)


def test_the_digest_of_the_cells_declaration_is_what_it_always_was() -> None:
    text = (
        '{"kind":"central-crop-block-mean","image_size":450,"crop":320,"block":10,'
        '"scale":0.00392156862745098,"largest_mean":255.0}'
    )
    assert PREPROCESS.model_dump_json() == text
    assert PREPROCESS.digest == hashlib.sha256(text.encode()).hexdigest()
