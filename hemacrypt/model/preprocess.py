"""Image -> normalised array: one implementation for training and client alike.

A bundle declares one of two kinds. `Preprocessing` is for cells: a segmented cell of 450x450 pixels is cropped at its
centre, reduced by the mean of square blocks and scaled. Scale is never normalised away, because the size of a cell
carries information. All arithmetic up to the last division is on integers, so both sides get the same bits on every
platform. `ArrayPreprocessing` is for networks from elsewhere: an image of exactly the network's size, times a factor.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hemacrypt.errors import ImageError

Pixels = npt.NDArray[np.uint8]

# A 450x450 24-bit BMP has 0.6 MB; ten times that leaves room for any sane lossless file and refuses a decoy.
LARGEST_FILE = 8 * 1024 * 1024
# No plan carries more; bounds what a stranger's declaration may make us build.
_MOST_VALUES = 1 << 20
_FORMATS = ("PNG", "BMP", "TIFF")


class _Declaration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def digest(self) -> str:
        """SHA-256 of the declaration, hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Preprocessing(_Declaration):
    """For cells: the declaration that stands in a bundle's manifest and that both sides follow.

    Raises
    ------
    pydantic.ValidationError
        If the crop does not lie centred in the image or the blocks do not divide the crop.
    """

    kind: Literal["central-crop-block-mean"] = "central-crop-block-mean"
    image_size: int = Field(450, ge=1, le=4096, description="width and height of the original, in pixels")
    crop: int = Field(320, ge=1, description="width and height of the centred crop, in pixels")
    block: int = Field(10, ge=1, description="width and height of the blocks that become one pixel")
    scale: float = Field(1.0 / 255.0, gt=0, le=1e6, description="factor from 0..255 to network input")
    largest_mean: float = Field(
        255.0,
        gt=0,
        le=255,
        description="mean level of a reduced image above which it is no cell of the kind trained on",
    )

    @model_validator(mode="after")
    def _geometry(self) -> Preprocessing:
        if self.crop > self.image_size or (self.image_size - self.crop) % 2:
            raise ValueError(f"a crop of {self.crop} cannot be centred in an image of {self.image_size} pixels")
        if self.crop % self.block:
            raise ValueError(f"blocks of {self.block} pixels do not divide a crop of {self.crop}")
        return self

    @property
    def size(self) -> int:
        """Width and height of the reduced image."""
        return self.crop // self.block

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of the network's input: (channels, height, width)."""
        return 3, self.size, self.size

    @property
    def input_range(self) -> tuple[float, float]:
        """Smallest and largest value of a preprocessed image."""
        return 0.0, 255.0 * self.scale

    def read(self, path: Path) -> Pixels:
        """Read an image file as pixels that can be preprocessed; shape (size, size, 3), already reduced.

        Raises
        ------
        ImageError
            If the file cannot be read as such an image.
        """
        return self.reduce(read_pixels(path, self.image_size))

    def reduce(self, image: Pixels) -> Pixels:
        """Crop the centre and take block means, rounded half up.

        Parameters
        ----------
        image:
            Original pixels, shape (image_size, image_size, 3), uint8.

        Returns
        -------
        uint8 array, shape (size, size, 3)

        Raises
        ------
        ImageError
            If shape or dtype differ.
        """
        expected = (self.image_size, self.image_size, 3)
        if image.shape != expected or image.dtype != np.uint8:
            raise ImageError(
                f"got an image of shape {image.shape}, {image.dtype}; expected {expected}, uint8: "
                "one segmented cell on black, as in the C-NMC release"
            )
        edge = (self.image_size - self.crop) // 2
        centre = image[edge : edge + self.crop, edge : edge + self.crop].astype(np.uint32)
        sums = centre.reshape(self.size, self.block, self.size, self.block, 3).sum(axis=(1, 3))
        area = self.block * self.block
        means: Pixels = ((sums + area // 2) // area).astype(np.uint8)
        return means

    def normalise(self, reduced: Pixels) -> npt.NDArray[np.float32]:
        """Turn reduced images into network input.

        Parameters
        ----------
        reduced:
            Shape (..., size, size, 3), uint8.

        Returns
        -------
        float32 array, shape (..., 3, size, size)

        Raises
        ------
        ImageError
            If shape or dtype differ.
        """
        expected = (self.size, self.size, 3)
        if reduced.ndim < 3 or reduced.shape[-3:] != expected or reduced.dtype != np.uint8:
            raise ImageError(f"got pixels of shape {reduced.shape}, {reduced.dtype}; expected {expected}, uint8")
        return np.moveaxis(reduced.astype(np.float32) * np.float32(self.scale), -1, -3)

    def __call__(self, image: Path | str | Pixels) -> npt.NDArray[np.float32]:
        """Preprocess one image.

        Parameters
        ----------
        image:
            A file (PNG, BMP or TIFF), its pixels, or pixels already reduced to (size, size, 3) uint8.

        Returns
        -------
        float32 array, shape (3, size, size)

        Raises
        ------
        ImageError
            If the file cannot be read as such an image.
        """
        if isinstance(image, (str, Path)):
            image = read_pixels(Path(image), self.image_size)
        reduced = image if image.shape == (self.size, self.size, 3) else self.reduce(image)
        values = self.normalise(reduced)
        mean = float(reduced.mean())
        if mean > self.largest_mean:
            # Far outside the training data the squares grow so large that the last modulus no longer holds the logits.
            raise ImageError(
                f"the image's mean level is {mean:.0f} of 255, beyond {self.largest_mean:.0f}, the most that a cell of "
                "the training data has; expected one segmented cell on black: remove the background first"
            )
        return values


_Side = Annotated[int, Field(ge=1, le=4096)]


class ArrayPreprocessing(_Declaration):
    """For networks from elsewhere: an image of exactly the network's size, times a factor.

    Raises
    ------
    pydantic.ValidationError
        If the shape is empty or the range is not one.
    """

    kind: Literal["array"] = "array"
    shape: tuple[_Side, _Side, _Side] = Field(description="channels, height, width")
    scale: float = Field(1.0 / 255.0, gt=0, le=1e6, description="factor from the image's values to network input")
    smallest: float = Field(0.0, ge=-1e9, le=1e9, description="smallest value that an image may hold")
    largest: float = Field(255.0, ge=-1e9, le=1e9, description="largest value that an image may hold")

    @model_validator(mode="after")
    def _range(self) -> ArrayPreprocessing:
        if self.smallest >= self.largest:
            raise ValueError(f"values from {self.smallest} to {self.largest} are no range")
        if self.shape[0] * self.shape[1] * self.shape[2] > _MOST_VALUES:
            raise ValueError(f"an image of shape {self.shape} has more than {_MOST_VALUES} values")
        return self

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of the network's input: (channels, height, width)."""
        return self.shape

    @property
    def input_range(self) -> tuple[float, float]:
        """Smallest and largest value of a preprocessed image."""
        return self.smallest * self.scale, self.largest * self.scale

    def read(self, path: Path) -> Pixels:
        """Read an image file as pixels that can be preprocessed; uint8, shape (channels, height, width).

        Raises
        ------
        ImageError
            If the file cannot be read as such an image, or the network reads neither grey nor RGB.
        """
        channels, height, width = self.shape
        if channels not in (1, 3):
            raise ImageError(f"{path} is a file, but the model reads {channels} channels; give arrays {self.shape}")
        if channels == 1:
            return read_pixels(path, (width, height), "L")[None]
        return np.moveaxis(read_pixels(path, (width, height)), -1, 0)

    def normalise(self, images: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Turn images into network input.

        Parameters
        ----------
        images:
            Numbers between ``smallest`` and ``largest``, shape (..., channels, height, width).

        Returns
        -------
        float32 array of the same shape

        Raises
        ------
        ImageError
            If shape, type or range differ.
        """
        array = np.asarray(images)
        if array.ndim < 3 or array.shape[-3:] != self.shape or array.dtype.kind not in "uif":
            raise ImageError(
                f"got an image of shape {array.shape}, {array.dtype}; expected numbers of shape {self.shape}: "
                "channels, height, width"
            )
        # Also refuses what is no number: larger values would make the squares outgrow the modulus unnoticed.
        if not ((array >= self.smallest) & (array <= self.largest)).all():
            raise ImageError(f"the image holds values that are not between {self.smallest:g} and {self.largest:g}")
        return (array * np.float64(self.scale)).astype(np.float32)

    def __call__(self, image: Path | str | npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """Preprocess one image.

        Parameters
        ----------
        image:
            A file (PNG, BMP or TIFF, 8-bit grey or RGB) of exactly the network's size, or an array of its shape.

        Returns
        -------
        float32 array, shape (channels, height, width)

        Raises
        ------
        ImageError
            If it is not such an image.
        """
        array = self.read(Path(image)) if isinstance(image, (str, Path)) else image
        if np.ndim(array) != 3:
            raise ImageError(f"got an array of shape {np.shape(array)}; expected one image of shape {self.shape}")
        return self.normalise(array)


AnyPreprocessing = Annotated[Preprocessing | ArrayPreprocessing, Field(discriminator="kind")]


def read_pixels(path: Path, image_size: int | tuple[int, int], mode: Literal["RGB", "L"] = "RGB") -> Pixels:
    """Read an image file, checking its size in bytes and in pixels before anything is decoded.

    Parameters
    ----------
    path:
        PNG, BMP or TIFF file with 8-bit RGB pixels.
    image_size:
        The width and height that the image must have: one number for both, or (width, height).
    mode:
        ``RGB``, or ``L`` for grey.

    Returns
    -------
    uint8 array, shape (height, width, 3), or (height, width) if grey

    Raises
    ------
    ImageError
        If there is no such file, it is too large, no image, or an image of another size or pixel type.
    """
    try:
        bytes_on_disk = path.stat().st_size
        if not path.is_file():
            raise ImageError(f"{path} is not a file; expected a PNG, BMP or TIFF image")
        if bytes_on_disk > LARGEST_FILE:
            raise ImageError(
                f"{path} has {bytes_on_disk:,} bytes; at most {LARGEST_FILE:,} are read, so it was not opened"
            )
        # Pillow's remarks on a damaged file are no concern of the caller: it is read, or it is refused.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decoded(path, image_size, mode)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; name a PNG, BMP or TIFF file of one cell") from None
    except PermissionError:
        raise ImageError(f"{path} may not be read by this user; check its permissions") from None
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise ImageError(f"{path} is no {'/'.join(_FORMATS)} image; convert it without loss and try again") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{path} is damaged ({type(error).__name__}); export it again from its source") from None


def _decoded(path: Path, image_size: int | tuple[int, int], mode: Literal["RGB", "L"]) -> Pixels:
    cell = isinstance(image_size, int)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    with Image.open(path, formats=_FORMATS) as image:
        if image.size != size:
            hint = "one segmented cell on black, as in the C-NMC release" if cell else "exactly what the network reads"
            raise ImageError(f"{path} is {image.width}x{image.height} pixels; expected {size[0]}x{size[1]}: {hint}")
        # Pillow would quietly drop the lower half of 16-bit colours.
        sixteen = any("16" in str(tile[3]) for tile in image.tile)
        if image.mode not in (("RGB", "RGBA", "P") if mode == "RGB" else ("L",)) or sixteen:
            kind = f"{image.mode}, 16 bits" if sixteen else image.mode
            raise ImageError(f"{path} has pixel type {kind}; expected 8-bit {'RGB' if mode == 'RGB' else 'grey'}")
        return np.asarray(image.convert(mode), dtype=np.uint8)
