"""Chest X-rays and their lung masks: one or several sources become one `Cohort` on a device.

A source is `"phantom"` (the built-in synthetic X-rays) or a folder in one of four layouts:

    folder      images/, masks/ (same stem, any image suffix, `_mask` may follow), metadata.csv (optional)
    Darwin 1.0  images/, annotations/*.json with "image": V7's former export format
    Darwin 2.0  images/, annotations/*.json with "item" and its slots: V7's export format
    COCO        images/, an instances file in annotations/ or at the folder's top; polygons and both RLEs

A `metadata.csv` beside a Darwin or COCO export adds to what the export says. Its one required column is
`image_id` (the image's path below images/ without suffix); all others of `COLUMNS` are optional. A file is
read rightly, or left out and counted with its reason, or the source is refused.

Two images are of one patient if their site and patient_id agree, wherever they were read from: the table's
`patient_id` is `"{site}:{patient_id}"`. The site is by default the source folder's name, the patient_id the
image's own id.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fmfl import paths
from fmfl.errors import UserError
from fmfl.sources import caches, contents
from fmfl.sources.files import first_line, printable
from fmfl.sources.mask_files import organ_of
from fmfl.sources.metadata import COLUMNS, words


@dataclass(frozen=True, eq=False)
class Cohort:
    """Images, masks and patients, ready to be indexed on a device.

    Attributes:
        images: [N, 1, H, W] uint8, 0..255, H = W; index tensors lie where they do.
        masks: [N, 1, H, W] uint8, 1 where there is lung (or another organ, by `mask_class`), else 0.
        table: one row an image, in the order of `images`; the columns are `COLUMNS`.
        left_out: one row a file that is not used: source, file (below the source's folder), reason (to count
            by), detail (one sentence), defect (True: to be mended; False: a file of another kind).
        remarks: sentences on images that are used, but that a person should look at.
        fingerprint: SHA-256 of pixels, masks and table as the files give them, under any path and name.
        device: where computations run; None: where the tensors lie.
    """

    images: Tensor
    masks: Tensor
    table: pd.DataFrame
    left_out: pd.DataFrame
    fingerprint: str
    device: torch.device | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.device or self.images.device)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]

    def to(self, device: str | torch.device, *, resident: bool = True) -> "Cohort":
        """Return the same cohort for `device`; unless `resident`, its tensors stay where they are."""
        images, masks = self.images, self.masks
        if resident:
            images, masks = images.to(device), masks.to(device)
        # "cuda" is "cuda:0": a tensor there tells the name that tensors have.
        return replace(self, images=images, masks=masks, device=torch.empty(0, device=device).device)

    def patients(self, indices: Tensor | Sequence[int]) -> set[str]:
        """Return the patient ids of images (an int64 tensor on any device, or a sequence)."""
        rows = torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()
        return set(self.table["patient_id"].iloc[rows])

    def summary(self) -> pd.DataFrame:
        """Count by source: images, patients, ages known, and the files left out for each reason."""
        counts = self.table.groupby("source", sort=False).agg(
            images=("image_id", "size"), patients=("patient_id", "nunique"), ages=("age", "count")
        )
        out = pd.crosstab(self.left_out["source"], self.left_out["reason"]).add_prefix("left out: ")
        return counts.rename(columns={"ages": "ages known"}).join(out.reindex(counts.index, fill_value=0))


def load(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    size: int = 256,
    device: str | torch.device = "cpu",
    *,
    num_phantoms: int = 300,
    phantom_seed: int = 0,
    mask_class: str = "lung",
    strict: bool = False,
    cache: str | os.PathLike | None = paths.CACHE,
    workers: int | None = None,
    progress: bool = True,
) -> Cohort:
    """Read one or several sources into one cohort.

    Images are squeezed to a square without padding, as in the paper. A file that cannot be used is listed in
    `left_out`, and the rest goes on.

    Args:
        sources: "phantom" or folders: a list, or one text with commas between them.
        size: pixels a side, 16..2048.
        device: where the tensors go.
        num_phantoms, phantom_seed: number and random seed of the synthetic X-rays.
        mask_class: the annotated class that is the mask; "left lung", "Lungs" and "LUNG_R" are "lung" too.
            "kidney:2+3" takes the labels 2 and 3 of mask files.
        strict: a file that is to be mended is an error; an image of another kind (lateral, CT slice) is not.
        cache: folder of decoded sources; None to decode every time.
        workers: decoding threads; None for one a core.
        progress: show a bar while decoding.

    Raises:
        UserError: a parameter is out of range, a source is missing, empty, in no known layout or without one
            usable image; with `strict` also the first file that is to be mended.
    """
    _check(size, device, mask_class, workers)
    folders = _names(sources)
    plans = {  # all of them before the first is read, which may take minutes
        name: contents.of_phantoms(num_phantoms, phantom_seed, size)
        if folder is None
        else contents.of_folder(folder, size, mask_class, workers, name if progress else "")
        for name, folder in folders.items()
    }
    parts = {name: caches.read(cache, f"{name}-{size}", plan) for name, plan in plans.items()}
    rows = [{"source": name} | entry for name, part in parts.items() for entry in part.left_out]
    left_out = pd.DataFrame(rows, columns=["source", "file", "reason", "detail", "defect"])
    left_out = left_out.astype({"defect": bool})
    if strict and left_out["defect"].any():
        raise UserError(_first_defect(left_out[left_out["defect"]], folders))
    return Cohort(
        images=_join([part.images for part in parts.values()]).to(device),
        masks=_join([part.masks for part in parts.values()]).to(device),
        table=_join_tables(parts),
        left_out=left_out,
        fingerprint=contents.sha256(*(part.digest.encode() for part in parts.values())),
        remarks=tuple(f"{name}: {remark}" for name, part in parts.items() for remark in part.remarks),
    )


class Preview(NamedTuple):
    """A cohort before its images are decoded.

    Attributes:
        table: as in `Cohort`, but for what only a decoded file tells: an empty mask, a DICOM header's age.
        images, masks: [n, 1, H, W] of the first few images.
        seconds: that decoding the others will take about; 0 where they are in the cache.
    """

    table: pd.DataFrame
    images: Tensor
    masks: Tensor
    seconds: float


def preview(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    size: int = 256,
    *,
    num_phantoms: int = 300,
    phantom_seed: int = 0,
    mask_class: str = "lung",
    cache: str | os.PathLike | None = paths.CACHE,
    few: int = 8,
) -> Preview:
    """Look at sources without decoding more than a few images of each; arguments and errors as for `load`."""
    _check(size, "cpu", mask_class, None)
    looks = {}
    for name, folder in _names(sources).items():
        if folder is None:
            plan = contents.of_phantoms(num_phantoms, phantom_seed, size)
        else:
            plan = contents.of_folder(folder, size, mask_class, None, "")
        looks[name] = caches.look(cache, f"{name}-{size}", plan, few)
    return Preview(
        _join_tables(looks),
        _join([look.images for look in looks.values()]),
        _join([look.masks for look in looks.values()]),
        sum(look.seconds for look in looks.values()),
    )


def _check(size: int, device: str | torch.device, mask_class: str, workers: int | None) -> None:
    low, high = contents.SIZES
    if not isinstance(size, int) or isinstance(size, bool) or not low <= size <= high:
        raise UserError(f"size is {size!r}: give a whole number of pixels in {low}..{high}")
    if not words(organ_of(mask_class).name):
        raise UserError(f"mask_class is {mask_class!r}: give the name of the annotated class, such as 'lung'")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers!r}: give the number of decoding threads, at least 1")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise UserError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from None


def _names(sources: str | os.PathLike | Sequence[str | os.PathLike]) -> dict[str, Path | None]:
    """Return each source's folder by its name in the table; None for the synthetic X-rays.

    The name is the default site, so it is not shared: of `a/train` and `b/train` it has both parts.
    """
    if isinstance(sources, str):
        sources = sources.split(",")
    elif isinstance(sources, os.PathLike):
        sources = [sources]
    folders: list[Path | None] = []
    for source in filter(None, (os.fspath(source).strip() for source in sources)):
        folder = None if source == "phantom" else Path(source).expanduser()
        if folder is not None and not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "there is no such folder"
            raise UserError(f"{folder}: {what}; give a folder with images and masks, or 'phantom'")
        if printable(source) != source:
            raise UserError(f"{source}: this name is not valid UTF-8; rename the folder")
        if any(folder == other or (folder and other and folder.samefile(other)) for other in folders):
            raise UserError(f"{source}: this source is given twice; name each source once")
        folders.append(folder)
    if not folders:
        raise UserError("sources is empty: give 'phantom', a folder, or several with commas between them")
    last = ["phantom" if folder is None else folder.resolve().name for folder in folders]
    named: dict[str, Path | None] = {}
    for name, folder in zip(last, folders, strict=True):
        if folder is not None and last.count(name) > 1:
            name = "/".join(folder.resolve().parts[-2:])
        if name in named:
            raise UserError(f"{folder}: another source is called {name} too; rename one of the folders")
        named[name] = folder
    return named


def _join(arrays: list[np.ndarray]) -> Tensor:
    """Return [N, H, W] arrays as one [N, 1, H, W] tensor; a single one is not copied."""
    return torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))[:, None]


def _join_tables(parts: Mapping[str, contents.Content | contents.Preview]) -> pd.DataFrame:
    """Return one table over all sources: sites filled in, patients and images named uniquely."""
    rows = []
    for name, part in parts.items():
        rows += [row | {"source": name, "site": row["site"] or name} for row in part.rows]
    sources_with = Counter(row["image_id"] for row in rows)  # within a source ids are unique
    for row in rows:
        row["patient_id"] = f"{row['site']}:{row['patient_id']}"
        if sources_with[row["image_id"]] > 1:
            row["image_id"] = f"{row['source']}/{row['image_id']}"
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"age": "float64", "original_width": "int64", "original_height": "int64"})


def _first_defect(defects: pd.DataFrame, folders: Mapping[str, Path | None]) -> str:
    first = defects.iloc[0]
    more = f" ({len(defects) - 1} more files are to be mended)" if len(defects) > 1 else ""
    file = folders[first["source"]] / first["file"]
    return f"{file}: {first['detail']}{more}; mend or remove it, or load without strict"
