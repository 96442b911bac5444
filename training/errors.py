"""What can go wrong while reading data, training and exporting."""

from __future__ import annotations

from hemacrypt.errors import HemacryptError


class DataError(HemacryptError):
    """The images or their labels are missing, inconsistent, or not what was asked for."""


class CollapseError(HemacryptError):
    """The trained model is not of the family that folds into affine maps and squares."""


class RunError(HemacryptError):
    """The folder of a training run is missing or incomplete, or settings do not fit together."""
