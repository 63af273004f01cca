"""Splits keep patients whole, sizes as asked, and skews as strong as their number says."""

import math
import random
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from fmfl import split
from fmfl.errors import UserError

SCHEMES = list(split.OPTIONS)


def made_up_table(num_images, *, images_per_patient=1, sites=4, seed=0, unknown_ages=0.0):
    """Patients of random age at random sites, images in random order.

    images_per_patient: the most; each patient has 1 to that many.
    """
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(num_images), rng.integers(1, images_per_patient + 1, num_images))[
        :num_images
    ]
    patient = rng.permutation(patient)
    age = rng.uniform(0, 90, num_images)
    age[rng.random(num_images) < unknown_ages] = np.nan
    return pd.DataFrame(
        {
            "image_id": [f"image{i}" for i in range(num_images)],
            "patient_id": [f"patient{p}" for p in patient],
            "age": age[patient],
            "site": [f"site{s}" for s in rng.integers(sites, size=num_images)[patient]],
        }
    )


def everything(table):
    return torch.arange(len(table))


def patients_of(table, parts):
    return [set(table.patient_id.iloc[part.numpy()]) for part in parts]


def equal(parts, others):
    return len(parts) == len(others) and all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))


# Holdout


@pytest.mark.parametrize("seed", range(3))
def test_holdout_has_the_papers_sizes_when_each_patient_has_one_image(seed):
    parts = split.holdout(made_up_table(6504, seed=seed), seed=seed)
    assert [len(part) for part in parts] == [1504, 500, 4500]


@pytest.mark.parametrize("seed", range(10))
def test_holdout_keeps_patients_whole_and_deals_every_image_once(seed):
    table = made_up_table(400, images_per_patient=18, seed=seed, unknown_ages=0.3)
    parts = split.holdout(table, seed=seed)
    first, second, third = patients_of(table, parts)
    assert not first & second and not first & third and not second & third
    assert torch.equal(torch.cat(parts).sort().values, everything(table))
    for part in parts:
        assert part.dtype == torch.int64
        assert torch.equal(part, part.sort().values)


@pytest.mark.parametrize("seed", range(10))
def test_holdout_falls_short_by_less_than_the_smallest_patient_left(seed):
    table = made_up_table(400, images_per_patient=18, seed=seed)
    parts = split.holdout(table, seed=seed, proxy=100, test=50)
    left = table.patient_id.iloc[parts.federated.numpy()].value_counts().min()
    assert 0 <= 100 - len(parts.proxy) < left
    assert 0 <= 50 - len(parts.test) < left


@pytest.mark.parametrize("limit", [60, 0.25])
def test_clients_that_hold_less_leave_proxy_and_test_as_they_are(limit):
    table = made_up_table(400, images_per_patient=4)
    whole, less = split.holdout(table), split.holdout(table, federated=limit)
    assert torch.equal(whole.proxy, less.proxy) and torch.equal(whole.test, less.test)
    wanted = limit if limit >= 1 else round(limit * len(whole.federated))
    assert wanted - 4 < len(less.federated) <= wanted
    assert set(less.federated.tolist()) < set(whole.federated.tolist())
    kept, left = set(less.federated.tolist()), set(whole.federated.tolist()) - set(less.federated.tolist())
    patients = patients_of(table, [torch.tensor(sorted(kept)), torch.tensor(sorted(left))])
    assert not patients[0] & patients[1], "a patient is held as a whole"


def test_more_clients_images_than_there_are_is_all_of_them():
    table = made_up_table(100)
    assert equal(split.holdout(table, federated=1000), split.holdout(table))


def test_a_mixture_counts_every_image_of_a_client_by_site_and_age_band():
    table = pd.DataFrame(
        {
            "patient_id": list("abcde"),
            "site": ["x", "x", "y", "y", "y"],
            "age": [3.0, 5.0, 3.0, np.nan, 81.0],
        }
    )
    found = split.composition(table, [torch.tensor([0, 1, 2]), torch.tensor([3, 4])])
    rows = sorted(found.itertuples(index=False, name=None))
    assert rows == [(0, "x", "0-5", 2), (0, "y", "0-5", 1), (1, "y", "", 1), (1, "y", "80+", 1)]


