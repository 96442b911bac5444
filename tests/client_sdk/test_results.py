"""What a prediction says: labels, probabilities, how sure it is — and what it keeps to itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client_sdk import Bytes, Milliseconds, Prediction


def _prediction(*logits: float, labels: tuple[str, ...] = ("normal", "leukaemic"), bound: float = 0.01) -> Prediction:
    return Prediction(
        source="cell.png",
        labels=labels[: len(logits)],
        logits=np.array(logits),
        error_bound=bound,
        milliseconds=Milliseconds(1, 2, 3, 4, 5),
        size=Bytes(10, 20),
    )


def test_probabilities_are_the_softmax() -> None:
    answer = _prediction(1.0, 3.0)
    expected = math.exp(3) / (math.exp(1) + math.exp(3))
    assert answer.probabilities["leukaemic"] == pytest.approx(expected, abs=1e-12)
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert (answer.index, answer.label) == (1, "leukaemic")
    assert answer.probability == answer.probabilities["leukaemic"]


def test_three_labels() -> None:
    answer = _prediction(0.0, -1.0, 2.0, labels=("a", "b", "c"))
    assert (answer.index, answer.label) == (2, "c")
    weights = [1, math.exp(-1), math.exp(2)]
    assert answer.probability == pytest.approx(weights[2] / sum(weights), abs=1e-12)


@pytest.mark.parametrize("logits", [(1000.0, -1000.0), (1e300, 0.0), (-1e4, -1e4)])
def test_extreme_logits_make_no_overflow(logits: tuple[float, float]) -> None:
    answer = _prediction(*logits)
    assert all(0 <= value <= 1 for value in answer.probabilities.values())
    assert answer.probability >= 0.5


@pytest.mark.parametrize(("logit", "label", "index"), [(2.0, "yes", 1), (-2.0, "not yes", 0), (0.0, "not yes", 0)])
def test_a_single_logit_is_logistic(logit: float, label: str, index: int) -> None:
    answer = _prediction(logit, labels=("yes",))
    positive = 1 / (1 + math.exp(-logit))
    assert (answer.label, answer.index) == (label, index)
    assert answer.probabilities["yes"] == pytest.approx(positive, abs=1e-12)
    assert answer.probability == pytest.approx(max(positive, 1 - positive), abs=1e-12)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_an_extreme_single_logit_makes_no_overflow(logit: float) -> None:
    answer = _prediction(logit, labels=("yes",))
    assert answer.probabilities["yes"] == (1.0 if logit > 0 else 0.0)
    assert answer.probability == 1.0


@pytest.mark.parametrize(
    ("logits", "decided"),
    [
        ((0.0, 0.0201), True),
        ((0.0, 0.0199), False),
        ((0.5, 0.5), False),
        ((0.03, 0.0, -5.0), True),
        ((0.03, 0.011, -5.0), False),
        ((0.0101,), True),
        ((-0.0101,), True),
        ((0.0099,), False),
        ((-0.0099,), False),
    ],
)
def test_a_label_is_decided_when_no_error_within_the_bound_could_change_it(
    logits: tuple[float, ...], decided: bool
) -> None:
    assert _prediction(*logits, labels=("a", "b", "c")).decided_beyond_error is decided


def test_neither_logits_nor_probabilities_show_when_printed() -> None:
    answer = _prediction(1.2345678, -9.8765432)
    for text in (repr(answer), str(answer), f"{answer}", repr([answer])):
        assert "1.23" not in text
        assert "9.87" not in text
        assert "cell.png" in text
        assert "logits" not in text
    assert repr(answer) == repr(_prediction(5.0, 6.0))
