"""Images at the size that a study trains on, in one small archive: for a machine at hand for minutes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import typer
from PIL import Image

from fmfl import data
from fmfl.data import Cohort

#: Quality of the JPEGs, 0 to 100. At 88 a chest X-ray of 256 x 256 pixels takes 10 KiB.
QUALITY = 88

#: Columns of `metadata.csv` besides the image's name.
COLUMNS = ("patient_id", "age", "age_source", "sex", "finding", "site", "view", "licence")


def encoded(picture: np.ndarray, kind: str) -> bytes:
    """Encode a picture of 0..255 as JPEG, or a mask of 0 and 1 as PNG of one bit a pixel."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        Image.fromarray(picture).save(buffer, kind, quality=QUALITY)
    else:
        Image.fromarray(picture > 0).save(buffer, kind, optimize=True)
    return buffer.getvalue()


def write(cohort: Cohort, out: Path) -> int:
    """Write images, masks and table as a .tgz of one folder that `fmfl data` reads; return its bytes."""
    names = [f"{number:05d}" for number in range(len(cohort))]
    table = cohort.table[[name for name in COLUMNS if name in cohort.table]].copy()
    # A reader puts the site before a patient's id: written with it, the id would be read with two.
    table["patient_id"] = [
        patient.removeprefix(f"{site}:")
        for patient, site in zip(table.patient_id, cohort.table.site, strict=True)
    ]
    table.insert(0, "image_id", names)
    table["original"] = cohort.table.image_id  # `fmfl data` counts the column and does not read it
    folder = out.name.split(".")[0]
    with tarfile.open(out, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            about = tarfile.TarInfo(f"{folder}/{name}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))

        add("metadata.csv", table.to_csv(index=False).encode())
        for number, name in enumerate(names):
            add(f"images/{name}.jpg", encoded(cohort.images[number, 0].numpy(), "JPEG"))
            add(f"masks/{name}.png", encoded(cohort.masks[number, 0].numpy(), "PNG"))
    return out.stat().st_size


def run(sources: str, out: Path = Path("packed.tgz"), size: int = 256) -> None:
    """Write folders of images, joined by commas, as one archive of JPEGs and masks of `--size` pixels a side.

    JPEG changes grey values a little, so a study of the archive is not to the byte that of the folders.
    """
    cohort = data.load(sources, size=size)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = write(cohort, out)
    ages = int(pd.to_numeric(cohort.table.age).notna().sum())
    typer.echo(f"{out}: {len(cohort)} images, {ages} with an age, {written / 1e6:.1f} MB")
