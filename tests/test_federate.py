"""Eq. 2 and 3 by their special cases, rounds that resume in the same bytes, arms with the same batches."""

import collections
import dataclasses
import threading
import warnings
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fmfl import federate, metrics, models, parallel, resume, runs, seeds, states, train
from fmfl.analysis import landscape
from fmfl.config import FederateConfig
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import UserError
from fmfl.federate import aggregate
from fmfl.runs import Run
from fmfl.train import FitResult

SIZE = 32
TEST = torch.tensor([10, 11])
PARTS = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6, 7, 8, 9])]  # unequal, so the weighting matters


@pytest.fixture(autouse=True)
def _micro_student(monkeypatch):
    """A student that trains in milliseconds, for claims that hold of any."""
    monkeypatch.setitem(
        models.STUDENTS,
        "micro",
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
        ),
    )


def a_cohort(num: int = 12) -> Cohort:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(20, 120, (num, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    masks = torch.zeros_like(images)
    for i in range(num):
        masks[i, :, 6 + i % 4 : 20 + i % 5, 5 + i % 3 : 24] = 1
    images[masks == 1] += 100
    names = [f"image{i}" for i in range(num)]
    table = pd.DataFrame(
        {"image_id": names, "patient_id": names, "site": "here", "age": np.arange(1.0 * num)}
    )
    return Cohort(images, masks, table, pd.DataFrame(), fingerprint="cohort")


def an_initial(
    student: str = "micro", seed: int = 0, name: str = "random", batch_norm: str = "average"
) -> InitialState:
    model = models.build(student, seed=seed, batch_norm=batch_norm)
    return InitialState(name, model.state_dict(), FitResult([], 6, 1.5))


def settings(**changes) -> FederateConfig:
    return dataclasses.replace(FederateConfig(num_rounds=3, batch_size=4, learning_rate=1e-2), **changes)


def serve(run_dir, *, parts=PARTS, student: str = "micro", cohort: Cohort | None = None, **more) -> Run:
    cohort, cfg = cohort or a_cohort(), more.pop("cfg", settings())
    given = {
        "initial": an_initial(student, batch_norm=cfg.batch_norm),
        "clients": runs.clients_of(cohort, parts),
        "cfg": cfg,
        "student": student,
        "cohort": cohort,
        "test": TEST,
    }
    return runs.start_or_resume(run_dir, **given | more)


def one_by_one(run: Run):
    """Eq. 2 of a round's clients on one core, so that a spy sees them in their order."""
    return runs.train_clients(run, devices=[torch.device("cpu")])


def run(server: Run, rounds: int | None = None) -> Run:
    """The notebook's round loop, to the end or stopped after some rounds."""
    cohort, train_round = a_cohort(), landscape.watched(one_by_one)
    for number in server.remaining_rounds():
        server.finish_round(aggregate(train_round(server)), cohort, TEST)
        if number == rounds:
            break
    return server


def equal(one: states.State, other: states.State) -> bool:
    """Bitwise."""
    return states.state_digest(one) == states.state_digest(other)


def without_seconds(server: Run) -> pd.DataFrame:
    return pd.DataFrame(server.history).drop(columns="seconds")


# ------------------------------------------------------------------------------------------ Eq. 3


def one_sgd_step(x: torch.Tensor, y: torch.Tensor) -> states.State:
    """Weights of a fresh linear model after one full-batch step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    (model(x) - y).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model.state_dict()


def test_one_full_batch_step_equals_sgd_on_the_pooled_data():
    """With E = 1 and full batches FedAvg is FedSGD (McMahan et al. 2017, section 2)."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(10, 4, generator=generator).double().split([3, 1], dim=1)
    clients = [slice(0, 2), slice(2, 10)]  # unequal, so the weighting matters
    averaged = aggregate((one_sgd_step(x[c], y[c]), c.stop - c.start) for c in clients)
    torch.testing.assert_close(averaged, dict(one_sgd_step(x, y)), rtol=1e-12, atol=1e-12)


def test_batchnorm_is_averaged_as_by_hand():
    """Two hospitals with 3 and 1 images; each has seen one batch of one channel, momentum 0.1 from (0, 1).

    Hospital A saw 1, 2, 3: mean 2, unbiased variance 1, so mean 0.1 * 2 = 0.2, variance 0.9 + 0.1 * 1 = 1.0.
    Hospital B saw 0, 10: mean 5, unbiased variance 50, so mean 0.5, variance 0.9 + 5 = 5.9.
    Weighted 3 : 1: mean (3 * 0.2 + 0.5) / 4 = 0.275, variance (3 * 1.0 + 5.9) / 4 = 2.225.
    Unweighted it would be 0.35 and 3.45; averaging parameters alone would leave 0.2 and 1.0.
    """
    found = []
    for seen in ([1.0, 2.0, 3.0], [0.0, 10.0]):
        layer = nn.BatchNorm1d(1)
        layer(torch.tensor(seen)[:, None])
        found.append(layer.state_dict())
    found[1]["num_batches_tracked"] += 4
    averaged = aggregate(zip(found, (3, 1), strict=True))
    assert averaged["running_mean"].item() == pytest.approx(0.275)
    assert averaged["running_var"].item() == pytest.approx(2.225)
    assert averaged["num_batches_tracked"].item() == 1, "the first client's count"
    assert averaged["num_batches_tracked"].dtype == torch.int64
    assert list(averaged) == list(found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_average_keeps_its_dtype_and_one_client_gives_its_own_bits(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0] = -0.0
    values += (values.double() * 1e-9).to(dtype)  # bits that float32 has not
    state = {"w": values, "count": torch.tensor(5)}
    averaged = aggregate([(state, 49)])
    assert averaged["w"].dtype == dtype
    assert equal(averaged, state)
    # And it is a copy: the client trains on.
    assert averaged["w"].data_ptr() != values.data_ptr()
    assert aggregate([(state, 49), ({**state, "w": 3 * values}, 1)])["w"].dtype == dtype


def test_the_sum_runs_in_double_precision():
    """In float32, 2^24 + 1 is 2^24: the third client would not be heard."""
    clients = [({"w": torch.tensor([v])}, 1) for v in (2.0**24, 1.0, 1.0, -(2.0**24))]
    assert aggregate(clients)["w"].item() == 0.5


def test_the_same_clients_in_the_same_order_give_the_same_bytes():
    clients = [(models.build("micro", seed=k).state_dict(), 3 * k + 1) for k in range(5)]
    assert equal(aggregate(clients), aggregate(iter(clients)))


def test_clients_are_asked_one_at_a_time_and_let_go():
    """A round with many clients needs the memory of one client's state, the running sum and a copy."""
    alive: list[weakref.ref] = []
    most = 0

    def client(k: int) -> tuple[states.State, int]:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.full((4,), float(k) if k != 3 else torch.nan)
        alive.append(weakref.ref(tensor))
        return {"w": tensor}, k + 1

    with pytest.warns(UserWarning, match="update 3 is not finite"):
        aggregate(client(k) for k in range(6))
    assert len(alive) == 6
    assert most == 0, "when a client begins, no other client's state is held"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_client_that_is_not_finite_is_left_out_with_a_warning(bad):
    good = [
        ({"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)}, 1),
        ({"w": torch.tensor([5.0, 6.0]), "n": torch.tensor(2)}, 3),
    ]
    diverged = {"w": torch.tensor([0.0, bad]), "n": torch.tensor(0)}
    for place in range(3):
        clients = [*good[:place], (diverged, 100), *good[place:]]
        with pytest.warns(UserWarning, match=f"update {place} is not finite"):
            averaged = aggregate(clients)
        assert averaged["w"].tolist() == [4.0, 5.0]
        assert averaged["n"].item() == 1


def test_large_numbers_are_no_infinities():
    """Their sum is one in float32; and an infinity beside its opposite is not taken for nothing."""
    large = torch.full((8,), 3e38)
    averaged = aggregate([({"w": large}, 1), ({"w": large / 3}, 1)])
    torch.testing.assert_close(averaged["w"], torch.full((8,), 2e38))
    opposite = torch.tensor([torch.inf, -torch.inf])
    with pytest.warns(match="update 1 is not finite"):
        aggregate([({"w": torch.ones(2)}, 1), ({"w": opposite}, 1)])


def test_a_round_without_a_valid_client_stops_the_run():
    with (
        pytest.warns(match="not finite"),
        pytest.raises(RuntimeError, match="no client gave a finite update"),
    ):
        aggregate([({"w": torch.tensor([torch.nan])}, 1)] * 2)
    with pytest.raises(RuntimeError, match="nothing to average"):
        aggregate([])


@pytest.mark.parametrize(
    ("other", "num_examples", "message"),
    [
        ({"v": torch.zeros(2)}, 1, "update 1 has other tensors"),
        ({"w": torch.zeros(1)}, 1, "update 1 has other tensors"),  # would broadcast
        ({"w": torch.zeros(2), "v": torch.zeros(2)}, 1, "update 1 has other tensors"),
        ({"w": torch.zeros(2)}, 0, "update 1 comes from 0 images"),
        ({"w": torch.zeros(2)}, -3, "update 1 comes from -3 images"),
    ],
)
def test_what_cannot_be_averaged_is_refused(other, num_examples, message):
    with pytest.raises(ValueError, match=message):
        aggregate([({"w": torch.zeros(2)}, 1), (other, num_examples)])


# ------------------------------------------------------------------------------------------ Eq. 2


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
@pytest.mark.parametrize("student", ["micro", "tiny_unet"])
def test_one_client_is_plain_training(tmp_path, student, optimizer_state):
    """No average changes anything: R rounds of E epochs are R * E epochs of one PyTorch loop, bit by bit."""
    cohort, rounds, epochs = a_cohort(), 2, 2
    cfg = settings(num_rounds=rounds, local_epochs=epochs, optimizer_state=optimizer_state, seed=5)
    everything = torch.arange(8)
    server = run(serve(tmp_path, parts=[everything], student=student, cfg=cfg))

    model = models.build(student, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, fused=True)
    with parallel.one_thread(CPU):  # as a run trains: one order of adding
        for number in range(1, rounds + 1):
            if optimizer_state == "reset":
                optimizer = torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, fused=True)
            for epoch in range(epochs):
                model.train()
                rng = seeds.generator(5, 0, number, epoch)
                for images, masks, _ in train.batches(
                    train.Examples(cohort.images, cohort.masks, everything), cfg.batch_size, rng
                ):
                    optimizer.zero_grad()
                    train.LOSSES["dice"](model(images), masks, None).backward()
                    optimizer.step()
    assert equal(server.theta, model.state_dict())


def test_the_scores_are_those_of_the_global_state(tmp_path):
    server, cohort = run(serve(tmp_path)), a_cohort()
    model = models.build("micro")
    model.load_state_dict(server.theta)
    model.eval()
    with torch.no_grad():
        probabilities = model(cohort.images[TEST].float() / 255).sigmoid()
    last = server.history[-1]
    assert last["dice"] == pytest.approx(metrics.dice(probabilities > 0.5, cohort.masks[TEST]).mean().item())
    shown = server.per_image(cohort, TEST)
    assert shown.columns.tolist() == [
        *("arm", "init", "split", "seed", "client", "image_id", "patient_id", "site", "age"),
        *("dice", "iou", "hd95", "assd"),
    ]
    assert shown.image_id.tolist() == ["image10", "image11"]
    assert shown.dice.mean() == pytest.approx(last["dice"])


def seen_batches(monkeypatch) -> list[tuple]:
    """Records what `train.make_batch` gives from now on."""
    seen: list[tuple] = []
    make_batch = train.make_batch

    def recorded(*args, **options):
        images, masks, extra = make_batch(*args, **options)
        seen.append((states.tensor_digest(images), states.tensor_digest(masks)))
        return images, masks, extra

    monkeypatch.setattr(train, "make_batch", recorded)
    return seen


def test_all_starts_see_the_same_batches(tmp_path, monkeypatch):
    """The arms are paired: what a client sees in a round does not depend on where the weights began."""
    seen = seen_batches(monkeypatch)
    found = []
    for name, seed in (("random", 0), ("fm", 1)):
        server = run(serve(tmp_path, initial=an_initial(seed=seed, name=name)))
        found.append((server.theta, tuple(seen)))
        seen.clear()
    assert not equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(set(found[0][1])) == len(found[0][1]) == 3 * (1 + 2), "and no two batches are alike"


def test_a_client_alone_sees_what_it_sees_in_the_federation(tmp_path, monkeypatch):
    seen = seen_batches(monkeypatch)
    run(serve(tmp_path))
    together = seen.copy()
    seen.clear()
    clients = runs.clients_of(a_cohort(), PARTS)
    run(serve(tmp_path, clients={1: clients[1]}, arm="standalone"))
    assert seen == [batch for number in range(3) for batch in together[3 * number + 1 : 3 * number + 3]]


def test_the_arms_without_a_server_keep_their_optimizer(tmp_path):
    """Centralised training is one long run: a new Adam each round would be a handicap for no reason."""
    cohort = a_cohort()
    everything = runs.pooled(cohort, torch.arange(8))
    server = run(
        serve(tmp_path, clients=everything, arm="centralised", cfg=settings(optimizer_state="reset"))
    )
    assert list(everything) == [seeds.POOLED]
    assert (server.split, server.client, server.cfg.optimizer_state) == ("pooled", -1, "keep")
    assert server.memory[seeds.POOLED]


@pytest.mark.usefixtures("diverging")
def test_a_client_that_diverged_comes_back_in_the_next_round(tmp_path):
    """Kept moments that are not finite would spoil all its later rounds too."""
    with pytest.warns(UserWarning, match="update 1 is not finite") as caught:
        server = run(serve(tmp_path, cfg=settings(optimizer_state="keep")))
    assert sum("not finite" in str(warning.message) for warning in caught) == 1, "in round 2 alone"
    assert all(value.isfinite().all() for value in server.theta.values())


# ------------------------------------------------------------------------------------------ named choices


CHOICES = {
    "plain": {},
    "keep": {"optimizer_state": "keep"},
    "local": {"batch_norm": "local"},
    "local and keep": {"batch_norm": "local", "optimizer_state": "keep"},
    "group": {"batch_norm": "group"},
    "momentum": {"server": "momentum"},
    "adam": {"server": "adam"},
    "proximal": {"proximal": 1.0},
    "participation": {"participation": 0.5, "optimizer_state": "keep"},
    "uniform": {"client_weights": "uniform"},
    "all": {
        **{"batch_norm": "local", "optimizer_state": "keep", "server": "adam", "proximal": 0.1},
        **{"participation": 0.5, "client_weights": "uniform"},
    },
}


def steps(run_dir, **changes) -> tuple[list[states.State], list[states.State], Run]:
    """The averages and the global states of a run's rounds, from the same start as all."""
    averages, found = [], []
    server = serve(run_dir, cfg=settings(**changes))
    found.append(server.theta)
    for _ in server.remaining_rounds():
        averages.append(aggregate(runs.train_clients(server)))
        server.finish_round(averages[-1], a_cohort(), TEST)
        found.append(server.theta)
    return averages, found, server


@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "plain"])
def test_every_choice_changes_the_federation(tmp_path, choice):
    plain = run(serve(tmp_path / "a")).theta
    chosen = run(serve(tmp_path / "b", cfg=settings(**CHOICES[choice]))).theta
    assert not equal(plain, chosen)


@pytest.mark.parametrize("choice", [name for name in CHOICES if name not in ("plain", "keep", "group")])
def test_the_arms_without_a_server_do_not_depend_on_its_choices(tmp_path, choice):
    clients = runs.clients_of(a_cohort(), PARTS)
    alone = {"clients": {1: clients[1]}, "arm": "standalone"}
    run(serve(tmp_path, **alone), rounds=1)
    assert serve(tmp_path, **alone, cfg=settings(**CHOICES[choice])).round_number == 1


def test_a_servers_momentum_is_the_formula_of_fedavgm(tmp_path):
    """v <- beta v + (theta - average), theta <- theta - lr v (Hsu et al. 2019); buffers are the average."""
    averages, found, _ = steps(tmp_path, server="momentum", server_momentum=0.7, server_learning_rate=0.5)
    weights = {name for name, _ in models.build("micro").named_parameters()}
    velocity = dict.fromkeys(weights, 0.0)
    for average, before, after in zip(averages, found, found[1:], strict=False):
        for name, value in after.items():
            if name in weights:
                velocity[name] = 0.7 * velocity[name] + (before[name] - average[name]).double()
                expected = before[name].double() - 0.5 * velocity[name]
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(value, average[name]), name


def test_a_servers_adam_is_the_formula_of_adam(tmp_path):
    """Kingma & Ba 2015, algorithm 1, with theta - average for the gradient; buffers are the average."""
    averages, found, _ = steps(tmp_path, server="adam", server_epsilon=1e-2)
    weights = {name for name, _ in models.build("micro").named_parameters()}
    m, v = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for t, average in enumerate(averages, start=1):
        for name, value in found[t].items():
            if name not in weights:
                assert torch.equal(value, average[name]), name
                continue
            before = found[t - 1][name].double()
            gradient = before - average[name].double()
            m[name] = 0.9 * m[name] + 0.1 * gradient
            v[name] = 0.99 * v[name] + 0.01 * gradient**2
            step = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.99**t)).sqrt() + 1e-2)
            torch.testing.assert_close(value.double(), before - 0.01 * step, rtol=1e-5, atol=1e-6)


