"""One way of learning for each family of models.

A learner is a function from a `Lesson` to what was `Learned`. To add an architecture, put a function
``(size, width, **options) -> keras.Model`` that gives two logits into `SQUARES` or into
`training.ordinary.NETWORKS`; distillation, augmentation, seeds and records come with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, cast

import keras
import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from hemacrypt.model.preprocess import Pixels
from training.errors import RunError
from training.models import cryptonet, squares, symmetric
from training.ordinary import FEATURES, NETWORKS, multiply_adds, ordinary_network
from training.settings import Settings
from training.study.config import BASELINES, Family, ModelConfig, StudyConfig
from training.study.teaching import Doubles, Learned, Lesson, logits_of, network_input, settle, teach
from training.symmetry import ORDER, SymmetricConv2D

Learner = Callable[[Lesson], Learned]

# Cells whose patches a first layer is whitened with: half a million patches, far more than there are numbers to find.
_WHITENING_CELLS = 512


def _paper_square(size: int, width: float, **options: Any) -> keras.Model:
    """Build the paper's network with squares and softmax; options are those of `Settings` that shape it."""
    maps = {name: max(1, round(number * width)) for name, number in _PAPER_MAPS.items()}
    return cryptonet(Settings.model_validate({**maps, **options}), size)


def _plain_squares(size: int, width: float, **options: Any) -> keras.Model:
    """Build `training.models.squares` with its options; ``width`` multiplies the channels."""
    chosen = {**_SYMMETRIC_MAPS, **options}
    scaled = {name: max(round(chosen[name] * width), min(chosen[name], 1)) for name in _SYMMETRIC_MAPS}
    return squares(size, **{**chosen, **scaled})


def _symmetric_square(size: int, width: float, **options: Any) -> keras.Model:
    """Build `training.models.symmetric` with its options; ``width`` multiplies the channels, in whole orbits."""

    def scaled(maps: int) -> int:
        return maps if width == 1 or not maps else ORDER * max(1, round(maps * width / ORDER))

    maps = {**_SYMMETRIC_MAPS, "third_maps": 0}
    chosen = {**maps, **options}
    return symmetric(size, **{**chosen, **{name: scaled(chosen[name]) for name in maps}})


_PAPER_MAPS = {"first_maps": 16, "inner_maps": 32, "hidden": 64}
_SYMMETRIC_MAPS = {"first_maps": 16, "inner_maps": 0, "hidden": 64}
# Networks that can be evaluated under encryption: (size, width, **options) -> two logits.
SQUARES: dict[str, Callable[..., keras.Model]] = {
    "cryptonet": _paper_square,
    "symmetric": _symmetric_square,
    "squares": _plain_squares,
}

ARCHITECTURES: dict[Family, Collection[str]] = {
    "ordinary": NETWORKS,
    "square": SQUARES,
    "svm": ("rbf",),
    "baseline": BASELINES,
}


def build(config: ModelConfig) -> tuple[keras.Model, str]:
    """Build the network of an ordinary or square model, untrained, and say what it starts from.

    Raises
    ------
    RunError
        If the architecture is unknown or does not take an option.
    """
    if config.family == "ordinary":
        return ordinary_network(config.architecture, config.size, config.width, config.weights, **config.options)
    try:
        return SQUARES[config.architecture](config.size, config.width, **config.options), "from scratch"
    except (TypeError, ValueError) as error:  # of the latter is pydantic's
        raise RunError(f"{config.name!r}: {config.architecture!r} does not take {config.options}: {error}") from error


def check(study: StudyConfig) -> dict[str, int]:
    """Build every network of a study once, so that a mistake shows before hours of training.

    Returns
    -------
    dict
        For each model the multiplications of one image; 0 where there is no network.

    Raises
    ------
    RunError
        If an architecture is unknown or does not take its options.
    """
    found = {}
    for model in study.models:
        known = ARCHITECTURES[model.family]
        if model.architecture not in known:
            raise RunError(
                f"{model.name!r}: there is no {model.architecture!r} of family {model.family!r}; "
                f"choose one of {', '.join(known)}"
            )
        networked = model.family in ("ordinary", "square")
        # From scratch: counting needs no download.
        found[model.name] = multiply_adds(build(model.model_copy(update={"weights": "scratch"}))[0]) if networked else 0
    return found


def learn_network(lesson: Lesson) -> Learned:
    """Train an ordinary or square network."""
    settle(lesson.seed)
    network, words = build(lesson.config)
    for layer in network.layers:
        if isinstance(layer, SymmetricConv2D) and layer.whitened:
            layer.whiten(network_input(lesson.images[:: -(-len(lesson.images) // _WHITENING_CELLS)]))
    history = teach(network, lesson)
    return Learned(logits_of(network), history, words, network.count_params(), multiply_adds(network), network)


def learn_svm(lesson: Lesson) -> Learned:
    """Train a support vector machine with RBF kernel on a network's features.

    ImageNet's VGG16 gives them where it is wanted and can be obtained; else the network of the study that
    `ModelConfig.features` names, trained in the same division. The option ``C`` is scikit-learn's.
    """
    settle(lesson.seed)
    network: Any = None
    words = "from scratch"
    if lesson.config.weights == "imagenet":
        network, words = ordinary_network("vgg16", lesson.config.size, 1.0, "imagenet")
    if words != "ImageNet":
        network = keras.saving.load_model(lesson.features, compile=False, safe_mode=True)
        words = f"{words}; features of {lesson.config.features!r}, trained in the same division"
    body = keras.Model(network.inputs, network.get_layer(FEATURES).output)

    def features(images: Pixels) -> Doubles:
        return np.asarray(body.predict(network_input(images), batch_size=256, verbose=0), dtype=np.float64)

    machine = make_pipeline(StandardScaler(), SVC(C=float(lesson.config.options.get("C", 1.0)), cache_size=500))
    machine.fit(features(lesson.images), lesson.labels, svc__sample_weight=lesson.weights)
    return Learned(lambda images: _two(machine.decision_function(features(images))), {}, words)


def learn_baseline(lesson: Lesson) -> Learned:
    """Fit one of the confounder baselines, which see nothing but the cell's area or mean colour."""
    from training.baselines import fit_baseline

    kind = cast(Literal["area", "colour"], lesson.config.architecture)
    fitted = fit_baseline(kind, lesson.images, lesson.labels, lesson.weights)
    return Learned(fitted.logits, {})


def _two(score: Doubles) -> Doubles:
    """Return logits whose difference is the score, shape (n, 2)."""
    return np.stack([-score / 2, score / 2], axis=1)


LEARNERS: dict[Family, Learner] = {
    "ordinary": learn_network,
    "square": learn_network,
    "svm": learn_svm,
    "baseline": learn_baseline,
}
