"""Pictures: from a file to 8-bit grey, and to the study's size."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fmfl.files import DICOM_SUFFIXES, LeftOut, first_line, has_image_suffix
from fmfl.metadata import OLDEST, UNKNOWN_AGE

DICOM_AGE_UNITS = {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}  # in a year


def read_image(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture as 8-bit grey, turned as its EXIF tag says, and what its header tells of the patient.

    8-bit grey stays as it is, colour is weighted to luma (ITU-R 601), transparency lies on black. Deeper
    grey (16-bit, float, DICOM) is stretched from its own lowest to its own highest value: such files hold 10,
    12 or 16 significant bits and seldom say which.

    Returns:
        (H, W) uint8, and a dict that may hold age (years), sex, patient_id and view; `age_without_unit` is
        True for an age that is a number alone, `age_not_valid` the text of one that is none.

    Raises:
        LeftOut: the file cannot be read, or holds several pictures.
    """
    # Decoders meet arbitrary bytes and raise nearly anything; whatever it is, it is this one file's fault.
    try:
        if path.suffix.lower() in DICOM_SUFFIXES or not has_image_suffix(path.name):
            return _read_dicom(path)
        image = open_picture(path)
        if is_deep(image):
            return _stretch(np.asarray(image)), {}
        return np.asarray(image.convert("L")), {}
    except (LeftOut, MemoryError):
        raise
    except Exception as error:
        raise unreadable(path, "image", error) from None


def unreadable(path: Path, what: str, error: Exception) -> LeftOut:
    """The reason why an image or a mask is left out that its decoder cannot read."""
    if path.is_symlink() and not path.exists():
        detail = f"it is a link to {os.readlink(path)}, which is not there"
        return LeftOut(path, "broken link", detail)
    return LeftOut(path, f"unreadable {what}", f"not readable as an image ({first_line(error)})")


def open_picture(path: Path) -> Image.Image:
    """A picture in memory, upright, its transparency on black; ValueError where the file holds several."""
    with Image.open(path) as opened:
        # A JPEG may hold its own thumbnail or a second view of the camera beside it.
        if opened.format not in ("JPEG", "MPO") and getattr(opened, "n_frames", 1) > 1:
            raise ValueError(f"it holds {opened.n_frames} pictures")
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = on_black(image)
        image.load()
        image.format = opened.format
        return image


def on_black(image: Image.Image) -> Image.Image:
    """A picture with transparency as RGB, laid on black."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """True for more than 8 bits a pixel in one channel."""
    return image.mode.startswith(("I", "F"))


def resize(grey: np.ndarray, size: int) -> np.ndarray:
    """(H, W) uint8 squeezed to (size, size), antialiased.

    Pillow's bilinear filter is as wide as the shrinking asks, along each side for itself: a weighted mean
    over the area that a new pixel covers. A 0/255 mask thresholded at the half keeps its edges in place.
    """
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Lowest..highest value -> 0..255; a flat picture becomes black."""
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
        raise LeftOut(path, "pydicom not installed", detail) from None
    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array
    if values.ndim != 2:
        raise ValueError(f"one grey frame is wanted, not an array of shape {values.shape}")
    kind = dataset.get("PhotometricInterpretation")
    if kind == "PALETTE COLOR":  # the values are numbers of colours
        colours = pixels.apply_color_lut(values, dataset)
        eight_bit = (colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8)
        return np.asarray(Image.fromarray(eight_bit).convert("L")), _header(dataset)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its values are {kind}, not grey")
    values = pixels.apply_modality_lut(values, dataset)  # stored values -> rescaled values
    grey = _stretch(pixels.apply_voi_lut(values, dataset))  # -> the window that a reader would see
    if kind == "MONOCHROME1":  # there the lowest value is white
        grey = 255 - grey
    return grey, _header(dataset)


def _header(dataset: Any) -> dict[str, Any]:
    header = {
        "patient_id": str(dataset.get("PatientID") or "").strip(),
        "sex": {"M": "M", "F": "F"}.get(str(dataset.get("PatientSex") or ""), ""),
        "view": str(dataset.get("ViewPosition") or "").strip(),
    }
    text = str(dataset.get("PatientAge") or "").strip()
    age = re.fullmatch(r"([0-9]{1,3})([DWMY]?)", text.upper())
    years = int(age[1]) / DICOM_AGE_UNITS[age[2] or "Y"] if age else OLDEST + 1
    if years <= OLDEST:
        header |= {"age": years, "age_without_unit": not age[2]}
    elif text.lower() not in UNKNOWN_AGE:
        header["age_not_valid"] = text
    return header