def test_holdout_gives_each_part_its_share_of_each_site_and_age_band():
    """Up to two patients: one for the stratum's start on the line, one for the rounding of the cut."""
    table = made_up_table(3000, unknown_ages=0.2)
    parts = split.holdout(table, proxy=0.3, test=0.1)
    strata = table.site + split.age_bands(table.age)
    assert strata.nunique() == 4 * 10
    for part, fraction in ((parts.proxy, 0.3), (parts.test, 0.1)):
        held = strata.iloc[part.numpy()].value_counts().reindex(strata.unique(), fill_value=0)
        expected = strata.value_counts() * fraction
        assert ((held - expected).abs() <= 2).all()
        assert (held[expected >= 2] > 0).all()


def test_a_lone_patient_of_its_stratum_reaches_every_part():
    """Small strata are not always put in the same part: over seeds each part gets its share of them."""
    table = made_up_table(100, sites=1)
    table.loc[7, "site"] = "lonely"
    seeds = 200
    draws = [split.holdout(table, seed, proxy=0.3, test=0.2) for seed in range(seeds)]
    got = [sum(7 in part for part in parts) for parts in zip(*draws, strict=True)]
    for count, fraction in zip(got, (0.3, 0.2, 0.5), strict=True):
        assert abs(count - seeds * fraction) < 4 * math.sqrt(seeds * fraction * (1 - fraction))