def test_a_servers_step_of_one_without_momentum_is_the_average(tmp_path):
    averages, found, _ = steps(tmp_path, server="momentum", server_momentum=0.0)
    for average, state in zip(averages, found[1:], strict=True):
        torch.testing.assert_close(state, average, rtol=1e-6, atol=1e-7)


def test_under_fedbn_a_client_has_its_own_batchnorm_and_the_server_their_average(tmp_path):
    """A client's second round begins with the others' weights and with its own BatchNorm."""
    server = serve(tmp_path, cfg=settings(batch_norm="local"))
    own = {name for name in server.theta if name.startswith("1.")}  # the second layer, BatchNorm
    assert federate.local_keys(server.model, server.cfg) == own and len(own) == 5
    trained = {}

    def client(k):
        (trained[k],) = runs.train_clients(server, [k])
        return trained[k]

    server.finish_round(aggregate(client(k) for k in server.participants()), a_cohort(), TEST)
    (one, n_one), (two, n_two) = trained[0][:2], trained[1][:2]
    assert (n_one, n_two) == (3, 7)
    for name in own - {"1.num_batches_tracked"}:
        assert not torch.equal(one[name], two[name])
        torch.testing.assert_close(server.theta[name], (3 * one[name] + 7 * two[name]) / 10)

    begun = []

    def begin(model, *_, **__):
        begun.append(models.copy_state(model))
        return FitResult()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", begin)
        assert len(list(runs.train_clients(server, [0, 1], [CPU]))) == 2
    for k in (0, 1):
        for name, value in begun[k].items():
            assert torch.equal(value, trained[k][0][name] if name in own else server.theta[name]), name


