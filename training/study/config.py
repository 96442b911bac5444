"""What a study consists of, read from TOML files; see docs/studies.md."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.errors import RunError
from training.settings import first_mistake

Protocol = Literal["image", "grouped", "heldout"]
Family = Literal["ordinary", "square", "svm", "baseline"]
BASELINES = ("area", "colour")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Augmentation(_Frozen):
    """How training cells are varied, besides the eight symmetries of the square, which are always drawn from.

    Nothing here interpolates: rotations by other than right angles blur a small image, and then the network meets
    sharper cells in use than it was trained on.
    """

    shift: int = Field(default=2, ge=0, le=16, description="largest shift in whole pixels")
    stain: float = Field(default=0.05, ge=0, lt=1, description="largest relative change of brightness, and of a colour")


class Views(_Frozen):
    """Views of the training cells to which teachers answer; see `training.study.views`."""

    count: int = Field(default=16, ge=1, le=256, description="views of each cell")
    shift: int = Field(default=1, ge=0, le=8, description="largest shift in 32nds of the width")
    stain: float = Field(
        default=0.05, ge=0, lt=0.5, description="largest relative change of brightness, and of a colour"
    )
    mix: float = Field(default=0.3, ge=0, le=1, description="share of views into which another cell is mixed")
    seed: int = Field(default=0, ge=0)


class ModelConfig(_Frozen):
    """One model of a study: everything that decides its outcome besides the data and the seed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    family: Family
    architecture: str = Field(description="as in training.study.learners.ARCHITECTURES")
    size: Literal[32, 64, 160] = Field(default=64, description="pixels; 160 needs the release itself, not the arrays")
    width: float = Field(default=1.0, gt=0, le=4, description="multiplies the channels; 1: the published size")
    options: dict[str, int | float | bool | str] = Field(
        default={}, description="further arguments of the architecture"
    )
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=64, ge=1)
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: makes the updates of weight matrices orthogonal; the rest learns by AdamW"
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="at the start; falls to zero along a half cosine")
    weight_decay: float = Field(default=0.05, ge=0, description="decoupled, as AdamW")
    clip_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    label_balance: bool = Field(default=True, description="let normal and leukaemic cells weigh the same in all")
    group_power: float = Field(default=0.0, ge=0, le=1, description="1: every group of subjects weighs the same")
    augmentation: Augmentation = Augmentation()
    weights: Literal["imagenet", "scratch"] = "scratch"
    teachers: tuple[str, ...] = Field(default=(), description="models whose mean logits on the train part are imitated")
    alpha: float = Field(default=0.7, ge=0, le=1, description="share of the teachers in the loss; see distil_loss")
    temperature: float = Field(
        default=2.0, gt=0, description="of teacher and student in the teachers' part of the loss"
    )
    views: Views | None = Field(
        default=None, description="teachers answer to these views of the cells, instead of to the cells alone"
    )
    features: str | None = Field(default=None, description="svm: the model whose features are used without ImageNet's")
    symmetries: bool = Field(default=False, description="average the logits over the eight symmetries of the image")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    protocols: tuple[Protocol, ...] | None = Field(default=None, description="default: those of the study")
    keep_weights: bool = Field(default=False, description="keep the trained network as model.keras")

    @property
    def needs(self) -> tuple[str, ...]:
        """Models that are trained before this one, in every division."""
        return (*self.teachers, *((self.features,) if self.features else ()))

    def recipe(self) -> dict[str, Any]:
        """Return what decides the outcome of a run: all but the lists of runs and what is kept of them."""
        return self.model_dump(mode="json", exclude={"protocols", "seeds", "keep_weights"})

    @model_validator(mode="after")
    def _sensible(self) -> ModelConfig:
        if self.features and self.family != "svm":
            raise ValueError(f"{self.name!r}: only a model of family 'svm' takes the features of another")
        if self.teachers and self.family not in ("ordinary", "square"):
            raise ValueError(f"{self.name!r}: a model of family {self.family!r} cannot be distilled from teachers")
        if self.views and not self.teachers:
            raise ValueError(f"{self.name!r}: views are what teachers answer to; name teachers, or leave views out")
        if self.family == "svm" and not self.features:
            raise ValueError(f"{self.name!r}: name in `features` the model whose features the SVM is trained on")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"{self.name!r}: seeds {list(self.seeds)}; expected different numbers from 0")
        return self


