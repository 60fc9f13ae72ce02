"""Laws of the discrete Laplacian: faces that are counted by hand, and neighbours that are summed one by one."""

from itertools import product

import numpy as np
import pytest

from ldm_lib.poisson import masked_laplacian

RNG = np.random.default_rng(0)
SHAPE = (5, 4, 6)
KNOWN = RNG.integers(1, 100, SHAPE).astype(float)
RAGGED = RNG.random(SHAPE) < 0.5
STEPS = [step for step in product((-1, 0, 1), repeat=3) if np.abs(step).sum() == 1]


def neighbours(voxel):
    """Those of a voxel that are in the volume."""
    around = [tuple(np.add(voxel, step)) for step in STEPS]
    return [place for place in around if all(0 <= i < n for i, n in zip(place, SHAPE, strict=True))]


@pytest.mark.parametrize(
    "mask", [RAGGED, np.ones(SHAPE, bool), np.arange(6) % 2 == np.zeros((5, 4, 1))], ids=["ragged", "all", "layers"]
)
def test_rows_sum_to_the_number_of_known_neighbours_and_these_to_the_edge(mask):
    laplacian, edge = masked_laplacian(KNOWN, mask)
    known = [[place for place in neighbours(voxel) if not mask[place]] for voxel in np.argwhere(mask)]
    np.testing.assert_array_equal(laplacian.sum(axis=1), [len(places) for places in known])
    np.testing.assert_array_equal(edge, [sum(KNOWN[place] for place in places) for places in known])


def test_it_is_the_number_of_neighbours_less_the_masked_ones():
    voxels = [tuple(voxel) for voxel in np.argwhere(RAGGED)]
    wanted = [[len(neighbours(a)) * (a == b) - (b in neighbours(a)) for b in voxels] for a in voxels]
    np.testing.assert_array_equal(masked_laplacian(KNOWN, RAGGED)[0].toarray(), wanted)


@pytest.mark.parametrize(("voxel", "faces"), [((2, 2, 2), 6), ((0, 2, 2), 5), ((0, 3, 2), 4), ((4, 3, 5), 3)])
def test_a_voxel_by_itself_has_as_many_faces_as_lie_in_the_volume(voxel, faces):
    mask = np.zeros(SHAPE, bool)
    mask[voxel] = True
    laplacian, edge = masked_laplacian(np.full(SHAPE, 7.0), mask)
    assert laplacian.toarray().tolist() == [[faces]] and edge.tolist() == [7.0 * faces]


def test_what_is_linear_in_place_solves_it_inside_the_volume():
    mask, (x, y, z) = np.zeros(SHAPE, bool), np.indices(SHAPE)
    mask[1:-1, 1:-1, 1:-1] = RAGGED[1:-1, 1:-1, 1:-1]
    plane = 3.0 * x - 2 * y + z
    laplacian, edge = masked_laplacian(np.where(mask, 1e9, plane), mask)
    np.testing.assert_allclose(laplacian @ plane[mask], edge, atol=1e-9)
