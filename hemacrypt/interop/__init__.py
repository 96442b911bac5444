"""Networks and images of other programs: CryptoNets' files, ONNX, Keras (through `training`), CIFAR-10.

An importer is a function from a path to an `Imported`. Those for single files are named as entry points
(``hemacrypt.importers`` in pyproject.toml) after the ending that they read, so that this package imports none of the
libraries that they need.
"""

from __future__ import annotations

from dataclasses import dataclass

from hemacrypt.model.network import Linear, Shape


@dataclass(frozen=True)
class Imported:
    """A network as another program's file describes it, folded.

    Attributes
    ----------
    input_shape:
        (channels, height, width).
    linears:
        The affine maps; see `CollapsedNetwork`.
    scale:
        Factor from an image's values to network input, where the file tells; else None.
    labels:
        What the logits stand for, where the file tells.
    columns_first:
        Whether the images that came with the network list their pixels column by column. The network itself reads
        them row by row, as any other: it was turned while it was read.
    """

    input_shape: Shape
    linears: tuple[Linear, ...]
    scale: float | None = None
    labels: tuple[str, ...] | None = None
    columns_first: bool = False
