"""Search of architectures: which square networks are worth their encrypted milliseconds.

Optuna proposes architectures; each is planned before it is trained, because sizes alone decide nearly all of an
encrypted evaluation's time. What the planner refuses or what costs more than the budget is never trained. The rest is
trained briefly in one fold of the grouped division of the pool. Objectives: AUROC on the fold that is left, and the
predicted milliseconds.

The search looks at that fold as often as it has trials, and the fold is part of the pool. So its AUROC flatters the
networks that it finds: they become models of a study, and figures come from there. Held-out cells are dropped as soon
as a file is open.

Source of the sampler: Ozaki et al., Multiobjective Tree-Structured Parzen Estimator (JAIR 2022).
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import keras
import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from sklearn.metrics import roc_auc_score

from hemacrypt.errors import HemacryptError
from hemacrypt.model.calibration import margin_quantiles
from hemacrypt.model.network import CollapsedNetwork
from hemacrypt.model.preprocess import Pixels
from hemacrypt.planner.costs import plan_ms
from hemacrypt.planner.latency.ckks import plan_network
from hemacrypt.seal.sizes import key_bytes
from training.collapse import collapse
from training.errors import DataError, RunError
from training.fit import weigh
from training.ordinary import multiply_adds
from training.pareto import Status, Tried, write_pareto
from training.report import read_progress
from training.settings import first_mistake
from training.study.config import ModelConfig
from training.study.divisions import divide, preprocessing_of, read_cells
from training.study.learners import build
from training.study.runner import machine
from training.study.runs import RunFolder, digest_of
from training.study.teaching import (
    Diverged,
    Doubles,
    Lesson,
    logits_of,
    settle,
    teach,
)

JOURNAL = "trials.journal"
# Margins say how exact logits have to be. An untrained network's mean nothing; trained ones on these cells have
# such: one cell in a hundred has logits closer together than this.
_USUAL_MARGINS: Final = {"0.01": 0.05}
# Cells that magnitudes and margins are measured on: enough for a prediction of time, a fraction of what export takes.
_MEASURED: Final = 1000
# Before training, sizes decide and magnitudes hardly matter.
_MEASURED_UNTRAINED: Final = 100
# Of a model's fields, those that the search decides itself.
_DECIDED: Final = frozenset(ModelConfig.model_fields) - {
    *(
        "batch_size",
        "optimizer",
        "learning_rate",
        "weight_decay",
        "clip_norm",
        "label_smoothing",
        "label_balance",
        "group_power",
    ),
    *("augmentation", "alpha", "temperature"),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Space(_Frozen):
    """What trials choose from; see `training.models.symmetric`."""

    size: tuple[Literal[32, 64], ...] = Field(default=(32, 64), min_length=1)
    symmetric: tuple[bool, ...] = Field(default=(True, False), min_length=1)
    first_maps: tuple[int, ...] = Field(default=(16,), min_length=1)
    kernel: tuple[int, ...] = Field(default=(4,), min_length=1)
    stride: tuple[int, ...] = Field(default=(2,), min_length=1)
    inner_maps: tuple[int, ...] = Field(default=(0,), min_length=1)
    inner_kernel: tuple[int, ...] = Field(default=(4,), min_length=1)
    inner_stride: tuple[int, ...] = Field(default=(2,), min_length=1)
    inner_pool: tuple[int, ...] = Field(default=(1,), min_length=1)
    third_maps: tuple[int, ...] = Field(default=(0,), min_length=1)
    pool: tuple[int, ...] = Field(default=(1,), min_length=1)
    hidden: tuple[int, ...] = Field(default=(64,), min_length=1)
    dropout: tuple[float, ...] = Field(default=(0.2,), min_length=1)
    activation: tuple[Literal["square", "quadratic"], ...] = Field(default=("square",), min_length=1)
    whitened: tuple[bool, ...] = Field(default=(False,), min_length=1)
    range_penalty: tuple[float, ...] = Field(default=(0.0,), min_length=1)


class SearchConfig(_Frozen):
    """A search, as its TOML file says it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    folds: int = Field(default=4, ge=2)
    fold: int = Field(default=0, ge=0, description="which fold of the grouped division trials are measured on")
    seed: int = Field(default=0, ge=0, description="of proposals, weights, order and dropout")
    epochs: int = Field(default=12, ge=1)
    trials: int = Field(default=60, ge=1)
    training: dict[str, Any] = Field(default={}, description="fields of ModelConfig that are the same for every trial")
    space: Space = Space()

    @model_validator(mode="after")
    def _sensible(self) -> SearchConfig:
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}; expected 0 to {self.folds - 1}")
        decided = sorted(_DECIDED & set(self.training))
        if decided:
            raise ValueError(f"[training] holds {decided}, which the search decides itself; leave them out")
        self.model({"architecture": "symmetric", "size": 32, "options": {}})
        return self

    def model(self, chosen: dict[str, Any]) -> ModelConfig:
        """Return an architecture as a model of a study."""
        return ModelConfig.model_validate(
            {**self.training, **chosen, "name": "trial", "family": "square", "epochs": self.epochs}
        )


