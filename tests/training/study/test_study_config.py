"""Files that describe studies: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.errors import RunError
from training.study.config import ModelConfig, read_study, shipped

PLAIN = '[[models]]\nname = "plain"\nfamily = "ordinary"\narchitecture = "plain"\n'
SQUARE = '[[models]]\nname = "square"\nfamily = "square"\narchitecture = "cryptonet"\nsize = 32\n'


def study(folder: Path, text: str) -> Any:
    path = folder / "study.toml"
    path.write_text('name = "tiny"\n' + text)
    return read_study(str(path))


def test_defaults_hold_for_models_that_do_not_say_otherwise(tmp_path: Path) -> None:
    read = study(tmp_path, f"[defaults]\nepochs = 7\nsize = 32\n{PLAIN}epochs = 3\n{SQUARE}")
    assert [(model.name, model.epochs, model.size) for model in read.models[:2]] == [
        ("plain", 3, 32),
        ("square", 7, 32),
    ]


def test_the_confounder_baselines_are_in_every_study_once(tmp_path: Path) -> None:
    assert [model.name for model in study(tmp_path, SQUARE).models] == ["square", "area", "colour"]
    assert study(tmp_path, SQUARE).model("area").size == 32  # no further archive is asked for
    own = '[[models]]\nname = "size"\nfamily = "baseline"\narchitecture = "area"\n'
    assert [model.name for model in study(tmp_path, SQUARE + own).models] == ["square", "size", "colour"]


def test_models_come_after_those_they_learn_from(tmp_path: Path) -> None:
    read = study(tmp_path, f'{SQUARE}teachers = ["plain"]\n{PLAIN}')
    assert [model.name for model in read.ordered()][:2] == ["plain", "square"]
    assert [model.name for model in read.ordered(["square"])] == ["plain", "square"]
    with pytest.raises(RunError, match="'nobody' is no model of the study 'tiny'"):
        read.ordered(["nobody"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'{SQUARE}teachers = ["plain"]', "'square' needs 'plain', which this study does not have; add it"),
        (
            f'{SQUARE}teachers = ["plain"]\n{PLAIN}teachers = ["square"]',
            "models need each other in a circle: square -> plain -> square",
        ),
        (f'{SQUARE}teachers = ["square"]', "circle: square -> square"),
        (SQUARE + SQUARE, r"models \['square'\] occur twice"),
        (f"{SQUARE}speed = 3", "models.0.speed: Extra inputs are not permitted"),
        (f"{SQUARE}size = 33", "is not TOML"),
        (SQUARE.replace("32", "33"), "models.0.size"),
        (f"{SQUARE}seeds = [1, 1]", r"seeds \[1, 1\]; expected different numbers"),
        (f'{SQUARE}features = "plain"\n{PLAIN}', "only a model of family 'svm' takes the features"),
        (SQUARE.replace('"square"\narch', '"svm"\narch'), "name in `features`"),
        (
            f'{PLAIN}protocols = ["image"]\n{SQUARE}teachers = ["plain"]',
            r"'square' needs 'plain', which does not run under \['grouped'\]",
        ),
        ('[[models]]\nname = "a"\nfamily = "baseline"\narchitecture = "area"\nteachers = ["a"]', "cannot be distilled"),
        ("folds = 1\n" + SQUARE, "folds"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RunError, match=words) as refused:
        study(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_an_unknown_study_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no shipped study \(full, quick\)"):
        read_study(str(tmp_path / "nothing.toml"))


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_are_valid_and_called_as_their_file(name: str) -> None:
    assert read_study(name).name == name


def test_seeds_protocols_and_keeping_do_not_change_what_a_run_is() -> None:
    model = ModelConfig(name="a", family="square", architecture="cryptonet")
    more = model.model_copy(update={"seeds": (0, 1), "protocols": ("image",), "keep_weights": True})
    assert more.recipe() == model.recipe()
    assert model.model_copy(update={"epochs": 31}).recipe() != model.recipe()


def test_full_size_widens_ordinary_networks_alone(tmp_path: Path) -> None:
    full = study(tmp_path, f"{PLAIN}width = 0.5\n{SQUARE}width = 0.5\n").full_size()
    assert (full.model("plain").width, full.model("square").width) == (1.0, 0.5)
