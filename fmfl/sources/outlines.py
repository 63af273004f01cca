"""Masks of pixels out of outlines and runs, as annotations give them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fmfl.sources.files import SkippedFile

#: Height and width of an image in pixels -> [H, W] bool.
Shape = Callable[[int, int], np.ndarray]


def fill_even_odd(outlines: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Return the pixels whose centre lies inside closed outlines, by the even-odd rule: [H, W] bool.

    The pixel in row r and column c covers [c, c+1] x [r, r+1]. Testing its centre keeps areas unbiased;
    drawing libraries add the outline itself, half a pixel all round. Each edge toggles, in every row that it
    crosses, the first pixel to the right of the crossing; the running parity along the row is the mask.

    Args:
        outlines: each [n, 2] float, x and y in pixels; may reach beyond the image.
        height, width: of the image in pixels.
    """
    toggles = np.zeros((height, width + 1), np.uint8)
    for outline in outlines:
        (x0, y0), (x1, y1) = outline.T, np.roll(outline, -1, axis=0).T
        first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
        last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
        rows_of_edge = last - first
        edge = np.repeat(np.arange(len(outline)), rows_of_edge)
        before = np.repeat(np.cumsum(rows_of_edge) - rows_of_edge, rows_of_edge)
        row = first[edge] + np.arange(len(edge)) - before
        along = (row + 0.5 - y0[edge]) / (y1 - y0)[edge]
        crossing = x0[edge] + along * (x1 - x0)[edge]
        column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
        np.bitwise_xor.at(toggles, (row, column), 1)
    return np.bitwise_xor.accumulate(toggles[:, :width], axis=1).astype(bool)


def decode_coco_counts(text: str | bytes) -> np.ndarray:
    """Return the run lengths in COCO's compressed RLE text.

    Each number is written five bits a character, lowest first, plus 48; bit 5 says that more follow, bit 4 of
    the last one is the sign. From the fourth number on, the difference to the number two before is written.
    """
    numbers: list[int] = []
    value = shift = 0
    for byte in text.encode("ascii") if isinstance(text, str) else text:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        numbers.append(value + numbers[-2] if len(numbers) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the RLE text ends within a number")
    return np.asarray(numbers, np.int64)


def from_runs(inside: np.ndarray, lengths: np.ndarray, order: str, height: int, width: int) -> np.ndarray:
    """Return [H, W] bool of run lengths; order "C" runs along rows, "F" along columns."""
    flat = np.repeat(inside, lengths)
    if len(flat) != height * width:
        raise ValueError(f"{len(flat)} pixels in the runs, {height * width} in the image")
    return flat.reshape((height, width), order=order)


def points(values: Any) -> np.ndarray:
    """Return [n, 2] float; raise a ValueError where the values are no finite x and y."""
    outline = np.asarray(values, np.float64)
    if outline.ndim != 2 or not np.isfinite(outline).all():
        raise ValueError("an outline is not a list of finite x and y")
    return outline


def coco_shapes(segmentation: Any) -> list[Shape]:
    """Return the shapes of one annotation: polygons (parts of one object, united), or one RLE mask.

    Raises:
        ValueError: it encloses nothing, or its numbers do not fit together.
    """
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        runs = decode_coco_counts(counts) if isinstance(counts, str | bytes) else np.asarray(counts, np.int64)
        height, width = segmentation["size"]
        if runs.min(initial=0) < 0 or runs.sum() != height * width:
            raise ValueError("the RLE counts do not add up to its size")
        return [partial(_from_coco_runs, runs, (height, width))]
    outlines = [points(np.reshape(part, (-1, 2))) for part in segmentation]
    if not any(len(outline) > 2 for outline in outlines):
        raise ValueError("no outline and no RLE mask is given")
    return [partial(fill_even_odd, [outline]) for outline in outlines]


def _from_coco_runs(runs: np.ndarray, size: tuple[int, int], height: int, width: int) -> np.ndarray:
    if size != (height, width):
        raise ValueError(f"the RLE has {size[0]} rows of {size[1]} pixels, its image {height} of {width}")
    return from_runs(np.arange(len(runs)) % 2 == 1, runs, "F", height, width)


def unite(
    annotation: Path, shapes: Sequence[Shape], declared: tuple[int, int], height: int, width: int
) -> tuple[np.ndarray, str]:
    """Return the union of shapes, [H, W] bool, and a remark.

    Args:
        annotation: the file that they are from.
        shapes: as `fill_even_odd`, or with a size of their own.
        declared: width and height of the picture that they were drawn on; 0: not told.
        height, width: of the image in pixels.

    Raises:
        SkippedFile: the image has another size, or outlines come without the size that they were drawn at or
            enclose none of its pixels, as those in fractions of the picture.
    """
    another_size = partial(SkippedFile, annotation, "mask of another size")
    if any(given and given != own for given, own in zip(declared, (width, height), strict=True)):
        size = f"{declared[0]} x {declared[1]}"
        raise another_size(f"annotated at {size} pixels, but its image has {width} x {height}")
    if 0 in declared and not all(shape.func is _from_coco_runs for shape in shapes):
        detail = "its outlines come without the width and height of the image that they were drawn on"
        raise SkippedFile(annotation, "mask of unknown size", detail)
    try:
        mask = np.logical_or.reduce([shape(height, width) for shape in shapes])
    except ValueError as error:
        raise another_size(str(error)) from None
    outlines = [outline for shape in shapes if shape.func is fill_even_odd for outline in shape.args[0]]
    if outlines and not mask.any():
        detail = "its outlines enclose no pixel of its image: give them in pixels, not in fractions"
        raise SkippedFile(annotation, "annotation unclear", detail)
    # By less than a tenth of the picture's side it is a slip of the hand.
    side = np.array([width, height])
    beyond = any((outline < -0.1 * side).any() or (outline > 1.1 * side).any() for outline in outlines)
    return mask, "outlines that reach far beyond their picture, cut at its border" if beyond else ""