def test_under_fedbn_the_servers_step_leaves_batchnorm_alone(tmp_path):
    averages, found, server = steps(tmp_path, batch_norm="local", server="momentum")
    for average, state in zip(averages[1:], found[2:], strict=True):  # without momentum a step is the average
        assert {name for name in state if torch.equal(state[name], average[name])} == federate.local_keys(
            server.model, server.cfg
        )


def test_under_fedbn_batchnorm_is_not_sent(tmp_path):
    """A micro student has 40 + 8 + 37 weights and 8 statistics of 4 bytes, and a count of 8 bytes."""
    server = run(serve(tmp_path, cfg=settings(batch_norm="local")), rounds=1)
    assert server.history[-1]["bytes_up"] == 2 * (40 + 37) * 4
    plain = run(serve(tmp_path), rounds=1)
    assert plain.history[-1]["bytes_up"] == 2 * ((40 + 8 + 37 + 8) * 4 + 8)


def test_under_fedbn_a_client_that_diverged_keeps_the_batchnorm_it_had(tmp_path, monkeypatch):
    server = run(serve(tmp_path, cfg=settings(batch_norm="local")), rounds=1)
    before = server.memory[0]

    def diverge(model, *_, **__):
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        return FitResult()

    monkeypatch.setattr(train, "fit", diverge)
    list(runs.train_clients(server, [0]))
    assert equal(server.memory[0], before) and all(name.startswith("norm/") for name in before)


