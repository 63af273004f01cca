"""Mask pictures, and the rule that tells which of their pixels are the organ: lung, unless another is named.

Programs write masks as 0/1, 0/255, labels, one colour or grey level a lung, probabilities; and JPEG, resizing
or smoothing leaves values between. One rule reads them all:

1. The darkest value is the background, and up to two other *plateaus* are the lungs. A plateau is a value
   that covers areas, not only edges.
2. A pixel between is lung where it is nearer to the plateau beside it than to the background. Files of
   fractions in 0..1 are probabilities: there lung begins at 0.5, and a plateau of lung lies above.
3. Anything else is left out with its reason: three plateaus or more beside the background (which are lung?),
   no plateaus (a photograph, a copy of the X-ray), an area that rule 2 would drop, two lungs of which one is
   hardly brighter than the background (a label beside "ignore"), a mask that is lung at most of the picture's
   border or its own (inverted, a box), and outlines that are not filled.

Where labels are named, as in `kidney:2` or `kidney:2+3`, no rule is needed: the pixels of these values are
the organ, and all others are not.
"""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported where they are first used: ndimage takes half a second
from PIL import Image, ImageOps

from fmfl.errors import UserError
from fmfl.sources.files import SkippedFile
from fmfl.sources.pixels import is_deep, on_black, open_picture, unreadable

FEW_VALUES = 16  # up to here a file's values can each be a label
LEAST_RANGE = 64  # grey levels; below, JPEG's own noise and a mask look alike
FLAT = 0.06  # of a file's range: what a plateau may vary within 3 x 3 pixels
NOISY = 0.3  # of a file's range: how wide a plateau's values may be spread
LEAST_SHARE = 0.002  # of the picture: a smaller plateau is noise
DARKEST = 1 / 16  # of the brighter lung's value; below, as in 1 and 255, one is a label and one is not
COPY = 0.9  # correlation with the image from which on a mask of many values is taken for its copy


class Organ(NamedTuple):
    """Annotated class that is the mask, and its labels in mask files; none: the rule tells them."""

    name: str
    labels: tuple[int, ...] = ()


LUNG = Organ("lung")


def organ_of(mask_class: str) -> Organ:
    """Return the organ that a `mask_class` names: `lung`, `kidney:2` or `kidney:2+3`.

    Raises:
        UserError: what follows the colon is no list of labels, or one of them is the background, 0.
    """
    name, colon, labels = (part.strip() for part in mask_class.partition(":"))
    if not colon:
        return Organ(name)
    if not re.fullmatch(r"[1-9]\d{0,4}(\+[1-9]\d{0,4})*", labels):
        raise UserError(
            f"mask_class is {mask_class!r}: after the colon give labels of the mask files, whole numbers "
            "from 1 joined by +, such as 'kidney:2' or 'kidney:2+3'"
        )
    return Organ(name, tuple(map(int, labels.split("+"))))


def is_lung(organ: str) -> bool:
    """Return True for the paper's organ, which has two sides in many mask files."""
    return organ.lower() in ("lung", "lungs")