class StudyConfig(_Frozen):
    """A study: models, protocols and what the divisions are drawn with.

    The two confounder baselines, area alone and mean colour alone, belong in every table: they are added where a
    study does not name them. ``[defaults]`` in the file holds values for every model that does not say otherwise.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    description: str = ""
    seed: int = Field(default=0, ge=0, description="of the image split")
    protocols: tuple[Protocol, ...] = Field(default=("image", "grouped"), min_length=1)
    folds: int = Field(default=4, ge=2)
    models: tuple[ModelConfig, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("models"), list):
            return content
        content = dict(content)
        defaults = content.pop("defaults", {})
        if not isinstance(defaults, dict):
            raise ValueError("[defaults] has to be a table of values for every model")
        content["models"] = [{**defaults, **model} if isinstance(model, dict) else model for model in content["models"]]
        tables = [model for model in content["models"] if isinstance(model, dict)]
        named = {model.get("architecture") for model in tables}
        size = max((model["size"] for model in tables if isinstance(model.get("size"), int)), default=64)
        content["models"] += [
            {"name": kind, "family": "baseline", "architecture": kind, "size": size}
            for kind in BASELINES
            if kind not in named
        ]
        return content

    @model_validator(mode="after")
    def _connected(self) -> StudyConfig:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models {twice} occur twice; give every model a name of its own")
        for model in self.models:
            for need in model.needs:
                if need not in names:
                    raise ValueError(f"{model.name!r} needs {need!r}, which this study does not have; add it")
                missing = set(self.protocols_of(model)) - set(self.protocols_of(self.model(need)))
                if missing:
                    raise ValueError(
                        f"{model.name!r} needs {need!r}, which does not run under {sorted(missing)}; let both run there"
                    )
            if model.features and self.model(model.features).family != "ordinary":
                raise ValueError(f"{model.name!r} takes features of {model.features!r}, which is no ordinary network")
        self.ordered()
        return self

    def model(self, name: str) -> ModelConfig:
        """Return the model of that name.

        Raises
        ------
        RunError
            If there is none.
        """
        for model in self.models:
            if model.name == name:
                return model
        raise RunError(f"{name!r} is no model of the study {self.name!r}; it has {[m.name for m in self.models]}")

    def protocols_of(self, model: ModelConfig) -> tuple[Protocol, ...]:
        """Return the protocols that a model runs under."""
        return self.protocols if model.protocols is None else model.protocols

    @property
    def protocols_in_use(self) -> tuple[Protocol, ...]:
        """All protocols that some model runs under."""
        used = {protocol for model in self.models for protocol in self.protocols_of(model)}
        return tuple(protocol for protocol in get_args(Protocol) if protocol in used)

    def ordered(self, only: Iterable[str] = ()) -> tuple[ModelConfig, ...]:
        """Return the models in the order of the file, each after those that it needs.

        Parameters
        ----------
        only:
            Names of models: these and what they need. Empty: all.

        Raises
        ------
        ValueError
            If models need each other in a circle.
        RunError
            If a name is unknown.
        """
        done: list[ModelConfig] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise ValueError(f"models need each other in a circle: {' -> '.join((*path, name))}; break it")
            model = self.model(name)
            if model not in done:
                for need in model.needs:
                    visit(need, (*path, name))
                done.append(model)

        for name in tuple(only) or [model.name for model in self.models]:
            visit(name, ())
        return tuple(done)

    def folds_of(self, protocol: Protocol) -> int:
        """Return how many divisions a protocol has."""
        return self.folds if protocol == "grouped" else 1

    def full_size(self) -> StudyConfig:
        """Return the study with every ordinary network at its published width."""
        models = [
            model.model_copy(update={"width": 1.0}) if model.family == "ordinary" else model for model in self.models
        ]
        return self.model_copy(update={"models": tuple(models)})


def shipped() -> dict[str, str]:
    """Return the studies that come with Hemacrypt: name and content of the file."""
    files = resources.files("training.study").joinpath("configs").iterdir()
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".toml")
    }


def read_study(name: str) -> StudyConfig:
    """Read a study: a shipped one by its name, or a TOML file by its path.

    Raises
    ------
    RunError
        If there is none, or its content is not that of a study; the message says where and why.
    """
    known = shipped()
    try:
        text = known[name] if name in known else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{name!r} is no file that can be read, and no shipped study ({', '.join(known)})") from error
    try:
        return StudyConfig.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{name} is not TOML: {error}; correct it") from error
    except ValidationError as error:
        raise RunError(f"{name} is no study: {first_mistake(error)}; correct it") from error
