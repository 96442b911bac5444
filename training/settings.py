"""Settings of a training run; those that this repository trains with are in `defaults`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import RunError

Content = TypeVar("Content", bound=BaseModel)


class Settings(BaseModel):
    """Everything that decides the outcome of a training run besides the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Literal["image", "subject"] = "subject"
    seed: int = Field(default=1, ge=0, lt=2**32, description="of weights, shuffling, augmentation and dropout")
    split_seed: int = Field(default=0, ge=0, description="of the division into train, validation and test")
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0, description="at the start; falls to zero along a half cosine")
    weight_decay: float = Field(default=0.3, ge=0, description="decoupled, as AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of a gradient; squares throw large ones")
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    logit_penalty: float = Field(
        default=1e-3, ge=0, description="weight of the squared logits, summed per image, in the loss"
    )
    label_balance: bool = Field(default=True, description="let normal and leukaemic cells weigh the same in all")
    group_power: float = Field(
        default=0.0, ge=0, le=1, description="0: every cell weighs the same; 1: every group of subjects does"
    )
    dropout: float = Field(default=0.3, ge=0, lt=1)
    shift: int = Field(default=0, ge=0, description="largest random shift, in pixels of the reduced image")
    stain: float = Field(
        default=0.0, ge=0, lt=1, description="largest relative change of brightness and of each colour"
    )
    first_maps: int = Field(default=16, ge=1, le=16, description="maps of the first convolution; 16 fill 4096 slots")
    inner_maps: int = Field(default=32, ge=1)
    hidden: int = Field(default=64, ge=1, le=64, description="values between second linear map and second square")


def defaults(protocol: Literal["image", "subject"]) -> Settings:
    """Return the settings that the models of this repository are trained with.

    Across persons the network overfits within a dozen epochs, so decay is strong, and labels weigh the same because
    the next hospital's mixture is unknown. Within the same persons longer training with little decay still gains, and
    the paper's figure is plain accuracy on the data's own mixture.
    """
    if protocol == "image":
        return Settings(protocol="image", epochs=60, weight_decay=0.01, label_balance=False)
    return Settings()


def read_json(path: Path, kind: type[Content]) -> Content:
    """Read one of the JSON files of a run.

    Raises
    ------
    RunError
        If it is missing or not of that kind.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror}); name what `hemacrypt train` has written") from error
    except ValidationError as error:
        raise RunError(f"{path} is no {kind.__name__} of this version ({first_mistake(error)}); correct it") from error


def first_mistake(error: ValidationError) -> str:
    """Return the place and the words of the first thing that is wrong."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
