"""What can go wrong, by name.

::

    HemacryptError
    ├── NetworkError      a network that is no chain of affine maps and squares, or has impossible shapes
    ├── BundleError       a model bundle that is missing, altered or of another schema
    ├── ImageError        an image that cannot be what the model was trained on
    ├── InteropError      a file of another program that is damaged, or holds a network that is not of the family
    ├── PlanError         no parameters serve this network, or a plan does not fit what it is used with
    └── FormatError       bytes that are not the SEAL object they should be

Every message names what was got, what was expected and what to do about it. None carries pixels, logits or keys.
"""

from __future__ import annotations


class HemacryptError(Exception):
    """Base of every error that Hemacrypt raises on purpose."""


class NetworkError(HemacryptError):
    """The network is not of the supported family, or its shapes do not fit together."""


class BundleError(HemacryptError):
    """The model bundle cannot be used: missing, altered, or written by another schema version."""


class ImageError(HemacryptError):
    """The image cannot be read, or is not the kind of image that the model was trained on."""


class InteropError(HemacryptError):
    """A file of another program cannot be read: damaged, or not of the family of networks that folds."""


class PlanError(HemacryptError):
    """No secure parameters serve the request, or a plan and what is used with it do not match."""


class FormatError(HemacryptError):
    """Bytes that should be a serialised SEAL object are not one, or not the one expected.

    Attributes
    ----------
    field:
        The part of the object that is wrong, for example ``scale`` or ``residues``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
