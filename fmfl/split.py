"""Splits of a cohort: proxy, test and federated parts, the clients' parts, and measures of their skew.

Patients, never single images, are dealt, so that no patient stands on two sides of any split. A split is
a set of sorted int64 index tensors into the rows of `Cohort.table`. Random order comes from a NumPy
generator keyed by the seed alone: neither the device nor any global generator changes it.

The paper (Li & Yang 2023, arXiv 2311.15463, section 3) names its parts (1,504 proxy, 500 test and 4,500
federated images over 3 clients) and its partitions (IID, age skew, quantity skew), but not the rule behind
either skew. The rules here are ours, each with its strength as one number.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
import torch
from numpy.random import Generator
from torch import Tensor

from fmfl import config
from fmfl.errors import UserError

#: Age bands, and the age in years at which each begins. The Guangzhou children are in one band.
AGE_BANDS = ("0-5", "6-17", "18-29", "30-39", "40-49", "50-59", "60-69", "70-79", "80+")
BEGINNINGS = (0, 6, 18, 30, 40, 50, 60, 70, 80)

#: Options of each scheme: the parameters tagged `partition` that begin with its name, such as `age_strength`.
OPTIONS = {
    scheme: {
        name.removeprefix(f"{scheme}_"): parameter
        for name, parameter in config.PARAMETERS.items()
        if name.startswith(f"{scheme}_") and name in config.tagged("partition")
    }
    for scheme in config.SPLITS
}

#: Schemes that deal by age; images without one are left out of them (see `without_age`).
AGE_SCHEMES = ("age", "dirichlet")

_DIRICHLET_DRAWS = 1000
_SMALL_STRATUM = 10  # patients


class Holdout(NamedTuple):
    """Sorted int64 indices of images, disjoint by patient; together the table, unless limited."""

    proxy: Tensor
    test: Tensor
    federated: Tensor


def age_bands(ages: Sequence[float] | pd.Series) -> np.ndarray:
    """Return the band in `AGE_BANDS` of each age in years, [N] str; "" where it is not known (NaN)."""
    years = np.asarray(ages, dtype=float)
    names = np.array([*AGE_BANDS, ""], dtype=object)
    band = np.searchsorted(BEGINNINGS, years, side="right") - 1
    return names[np.where(np.isnan(years), len(AGE_BANDS), band)]


def holdout(
    table: pd.DataFrame,
    seed: int = 0,
    *,
    proxy: float = 1504 / 6504,
    test: float = 500 / 6504,
    federated: float = 0,
    device: torch.device | str = "cpu",
) -> Holdout:
    """Deal whole patients to the proxy set, the test set and the clients, stratified by site and age band.

    The patients of each stratum are shuffled and spread evenly over one line. The test part is cut from the
    line's start, the proxy part from the rest, and the clients keep what is left. So a part holds of each
    stratum a share in proportion to its images, up to about one patient.

    A part has the requested size when every patient has one image. Otherwise it can fall short, by fewer
    images than the smallest patient left over has. The test part depends on the seed and its own size only,
    so studies of the proxy set's size share it. Limiting `federated` changes neither proxy nor test.

    Args:
        table: N rows with patient_id, site and age (years, NaN where unknown).
        seed: >= 0.
        proxy: the proxy set's size; below 1 a fraction of the images, otherwise their number.
        test: the test set's size, likewise.
        federated: the clients' share of the rest: below 1 a fraction, otherwise a number of images; 0: all.
        device: of the indices.

    Raises:
        UserError: a size is not a positive number, a part comes out empty, or the clients get nothing.
    """
    sizes = {"test": _size("test", test, len(table)), "proxy": _size("proxy", proxy, len(table))}
    if sum(sizes.values()) >= len(table):
        raise UserError(
            f"the proxy ({sizes['proxy']}) and test ({sizes['test']}) parts leave none of the {len(table)} "
            "images for the clients: make them smaller or add images"
        )
    rows = np.arange(len(table))
    patients = _stratified_line(_patients(table, rows), _generator(seed, "holdout"))
    images = patients.images.to_numpy()
    part = np.full(len(patients), "federated", dtype=object)
    for name, size in sizes.items():
        part[_fill(images, part == "federated", size)] = name
    if federated:
        rest = part == "federated"
        size = _size("federated", federated, images[rest].sum())
        part[rest & ~_fill(images, rest, size)] = "left out"
    for name in Holdout._fields:
        if name not in part:
            raise UserError(
                f"the {name} part is empty, because patients are not divided and no patient's images fit in: "
                "change the sizes proxy, test and federated, or add patients"
            )
    by_row = pd.Series(part, index=patients.index).loc[table.patient_id].to_numpy()
    return Holdout(*(torch.from_numpy(rows[by_row == name]).to(device) for name in Holdout._fields))


def partition(
    table: pd.DataFrame, indices: Tensor, scheme: str, num_clients: int = 3, seed: int = 0, **options: float
) -> list[Tensor]:
    """Deal the patients of these images to the clients.

    ============ ========================================================================================
    `iid`        equal sizes, every client a like share of every site and age band
    `age`        equal sizes; patients sorted by (1 - strength) * place in the IID order + strength * place
                 in the order of ages, then cut, youngest first. strength 0 is `iid`; 1 (default) sorts by
                 age alone, people of one age staying in the IID order
    `quantity`   as `iid`, with sizes in a geometric series, the largest first, `ratio` (default 9: 9:3:1
                 for three clients) times the smallest; 1 is `iid`
    `site`       sites, the largest first, each to the client with the fewest images so far
    `dirichlet`  of each age band, client shares drawn from Dirichlet(concentration, ..., concentration),
                 default 0.5 (Yurochkin et al. 2019, arXiv 1905.12022, with age bands for classes); drawn
                 again, from the same generator, while a client has nobody
    ============ ========================================================================================

    Sizes count images; as patients stay whole, a client's size is met up to one patient's images. A patient
    with several ages counts with their mean, one seen at several sites with the commonest.

    Args:
        table: one row an image, with patient_id, site and age (years, NaN where unknown).
        indices: [N] int64 rows of `table`, each once.
        scheme: a key of `OPTIONS`.
        num_clients: K >= 1.
        seed: >= 0.
        **options: the scheme's own, see `OPTIONS`.

    Returns:
        K sorted int64 tensors on the device of `indices`: together `indices`, under `AGE_SCHEMES` less the
        images without an age.

    Raises:
        UserError: an unknown scheme or option, a value out of range, or too few patients, sites or ages.
    """
    values = _options(scheme, options)
    if not _is_a(Integral, num_clients) or num_clients < 1:
        raise UserError(f"num_clients is {num_clients!r}, but has to be a whole number of at least 1")
    rows = _rows(table, indices)
    if scheme in AGE_SCHEMES:
        rows = rows[table.age.notna().to_numpy()[rows]]
        if len(rows) == 0:
            raise UserError(
                f"split {scheme!r} needs ages, but none of these images has one: use another split"
            )
    patients = _patients(table, rows)
    if len(patients) < num_clients:
        raise UserError(
            f"num_clients is {num_clients}, but split {scheme!r} has only {len(patients)} patients to deal: "
            "ask for fewer clients or add patients"
        )
    rng = _generator(seed, "partition")
    patients = _stratified_line(patients, rng)
    client = _SCHEMES[scheme](patients, num_clients, rng, **values)
    by_row = pd.Series(client, index=patients.index).loc[table.patient_id.iloc[rows]].to_numpy()
    return [torch.from_numpy(rows[by_row == k]).to(indices.device) for k in range(num_clients)]


def with_age(table: pd.DataFrame, indices: Tensor) -> Tensor:
    """Return the indices of images that have an age; a UserError where none has."""
    known = torch.from_numpy(table.age.notna().to_numpy()[_rows(table, indices)])
    if not known.any():
        raise UserError(
            "images_without_age is leave_out, but none of these images has an age: set it to keep, and use "
            "splits other than age and dirichlet"
        )
    return indices[known.to(indices.device)]


def check_ages(table: pd.DataFrame, indices: Tensor) -> None:
    """Raise a UserError where a split by age has one age alone to deal: it would be no skew at all."""
    ages = table.age.iloc[_rows(table, indices)].dropna()
    if len(ages) > 1 and ages.nunique() == 1:
        raise UserError(
            f"split 'age' needs people of different ages, but all {len(ages)} images with an age that it "
            f"would deal are of people {ages.iloc[0]:g} years old: use another split"
        )


def without_age(table: pd.DataFrame, indices: Tensor) -> int:
    """Count the images without an age, which the schemes in `AGE_SCHEMES` leave out."""
    return int(table.age.iloc[_rows(table, indices)].isna().sum())


def composition(table: pd.DataFrame, clients: Sequence[Tensor]) -> pd.DataFrame:
    """Count images by client, site and age band ("": not known): columns client, site, band, images."""
    parts = {client: table.iloc[_rows(table, indices)] for client, indices in enumerate(clients)}
    images = pd.concat(parts, names=["client"]).reset_index("client")
    images = images.assign(band=age_bands(images.age))
    return images.groupby(["client", "site", "band"]).size().rename("images").reset_index()


def skew(table: pd.DataFrame, clients: Sequence[Tensor]) -> dict[str, float]:
    """Measure how much the clients differ in age and in size.

    Ages are counted by image, as the federated average weights clients by images; images without an age do
    not count. A measure is NaN where fewer than two clients have ages.

    Returns:
        - jensen_shannon_mean, jensen_shannon_max: over pairs of clients, the Jensen-Shannon distance (square
          root of the divergence in bits) of their histograms over `AGE_BANDS`; 0 same, 1 no band shared.
        - wasserstein_mean, wasserstein_max: over pairs, the Wasserstein-1 distance of their ages in years:
          how far ages move, on average, to turn one client's into the other's.
        - size_ratio: images of the largest client over images of the smallest; >= 1.
    """
    sizes = [len(indices) for indices in clients]
    if not sizes or min(sizes) == 0:
        raise ValueError(f"skew needs clients that hold images, got sizes {sizes}")
    ages = [table.age.iloc[_rows(table, indices)].dropna().to_numpy(dtype=float) for indices in clients]
    pairs = list(combinations([client for client in ages if len(client)], 2))
    shannon = [
        scipy.spatial.distance.jensenshannon(_histogram(a), _histogram(b), base=2) for a, b in pairs
    ] or [math.nan]
    wasserstein = [scipy.stats.wasserstein_distance(a, b) for a, b in pairs] or [math.nan]
    return {
        "jensen_shannon_mean": float(np.mean(shannon)),
        "jensen_shannon_max": float(np.max(shannon)),
        "wasserstein_mean": float(np.mean(wasserstein)),
        "wasserstein_max": float(np.max(wasserstein)),
        "size_ratio": max(sizes) / min(sizes),
    }


# The schemes: from patients in IID order to a client number for each.


def _iid(patients: pd.DataFrame, num_clients: int, rng: Generator) -> np.ndarray:
    return _cut(patients.images.to_numpy(), np.ones(num_clients))


def _by_age(patients: pd.DataFrame, num_clients: int, rng: Generator, *, strength: float) -> np.ndarray:
    images = patients.images.to_numpy()
    by_age = np.argsort(patients.age.to_numpy(), kind="stable")  # stable: one age stays in the IID order
    place = np.empty(len(patients))
    place[by_age] = _middles(images[by_age]) / images.sum()
    order = np.argsort((1 - strength) * patients.position.to_numpy() + strength * place, kind="stable")
    client = np.empty(len(patients), dtype=int)
    client[order] = _cut(images[order], np.ones(num_clients))
    return client


def _by_quantity(patients: pd.DataFrame, num_clients: int, rng: Generator, *, ratio: float) -> np.ndarray:
    return _cut(patients.images.to_numpy(), np.geomspace(ratio, 1, num_clients))


def _by_site(patients: pd.DataFrame, num_clients: int, rng: Generator) -> np.ndarray:
    sizes = patients.groupby("site").images.sum().sort_values(ascending=False, kind="stable")
    if len(sizes) < num_clients:
        raise UserError(
            f"num_clients is {num_clients}, but split 'site' finds {len(sizes)} "
            f"site{'s' * (len(sizes) != 1)} among these images: ask for fewer clients or use another split"
        )
    totals = np.zeros(num_clients)
    client_of_site = {}
    for site, images in sizes.items():
        client_of_site[site] = int(totals.argmin())
        totals[client_of_site[site]] += images
    return patients.site.map(client_of_site).to_numpy()


def _by_dirichlet(
    patients: pd.DataFrame, num_clients: int, rng: Generator, *, concentration: float
) -> np.ndarray:
    bands = age_bands(patients.age)
    members = [np.flatnonzero(bands == band) for band in AGE_BANDS if band in bands]
    images = patients.images.to_numpy()
    for _ in range(_DIRICHLET_DRAWS):
        client = np.empty(len(patients), dtype=int)
        for band in members:
            shares = rng.dirichlet(np.full(num_clients, concentration))
            client[band] = _cut(images[band], shares, everyone=False)
        if len(np.unique(client)) == num_clients:
            return client
    raise UserError(
        f"concentration {concentration:g} left a client without a patient in each of {_DIRICHLET_DRAWS} "
        f"draws ({num_clients} clients, {len(patients)} patients, age bands {', '.join(np.unique(bands))}): "
        "raise it or ask for fewer clients"
    )


_SCHEMES: dict[str, Callable[..., np.ndarray]] = {
    "iid": _iid,
    "age": _by_age,
    "quantity": _by_quantity,
    "site": _by_site,
    "dirichlet": _by_dirichlet,
}


def _patients(table: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return one row a patient, by patient_id (the index): images, age (mean, NaN), site (commonest)."""
    part = table.iloc[rows]
    if part.patient_id.isna().any():
        raise ValueError("every image needs a patient_id: without one it would be dealt to nobody")
    grouped = part.groupby("patient_id", sort=True)
    visits = part.assign(site=part.site.fillna("")).groupby(["patient_id", "site"]).size().rename("visits")
    visits = visits.reset_index().sort_values(["visits", "site"], ascending=[False, True])
    site = visits.drop_duplicates("patient_id").set_index("patient_id").site
    patients = pd.DataFrame({"images": grouped.size(), "age": grouped.age.mean()})
    return patients.assign(site=site)  # aligned by patient_id


