"""Pictures: from a file to 8-bit grey, and to the study's size."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fmfl.sources.files import DICOM_SUFFIXES, SkippedFile, first_line, has_image_suffix
from fmfl.sources.metadata import OLDEST, UNKNOWN_AGE

PHOTOMETRIC_TAG = 262  # PhotometricInterpretation of TIFF 6.0
DICOM_AGE_UNITS = {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}  # in a year


def read_image(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a picture as 8-bit grey, turned as its EXIF tag says, and its header's data of the patient.

    8-bit grey stays as it is, colour is weighted to luma (ITU-R 601), transparency lies on black. Deeper
    grey (16-bit, float, DICOM) is stretched from its own lowest to its own highest value: such files hold 10,
    12 or 16 significant bits and seldom say which.

    Returns:
        [H, W] uint8, and a dict that may hold age (years), sex, patient_id and view; `age_without_unit` is
        True for an age that is a number alone, `age_not_valid` the text of one that is none; `spacing` is the
        height and width of a pixel in mm, `spacing_from` the tag that gives it, `orientation` the patient's
        directions along a row and a column.

    Raises:
        SkippedFile: the file cannot be read, or holds several pictures.
    """
    try:
        if path.suffix.lower() in DICOM_SUFFIXES or not has_image_suffix(path.name):
            return _read_dicom(path)
        image = open_picture(path)
        if is_deep(image):
            return _stretch(np.asarray(image)), {}
        return np.asarray(image.convert("L")), {}
    except (SkippedFile, MemoryError):
        raise
    except Exception as error:  # decoders of arbitrary bytes raise nearly anything
        raise unreadable(path, "image", error) from None


def unreadable(path: Path, what: str, error: Exception) -> SkippedFile:
    """Return the reason to leave out an image or a mask that its decoder cannot read."""
    if path.is_symlink() and not path.exists():
        detail = f"it is a link to {os.readlink(path)}, which is not there"
        return SkippedFile(path, "broken link", detail)
    return SkippedFile(path, f"unreadable {what}", f"not readable as an image ({first_line(error)})")


def open_picture(path: Path) -> Image.Image:
    """Return a picture upright, its transparency on black; raise a ValueError where there are several.

    Where a TIFF file's lowest value is white (PhotometricInterpretation 0), Pillow inverts 8 bits and less
    and leaves deeper values as they are. Here white is the highest value of both.
    """
    with Image.open(path) as opened:
        # A JPEG may hold its own thumbnail or a second view of the camera beside it.
        if opened.format not in ("JPEG", "MPO") and getattr(opened, "n_frames", 1) > 1:
            raise ValueError(f"it holds {opened.n_frames} pictures")
        white_is_low = getattr(opened, "tag_v2", {}).get(PHOTOMETRIC_TAG) == 0
        image = ImageOps.exif_transpose(opened)
        if white_is_low and is_deep(image):
            image = _invert(image)
        if image.has_transparency_data:
            image = on_black(image)
        image.load()
        image.format = opened.format
        return image


def _invert(image: Image.Image) -> Image.Image:
    """Return a picture whose highest value has become the lowest."""
    values = np.asarray(image)
    wide = values.astype(np.float64)  # 16 and 32 bits are exact in it
    return Image.fromarray((wide.max() + wide.min() - wide).astype(values.dtype))


def on_black(image: Image.Image) -> Image.Image:
    """Return a picture with transparency as RGB, laid on black."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Return True for more than 8 bits a pixel in one channel."""
    return image.mode.startswith(("I", "F"))


