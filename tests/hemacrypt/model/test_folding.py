"""Layers fold exactly: compared, step by step, with a network that computes every layer by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.errors import NetworkError
from hemacrypt.model.folding import Fold
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from tests.hemacrypt.batches import Batch
from tests.hemacrypt.setups import Setup

Array = npt.NDArray[np.float64]
Step = Callable[[Array], Array]
SHAPE = (2, 6, 5)


class Twin:
    """Folds layers and keeps each of them as a plain function of (batch, channels, height, width) or (batch, n)."""

    def __init__(self, seed: int, shape: tuple[int, int, int] = SHAPE) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape, self.fold, self.steps = shape, Fold(shape), list[Step]()

    def convolution(self, maps: int, size: int, stride: int = 1, padding: int = 0) -> Twin:
        kernel = self.rng.normal(size=(maps, self.fold.channels, size, size)) / size
        bias = self.rng.normal(size=maps)
        self.fold.convolution("c", kernel, bias, stride, ((padding, padding), (padding, padding)))

        def step(x: Array) -> Array:
            padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
            return np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], kernel) + bias[:, None, None]

        self.steps.append(step)
        return self

    def quadratic(self, a: Array, b: Array, c: Array) -> Twin:
        self.fold.quadratic("q", a, b, c)

        def step(x: Array) -> Array:
            one, two, three = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (a, b, c))
            return one * x**2 + two * x + three

        self.steps.append(step)
        return self

    def random_quadratic(self) -> Twin:
        return self.quadratic(*self.rng.normal(size=(3, self.fold.channels)))

    def dense(self, outputs: int) -> Twin:
        weight, bias = self.rng.normal(size=(outputs, self.fold.values)) / 4, self.rng.normal(size=outputs)
        if self.fold.map_shape is not None:
            self.fold.flatten()
        self.fold.dense("d", weight, bias)
        self.steps.append(lambda x: x.reshape(len(x), -1) @ weight.T + bias)
        return self

    def check(self) -> CollapsedNetwork:
        x = self.rng.normal(size=(4, *self.shape))
        expected = x
        for step in self.steps:
            expected = step(expected)
        network = CollapsedNetwork(self.shape, self.fold.finish())
        got = network(x)
        np.testing.assert_allclose(got, expected.reshape(len(x), -1), rtol=1e-9, atol=1e-9 * np.abs(expected).max())
        return network


def test_a_constant_before_padding_becomes_a_bias_that_differs_at_the_border() -> None:
    network = Twin(0).convolution(3, 2).random_quadratic().convolution(4, 3, 1, 1).check()
    second = network.linears[1]
    assert isinstance(second, Convolution)
    assert second.bias.shape == second.output_shape
    assert np.ptp(second.bias, axis=(1, 2)).min() > 0
    np.testing.assert_array_equal(second.bias[:, 1, 1], second.bias[:, 2, 1])


def test_further_layers_fold_onto_such_a_bias() -> None:
    twin = Twin(1).convolution(3, 2).random_quadratic().convolution(4, 3, 1, 1).convolution(2, 2).random_quadratic()
    network = twin.convolution(3, 3, 2, 1).convolution(2, 2, 1, 1).dense(3).check()
    assert [type(layer) for layer in network.linears] == [Convolution, Convolution, Dense]


@pytest.mark.parametrize(
    ("shape", "size", "stride", "padding", "folded"),
    [
        ((2, 8, 6), 2, 2, 1, True),
        ((2, 8, 6), 1, 2, 1, True),
        ((2, 9, 6), 3, 3, 2, True),
        ((2, 8, 6), 1, 1, 1, True),
        ((2, 9, 6), 2, 2, 1, False),  # a row is left over: a zero behind the map is not a window of zeros
        ((2, 8, 6), 3, 2, 1, False),  # nor where windows overlap
    ],
)
def test_windows_side_by_side_fold_into_a_padded_convolution(
    shape: tuple[int, int, int], size: int, stride: int, padding: int, folded: bool
) -> None:
    network = Twin(3, shape).convolution(3, size, stride).convolution(4, 3, 1, padding).check()
    (only,) = network.linears
    assert isinstance(only, Convolution) == folded
    if isinstance(only, Convolution):
        assert only.kernel.shape[2:] == (size + 2 * stride,) * 2
        assert (only.stride, only.padding) == (stride, ((padding * stride,) * 2,) * 2)


def test_a_pure_square_needs_no_bias_by_position() -> None:
    twin = Twin(2).convolution(3, 2)
    twin.fold.square("s")
    twin.steps.append(lambda x: x * x)
    second = twin.convolution(4, 3, 1, 1).check().linears[1]
    assert isinstance(second, Convolution)
    assert second.bias.shape == (4,)


NUMBERS = st.sampled_from([0.0, 1.0, -2.5, 1e-3, 1e-9, 40.0])


@settings(deadline=None, derandomize=True, database=None, max_examples=80)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=3, max_size=3), st.booleans(), st.integers(0, 2**16))
def test_any_coefficients_fold(coefficients: list[tuple[float, float, float]], flat: bool, seed: int) -> None:
    a, b, c = np.array(coefficients).T
    twin = Twin(seed)
    twin = twin.dense(3) if flat else twin.convolution(3, 2)
    if not (a.any() or b.any()):
        with pytest.raises(NetworkError, match="'q' makes every channel a constant"):
            twin.quadratic(a, b, c)
        return
    middle = twin.quadratic(a, b, c).dense(2).check().linears[0]
    # A channel that is linear, or nearly, is read twice; one that is constant not at all.
    reads = sum(2 if abs(two) > 128 * abs(one) else int(one != 0) for one, two in zip(a, b, strict=True))
    assert middle.outputs == reads * (1 if flat else 5 * 4)


def test_a_linear_channel_stays_exact_beside_large_values() -> None:
    twin = Twin(5).convolution(2, 1)
    network = twin.quadratic(np.array([0.0, 1e-12]), np.array([1.0, 1.0]), np.zeros(2)).dense(2).check()
    # A completed square would have shifted the second channel by 5e11.
    assert max(np.abs(layer.offset()).max() for layer in network.linears) < 100


def test_coefficients_of_values_fold_where_channels_share_them() -> None:
    twin = Twin(6).convolution(2, 2)
    twin.fold.flatten()
    with pytest.raises(NetworkError, match="'q' stands between Flatten and Dense"):
        twin.fold.quadratic("q", np.arange(40.0), 0.0, 0.0)
    twin.fold.quadratic("q", np.repeat([2.0, 3.0], 20), 1.0, 0.0)
    twin.steps.append(lambda x: np.array([2.0, 3.0])[:, None, None] * x**2 + x)
    twin.dense(2).check()


REFUSED: dict[str, tuple[Callable[[Fold], None], str]] = {
    "wrong channels": (lambda f: f.convolution("c", np.ones((1, 3, 2, 2)), [0.0]), "'c': convolution reads 3 channels"),
    "not finite": (lambda f: f.convolution("c", np.full((1, 2, 2, 2), np.nan), [0.0]), "'c'.*not finite"),
    "map not flattened": (lambda f: f.dense("d", np.ones((2, 60)), [0.0, 0.0]), "'d' reads a feature map; put Flatten"),
    "square first": (lambda f: f.square("s"), "nothing linear stands before 's'"),
    "infinite coefficient": (lambda f: f.quadratic("q", np.inf, 0, 0), "'q' holds numbers that are not finite"),
    "coefficients of another size": (lambda f: f.quadratic("q", [1, 2, 3], 0, 0), "one for each of 2 channels"),
    "window too large": (lambda f: f.mean_pooling("p", (7, 7), 1), "'p'.*empty map"),
    "huge mean": (lambda f: f.mean_pooling("p", (6000, 6000), 1), "'p' needs a matrix of 144,000,000"),
    "nothing at all": (lambda f: [f.finish(), None][1], "ends in a Square"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fold_is_refused_by_name(name: str) -> None:
    act, message = REFUSED[name]
    with pytest.raises(NetworkError, match=message):
        act(Fold(SHAPE))


def test_a_product_of_padded_convolutions_that_no_memory_holds_is_refused() -> None:
    fold = Fold((16, 96, 96))
    for name in ("one", "two"):
        fold.convolution(name, np.ones((16, 16, 3, 3)), np.zeros(16), 1, ((1, 1), (1, 1)))
    with pytest.raises(NetworkError, match="without padding"):
        fold.finish()


@pytest.fixture(scope="module")
def bordered() -> CollapsedNetwork:
    """Return a network with a quadratic activation before a padded convolution, and a linear channel, calibrated."""
    twin = (
        Twin(8, (1, 6, 6))
        .convolution(2, 3)
        .quadratic(np.array([0.5, 0.0]), np.array([0.3, 1.0]), np.array([1.0, -1.0]))
    )
    network = twin.convolution(2, 3, 1, 1).random_quadratic().dense(3).check()
    layer = network.linears[1]
    assert isinstance(layer, Convolution)
    assert layer.bias.ndim == 3
    return network.calibrated(np.random.default_rng(0).random((300, 1, 6, 6)))


def test_a_bias_by_position_runs_encrypted_within_the_bound(bordered: CollapsedNetwork) -> None:
    setup = Setup.of(bordered)
    image = setup.images(1)
    for logits in (
        setup.predict(image),
        setup.holder.decrypt(setup.vector.evaluate(setup.holder.encrypt(image), setup.vector_keys)),
    ):
        assert np.abs(logits - bordered(image)).max() <= setup.plan.public.logit_error_bound


def test_a_bias_by_position_runs_in_batches_within_the_bound(bordered: CollapsedNetwork) -> None:
    batch = Batch.of(bordered)
    images = np.random.default_rng(2).random((5, 1, 6, 6))
    assert batch.error(images) <= batch.plan.public.logit_error_bound