def _stratified_line(patients: pd.DataFrame, rng: Generator) -> pd.DataFrame:
    """Put patients in a random order of which every stretch holds a like share of each site and age band.

    The new column `position` lies in [0, 1). The shuffled patients of a stratum stand on the line at
    distances in proportion to their images, from a random start and around the end (systematic sampling:
    Madow & Madow 1944, Annals of Mathematical Statistics 15:1), so a stratum of one patient stands anywhere.
    Sites with fewer than `_SMALL_STRATUM` patients in an age band share one stratum of that band: public
    collections name dozens of sites with a patient or two.
    """
    position = np.empty(len(patients))
    images = patients.images.to_numpy()
    band = pd.Series(age_bands(patients.age), index=patients.index)
    small = patients.groupby(["site", band]).images.transform("size") < _SMALL_STRATUM
    strata = patients.groupby([small, patients.site.mask(small, ""), band], sort=True).indices
    for key in sorted(strata):
        members = rng.permutation(strata[key])
        place = _middles(images[members]) / images[members].sum()
        position[members] = (place + rng.random()) % 1
    return patients.assign(position=position).sort_values("position", kind="stable")


def _middles(images: np.ndarray) -> np.ndarray:
    """Return the middle of each patient, counted in images, when patients follow one another."""
    return np.cumsum(images) - images / 2


