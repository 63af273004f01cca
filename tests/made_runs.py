"""A run's folder as a study leaves it, with a student that was trained for a moment."""

import functools
import json
from pathlib import Path

import torch

from fmfl import config, data, models, parallel, states, train
from fmfl.study import outputs

SIZE = 32
STUDENT = "tiny_unet"
#: arm, split, init, seed and client of each run, as one with two splits and two seeds has them.
RUNS = [
    *(("federated", "age", init, seed, -1) for init in ("random", "fm") for seed in (0, 1)),
    ("federated", "iid", "fm", 0, -1),
    ("centralised", "pooled", "random", 0, -1),
    *(("standalone", "age", "random", 0, client) for client in (0, 1)),
]


def cohort(number=40):
    return data.load("phantom", size=SIZE, num_phantoms=number, cache=None, progress=False)


@functools.cache
def trained() -> states.State:
    """Weights whose masks are neither empty nor full: a few steps on synthetic images."""
    images = cohort()
    model = models.build(STUDENT, seed=1)
    examples = train.Examples(images.images, images.masks, torch.arange(len(images)))
    options = {"epochs": 6, "batch_size": 8, "key": (0,)}
    with parallel.one_thread(images.device):  # the same weights on every number of cores
        train.fit(model, examples, train.LOSSES["dice"], optimizer=train.adam(model, 3e-3), **options)
    return models.copy_state(model)


def name_of(arm, split, init, seed, client):
    return f"{arm}-{split}-{init}-seed{seed}" + (f"-client{client}" if client >= 0 else "")


def make_run(folder: Path, runs=RUNS, rounds=2, done=None, cells=True, **settings) -> Path:
    """Write weights with their records, and a cell with the run's settings."""
    for number, (arm, split, init, seed, client) in enumerate(runs):
        state = {key: value.clone() for key, value in trained().items()}
        first = next(iter(state))
        state[first] += number * 1e-3  # so that no two files hold the same weights
        made_of = {"settings": {"student": STUDENT, "num_rounds": rounds, "batch_norm": "average"}}
        states.write_state(
            folder / "weights" / f"{name_of(arm, split, init, seed, client)}.safetensors",
            state,
            made_of=made_of | {"data": "of these images"},
            **{"arm": arm, "split": split, "init": init, "seed": seed, "client": client},
            round_number=rounds if done is None else done,
        )
    if cells:
        given = {"run_name": str(folder), "size": SIZE, "student": STUDENT, "num_rounds": rounds}
        outputs.save(config.settings(given | settings), "04_federate", {"images": "of these images"})
    return folder


def make_manifest(folder: Path, **changed) -> dict:
    """Write manifest.json with the digests of the weights that are there."""
    digests = {
        file.name: states.read_record(file)["sha256"]
        for file in sorted((folder / "weights").glob("*.safetensors"))
    }
    flat = config.settings({"size": SIZE, "student": STUDENT, "num_rounds": 2}).flat()
    settings = {name: value for name, value in flat.items() if name not in ("split", "seed")}
    settings |= {"arms": ["federated"], "inits": ["random", "fm"], "splits": ["age"], "seeds": [0, 1]}
    manifest = {
        "fmfl": "9.8.7",
        "commit": "0123abcd",
        "created": "2031-02-03T04:05:06+00:00",
        "device": {"kind": "cpu", "name": "a machine"},
        "settings": settings,
        "data": {"images": 1234, "patients": 321, "left_out": {"lateral view": 7}, "proxy": 100, "test": 60}
        | {"federated": 1074, "without_age": 11, "fingerprint": "f" * 64},
        "teacher": {"name": "builtin", "dice": 0.912, "calibration_error": 0.0123, "note": "It stands in."},
        "student": {"student": STUDENT, "norm": "batch", "parameters": 472425, "bytes": 1917956}
        | {"flops": 10**7},
        "weights": digests,
    } | changed  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return manifest