def read_search(name: str) -> SearchConfig:
    """Read a search: ``default``, or a TOML file by its path.

    Raises
    ------
    RunError
        If there is none, or its content is not that of a search.
    """
    try:
        path = resources.files("training").joinpath("search.toml") if name == "default" else Path(name)
        return SearchConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{name} is not TOML: {error}; correct it") from error
    except ValidationError as error:
        raise RunError(f"{name} is no search: {first_mistake(error)}; correct it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{name!r} is no file that can be read; name a TOML file, or 'default'") from error


class Search:
    """A search with its data and the folder that it goes on in.

    Parameters
    ----------
    config:
        What to try.
    data:
        Folder of the data, as `training.datasets.load_cells` reads it.
    out:
        Folder of trials and results.
    teachers:
        Folders of finished runs of a study (``OUT/runs/MODEL/grouped-FOLD/seed-S``) in the same division, whose mean
        logits are imitated.
    budget_ms:
        Architectures that cost more are not trained; None: all are.

    Raises
    ------
    DataError
        If the data cannot be read or divided, or a teacher taught other cells.
    RunError
        If the folder holds another search.
    """

    def __init__(
        self,
        config: SearchConfig,
        data: Path,
        out: Path,
        teachers: Sequence[Path] = (),
        budget_ms: float | None = None,
        console: Console | None = None,
    ) -> None:
        self.config, self.out, self.budget_ms = config, out, budget_ms
        self._say: Callable[[str], None] = console.print if console else lambda words: None
        show = partial(read_progress, console) if console else None
        self._cells = read_cells(data, config.space.size, progress=show)
        self._some = first = next(iter(self._cells.values()))
        self._division = divide(first, "grouped", config.folds)[config.fold]
        self._soft, taught = self._taught(teachers)
        self._study = self._opened(
            {
                "config": config.model_dump(mode="json", exclude={"trials"}),
                "train": first.fingerprint(self._division.train),
                "test": first.fingerprint(self._division.test),
                "teachers": taught,
            }
        )

    def _taught(self, teachers: Sequence[Path]) -> tuple[Doubles | None, list[str]]:
        """Return the mean logits of teachers on the train part, and their digests."""
        if not teachers:
            return None, []
        expected = self._some.sha256[self._division.train].tolist()
        folders = [RunFolder(path) for path in teachers]
        for folder in folders:
            if not folder.finished or folder.result().status != "finished":
                raise RunError(f"{folder.path} is no finished run of a study; name OUT/runs/MODEL/grouped-0/seed-0")
            if folder.logits().train_sha256.tolist() != expected:
                raise DataError(
                    f"{folder.path} was trained on other cells; name a run of {self._division.name} of a study with "
                    f"{self.config.folds} folds"
                )
        mean: Doubles = np.mean([folder.logits().train_logits for folder in folders], axis=0)
        return mean, [folder.result().digest for folder in folders]

    def _opened(self, content: dict[str, Any]) -> optuna.Study:
        """Open the journal of trials, or begin it."""
        self.out.mkdir(parents=True, exist_ok=True)
        journal = str(self.out / JOURNAL)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal))),
            study_name="search",
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
        digest = digest_of(content)
        if study.user_attrs.get("digest", digest) != digest:
            raise RunError(
                f"{self.out} holds a search of another configuration, other data or other teachers; "
                "choose another --out"
            )
        study.set_user_attr("digest", digest)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)  # it was interrupted
        # Not the same proposals again when a search goes on.
        study.sampler = optuna.samplers.TPESampler(seed=self.config.seed + len(study.trials))
        return study

    def run(self, trials: int, minutes: float | None = None) -> None:
        """Try architectures until there are ``trials`` of them, refused ones included, or time is up.

        Parameters
        ----------
        trials:
            In all, with those that are there already.
        minutes:
            A trial that is under way then is finished; None: no limit.
        """
        missing = trials - len(self._done())
        if missing > 0:
            self._study.optimize(
                self._try, n_trials=missing, timeout=None if minutes is None else 60 * minutes, gc_after_trial=True
            )

    def tried(self) -> tuple[Tried, ...]:
        """Return all trials that are done, each architecture once."""
        every = [Tried(number=trial.number, **trial.user_attrs["tried"]) for trial in self._done()]
        once: dict[str, Tried] = {}
        # What an earlier budget refused may have been trained since.
        for one in sorted(every, key=lambda one: (one.status == "refused", one.number)):
            once.setdefault(one.words, one)
        return tuple(sorted(once.values(), key=lambda one: one.number))

    def report(self, command: str = "") -> None:
        """Write ``pareto.*``; see `training.pareto.write_pareto`."""
        teachers = "imitates teachers of a study" if self._soft is not None else "no teacher"
        about = {
            "name": self.config.name,
            "command": f"`{command or 'hemacrypt study search'}`",
            "machine": machine(),
            "AUROC": f"after {self.config.epochs} epochs ({teachers}), on {len(self._division.test)} cells of fold "
            f"{self.config.fold} of {self.config.folds} of the grouped division of the training pool. Trials were "
            "compared on these cells: figures of those on the front are optimistic, and final ones come from studies",
            "milliseconds": "of one encrypted evaluation on one thread, predicted by the planner from a fixed table of "
            "costs, the same on every machine; not measured",
            "budget": "none" if self.budget_ms is None else f"{self.budget_ms:g} ms",
        }
        write_pareto(self.tried(), self.out, about)

    def _done(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def _try(self, trial: Trial) -> tuple[float, float]:
        """Try what a trial proposes; an architecture that was tried before is not trained again."""
        model = self.config.model(_proposed(trial, self.config.space))
        same = next((done for done in self._done() if done.params == trial.params and _learned(done)), None)
        found = same.user_attrs["tried"] if same else self._outcome(model)
        trial.set_user_attr("tried", found)
        one = Tried(number=trial.number, **found)
        point = one.point
        if point is None:
            self._say(f"trial {trial.number}: {one.words}: {one.status}, {one.reason}")
            raise optuna.TrialPruned(one.reason)
        again = f" (as trial {same.number})" if same else ""
        self._say(f"trial {trial.number}: {one.words}: AUROC {point[0]:.4f}, {point[1]:.1f} ms{again}")
        return point

    def _outcome(self, model: ModelConfig) -> dict[str, Any]:
        """Plan, then train, then plan again; return the fields of a `Tried`."""
        found: dict[str, Any] = {"model": model.model_dump(include={"architecture", "size", "options"})}

        def without_result(status: Status, reason: object) -> dict[str, Any]:
            return {**found, "status": status, "reason": str(reason)}

        settle(self.config.seed)
        try:
            network, _ = build(model)
            found |= {"parameters": network.count_params(), "multiply_adds": multiply_adds(network)}
            planned = self._planned(network, model.size, trained=False)
        except HemacryptError as refused:
            return without_result("refused", refused)
        found |= {"planned_ms": planned["ms"], "squares": planned["squares"]}
        if self.budget_ms is not None and planned["ms"] > self.budget_ms:
            return without_result("refused", f"{planned['ms']:.1f} ms predicted, budget {self.budget_ms:g} ms")
        began = time.monotonic()
        try:
            teach(network, self._lesson(model))
            auroc = self._auroc(network, model.size)
            found["seconds"] = round(time.monotonic() - began, 2)
            return {**found, **self._planned(network, model.size, trained=True), "auroc": auroc, "status": "trained"}
        except Diverged as diverged:
            return without_result("diverged", diverged)
        except HemacryptError as refused:
            return without_result("refused", f"after training: {refused}")

    def _lesson(self, model: ModelConfig) -> Lesson:
        cells, train = self._cells[model.size], self._division.train
        return Lesson(
            config=model,
            images=cells.images[train],
            labels=cells.labels[train],
            weights=weigh(cells, train, model.label_balance, model.group_power),
            soft=self._soft,
            answers=None,
            watched=None,
            features=None,
            seed=self.config.seed,
        )

    def _auroc(self, network: keras.Model, size: int) -> float:
        cells, test = self._cells[size], self._division.test
        found = logits_of(network)(cells.images[test])
        if not np.isfinite(found).all():
            raise Diverged("a logit is no finite number")
        return float(roc_auc_score(cells.labels[test], found[:, 1] - found[:, 0]))

    def _planned(self, network: keras.Model, size: int, trained: bool) -> dict[str, Any]:
        """Predict the encrypted evaluation of a network, with magnitudes of training cells."""
        rows = self._division.train
        step = -(-len(rows) // (_MEASURED if trained else _MEASURED_UNTRAINED))
        seen = self._cells[size].images[rows[::step]]
        return predicted(collapse(network), seen, None if trained else _USUAL_MARGINS)


def predicted(network: CollapsedNetwork, seen: Pixels, margins: dict[str, float] | None = None) -> dict[str, Any]:
    """Plan one encrypted evaluation and predict what it costs.

    Parameters
    ----------
    network:
        Not calibrated.
    seen:
        Cells that magnitudes are measured on, uint8, shape (n, size, size, 3).
    margins:
        Between the logits (see `hemacrypt.model.calibration`); None: those of the network on these cells.

    Returns
    -------
    dict
        ``ms``, ``degree``, ``key_megabytes``, ``error_bound`` and ``squares``, as in `training.pareto.Tried`.

    Raises
    ------
    PlanError
        If the planner refuses it.
    """
    values = preprocessing_of(seen.shape[1]).normalise(seen)
    plan = plan_network(
        network.calibrated(values), margins=margin_quantiles(network(values)) if margins is None else margins
    )
    return {
        "ms": round(plan_ms(plan.public.parameters, plan.steps), 3),
        "degree": plan.public.parameters.degree,
        "key_megabytes": round(key_bytes(plan.public.parameters, plan.public.keys) / 1e6, 2),
        "error_bound": plan.public.logit_error_bound,
        "squares": network.squares,
    }


def _learned(trial: FrozenTrial) -> bool:
    """Whether a network was trained, for better or worse; what was refused may pass now, and costs little."""
    return bool(trial.user_attrs["tried"]["status"] != "refused")


def _proposed(trial: Trial, space: Space) -> dict[str, Any]:
    """Let a trial choose ``architecture``, ``size`` and ``options``, and nothing that would mean nothing."""

    def choose(name: str) -> Any:
        return trial.suggest_categorical(name, getattr(space, name))

    size, symmetric, inner_maps = choose("size"), choose("symmetric"), choose("inner_maps")
    third_maps = choose("third_maps") if symmetric and inner_maps else 0
    idle = {"size", "symmetric", "inner_maps", "third_maps"}
    if not inner_maps:
        idle |= {"inner_kernel", "inner_stride"}
    if not third_maps:
        idle |= {"inner_pool"}
    if not symmetric:
        idle |= {"activation", "whitened", "range_penalty"}
    options = {name: choose(name) for name in Space.model_fields if name not in idle} | {"inner_maps": inner_maps}
    if third_maps:
        options["third_maps"] = third_maps
    return {"architecture": "symmetric" if symmetric else "squares", "size": size, "options": options}