def _fill(images: np.ndarray, free: np.ndarray, size: int) -> np.ndarray:
    """Take free patients in order, each that still fits, up to `size` images: [patients] bool."""
    taken = np.zeros(len(images), dtype=bool)
    for patient in np.flatnonzero(free):
        if images[patient] <= size:
            taken[patient] = True
            size -= images[patient]
        if size == 0:
            break
    return taken


def _cut(images: np.ndarray, shares: np.ndarray, *, everyone: bool = True) -> np.ndarray:
    """Cut a row of patients into K stretches with these shares of the images: [patients] client number.

    A patient on a cut goes to the side where most of its images lie. With `everyone`, cuts move by as little
    as gives every client a patient.
    """
    edges = np.cumsum(shares)[:-1] / np.sum(shares) * images.sum()
    cuts = np.searchsorted(_middles(images), edges, side="left")  # cut k: the first patient of client k + 1
    if everyone:
        steps = np.arange(1, len(cuts) + 1)
        cuts = np.maximum.accumulate(cuts - steps) + steps  # each cut at least one patient after the last
        cuts = np.clip(cuts, steps, len(images) - steps[::-1])
    return np.searchsorted(cuts, np.arange(len(images)), side="right")


def _histogram(ages: np.ndarray) -> np.ndarray:
    bands = age_bands(ages)
    return np.array([np.count_nonzero(bands == band) for band in AGE_BANDS])