def read_mask(path: Path, grey: np.ndarray, organ: Organ = LUNG) -> tuple[np.ndarray, str]:
    """Read a mask picture for an image.

    Args:
        path: the mask's file.
        grey: [H, W] uint8, the image that it belongs to.
        organ: named in the remark; its labels, if any, are the mask.

    Returns:
        [H, W] bool, and a remark, "" where every pixel stands for itself.

    Raises:
        SkippedFile: the file cannot be read, has another size, or does not say which pixels are the
            organ.
    """
    try:
        image = open_picture(path)
        values, hues = _values(path, image)
    except MemoryError:
        raise
    except Exception as error:
        raise unreadable(path, "mask", error) from None
    if values.shape != grey.shape:
        (height, width), (rows, columns) = grey.shape, values.shape
        detail = f"the mask has {columns} x {rows} pixels, its image {width} x {height}"
        raise SkippedFile(path, "mask of another size", detail)
    unclear = partial(SkippedFile, path, "mask unclear")
    if organ.labels:
        return _labelled(path, values, hues, organ), ""
    copied = SkippedFile(path, "mask is its image", "it shows the image itself, and no mask")
    try:
        if hues > 2:
            raise ValueError(f"it has areas of {hues} colours, and which of them are {organ.name} is unknown")
        mask, between = lung_pixels(values, lossy=image.format in ("JPEG", "MPO", "WEBP"))
    except ValueError as error:
        choose = _choose_labels(values, hues, organ)
        raise (copied if _alike(values, grey) > COPY else unclear(f"{error}{choose}")) from None
    if _alike(mask, grey) > 0.98 or (between and _alike(values, grey) > COPY):
        raise copied
    if doubt := _no_areas(mask):
        raise unclear(doubt)
    if between:
        return mask, f"grey levels between {organ.name} and background"
    return mask, "" if is_lung(organ.name) else _two_labels(values, mask, organ)


def labels_of(path: Path) -> list[int]:
    """Return the labels in a mask file; none where it cannot be read or holds no labels."""
    try:
        values, hues = _numbers(path, *_values(path, open_picture(path)))
    except Exception:  # of a decoder; the reading of the mask itself says which
        return []
    distinct = _distinct(values)
    if hues > 1 or values.dtype.kind == "f" or len(distinct) > FEW_VALUES:
        return []
    return [int(value) for value in distinct if value > 0]


def _numbers(path: Path, values: np.ndarray, hues: int) -> tuple[np.ndarray, int]:
    """Return a mask's values and hues, of a palette its numbers."""
    with Image.open(path) as opened:
        if opened.mode == "P":
            return np.asarray(ImageOps.exif_transpose(opened)), 0
    return values, hues


def _labelled(path: Path, values: np.ndarray, hues: int, organ: Organ) -> np.ndarray:
    """Return the pixels that have one of the organ's labels; of a palette its numbers are the labels.

    Raises:
        SkippedFile: the file holds colours or fractions.
    """
    values, hues = _numbers(path, values, hues)
    if hues > 1 or values.dtype.kind == "f":
        kind = "colours" if hues > 1 else "fractions"
        detail = f"it holds {kind}, not labels: name the organ alone, mask_class={organ.name}"
        raise SkippedFile(path, "mask unclear", detail)
    return np.isin(values, organ.labels)


def _choose_labels(values: np.ndarray, hues: int, organ: Organ) -> str:
    """Return what to do where a file of whole numbers has more labels than a mask; "" for other files."""
    distinct = _distinct(values)
    labels = [int(value) for value in distinct[:FEW_VALUES] if value > 0]
    if hues or values.dtype.kind == "f" or len(labels) < 2 or len(distinct) > FEW_VALUES:
        return ""
    listed = ", ".join(map(str, labels))
    return f" (its labels are {listed}: choose by mask_class={organ.name}:{labels[0]}, or several with +)"


def _two_labels(values: np.ndarray, mask: np.ndarray, organ: Organ) -> str:
    """Return a remark where two values count as one organ: they may be an organ and its tumour."""
    labels, counts = np.unique(values[mask], return_counts=True)
    two = labels[counts > LEAST_SHARE / 2 * values.size] if len(labels) <= FEW_VALUES else ()
    if len(two) < 2:
        return ""
    pair = " and ".join(f"{label:g}" for label in two)
    choose = f"; mask_class={organ.name}:{two[0]:g} takes the first alone"
    return f"a mask of two values ({pair}) that both count as {organ.name}{choose}"


def _no_areas(mask: np.ndarray) -> str:
    """Return why a mask shows something else than areas of an organ; "" where nothing speaks against it."""
    if not mask.any():
        return ""
    if _border(mask) > 0.5:
        return "it is bright along most of the picture's border: bright has to be the organ, dark the rest"
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if min(box.shape[0] / mask.shape[0], box.shape[1] / mask.shape[1]) > 0.5 and _border(box) > 0.5:
        return "its bright part is a box or a frame: bright has to be the organ, dark the rest"
    if mask.mean() < 0.1 and scipy.ndimage.binary_fill_holes(mask).sum() > 3 * mask.sum():
        return "it draws outlines: fill the areas that they enclose"
    return ""


