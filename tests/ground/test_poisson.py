"""Laws of the discrete Laplacian: faces counted by hand and neighbours summed one by one."""

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
    """Neighbours of a voxel inside the volume."""
    around = [tuple(np.add(voxel, step)) for step in STEPS]
    return [other for other in around if all(0 <= i < n for i, n in zip(other, SHAPE, strict=True))]


@pytest.mark.parametrize(
    "mask", [RAGGED, np.ones(SHAPE, bool), np.arange(6) % 2 == np.zeros((5, 4, 1))], ids=["ragged", "all", "layers"]
)
def test_rows_sum_to_the_number_of_known_neighbours_and_edge_sums_to_their_values(mask):
    laplacian, edge = masked_laplacian(KNOWN, mask)
    known = [[other for other in neighbours(voxel) if not mask[other]] for voxel in np.argwhere(mask)]
    np.testing.assert_array_equal(laplacian.sum(axis=1), [len(others) for others in known])
    np.testing.assert_array_equal(edge, [sum(KNOWN[other] for other in others) for others in known])


def test_the_matrix_is_degree_minus_adjacency():
    voxels = [tuple(voxel) for voxel in np.argwhere(RAGGED)]
    expected = [[len(neighbours(a)) * (a == b) - (b in neighbours(a)) for b in voxels] for a in voxels]
    np.testing.assert_array_equal(masked_laplacian(KNOWN, RAGGED)[0].toarray(), expected)


@pytest.mark.parametrize(("voxel", "faces"), [((2, 2, 2), 6), ((0, 2, 2), 5), ((0, 3, 2), 4), ((4, 3, 5), 3)])
def test_an_isolated_voxel_has_one_neighbour_per_face_inside_the_volume(voxel, faces):
    mask = np.zeros(SHAPE, bool)
    mask[voxel] = True
    laplacian, edge = masked_laplacian(np.full(SHAPE, 7.0), mask)
    assert laplacian.toarray().tolist() == [[faces]] and edge.tolist() == [7.0 * faces]


def test_a_linear_function_solves_it_inside_the_volume():
    mask, (x, y, z) = np.zeros(SHAPE, bool), np.indices(SHAPE)
    mask[1:-1, 1:-1, 1:-1] = RAGGED[1:-1, 1:-1, 1:-1]
    plane = 3.0 * x - 2 * y + z
    laplacian, edge = masked_laplacian(np.where(mask, 1e9, plane), mask)
    np.testing.assert_allclose(laplacian @ plane[mask], edge, atol=1e-9)