def test_with_group_norm_no_batchnorm_is_left_to_average(tmp_path):
    server = run(serve(tmp_path, cfg=settings(batch_norm="group")))
    assert not [name for name in server.theta if "running" in name]
    for arm, clients in (("centralised", runs.pooled(a_cohort(), torch.arange(8))), ("standalone", None)):
        clients = clients or {1: runs.clients_of(a_cohort(), PARTS)[1]}
        alone = serve(tmp_path, arm=arm, clients=clients, cfg=settings(batch_norm="group"))
        assert alone.cfg.batch_norm == "group" and not models.norm_keys(alone.model)


def test_without_a_proximal_term_nothing_is_computed_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "proximal", None)
    run(serve(tmp_path, cfg=settings(proximal=0.0)))


def test_a_strong_proximal_term_holds_the_clients_together(tmp_path):
    """Li et al. 2020, section 3.2: the larger mu, the nearer the clients stay to the global weights."""

    def moved(mu: float) -> float:
        server = serve(tmp_path, cfg=settings(proximal=mu, local_epochs=5, learning_rate=1e-3))
        ((state, *_),) = runs.train_clients(server, [1])
        names = [name for name, _ in server.model.named_parameters()]
        return sum((state[n] - server.theta[n]).square().sum() for n in names).item()

    assert moved(0.0) > moved(1.0) > moved(100.0)