def resize(grey: np.ndarray, size: int) -> np.ndarray:
    """Squeeze [H, W] uint8 to a square, antialiased.

    Pillow's bilinear filter is as wide as the scale along each side: a weighted mean over the area that a
    new pixel covers. A 0/255 mask thresholded at the half keeps its edges in place.
    """
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Scale lowest..highest value to 0..255; a flat picture becomes black."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds values that are not finite")
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _read_dicom(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        import pydicom
        from pydicom import pixels
    except ImportError:
        detail = "reading DICOM needs the package pydicom: pip install pydicom"
        raise SkippedFile(path, "pydicom not installed", detail) from None
    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array
    if values.ndim != 2:
        raise ValueError(f"it is an array of shape {values.shape}, not one grey frame")
    kind = dataset.get("PhotometricInterpretation")
    if kind == "PALETTE COLOR":  # the values are numbers of colours
        colours = pixels.apply_color_lut(values, dataset)
        eight_bit = (colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8)
        return np.asarray(Image.fromarray(eight_bit).convert("L")), _header(dataset)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its values are {kind}, not grey")
    if kind == "MONOCHROME2" and dataset.get("PresentationLUTShape") == "INVERSE":
        raise ValueError("its header says both MONOCHROME2 and INVERSE: whether bright is bone is unknown")
    picture = ~_padding(values, dataset)
    values = pixels.apply_modality_lut(values, dataset)  # stored values -> rescaled values
    values = pixels.apply_voi_lut(values, dataset)  # -> the window that a reader would see
    grey = np.zeros(values.shape, np.uint8)
    grey[picture] = _stretch(values[picture])
    if kind == "MONOCHROME1":  # there the lowest value is white
        grey[picture] = 255 - grey[picture]
    return grey, _header(dataset)


def _padding(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """Return where stored values fill up the picture and measure nothing, [H, W] bool (PS3.3, C.7.5.1.1.2).

    Such a value may lie far beyond all others, and would leave them a few grey levels.
    """
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    padding = (stored >= low) & (stored <= high)
    return padding & ~padding.all()


def _header(dataset: Any) -> dict[str, Any]:
    header = {
        "patient_id": str(dataset.get("PatientID") or "").strip(),
        "sex": {"M": "M", "F": "F"}.get(str(dataset.get("PatientSex") or ""), ""),
        "view": str(dataset.get("ViewPosition") or "").strip(),
    }
    header |= _geometry(dataset)
    text = str(dataset.get("PatientAge") or "").strip()
    age = re.fullmatch(r"([0-9]{1,3})([DWMY]?)", text.upper())
    years = int(age[1]) / DICOM_AGE_UNITS[age[2] or "Y"] if age else OLDEST + 1
    if years <= OLDEST:
        header |= {"age": years, "age_without_unit": not age[2]}
    elif text.lower() not in UNKNOWN_AGE:
        header["age_not_valid"] = text
    return header


def _geometry(dataset: Any) -> dict[str, Any]:
    """Return the size of a pixel and the patient's directions, where a header has them.

    ImagerPixelSpacing is measured at the detector, where a lung is larger than in the chest. So is a
    PixelSpacing of the same values (PS3.3, 10.7.1.3).
    """
    geometry: dict[str, Any] = {}
    for tag in ("ImagerPixelSpacing", "PixelSpacing"):  # the second one, in the patient, is preferred
        spacing = _numbers(dataset, tag)
        sound = len(spacing) == 2 and all(0 < value < 100 for value in spacing)
        if sound and spacing != geometry.get("spacing"):
            geometry |= {"spacing": spacing, "spacing_from": tag}
    directions = _values(dataset, "PatientOrientation")
    if len(directions) == 2 and all(directions):
        geometry["orientation"] = "\\".join(directions).upper()
    return geometry


def _numbers(dataset: Any, tag: str) -> tuple[float, ...]:
    """Return a tag's numbers; none where it is not valid, as the picture is of use without them."""
    try:
        return tuple(float(text) for text in _values(dataset, tag))
    except ValueError:
        return ()


def _values(dataset: Any, tag: str) -> list[str]:
    """Return a tag's values as they are written; pydicom gives a single one without a list."""
    stored = dataset[tag].value if tag in dataset else None
    if stored is None:
        return []
    several = [stored] if isinstance(stored, (str, float, int)) else stored
    return [str(value).strip() for value in several]