def test_the_test_part_does_not_depend_on_the_proxy_part():
    table = made_up_table(500, images_per_patient=4)
    tests = [split.holdout(table, seed=3, proxy=size, test=60).test for size in (10, 0.2, 200)]
    assert torch.equal(tests[0], tests[1]) and torch.equal(tests[0], tests[2])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"proxy": 0.7, "test": 0.3}, "leave none of the 100 images"),
        ({"proxy": 90, "test": 10}, "leave none of the 100 images"),
        ({"proxy": -0.1}, "proxy is -0.1"),
        ({"test": 0}, "test is 0"),
        ({"test": 2.5}, "test is 2.5"),
        ({"test": math.nan}, "test is nan"),
        ({"test": "many"}, "test is 'many'"),
        ({"test": 0.001}, "the test part is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_impossible_parts_are_named(sizes, words):
    with pytest.raises(UserError, match=words):
        split.holdout(made_up_table(100), **sizes)


def test_a_part_smaller_than_every_patient_is_named():
    table = made_up_table(40).assign(patient_id=[f"patient{i // 10}" for i in range(40)])
    with pytest.raises(UserError, match="test part is empty, because patients are not divided"):
        split.holdout(table, proxy=10, test=5)


# Partition


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(5))
def test_partition_keeps_patients_whole_and_deals_every_image_once(scheme, seed):
    table = made_up_table(300, images_per_patient=9, seed=seed)
    indices = split.holdout(table, seed=seed).federated
    clients = split.partition(table, indices, scheme, 3, seed=seed)
    first, second, third = patients_of(table, clients)
    assert not first & second and not first & third and not second & third
    assert torch.equal(torch.cat(clients).sort().values, indices)
    for client in clients:
        assert len(client) > 0
        assert client.dtype == torch.int64
        assert torch.equal(client, client.sort().values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_split_is_set_by_its_seed_alone(scheme):
    table = made_up_table(200, images_per_patient=3)
    options = {"strength": 0.5} if scheme == "age" else {}  # 1 is set by the ages, whatever the seed

    def deal(indices, seed):
        return [*split.holdout(table, seed), *split.partition(table, indices, scheme, 3, seed, **options)]

    first = deal(everything(table), seed=1)
    np.random.seed(5)  # noqa: NPY002  a global generator, to show that it does not matter
    torch.manual_seed(5)
    random.seed(5)
    assert equal(deal(everything(table).flip(0), seed=1), first)
    second = deal(everything(table), seed=2)
    assert not equal(second[:3], first[:3])
    if scheme != "site":  # sites are dealt by size, not by chance
        assert not equal(second[3:], first[3:])


@pytest.mark.parametrize("scheme", ["iid", "age"])
def test_the_papers_clients_have_1500_images_each(scheme):
    table = made_up_table(4500)
    clients = split.partition(table, everything(table), scheme, 3)
    assert [len(client) for client in clients] == [1500, 1500, 1500]


@pytest.mark.parametrize("num_clients", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("scheme", ["iid", "age", "quantity"])
def test_every_client_has_a_patient_up_to_as_many_clients_as_patients(scheme, num_clients):
    """40 patients of very unequal size: 79 images, 40 of them of one patient."""
    table = made_up_table(79).assign(patient_id=[f"patient{max(i - 39, 0):02d}" for i in range(79)])
    assert table.patient_id.nunique() == 40
    clients = split.partition(table, everything(table), scheme, num_clients)
    assert len(clients) == num_clients
    assert min(len(client) for client in clients) >= 1
    assert sum(len(client) for client in clients) == 79


def test_sites_of_few_patients_are_stratified_by_age_together():
    """300 patients at 300 sites: their ages are dealt as evenly as those of one site."""
    table = made_up_table(300).assign(site=[f"site{i}" for i in range(300)])
    bands = pd.Series(split.age_bands(table.age))
    for seed in range(3):
        for client in split.partition(table, everything(table), "iid", 3, seed):
            held = bands.iloc[client.numpy()].value_counts()
            assert ((held - bands.value_counts() / 3).abs() <= 2).all()


@pytest.mark.parametrize(
    ("images", "client"),
    [
        ([2, 2, 2], [0, 1, 2]),
        ([10, 1, 1], [0, 1, 2]),  # cuts after 4 and 8 images: both before or inside the first patient
        ([1, 1, 10], [0, 1, 2]),
        ([1, 10, 1], [0, 1, 2]),
        ([1, 2, 9, 1, 2], [0, 0, 1, 2, 2]),  # cuts after 5 and 10: middles 0.5, 2, 7.5, 12.5, 14
        ([5, 5, 1, 1, 3], [0, 1, 2, 2, 2]),  # cuts after 5 and 10: middles 2.5, 7.5, 10.5, 11.5, 13.5
    ],
)
def test_a_row_of_patients_is_cut_where_most_images_lie_and_leaves_nobody_without(images, client):
    assert split._cut(np.array(images), np.ones(3)).tolist() == client


def test_iid_clients_have_like_shares_of_each_site_and_age_band():
    table = made_up_table(3000)
    strata = table.site + split.age_bands(table.age)
    for client in split.partition(table, everything(table), "iid", 3):
        held = strata.iloc[client.numpy()].value_counts()
        assert ((held - strata.value_counts() / 3).abs() <= 2).all()


def test_no_strength_is_iid():
    table = made_up_table(500, images_per_patient=4)
    iid = split.partition(table, everything(table), "iid", 3, seed=4)
    assert equal(split.partition(table, everything(table), "age", 3, seed=4, strength=0), iid)
    assert equal(split.partition(table, everything(table), "quantity", 3, seed=4, ratio=1), iid)


def test_full_strength_sorts_by_age():
    table = made_up_table(300)
    clients = split.partition(table, everything(table), "age", 3, strength=1)
    ages = [table.age.iloc[client.numpy()] for client in clients]
    assert ages[0].max() < ages[1].min() and ages[1].max() < ages[2].min()


@pytest.mark.parametrize("seed", range(3))
def test_age_skew_grows_with_its_strength(seed):
    table = made_up_table(1500, seed=seed)
    strengths = (0, 0.25, 0.5, 0.75, 1)
    clients = [split.partition(table, everything(table), "age", 3, seed, strength=s) for s in strengths]
    for measure in ("jensen_shannon_mean", "wasserstein_mean"):
        skews = [split.skew(table, parts)[measure] for parts in clients]
        assert all(a < b for a, b in pairwise(skews)), (measure, skews)
    assert split.skew(table, clients[0])["jensen_shannon_mean"] < 0.05


@pytest.mark.parametrize("scheme", ["iid", "age", "quantity", "dirichlet"])
def test_patients_of_one_age_are_not_dealt_in_the_order_of_their_names(scheme):
    """As in the Guangzhou part, where thousands of children carry the cohort's age.

    Names in the order of 900 rows: n rows by chance have mean 449.5 and standard error 260 / sqrt(n).
    """
    table = made_up_table(900, sites=3).assign(age=3.0, patient_id=[f"patient{i:03d}" for i in range(900)])
    for client in split.partition(table, everything(table), scheme, 3, seed=1):
        assert abs(client.double().mean() - 449.5) < 4 * 260 / math.sqrt(len(client))
        at_sites = table.site.iloc[client.numpy()].value_counts() / len(client)
        assert at_sites.between(0.25, 0.42).all()


@pytest.mark.parametrize(
    ("ratio", "sizes"), [(1, [1300, 1300, 1300]), (4, [2229, 1114, 557]), (9, [2700, 900, 300])]
)
def test_quantity_skew_has_its_ratio(ratio, sizes):
    """Of 3,900 images, 4:2:1 is 2228.6, 1114.3, 557.1 and 9:3:1 is 2700, 900, 300."""
    table = made_up_table(3900)
    clients = split.partition(table, everything(table), "quantity", 3, ratio=ratio)
    assert [len(client) for client in clients] == sizes
    assert split.skew(table, clients)["size_ratio"] == pytest.approx(ratio, rel=2e-3)


def test_quantity_skew_leaves_ages_alike():
    table = made_up_table(3900)
    clients = split.partition(table, everything(table), "quantity", 3, ratio=9)
    assert split.skew(table, clients)["wasserstein_max"] < 2
    assert split.skew(table, clients)["jensen_shannon_max"] < 0.1


def test_sites_go_to_the_client_with_the_fewest_images():
    """50 to 0, 30 to 1, 20 to 1 (30 < 50), 15 to 0 (50 = 50, so the first), 10 to 1 (50 < 65)."""
    sizes = {"a": 10, "b": 50, "c": 15, "d": 30, "e": 20}
    sites = [site for site, size in sizes.items() for _ in range(size)]
    table = made_up_table(125).assign(site=sites)
    clients = split.partition(table, everything(table), "site", 2)
    assert [set(table.site.iloc[client.numpy()]) for client in clients] == [{"b", "c"}, {"d", "e", "a"}]


def test_a_patient_seen_at_two_sites_stays_whole_at_the_commonest():
    table = made_up_table(9).assign(
        site=["a", "a", "b", "a", "a", "a", "b", "b", "b"], patient_id=list("ppp") + list("qrsxyz")
    )
    clients = split.partition(table, everything(table), "site", 2)
    assert [client.tolist() for client in clients] == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]


def test_a_patient_seen_at_two_ages_counts_with_their_mean():
    """p is 45 on average, between q (40) and r (50), though the youngest and the oldest image are p's."""
    table = made_up_table(6).assign(patient_id=list("pqqrrp"), age=[10, 40, 40, 50, 50, 80])
    clients = split.partition(table, everything(table), "age", 3)
    assert [client.tolist() for client in clients] == [[1, 2], [0, 5], [3, 4]]


def test_images_without_a_site_count_as_one_more_site():
    table = made_up_table(60, sites=1)
    table.loc[table.index % 3 == 0, "site"] = None
    clients = split.partition(table, everything(table), "site", 2)
    assert [len(client) for client in clients] == [40, 20]
    assert table.site.iloc[clients[1].numpy()].isna().all()
    assert sum(len(part) for part in split.holdout(table)) == 60


def test_dirichlet_skew_shrinks_with_its_concentration():
    table = made_up_table(2000)
    skews = [
        np.mean(
            [
                split.skew(
                    table, split.partition(table, everything(table), "dirichlet", 3, seed, concentration=c)
                )["jensen_shannon_mean"]
                for seed in range(10)
            ]
        )
        for c in (0.05, 0.5, 5, 1e4)
    ]
    assert skews[0] > 0.7
    assert all(a > b for a, b in pairwise(skews)), skews
    assert skews[-1] < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_images_without_an_age_are_left_out_of_the_age_arms_and_counted(scheme):
    table = made_up_table(300, unknown_ages=0.4)
    unknown = int(table.age.isna().sum())
    assert unknown > 50
    dealt = torch.cat(split.partition(table, everything(table), scheme, 3))
    assert split.without_age(table, everything(table)) == unknown
    assert len(dealt) == 300 - unknown * (scheme in ("age", "dirichlet"))
    if scheme in ("age", "dirichlet"):
        assert split.without_age(table, dealt) == 0


@pytest.mark.parametrize(
    ("scheme", "options", "words"),
    [
        ("ages", {}, "split 'ages' is not known: use one of iid, age, quantity, site, dirichlet"),
        ("age", {"ratio": 2}, "split 'age' has no option 'ratio': it takes strength"),
        ("iid", {"strength": 1}, "split 'iid' has no option 'strength': it takes no option"),
        ("age", {"strength": 1.1}, "strength of split 'age' is 1.1, but has to be from 0 to 1"),
        ("age", {"strength": math.nan}, "strength of split 'age' is nan"),
        ("age", {"strength": "strong"}, "strength of split 'age' is 'strong'"),
        ("quantity", {"ratio": 0.5}, "ratio of split 'quantity' is 0.5"),
        ("dirichlet", {"concentration": 0}, "concentration of split 'dirichlet' is 0"),
        ("iid", {"num_clients": 101}, "num_clients is 101, but split 'iid' has only 100 patients"),
        ("iid", {"num_clients": 0}, "num_clients is 0"),
        ("iid", {"num_clients": 2.0}, "num_clients is 2.0"),
        ("site", {"num_clients": 5}, "num_clients is 5, but split 'site' finds 4 sites"),
        ("iid", {"seed": -3}, "seed is -3"),
    ],
)
def test_impossible_partitions_are_named(scheme, options, words):
    table = made_up_table(100)
    with pytest.raises(UserError, match=words):
        split.partition(table, everything(table), scheme, **options)


def test_age_arms_without_any_age_are_named():
    table = made_up_table(30).assign(age=np.nan)
    with pytest.raises(UserError, match="split 'age' needs ages"):
        split.partition(table, everything(table), "age")


def test_a_split_by_one_age_is_refused():
    table = made_up_table(30).assign(age=3.0)
    with pytest.raises(UserError, match=r"split 'age' needs .* different ages, but all 30 .* 3 years old"):
        split.check_ages(table, everything(table))
    table.loc[0, "age"] = np.nan
    with pytest.raises(UserError, match="but all 29 images"):
        split.check_ages(table, everything(table))
    table.loc[0, "age"] = 40.0
    split.check_ages(table, everything(table))


def test_a_dirichlet_draw_that_cannot_reach_every_client_is_named():
    """Two patients of one band and concentration 0.01: nearly every draw gives one client both."""
    table = made_up_table(12).assign(patient_id=[f"patient{i // 3}" for i in range(12)], age=40.0)
    with pytest.raises(
        UserError, match=r"concentration 0\.01 left a client without .* in each of 1000 draws"
    ):
        split.partition(table, everything(table), "dirichlet", 4, concentration=0.01)


@pytest.mark.parametrize("indices", [[0, 0, 1], [-1, 2, 3], [5, 100, 1]])
def test_indices_that_are_no_set_of_rows_are_refused(indices):
    with pytest.raises(ValueError, match="rows of the table"):
        split.partition(made_up_table(100), torch.tensor(indices), "iid")


def test_an_image_without_a_patient_is_refused():
    table = made_up_table(10)
    table.loc[4, "patient_id"] = None
    with pytest.raises(ValueError, match="patient_id"):
        split.holdout(table, proxy=3, test=2)


# Skew


def test_age_bands_include_their_lower_end():
    ages = [0, 5.9, 6, 17.9, 18, 29.9, 30, 79.9, 80, 104, math.nan]
    names = ["0-5", "0-5", "6-17", "6-17", "18-29", "18-29", "30-39", "70-79", "80+", "80+", ""]
    assert split.age_bands(ages).tolist() == names


def test_skew_against_a_case_by_hand():
    """Ages: client 0 has 20, 20; client 1 has 20, 40; client 2 has 60 four times.

    Jensen-Shannon divergence in bits over the bands 18-29, 40-49, 60-69:
      0 and 1: p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4):
               (1 log2(4/3) + (1/2 log2(2/3) + 1/2 log2 2)) / 2 = 0.311278
      0 and 2, 1 and 2: nothing shared: 1
    Wasserstein in years: 0 and 1: half moves 20 years = 10; 0 and 2: 40; 1 and 2: (40 + 20) / 2 = 30.
    """
    table = made_up_table(9).assign(age=[20, 20, 20, 40, 60, 60, 60, 60, math.nan])
    clients = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5, 6, 7])]
    shannon = math.sqrt((math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5) / 2)
    assert shannon == pytest.approx(math.sqrt(0.311278), rel=1e-5)
    assert split.skew(table, clients) == pytest.approx(
        {
            "jensen_shannon_mean": (shannon + 1 + 1) / 3,
            "jensen_shannon_max": 1,
            "wasserstein_mean": (10 + 40 + 30) / 3,
            "wasserstein_max": 40,
            "size_ratio": 2,
        }
    )


def test_like_clients_have_no_skew():
    table = made_up_table(6).assign(age=[10, 50, 10, 50, 10, 50])
    measures = split.skew(table, [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])])
    assert measures.pop("size_ratio") == 1
    assert set(measures.values()) == {0}


def test_skew_of_ages_is_unknown_without_two_clients_that_have_them():
    table = made_up_table(4).assign(age=[10, 20, math.nan, math.nan])
    measures = split.skew(table, [torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 3])])
    assert measures["wasserstein_max"] == 10
    measures = split.skew(table, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    assert math.isnan(measures["wasserstein_max"]) and math.isnan(measures["jensen_shannon_mean"])
    assert measures["size_ratio"] == 1