def _generator(seed: int, purpose: str) -> Generator:
    """Return the seed's generator for one purpose: the parts' draws do not echo in the clients'."""
    if not _is_a(Integral, seed) or seed < 0:
        raise UserError(f"seed is {seed!r}, but has to be a whole number of at least 0")
    return np.random.default_rng([int(seed), *purpose.encode()])


def _rows(table: pd.DataFrame, indices: Tensor) -> np.ndarray:
    """Return the indices as a sorted array, each once and within the table."""
    rows = np.sort(torch.as_tensor(indices).cpu().numpy())
    if rows.ndim != 1 or rows.dtype != np.int64:
        raise ValueError(f"indices must be [N] int64, got {rows.shape} {rows.dtype}")
    if len(rows) and (rows[0] < 0 or rows[-1] >= len(table) or (np.diff(rows) == 0).any()):
        raise ValueError(f"indices must name rows of the table (0 to {len(table) - 1}), each once")
    return rows


def _size(name: str, size: float, num_images: int) -> int:
    """Return a part's size in images from a fraction (below 1) or a number of images."""
    if not _is_a(Real, size) or not 0 < size < math.inf or (size >= 1 and size != int(size)):
        raise UserError(
            f"{name} is {size!r}, but has to be a fraction of the images (above 0, below 1) "
            "or their number (1, 2, ...)"
        )
    return round(size * num_images) if size < 1 else int(size)


def _options(scheme: str, given: dict[str, float]) -> dict[str, float]:
    """Return the scheme's options, checked, with defaults for those not given."""
    if scheme not in OPTIONS:
        raise UserError(f"split {scheme!r} is not known: use one of {', '.join(OPTIONS)}")
    known = OPTIONS[scheme]
    for name, value in given.items():
        if name not in known:
            takes = ", ".join(known) or "no option"
            raise UserError(f"split {scheme!r} has no option {name!r}: it takes {takes}")
        low, high = known[name].low, known[name].high
        if not _is_a(Real, value) or not low <= value <= high:
            raise UserError(
                f"{name} of split {scheme!r} is {value!r}, but has to be from {low:g} to {high:g}"
            )
    return {name: float(given.get(name, option.default)) for name, option in known.items()}


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
