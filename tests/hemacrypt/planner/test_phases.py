"""Images whose channels no ciphertext holds: parted by the remainders of row and column."""

from __future__ import annotations

import numpy as np
import pytest

from hemacrypt.engines.clear.ckks import ClearEngine
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense, Shape
from hemacrypt.plan.plan import LinearStep
from hemacrypt.planner import plan_network
from hemacrypt.planner.latency.diagonals import Grid, forms, image_grid, image_grids


def network(shape: Shape, stride: int, padding: int = 0, *, second: bool = False) -> CollapsedNetwork:
    rng = np.random.default_rng(stride)
    around = ((padding, padding), (padding, padding + 1))
    first = Convolution(rng.normal(size=(3, shape[0], 3, 3)) / 9, rng.normal(size=3), shape, stride, around)
    layers: list[Convolution | Dense] = [first]
    if second:
        kernel = rng.normal(size=(2, 3, 2, 2)) / 4
        layers.append(Convolution(kernel, rng.normal(size=2), first.output_shape, 2))
    layers.append(Dense(rng.normal(size=(2, layers[-1].outputs)) / layers[-1].outputs, rng.normal(size=2)))
    return CollapsedNetwork(shape, tuple(layers))


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
def test_a_strided_convolution_over_a_large_image_is_computed(stride: int, padding: int) -> None:
    asked = network((2, 71, 90), stride, padding)
    image = np.random.default_rng(9).random((1, *asked.input_shape))
    for options in ({}, {"slots": "real"}):
        plan = plan_network(asked, **options)
        np.testing.assert_allclose(ClearEngine(plan).predict(image), asked(image), rtol=0, atol=1e-9)
    pair = plan_network(asked, images=2)
    images = np.random.default_rng(10).random((2, *asked.input_shape))
    np.testing.assert_allclose(ClearEngine(pair).predict(images), asked(images), rtol=0, atol=1e-9)


def test_a_second_convolution_reads_what_the_first_one_wrote_in_phases() -> None:
    asked = network((1, 100, 80), 1, second=True)
    image = np.random.default_rng(11).random((1, *asked.input_shape))
    np.testing.assert_allclose(ClearEngine(plan_network(asked)).predict(image), asked(image), rtol=0, atol=1e-9)


def test_a_convolution_of_stride_four_needs_few_diagonals() -> None:
    asked = network((3, 96, 96), 4)
    step = plan_network(asked).steps[0]
    assert isinstance(step, LinearStep)
    # Without phases: one for every row and column that meet, some ten thousand.
    assert step.multiplications < 200
    assert step.inputs <= 6


def test_phases_that_suit_the_stride_are_tried_and_small_images_have_none() -> None:
    assert [grid.phases for grid in image_grids((3, 32, 32), 4096, 2)] == [1]
    assert image_grids((3, 96, 96), 4096, None) == []
    for stride in range(1, 7):
        grids = image_grids((3, 96, 96), 4096, stride)
        assert grids
        assert all(grid.phases % stride == 0 or stride % grid.phases == 0 for grid in grids)
        assert all(grid.holds((3, 96, 96), 4096) for grid in grids)
    assert image_grid((1, 4096, 4096), 4096, 2) is None


@pytest.mark.parametrize(
    ("phases", "stride", "after"), [(4, 1, (1, 4)), (4, 2, (1, 2)), (4, 4, (1, 1)), (2, 4, (2, 1)), (1, 3, (3, 1))]
)
def test_a_stride_takes_phases_first_and_opens_gaps_then(phases: int, stride: int, after: tuple[int, int]) -> None:
    found = Grid(8, 8, phases=phases).strided(stride)
    assert found is not None
    assert (found.gap, found.phases) == after
    assert Grid(8, 8, phases=4).strided(3) is None


def test_a_stride_that_does_not_go_with_the_phases_leaves_the_form_without_a_grid() -> None:
    grid = Grid(32, 32, phases=3)
    layer = Convolution(np.ones((1, 1, 2, 2)), np.zeros(1), (1, 96, 96), 2)
    source = grid.layout((1, 96, 96), 4096, 4096)
    assert [form.grid for form in forms(layer, layer.entries(), source, grid)] == [None]


def test_every_pixel_has_a_place_of_its_own_beside_those_of_its_phase() -> None:
    grid = Grid(4, 4, phases=3)
    layout = grid.layout((2, 10, 12), 16, 16)
    assert layout.ciphertexts == grid.ciphertexts((2, 10, 12), 16) == 18
    places = layout.positions.reshape(2, 10, 12)
    # Pixels three apart are neighbours; those of another remainder lie in another ciphertext.
    assert places[0, 3, 4] - places[0, 0, 4] == 4
    assert places[1, 2, 7] - places[1, 2, 4] == 1
    assert len({place // 16 for place in places[:, :3, :3].ravel().tolist()}) == 18
