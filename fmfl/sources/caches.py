"""Decoded sources in files, so that a folder is decoded once."""

import glob
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from fmfl import states
from fmfl.sources.contents import Content, Plan, Preview
from fmfl.sources.files import first_line

#: Raise it when the same files give other pixels, masks or rows than before; older caches are then not used.
CACHE_FORMAT = 4


def read(folder: str | os.PathLike | None, name: str, plan: Plan) -> Content:
    """Return what a plan reads, or what it read the last time for the same files and settings.

    A damaged cache is made again. One that cannot be written costs the time of decoding again, never the run.

    Args:
        folder: of the caches; None for no cache.
        name: of the source, to name its caches by.
        plan: how to read the source.
    """
    if folder is None:
        return plan.read()
    file, stem = _file_of(folder, name, plan)
    stored = states.read_state(file, fingerprint=file.stem)
    if stored:
        return _unpack(stored[0])
    if file.exists():
        warnings.warn(f"{file}: damaged cache; decoding again", stacklevel=3)
    content = plan.read()
    try:
        states.write_state(file, _pack(content), fingerprint=file.stem)
        for old in file.parent.glob(f"{glob.escape(stem)}-*"):  # of this source before its files changed
            if old != file:
                old.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{file}: the cache cannot be written ({first_line(error)})", stacklevel=3)
    return content


def look(folder: str | os.PathLike | None, name: str, plan: Plan, few: int) -> Preview:
    """Return a source's rows and a few images: from its cache where there is one, else without decoding all.

    Args:
        folder, name, plan: see `read`.
        few: number of images.
    """
    file = None if folder is None else _file_of(folder, name, plan)[0]
    stored = file and states.read_state(file, fingerprint=file.stem)
    if not stored:
        return plan.look(few)
    content = _unpack(stored[0])
    return Preview(content.rows, content.images[:few], content.masks[:few], 0.0)


def _file_of(folder: str | os.PathLike, name: str, plan: Plan) -> tuple[Path, str]:
    """Return the file of a plan's cache, and how the names of all caches of its source begin."""
    stem = f"{name.replace('/', '_')}-{states.fingerprint(CACHE_FORMAT, plan.settings)[:16]}"
    return Path(folder) / f"{stem}-{states.fingerprint(plan.files)[:16]}.safetensors", stem


def _pack(content: Content) -> states.State:
    """Return a content as tensors: masks with one bit a pixel, the table and all else as JSON."""
    about = content._asdict()
    images, masks = about.pop("images"), about.pop("masks")
    packed = {
        "images": images,
        "masks": np.packbits(masks.reshape(len(masks), -1), axis=1),
        "about": np.frombuffer(bytearray(json.dumps(about).encode()), np.uint8),
    }
    return {key: torch.from_numpy(array) for key, array in packed.items()}


def _unpack(state: states.State) -> Content:
    images, packed, about = (state[key].numpy() for key in ("images", "masks", "about"))
    masks = np.unpackbits(packed, axis=1, count=images[0].size).reshape(images.shape)
    return Content(images, masks, **json.loads(about.tobytes()))