def test_who_takes_part_depends_on_seed_and_round_alone(tmp_path):
    parts = [torch.tensor([k]) for k in range(10)]

    def drawn(seed: int, **more) -> list[list[int]]:
        server = serve(tmp_path, parts=parts, cfg=settings(participation=0.3, seed=seed), **more)
        found = []
        for server.round_number in range(50):
            found.append(server.participants())
        return found

    rounds = drawn(0)
    assert rounds == drawn(0, initial=an_initial(seed=3, name="fm")) != drawn(1)
    assert all(len(who) == 3 and who == sorted(set(who)) for who in rounds)
    times = collections.Counter(k for who in rounds for k in who)
    assert set(times) == set(range(10))
    # Each is drawn 50 times with p = 0.3: mean 15, standard deviation 3.2.
    assert all(abs(count - 15) < 4 * 3.2 for count in times.values())


@pytest.mark.parametrize(
    ("fraction", "number"), [(0.0, 1), (0.01, 1), (0.25, 1), (0.5, 2), (0.6, 2), (1.0, 4)]
)
def test_a_fraction_of_the_clients_takes_part_and_at_least_one(tmp_path, fraction, number):
    parts = [torch.tensor([2 * k, 2 * k + 1]) for k in range(4)]
    server = serve(tmp_path, parts=parts, cfg=settings(participation=fraction))
    assert len(server.participants()) == number
    run(server)
    assert [len(done["clients"]) for done in server.rounds] == [0, *[number] * 3]
    assert server.images_seen == 6 + 3 * number * 2
    assert server.history[-1]["bytes_up"] == 3 * number * models.num_bytes(server.theta)


def test_the_record_says_who_took_part(tmp_path):
    server = run(serve(tmp_path, cfg=settings(participation=0.5)))
    recorded = states.read_record(server.file)["rounds"]
    for number, done in enumerate(recorded[1:]):
        server.round_number = number
        assert done["clients"] == server.participants()
    assert len({tuple(done["clients"]) for done in recorded[1:]}) == 2, "both take part at some time"


def test_uniform_weights_make_every_client_count_alike(tmp_path):
    server = serve(tmp_path, cfg=settings(client_weights="uniform"))
    found = list(runs.train_clients(server, [0, 1]))
    assert [update.num_examples for update in found] == [1, 1]
    for name, value in aggregate(found).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (found[0][0][name] + found[1][0][name]) / 2)


def test_every_round_leaves_the_digest_of_its_state(tmp_path):
    _, found, server = steps(tmp_path)
    assert [done["sha256"] for done in server.rounds] == [states.state_digest(state) for state in found]
    assert states.read_record(server.file)["rounds"] == server.rounds


# ------------------------------------------------------------------------------------------ history


def test_the_history_counts_bytes_images_and_the_cost_of_the_start(tmp_path):
    server = run(serve(tmp_path, cfg=settings(local_epochs=2)))
    table = pd.DataFrame(server.history)
    weight = models.num_bytes(server.theta)
    assert table["round"].tolist() == [0, 1, 2, 3]
    assert table.images_seen.tolist() == [6, 26, 46, 66], (
        "6 for the start, then 2 epochs of 10 images a round"
    )
    assert table.bytes_up.tolist() == table.bytes_down.tolist() == [0, 2 * weight, 4 * weight, 6 * weight]
    assert table.seconds.iloc[0] == 1.5
    assert table.seconds.is_monotonic_increasing
    assert set(table.arm) == {"federated"}


def test_without_a_server_nothing_is_sent(tmp_path):
    clients = runs.clients_of(a_cohort(), PARTS)
    server = run(serve(tmp_path, clients={1: clients[1]}, arm="standalone"))
    assert {row["bytes_up"] for row in server.history} == {0}
    assert server.client == 1


@pytest.mark.parametrize(("every", "scored"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (50, [0, 3])])
def test_the_last_round_is_always_scored(tmp_path, every, scored):
    server = run(serve(tmp_path, cfg=settings(score_every=every)))
    assert [row["round"] for row in server.history] == scored


def test_standalone_clients_become_one_row_a_round(tmp_path):
    """Scores are means over the clients, costs are sums."""
    clients = runs.clients_of(a_cohort(), PARTS)
    alone = [run(serve(tmp_path, clients={k: clients[k]}, arm="standalone")) for k in clients]
    table = runs.results([run(serve(tmp_path)), *alone])
    assert len(table) == 4 + 4
    row = table[(table.arm == "standalone") & (table["round"] == 3)].iloc[0]
    last = [server.history[-1] for server in alone]
    assert row.dice == pytest.approx((last[0]["dice"] + last[1]["dice"]) / 2)
    assert row.images_seen == 2 * 6 + 3 * 3 + 3 * 7
    assert row.seconds == pytest.approx(last[0]["seconds"] + last[1]["seconds"])
    federated = table[table.arm == "federated"]
    assert federated["round"].tolist() == [0, 1, 2, 3]


def test_results_of_a_run_that_has_not_ended_are_refused(tmp_path):
    with pytest.raises(UserError, match="federated-age-random-seed0 stands at round 1 of 3"):
        runs.results([run(serve(tmp_path), rounds=1)])


# ------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_run_ends_in_the_same_bytes(tmp_path, choice, stop):
    cfg = settings(**CHOICES[choice])
    undisturbed = run(serve(tmp_path / "a", cfg=cfg))
    run(serve(tmp_path / "b", cfg=cfg), rounds=stop)
    resumed = serve(tmp_path / "b", cfg=cfg)
    assert resumed.round_number == stop
    assert len(resumed.history) == stop + 1
    run(resumed)
    assert equal(resumed.theta, undisturbed.theta)
    assert equal(states.read_state(resumed.file)[0], undisturbed.theta)
    assert resumed.rounds == undisturbed.rounds
    pd.testing.assert_frame_equal(without_seconds(resumed), without_seconds(undisturbed), check_exact=True)
    seconds = [row["seconds"] for row in resumed.history]
    assert seconds == sorted(seconds)