def _border(mask: np.ndarray) -> float:
    """Return the share of a picture's outermost pixels that is lung."""
    return np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean()


def _values(path: Path, image: Image.Image) -> tuple[np.ndarray, int]:
    """Return [H, W] values of which the darkest is background, and the number of hues (0 for grey)."""
    with Image.open(path) as opened:
        stored = ImageOps.exif_transpose(opened)
        if stored.mode == "P" and not stored.has_transparency_data:
            numbers = np.asarray(stored)
            used = np.unique(numbers)
            colours = np.unique(np.asarray(stored.convert("RGB")).reshape(-1, 3), axis=0)
            if len(colours) < len(used) <= FEW_VALUES:  # a black palette: the numbers are the labels
                return numbers, 0
        elif stored.has_transparency_data:
            alpha = np.asarray(stored.convert("RGBA"))[:, :, 3]
            if not np.ptp(np.asarray(on_black(stored))) and np.ptp(alpha):  # drawn in black on nothing
                return alpha, 0
    if image.mode == "1":
        image = image.convert("L")
    if image.mode == "L" or is_deep(image):
        return np.asarray(image), 0
    colours = np.asarray(image.convert("RGB"))
    return colours.max(axis=2), _hues(colours)


def _hues(colours: np.ndarray) -> int:
    """Count the kinds of colour that cover an area: mixtures of red, green and blue."""
    brightest = colours.max(axis=2, keepdims=True)
    bright = brightest[:, :, 0] > max(16, brightest.max() // 4)
    kinds = (colours > brightest / 2) @ np.array([1, 2, 4])
    return int((np.bincount(kinds[bright], minlength=8) > LEAST_SHARE * bright.size).sum())


def _alike(values: np.ndarray, grey: np.ndarray) -> float:
    """Return Pearson's correlation of two pictures, 0 where one of them is flat."""
    a, b = (one.ravel() - one.mean(dtype=np.float64) for one in (values, grey))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 and np.isfinite(scale) else 0.0


def lung_pixels(values: np.ndarray, lossy: bool = False) -> tuple[np.ndarray, bool]:
    """Tell the lungs in a mask's values, by the rule that the module states.

    Args:
        values: [H, W] of any number type, one a pixel; the darkest is background.
        lossy: the file's format changes values by itself (JPEG).

    Returns:
        [H, W] bool, and True where there are values between the plateaus.

    Raises:
        ValueError: the lungs are unclear; one clause that says why.
    """
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds values that are not finite")
    if low == high:
        if low == 0:
            return np.zeros(values.shape, bool), False
        raise ValueError(f"every pixel has the value {low:g}")
    fractions = values.dtype.kind == "f" and bool((values != np.rint(values)).any())
    if fractions and low < 0:
        raise ValueError(f"its values run from {low:g} to {high:g}: neither labels nor probabilities")
    if lossy and high - low < LEAST_RANGE:
        raise ValueError(f"it is a JPEG of values {low:g} to {high:g}, which its own noise can change")
    if fractions and high <= 1:
        return _split(values, lossy, half=0.5)
    return _split(values, lossy)


def _split(values: np.ndarray, lossy: bool, half: float | None = None) -> tuple[np.ndarray, bool]:
    """Return the same as `lung_pixels`; `half`: where lung begins by the values' own meaning."""
    distinct = _distinct(values)
    if len(distinct) == 2:
        levels, flat = distinct, None
    else:
        exact = len(distinct) <= FEW_VALUES and not lossy
        levels, flat = _labels(values) if exact else (distinct[:0], None)
        if len(levels) < 2:
            levels, flat = _plateaus(values)
    if len(levels) not in (2, 3):
        areas = "no clear areas"
        if len(levels) > 3:
            areas = f"{len(levels) - 1} grey levels beside the background"
        raise ValueError(f"it has {areas}, and which of them are the organ is unknown")
    if len(levels) == 3 and levels[1] - levels[0] < DARKEST * (levels[2] - levels[0]):
        pair = f"{levels[1]:g} and {levels[2]:g}"
        raise ValueError(f"its values {pair} are too far apart for two sides; one may mean neither")
    # A darker lung may be written as 127 / 255, a little below the half.
    if half is not None and not levels[0] < half <= levels[1] * (1.02 if len(levels) == 3 else 1):
        raise ValueError(f"its areas have the probabilities {', '.join(f'{one:.2f}' for one in levels)}")
    if len(distinct) == 2:
        return values == levels[1], False
    mask = values >= _threshold(values, flat, levels.astype(np.float64), half)
    _refuse_unexplained(values, levels, mask)
    return mask, len(distinct) > len(levels)


def _threshold(
    values: np.ndarray, flat: np.ndarray, levels: np.ndarray, half: float | None
) -> float | np.ndarray:
    """Return half of the way from the background to the plateau of lung nearest to each pixel."""
    halves = (levels[0] + levels[1:]) / 2
    if len(halves) == 1:
        return halves[0] if half is None else half
    lung = flat & (values > halves[0])
    nearest = scipy.ndimage.distance_transform_edt(~lung, return_distances=False, return_indices=True)
    bright = values > (levels[1] + levels[2]) / 2
    return np.where(bright[tuple(nearest)], halves[1], halves[0])


def _distinct(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    return np.unique(values)


def _spread(values: np.ndarray) -> np.ndarray:
    """Return the largest less the smallest value of the 3 x 3 pixels around each."""
    return scipy.ndimage.maximum_filter(values, 3) - scipy.ndimage.minimum_filter(values, 3)


def _labels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that cover areas, and where they do, in a file of few values."""
    flat = _spread(values) == 0
    labels, counts = np.unique(values[flat], return_counts=True)
    return labels[counts > LEAST_SHARE / 2 * values.size], flat


def _plateaus(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle values of areas that are flat but for noise, and where they are."""
    low, high = float(values.min()), float(values.max())
    scaled = (values.astype(np.float32) - low) / (high - low)
    flat = _spread(scaled) <= FLAT
    if flat.mean() < 0.4:
        raise ValueError("its values change from pixel to pixel, as in a photograph")
    inside = np.sort(scaled[flat])
    bins = np.bincount((inside * 63.999).astype(int), minlength=64)
    filled = np.flatnonzero(bins > LEAST_SHARE / 2 * flat.sum())
    groups = np.split(filled, np.flatnonzero(np.diff(filled) > 2) + 1)
    if any(group[-1] - group[0] > NOISY * 64 for group in groups):
        raise ValueError("its values run on from dark to bright, as in a photograph")
    levels = []
    for group in groups:
        members = inside[(inside >= group[0] / 64) & (inside <= (group[-1] + 1) / 64)]
        levels.append(low + (high - low) * float(np.median(members)))
    return np.array(levels), flat


def _refuse_unexplained(values: np.ndarray, levels: np.ndarray, mask: np.ndarray) -> None:
    """Raise a ValueError where much is brighter than every plateau, or an area of its own is in no lung."""
    least, step = LEAST_SHARE / 2 * values.size, 0.15 * (float(values.max()) - float(levels[0]))
    if (values > levels[-1] + step).sum() > least:
        raise ValueError("it has lines or spots brighter than all of its areas; their meaning is unknown")
    areas, count = scipy.ndimage.label((values > levels[0] + step) | mask)
    sizes = np.bincount(areas.ravel(), minlength=count + 1)
    kept = np.bincount(areas[mask], minlength=count + 1)
    if ((sizes[1:] > max(4, least)) & (kept[1:] == 0)).any():
        raise ValueError("it has an area brighter than the background and darker than half of its mask")
