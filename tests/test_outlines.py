import numpy as np
from matplotlib.path import Path as Outline

from fmfl.sources import outlines


def test_compressed_counts_by_hand():
    """3, 2 and 4 stand as they are; then 1 as 1 - 2 = -1 (five set bits: 31, "O") and 104 as 104 - 4 = 100.

    100 is 3 * 32 + 4: first 4 with the bit for more (4 + 32 + 48 = 84, "T"), then 3 ("3").
    """
    assert outlines.decode_coco_counts("324OT3").tolist() == [3, 2, 4, 1, 104]


def test_a_rectangle_between_pixel_edges_has_its_own_area():
    mask = outlines.fill_even_odd([np.array([[2, 1], [7, 1], [7, 4], [2, 4]], float)], 6, 9)
    assert mask.sum() == 5 * 3
    assert mask[1:4, 2:7].all()


def test_a_triangle_by_hand():
    """Corners (0, 0), (4, 0), (0, 4): the centre (c + .5, r + .5) is inside where c + r + 1 < 4."""
    mask = outlines.fill_even_odd([np.array([[0, 0], [4, 0], [0, 4]], float)], 4, 4)
    # On the line c + r = 3 the centre lies on the edge itself: a right edge does not count as inside.
    assert mask.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_even_odd_leaves_a_hole_and_fills_an_island_in_it():
    def square(a, b):
        return np.array([[a, a], [b, a], [b, b], [a, b]], float)

    mask = outlines.fill_even_odd([square(0, 10), square(2, 8), square(4, 6)], 10, 10)
    assert mask.sum() == 100 - 36 + 4
    assert mask[5, 5]
    assert not mask[3, 3]


def test_filling_agrees_with_a_point_in_polygon_test_of_every_pixel_centre():
    """matplotlib asks each point for itself; outlines reach beyond the picture on all sides."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:24, :30] + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], 1)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 15))
        radii = rng.uniform(3, 20, 15)
        outline = np.stack([15 + radii * np.cos(angles), 12 + radii * np.sin(angles)], 1)
        expected = Outline(outline).contains_points(centres).reshape(24, 30)
        np.testing.assert_array_equal(outlines.fill_even_odd([outline], 24, 30), expected)