def test_kept_moments_go_back_to_their_own_weights(tmp_path):
    """Checkpoints hold rows, the student's convolutions are channels last: same numbers, another layout."""
    cfg = settings(optimizer_state="keep")
    running = run(serve(tmp_path, cfg=cfg), rounds=1)
    resumed = serve(tmp_path, cfg=cfg)
    assert resumed.memory.keys() == running.memory.keys() == {0, 1}
    for client, kept in resumed.memory.items():
        assert equal(running.memory[client], kept) and all(name.startswith("adam/") for name in kept)
    optimizer = train.adam(resumed.model, 1e-2)
    moments = {name.removeprefix("adam/"): value for name, value in resumed.memory[0].items()}
    federate.load_moments(optimizer, moments)
    for parameter in resumed.model.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[parameter][name].stride() == parameter.stride()


def test_a_finished_run_is_read_and_not_done_again(tmp_path, monkeypatch):
    done = run(serve(tmp_path))
    monkeypatch.setattr(train, "fit", None)
    found = run(serve(tmp_path))
    assert found.round_number == 3
    assert found.history == done.history
    assert equal(found.theta, done.theta)
    tensors, _ = states.read_state(done.file)
    assert tensors.keys() == done.theta.keys(), "the last file holds the model alone"


def damaged(whole: bytes, damage: str) -> bytes:
    return {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "one bit": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
        "text": b"<!DOCTYPE html><html></html>",
    }[damage]


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "text"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, damage):
    undisturbed = run(serve(tmp_path / "a"))
    stopped = run(serve(tmp_path), rounds=2)
    stopped.file.write_bytes(damaged(stopped.file.read_bytes(), damage))
    with pytest.warns(
        UserWarning, match="seed0.safetensors is damaged: the run continues from the checkpoint"
    ):
        again = serve(tmp_path)
    assert again.round_number == 1
    assert states.read_record(again.file)["round_number"] == 1, "the damaged file is no longer there"
    assert equal(run(again).theta, undisturbed.theta)
    assert again.rounds == undisturbed.rounds
    pd.testing.assert_frame_equal(without_seconds(again), without_seconds(undisturbed), check_exact=True)


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "text"])
def test_without_a_whole_checkpoint_a_run_begins_anew(tmp_path, damage):
    undisturbed = run(serve(tmp_path / "a"))
    stopped = run(serve(tmp_path), rounds=2)
    for file in (stopped.file, states.previous(stopped.file)):
        file.write_bytes(damaged(file.read_bytes(), damage))
    with pytest.warns(UserWarning, match="seed0.safetensors is damaged: the run begins anew"):
        again = serve(tmp_path)
    assert again.round_number == 0
    assert equal(run(again).theta, undisturbed.theta)


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    """The newest has become the one before it, and its successor is not yet in its place."""
    stopped = run(serve(tmp_path), rounds=2)
    stopped.file.replace(states.previous(stopped.file))
    assert serve(tmp_path).round_number == 2


def test_two_checkpoints_are_kept_and_at_the_end_the_final_weights_alone(tmp_path):
    server = serve(tmp_path)
    kept = []
    for _ in server.remaining_rounds():
        server.finish_round(server.theta, a_cohort(), TEST)
        files = sorted(server.file.parent.iterdir())
        kept.append([states.read_record(file)["round_number"] for file in files])
    assert kept == [[1], [2, 1], [3]]
    assert files == [server.file]


