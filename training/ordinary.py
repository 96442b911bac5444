"""Ordinary networks, which nobody has to encrypt: the paper's comparison, and teachers of square networks.

Every network maps (batch, size, size, 3) float32 in [0, 1] to two logits, and has a layer ``features`` before its
head: the mean over the last map, which an SVM is trained on.

The paper (section III.B) takes AlexNet, VGG16, VGG19 and ResNet50 as published, for 224x224 pixels. Ours are
trained from scratch on small images, so three things differ: every convolution has batch normalisation, without which
VGG does not train from scratch at this depth; the dense layers after the last map give way to its mean (most of
VGG's weights are there and would only overfit); and stems step over small images less. ``width`` multiplies the
channels, so that a laptop can run the comparison; 1 is the published size. With ImageNet weights the networks are
those of ``keras.applications``, unchanged up to the head.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import layers

from training.errors import RunError
from training.symmetry import ORDER, OrbitMean, SymmetricConv2D, SymmetricNormalization

FEATURES = "features"
_BLOCKS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_VGG_CHANNELS = (64, 128, 256, 512, 512)
_RESNET_BLOCKS = (3, 4, 6, 3)
# Mean of ImageNet's blue, green and red: what VGG and ResNet50 of 2014/15 were trained with.
_IMAGENET_MEANS = (103.939, 116.779, 123.68)


@keras.saving.register_keras_serializable(package="hemacrypt")
class ImageNetInput(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Turns [0, 1] red-green-blue into 0..255 blue-green-red less the means of ImageNet."""

    def call(self, values: Any) -> Any:
        """Return the values that published weights expect, same shape."""
        return values[..., ::-1] * 255.0 - keras.ops.convert_to_tensor(_IMAGENET_MEANS, dtype=values.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape


@keras.saving.register_keras_serializable(package="hemacrypt")
class TwoLogits(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Turns the logit z of a sigmoid into (-z/2, z/2), whose softmax is that sigmoid."""

    def call(self, values: Any) -> Any:
        """Return shape (batch, 2) for (batch, 1)."""
        return keras.ops.concatenate([values * -0.5, values * 0.5], axis=-1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return (batch, 2)."""
        return (*input_shape[:-1], 2)


def _channels(published: int, width: float) -> int:
    return max(1, round(published * width))


def _conv(
    values: Any, channels: int, kernel: int = 3, stride: int = 1, relu: bool = True, momentum: float = 0.95
) -> Any:
    values = layers.Conv2D(channels, kernel, strides=stride, padding="same", use_bias=False)(values)
    values = layers.BatchNormalization(momentum=momentum)(values)
    return layers.ReLU()(values) if relu else values


def _head(values: Any, dropout: float) -> Any:
    values = layers.GlobalAveragePooling2D(name=FEATURES)(values)
    return layers.Dense(2, name="logits")(layers.Dropout(dropout)(values))


def plain(size: int, width: float, dropout: float = 0.3, channels: Sequence[int] = (32, 64, 128)) -> keras.Model:
    """Build seven layers of 3x3 convolutions and pooling: small, strong on cells, and a good teacher."""
    first, second, third = (_channels(number, width) for number in channels)
    entry = keras.Input((size, size, 3), name="cell")
    values = _conv(_conv(entry, first, stride=2), first)
    for number in (second, third):
        values = layers.MaxPooling2D(2)(values)
        values = _conv(_conv(values, number), number)
    return keras.Model(entry, _head(values, dropout), name="plain")


def deep(size: int, width: float, dropout: float = 0.3, channels: Sequence[int] = (16, 32, 64, 128)) -> keras.Model:
    """Build eight 3x3 convolutions in four pairs, the first of which reads every pixel: a narrow VGG."""
    entry = values = keras.Input((size, size, 3), name="cell")
    for block, published in enumerate(channels):
        if block:
            values = layers.MaxPooling2D(2)(values)
        for _ in range(2):
            values = _conv(values, _channels(published, width), momentum=0.9)
    return keras.Model(entry, _head(values, dropout), name="deep")


def symmetric_plain(
    size: int,
    width: float,
    dropout: float = 0.3,
    channels: Sequence[int] = (32, 64, 128),
    whitened: bool = False,
) -> keras.Model:
    """Build `plain` of layers that commute with the eight symmetries; channels are rounded to multiples of 8.

    Its stem is 4x4/2, which reaches both borders of an even map alike, as 3x3/2 does not. ``features`` are means over
    map and symmetries, so a cell has the same ones however it lies. ``whitened``: the stem can be whitened, see
    `training.symmetry.SymmetricConv2D.whiten`.
    """
    first, second, third = (ORDER * max(1, round(number * width / ORDER)) for number in channels)
    entry = keras.Input((size, size, 3), name="cell")
    values = _symmetric_conv(entry, first, 4, 2, lifted=False, whitened=whitened)
    values = _symmetric_conv(values, first)
    for number in (second, third):
        values = layers.MaxPooling2D(2)(values)
        values = _symmetric_conv(_symmetric_conv(values, number), number)
    values = OrbitMean(name=FEATURES)(layers.GlobalAveragePooling2D()(values))
    head = layers.Dense(2, name="logits")(layers.Dropout(dropout)(values))
    return keras.Model(entry, head, name="symmetric_plain")


def _symmetric_conv(
    values: Any, channels: int, kernel: int = 3, stride: int = 1, lifted: bool = True, whitened: bool = False
) -> Any:
    values = SymmetricConv2D(channels // ORDER, kernel, stride, padding=1, lifted=lifted, whitened=whitened)(values)
    return layers.ReLU()(SymmetricNormalization(momentum=0.9)(values))


def alexnet(size: int, width: float, dropout: float = 0.5) -> keras.Model:
    """Build AlexNet (Krizhevsky et al. 2012) with batch normalisation in place of response normalisation.

    Up to 64 pixels the stem is 7x7/2 instead of 11x11/4, and the two dense layers have the width of the published
    ones times ``width`` on the mean of the last map.
    """
    entry = keras.Input((size, size, 3), name="cell")
    values = _conv(entry, _channels(96, width), *((7, 2) if size <= 64 else (11, 4)))
    values = layers.MaxPooling2D(3, strides=2, padding="same")(values)
    values = _conv(values, _channels(256, width), 5)
    values = layers.MaxPooling2D(3, strides=2, padding="same")(values)
    for published in (384, 384, 256):
        values = _conv(values, _channels(published, width))
    values = layers.MaxPooling2D(3, strides=2, padding="same")(values)
    values = layers.GlobalAveragePooling2D(name=FEATURES)(values)
    for _ in range(2):
        values = layers.Dropout(dropout)(layers.Dense(_channels(4096, width), activation="relu")(values))
    return keras.Model(entry, layers.Dense(2, name="logits")(values), name="alexnet")


def _vgg(name: str, size: int, width: float, dropout: float) -> keras.Model:
    entry = values = keras.Input((size, size, 3), name="cell")
    for block, (depth, published) in enumerate(zip(_BLOCKS[name], _VGG_CHANNELS, strict=True)):
        if block:
            values = layers.MaxPooling2D(2)(values)
        for _ in range(depth):
            values = _conv(values, _channels(published, width))
    return keras.Model(entry, _head(values, dropout), name=name)


def vgg16(size: int, width: float, dropout: float = 0.5) -> keras.Model:
    """Build the convolutions of VGG16 (Simonyan and Zisserman 2015) with batch normalisation."""
    return _vgg("vgg16", size, width, dropout)


def vgg19(size: int, width: float, dropout: float = 0.5) -> keras.Model:
    """Build the convolutions of VGG19 (Simonyan and Zisserman 2015) with batch normalisation."""
    return _vgg("vgg19", size, width, dropout)


def resnet50(size: int, width: float, dropout: float = 0.0) -> keras.Model:
    """Build ResNet50 (He et al. 2016); up to 64 pixels without the pooling after the stem."""
    entry = keras.Input((size, size, 3), name="cell")
    values = _conv(entry, _channels(64, width), 7, 2)
    if size > 64:
        values = layers.MaxPooling2D(3, strides=2, padding="same")(values)
    for stage, depth in enumerate(_RESNET_BLOCKS):
        inner, outer = _channels(64 * 2**stage, width), _channels(256 * 2**stage, width)
        for block in range(depth):
            stride = 2 if stage and not block else 1
            shortcut = values if block else _conv(values, outer, 1, stride, relu=False)
            values = _conv(_conv(_conv(values, inner, 1, stride), inner), outer, 1, relu=False)
            values = layers.ReLU()(layers.Add()([values, shortcut]))
    return keras.Model(entry, _head(values, dropout), name="resnet50")


def cryptonet_relu(size: int, width: float, dropout: float = 0.3) -> keras.Model:
    """Build the twin of `training.models.cryptonet`: ReLU for its squares, one sigmoid output for its softmax."""
    maps, inner, hidden = (_channels(number, width) for number in (16, 32, 64))
    entry = keras.Input((size, size, 3), name="cell")
    values = layers.AveragePooling2D(2)(_conv(entry, maps, 4, 2))
    values = layers.Conv2D(inner, 3, padding="same")(values)
    values = layers.Flatten(name=FEATURES)(layers.Conv2D(inner, 3, padding="same")(values))
    values = layers.BatchNormalization(momentum=0.95)(layers.Dense(hidden, use_bias=False)(values))
    values = layers.Dropout(dropout)(layers.ReLU()(values))
    return keras.Model(entry, TwoLogits(name="logits")(layers.Dense(1)(values)), name="cryptonet_relu")


NETWORKS: dict[str, Callable[..., keras.Model]] = {
    "plain": plain,
    "symmetric-plain": symmetric_plain,
    "deep": deep,
    "alexnet": alexnet,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet50": resnet50,
    "cryptonet-relu": cryptonet_relu,
}
_APPLICATIONS = {"vgg16": "VGG16", "vgg19": "VGG19", "resnet50": "ResNet50"}


def ordinary_network(
    architecture: str, size: int, width: float, weights: str = "scratch", **options: Any
) -> tuple[keras.Model, str]:
    """Build one of `NETWORKS`.

    Parameters
    ----------
    architecture:
        Key of `NETWORKS`.
    size:
        Width and height of the images.
    width:
        Multiplies the channels.
    weights:
        ``imagenet``: start from ImageNet weights where they exist and can be obtained; ``scratch``: do not.
    options:
        Further arguments, such as ``dropout``.

    Returns
    -------
    network, words
        The words say which weights it starts from, and why.

    Raises
    ------
    RunError
        If there is no such architecture, or it does not take an option.
    """
    if architecture not in NETWORKS:
        raise RunError(f"there is no ordinary network {architecture!r}; choose one of {', '.join(NETWORKS)}")
    words = "from scratch"
    if weights == "imagenet":
        network, words = _pretrained(architecture, size, width)
        if network is not None:
            return network, words
    try:
        return NETWORKS[architecture](size, width, **options), words
    except TypeError as error:
        raise RunError(f"{architecture!r} does not take the options {options}: {error}") from error


def _pretrained(architecture: str, size: int, width: float) -> tuple[keras.Model | None, str]:
    if architecture not in _APPLICATIONS:
        return None, "from scratch (Keras has no ImageNet weights for it)"
    if width != 1:
        return None, "from scratch (ImageNet weights exist at width 1 only)"
    try:
        with _patience(30):
            body = getattr(keras.applications, _APPLICATIONS[architecture])(
                include_top=False, weights="imagenet", input_shape=(size, size, 3)
            )
    except Exception as error:  # Keras raises a bare Exception when a download fails
        return None, f"from scratch (ImageNet weights could not be obtained: {type(error).__name__})"
    entry = keras.Input((size, size, 3), name="cell")
    return keras.Model(entry, _head(body(ImageNetInput()(entry)), 0.5), name=architecture), "ImageNet"


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Let no connection wait longer than this: a network that swallows packets looks like none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def multiply_adds(network: keras.Model) -> int:
    """Return the multiplications of one image's forward pass: those of convolutions and dense layers."""
    total = 0
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            total += multiply_adds(layer)
        elif isinstance(layer, layers.Conv2D):
            height, width = layer.output.shape[1:3]
            total += int(height * width) * _size(layer.kernel)
        elif isinstance(layer, SymmetricConv2D):
            height, width = layer.output.shape[1:3]
            total += int(height * width) * ORDER * _size(layer.weight)
        elif isinstance(layer, layers.Dense):
            total += _size(layer.kernel)
    return total


def _size(variable: Any) -> int:
    size = 1
    for side in variable.shape:
        size *= int(side)
    return size