CHANGES = {
    "a setting": lambda: {"cfg": settings(learning_rate=1e-3)},
    "more rounds": lambda: {"cfg": settings(num_rounds=4)},
    "another start": lambda: {"initial": an_initial(seed=9)},
    "other images": lambda: {"cohort": dataclasses.replace(a_cohort(), fingerprint="another")},
    "other owners": lambda: {"parts": [PARTS[0], PARTS[1][:-1]]},
    "other test images": lambda: {"test": torch.tensor([10])},
    "precision": lambda: {"precision": "bfloat16"},
    "another server": lambda: {"cfg": settings(server="momentum")},
    "own BatchNorm": lambda: {"cfg": settings(batch_norm="local")},
    "nothing": lambda: {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_only_where_nothing_has_changed(tmp_path, change):
    stopped = run(serve(tmp_path), rounds=1)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        again = serve(tmp_path, **CHANGES[change]())
    assert again.file == stopped.file
    assert again.round_number == (1 if change == "nothing" else 0)


SAYS = {
    "a setting": "learning_rate 0.01, now 0.001",
    "more rounds": "num_rounds 3, now 4",
    "another start": "other weights to begin with",
    "other images": "other images",
    "other owners": "other images at the clients",
    "other test images": "other test images",
    "precision": "precision float32, now bfloat16",
    "another server": "server average, now momentum",
    "own BatchNorm": "batch_norm average, now local",
}


@pytest.mark.parametrize("change", SAYS)
def test_a_finished_run_is_moved_aside_with_a_warning_that_says_what_differs(tmp_path, change):
    done = run(serve(tmp_path))
    before = done.file.read_bytes()
    with pytest.warns(UserWarning, match="another run") as caught:
        serve(tmp_path, **CHANGES[change]())
    kept = done.file.parent / "aside" / f"{done.file.stem}.{done.fingerprint[:8]}.safetensors"
    (said,) = [str(one.message) for one in caught if "another run" in str(one.message)]
    assert said == f"{done.file} held 3 rounds of another run ({SAYS[change]}): they are kept in {kept}"
    assert kept.read_bytes() == before and not done.file.exists()
    assert list(done.file.parent.glob("*.safetensors")) == [], "no manifest takes it for a result"


def test_rounds_made_by_other_code_are_kept(tmp_path, monkeypatch):
    done = run(serve(tmp_path))
    monkeypatch.setattr(runs, "code_digest", lambda files: "edited")
    with pytest.warns(UserWarning, match=r"held 3 rounds of another run \(other code\)"):
        serve(tmp_path)
    assert resume.unlike({}, done.made_of) == ["an older version of fmfl wrote it"]


@pytest.mark.filterwarnings("ignore:.*another run:UserWarning")
def test_a_run_comes_back_from_aside_and_is_not_done_again(tmp_path, monkeypatch):
    """Two settings in turn: each is trained once, and nothing is written over."""
    first = run(serve(tmp_path))
    other = run(serve(tmp_path, cfg=settings(learning_rate=1e-3)))
    monkeypatch.setattr(train, "fit", None)
    assert equal(run(serve(tmp_path)).theta, first.theta)
    again = run(serve(tmp_path, cfg=settings(learning_rate=1e-3)))
    assert equal(again.theta, other.theta) and again.round_number == 3
    assert [file.name for file in (first.file.parent / "aside").iterdir()] == [
        f"{first.file.stem}.{first.fingerprint[:8]}.safetensors"
    ]


@pytest.mark.filterwarnings("ignore:.*another run:UserWarning")
def test_what_is_aside_is_never_written_over(tmp_path):
    """A damaged file of the same name stays, and the whole one goes beside it."""
    first = run(serve(tmp_path), rounds=2)
    kept = resume.aside(first.file, {"fingerprint": first.fingerprint})
    kept.parent.mkdir()
    kept.write_bytes(b"something else")
    serve(tmp_path, cfg=settings(learning_rate=1e-3))
    assert kept.read_bytes() == b"something else"
    beside = kept.with_name(f"{kept.stem}.1.safetensors")
    assert states.read_record(beside)["round_number"] == 2
    assert serve(tmp_path).round_number == 2, "and it goes on from there"


@pytest.mark.filterwarnings("ignore:.*(another run|damaged):UserWarning")
def test_of_a_run_whose_newest_checkpoint_is_damaged_the_one_before_is_kept(tmp_path):
    first = run(serve(tmp_path), rounds=2)
    first.file.write_bytes(b"")
    serve(tmp_path, cfg=settings(learning_rate=1e-3))
    kept = resume.aside(first.file, {"fingerprint": first.fingerprint})
    assert states.read_record(kept)["round_number"] == 1


def test_a_run_that_may_not_move_another_is_refused_and_nothing_is_touched(tmp_path):
    done = run(serve(tmp_path))
    before = done.file.read_bytes()
    with pytest.raises(UserError, match=r"holds 3 rounds made with other settings.*learning_rate 0.01, now"):
        serve(tmp_path, cfg=settings(learning_rate=1e-3), move_aside=False)
    assert done.file.read_bytes() == before and list(done.file.parent.iterdir()) == [done.file]
    assert serve(tmp_path, move_aside=False).round_number == 3


def test_which_other_arms_are_run_does_not_matter(tmp_path):
    run(serve(tmp_path), rounds=1)
    assert serve(tmp_path, cfg=settings(arms="federated", inits="random")).round_number == 1


def test_one_centralised_run_serves_all_splits(tmp_path):
    clients = runs.pooled(a_cohort(), torch.arange(8))
    run(serve(tmp_path, clients=clients, arm="centralised"), rounds=2)
    for split in ("iid", "quantity"):
        again = serve(tmp_path, clients=clients, arm="centralised", cfg=settings(split=split, num_clients=5))
        assert again.round_number == 2


def test_every_run_has_a_file_of_its_own(tmp_path):
    cohort = a_cohort()
    clients = runs.clients_of(cohort, PARTS)
    files = [
        serve(tmp_path).file,
        serve(tmp_path, initial=an_initial(name="fm")).file,
        serve(tmp_path, cfg=settings(seed=1)).file,
        serve(tmp_path, cfg=settings(split="iid")).file,
        serve(tmp_path, clients=runs.pooled(cohort, torch.arange(8)), arm="centralised").file,
        *(serve(tmp_path, clients={k: clients[k]}, arm="standalone").file for k in clients),
    ]
    assert max(collections.Counter(files).values()) == 1
    assert not any(file.exists() for file in files), "nothing is written before a round is finished"


# ------------------------------------------------------------------------------------------ the clients' ways


def by_hand(updates: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """The slow, obvious version: every pair of clients."""
    lengths = np.linalg.norm(updates, axis=1)
    pairs = [
        updates[a] @ updates[b] / lengths[a] / lengths[b]
        for a in range(len(updates))
        for b in range(len(updates))
        if a < b
    ]
    mean = np.average(updates, axis=0, weights=weights)
    return {
        "update_norm": lengths.mean(),
        "update_cosine": np.mean(pairs),
        "update_diversity": np.average(lengths**2, weights=weights) / (mean @ mean),
    }


def test_how_clients_drift_is_what_all_pairs_say():
    rng = np.random.default_rng(0)
    before, weights = rng.normal(size=12), np.array([5.0, 1.0, 2.0, 9.0])
    updates = rng.normal(size=(4, 12)) + 0.5
    start = torch.from_numpy(before)
    drift = landscape.Drift({"a": start[:8].reshape(2, 4), "b": start[8:]}, ["a", "b"])
    for update, weight in zip(updates, weights, strict=True):
        after = torch.from_numpy(before + update)
        drift.add({"a": after[:8].reshape(2, 4), "b": after[8:], "count": torch.tensor(3)}, weight)
    assert drift.measures() == pytest.approx(by_hand(updates, weights), rel=1e-4)


def test_clients_that_agree_or_are_orthogonal_have_the_known_diversity():
    for updates, cosine, diversity in ((torch.ones(3, 4), 1, 1), (torch.eye(4)[:3], 0, 3)):
        drift = landscape.Drift({"w": torch.zeros(4)}, ["w"])
        for update in updates:
            drift.add({"w": update}, 7)
        found = drift.measures()
        assert found["update_cosine"] == pytest.approx(cosine, abs=1e-6)
        assert found["update_diversity"] == pytest.approx(diversity)


@pytest.mark.parametrize("updates", [[], [1.0], [float("nan"), 1.0], [0.0, 0.0]])
def test_without_two_clients_that_have_moved_there_is_no_drift(updates):
    drift = landscape.Drift({"w": torch.zeros(2)}, ["w"])
    for update in updates:
        drift.add({"w": torch.full((2,), update)}, 1)
    assert set(drift.measures().values()) == {None}


def test_a_client_that_is_not_finite_does_not_count_in_the_drift():
    drifts = [landscape.Drift({"w": torch.zeros(2)}, ["w"]) for _ in range(2)]
    for number, values in enumerate(([1.0, 0.0], [1.0, 1.0], [float("inf"), 0.0])):
        for drift in drifts[: 1 if number == 2 else 2]:
            drift.add({"w": torch.tensor(values)}, number + 1)
    assert drifts[0].measures() == drifts[1].measures()


def test_the_rounds_tell_how_far_the_clients_and_the_global_state_have_gone(tmp_path):
    """Recomputed from the clients' states of the last round; after a stop, the rounds before it are kept."""
    server = run(serve(tmp_path), 2)
    start, before = server.initial, server.theta
    updates_ = list(landscape.watched(runs.train_clients)(server))
    names = [name for name, _ in server.model.named_parameters()]

    def flat(state):
        return torch.cat([state[name].flatten() for name in names]).double().numpy()

    updates = np.array([flat(state) - flat(before) for state, *_ in updates_])
    server.finish_round(aggregate(updates_), a_cohort(), TEST)
    (*_, last) = landscape.drift_by_round([server]).to_dict("records")
    assert (last["init"], last["split"], last["seed"], last["round"]) == ("random", "age", 0, 3)
    expected = by_hand(updates, np.array([3, 7]))
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    away = np.linalg.norm(flat(server.theta) - flat(start))
    assert last["distance_from_start"] == pytest.approx(away, rel=1e-3)
    again = landscape.drift_by_round([run(serve(tmp_path))])
    assert again.equals(landscape.drift_by_round([server])) and len(again) == 3


def test_the_other_arms_have_no_drift(tmp_path):
    alone = run(serve(tmp_path, parts=PARTS[:1], arm="standalone"))
    assert landscape.drift_by_round([alone]).empty and "distance_from_start" not in alone.rounds[-1]


# ------------------------------------------------------------------------------------------ side by side

CPU = torch.device("cpu")
FIVE = [torch.arange(0, 1), torch.arange(1, 3), torch.arange(3, 4), torch.arange(4, 9), torch.arange(9, 10)]


@pytest.mark.parametrize("choices", [{}, {"optimizer_state": "keep", "batch_norm": "local", "proximal": 0.1}])
@pytest.mark.parametrize(
    "devices",
    [[CPU, CPU], [CPU, torch.device("cpu:0"), CPU]],
    ids=["two cores", "images moved to another device"],
)
def test_clients_side_by_side_give_the_bytes_of_one_after_another(tmp_path, choices, devices):
    """Clients of unequal size over two rounds, with all that is kept between."""

    def two_rounds(name: str, devices) -> Run:
        server = serve(tmp_path / name, parts=FIVE, cfg=settings(**choices))
        for _ in range(2):
            updates = runs.train_clients(server, server.participants(), devices)
            server.finish_round(aggregate(updates), a_cohort(), TEST)
        return server

    one, many = two_rounds("one", [CPU]), two_rounds("many", devices)
    assert one.rounds == many.rounds and len(one.rounds) == 3
    assert one.images_seen == many.images_seen
    assert one.memory.keys() == many.memory.keys()
    assert all(equal(memory, many.memory[client]) for client, memory in one.memory.items())


def test_clients_side_by_side_come_in_their_order_from_as_many_threads(tmp_path, monkeypatch):
    threads, most, fit = set(), [], train.fit

    def watched(*arguments, **more):
        threads.add(threading.get_ident())
        return fit(*arguments, **more)

    monkeypatch.setattr(train, "fit", watched)
    server = serve(tmp_path, parts=FIVE, cfg=settings(client_weights="images"))
    for _, images, *_ in runs.train_clients(server, [3, 0, 4, 1], [CPU, CPU]):
        most.append(images)
    assert most == [5, 1, 1, 2]
    assert len(threads) == 2 and threading.get_ident() not in threads
    assert torch.get_num_threads() >= 1 and len(server.replicas) == 1


def test_a_client_that_fails_beside_others_stops_the_round(tmp_path, monkeypatch):
    def fail(model, examples, *arguments, **more):
        raise RuntimeError(f"no room for {len(examples)} images")

    monkeypatch.setattr(train, "fit", fail)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="no room for 1 images"):
        list(runs.train_clients(serve(tmp_path, parts=FIVE), range(5), [CPU, CPU]))
    assert torch.get_num_threads() == threads
