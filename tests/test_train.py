"""The training loop against plain PyTorch, paired batches, and the three initial states by their theorems."""

import collections
import dataclasses
import os
import threading
import time

import pytest
import torch
from torch import Tensor, nn

from fmfl import augment, devices, distill, losses, models, parallel, seeds, states, train
from fmfl.config import DistillConfig, RunConfig
from fmfl.errors import UserError
from fmfl.train import Examples

NUM, SIZE = 12, 32

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


def examples(indices=range(10), logits: bool = False, num: int = NUM) -> Examples:
    """Images with a bright rectangle as the mask; image i is recognised by the grey value i of its corner.

    With `logits` the teacher's are +6 inside the mask and -6 outside.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(20, 120, (num, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    masks = torch.zeros_like(images)
    for i in range(num):
        masks[i, :, 6 + i % 4 : 20 + i % 5, 5 + i % 3 : 24] = 1
    images[masks == 1] += 100
    images[:, 0, 0, 0] = torch.arange(num)
    chosen = torch.tensor(list(indices))
    teacher = (masks[chosen].float() * 12 - 6) if logits else None
    return Examples(images, masks, chosen, teacher)


def epoch(of: Examples, *key: int, batch_size: int = 4, augmentation: str = "none") -> list:
    return list(train.batches(of, batch_size, seeds.generator(*key), augmentation=augmentation))


def order(of: Examples, *key: int) -> list[int]:
    """In which order an epoch shows the images."""
    return [round(corner * 255) for images, *_ in epoch(of, *key) for corner in images[:, 0, 0, 0].tolist()]


def equal(one: states.State, other: states.State) -> bool:
    """Bitwise."""
    return states.state_digest(one) == states.state_digest(other)


# ------------------------------------------------------------------------------------------ batches


OTHER_NAME = torch.device("cpu", 0)
"""The CPU under a name that no tensor there has: stored on "the host", wanted on another "device"."""


def test_chosen_rows_come_to_the_device_that_asks():
    """Of the meta device one sees the shapes alone, which tell the rest."""
    stored, rows = torch.arange(12, dtype=torch.uint8).view(4, 3), torch.tensor([2, 0])
    assert train.fetch(stored, rows, stored.device).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert train.fetch(stored, rows, OTHER_NAME).tolist() == [[6, 7, 8], [0, 1, 2]]
    sent = train.fetch(stored, rows, torch.device("meta"))
    assert (sent.device.type, sent.shape, sent.dtype) == ("meta", (2, 3), torch.uint8)


DEVICES = [OTHER_NAME, pytest.param(torch.device("cuda", 0), marks=needs_gpu)]


def resident(of: Examples, device: torch.device) -> Examples:
    return Examples(*(t.to(device) for t in (of.images, of.masks, of.indices, of.teacher_logits)))


@pytest.mark.parametrize("device", DEVICES)
def test_images_on_the_host_give_the_batches_of_resident_ones(device, monkeypatch):
    """The same bit by bit, in the same layout; a batch is sent when it is due, and never more."""
    at_home = examples(range(3, 10), logits=True)
    expected = epoch(resident(at_home, device), 5, augmentation="device")
    fetch, sent = train.fetch, []

    def watched(stored, rows, to):
        sent.append((stored.device == to, len(rows)))
        return fetch(stored, rows, to)

    monkeypatch.setattr(train, "fetch", watched)
    found = epoch(dataclasses.replace(at_home, device=device), 5, augmentation="device")
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) and (a.device, a.stride()) == (b.device, b.stride())
    assert sent == [(False, 4)] * 3 + [(False, 3)] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_start_made_from_the_host_is_the_resident_one(device):
    of = examples(range(6), logits=True)
    devices.set_determinism(RunConfig(deterministic=True))
    try:
        hosted = begin("fm", of=dataclasses.replace(of, device=device))
        assert equal(hosted.state, begin("fm", of=resident(of, device)).state)
    finally:
        devices.set_determinism(RunConfig())


@pytest.mark.parametrize("device", DEVICES)
def test_predicting_from_the_host_is_predicting(device):
    of, model = examples(), models.build("micro", device=device)
    there = train.predict(model, of.images.to(device), of.indices.to(device), batch_size=3)
    assert torch.equal(train.predict(model, of.images, of.indices, batch_size=3), there)
    assert train.predict(model, of.images, of.indices[:0]).shape == (0, 1, SIZE, SIZE)


@needs_gpu
def test_a_gpu_gives_the_same_bytes_twice_where_that_is_asked_for():
    devices.set_determinism(RunConfig(deterministic=True))
    try:
        there = resident(examples(range(6), logits=True), torch.device("cuda", 0))
        assert equal(*(begin("fm", of=there).state for _ in range(2)))
    finally:
        devices.set_determinism(RunConfig())


def test_determinism_is_set_on_a_gpu_and_only_there(monkeypatch):
    """Set and unset, as the run says; a CPU's training needs no help."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    devices.set_determinism(RunConfig(device="cpu", deterministic=True))
    assert asked == [] and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    for wanted in (True, False):
        devices.set_determinism(RunConfig(device="cuda", deterministic=wanted))
    assert asked == [True, False]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(("num", "batch_size"), [(10, 4), (9, 8), (8, 4), (3, 8), (7, 1)])
def test_an_epoch_shows_every_image_once_in_batches_of_nearly_one_size(num, batch_size):
    """9 images at 8 a batch are 5 + 4: with 8 + 1 BatchNorm would see a batch of one."""
    of = examples(range(1, 1 + num))
    sizes = [len(images) for images, *_ in epoch(of, 0, batch_size=batch_size)]
    assert len(sizes) == -(-num // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert sorted(order(of, 0)) == list(range(1, 1 + num))


def test_seed_client_round_and_epoch_each_change_the_order_and_the_augmentation():
    keys = [(0, 0, 1, 0), (1, 0, 1, 0), (0, 1, 1, 0), (0, 0, 2, 0), (0, 0, 1, 1)]
    of = examples()
    assert len({tuple(order(of, *key)) for key in keys}) == len(keys)
    draws = {states.tensor_digest(augment.draw(5, seeds.generator(*key))) for key in keys}
    assert len(draws) == len(keys)


def test_the_same_key_gives_the_same_batches_bit_by_bit():
    torch.manual_seed(1)
    one = epoch(examples(logits=True), 3, 1, 2, 0, augmentation="device")
    torch.manual_seed(2)
    again = epoch(examples(logits=True), 3, 1, 2, 0, augmentation="device")
    for first, second in zip(one, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("augmentation", ["device", "none"])
def test_image_mask_and_teacher_belong_together(augmentation):
    """The teacher's logits were made from the masks, so they must still say what the moved masks say."""
    of = examples([7, 2, 9, 4, 11], logits=True)
    for images, masks, logits in epoch(of, 5, batch_size=2, augmentation=augmentation):
        assert images.shape == masks.shape == logits.shape
        assert {images.dtype, masks.dtype, logits.dtype} == {torch.float32}
        assert ((logits > 0) == masks.bool()).float().mean() > 0.97  # edges are interpolated
        inside, outside = images[masks == 1].mean(), images[masks == 0].mean()
        assert inside > outside + 0.2


def test_teacher_logits_are_by_position_and_images_by_index():
    """Row i of the logits belongs to `indices[i]`, whatever the number of stored images."""
    of = examples([7, 2, 9, 4, 11])
    of.teacher_logits = of.indices.float().view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)
    for images, _, logits in epoch(of, 5, batch_size=2):
        assert torch.equal((images[:, 0, 0, 0] * 255).round(), logits[:, 0, 0, 0])


# ------------------------------------------------------------------------------------------ the loop


def plain_training(
    model, of: Examples, loss, *, key: tuple[int, ...], epochs: int, batch_size: int, rate: float
) -> list[float]:
    """What `fit` does, written out without any of its parts but the random numbers and `augment`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    model.train()
    means = []
    for number in range(epochs):
        rng = seeds.generator(*key, number)
        shuffled, draws = torch.randperm(len(of), generator=rng), augment.draw(len(of), rng)
        total, steps = 0.0, -(-len(of) // batch_size)
        for rows, drawn in zip(shuffled.chunk(steps), draws.chunk(steps), strict=True):
            rows_of = of.indices[rows]
            images, masks, _ = augment.apply(of.images[rows_of], of.masks[rows_of], drawn)
            value = loss(model(images.to(memory_format=torch.channels_last)), masks)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item() * len(rows)
        means.append(total / len(of))
    return means


def test_the_loop_is_plain_pytorch_bit_by_bit():
    of = examples(range(8))
    expected = models.build("tiny_unet")
    means = plain_training(expected, of, losses.dice_loss, key=(0, 1, 2), epochs=2, batch_size=4, rate=1e-2)
    model = models.build("tiny_unet")
    fitted = train.fit(
        model,
        of,
        train.LOSSES["dice"],
        epochs=2,
        batch_size=4,
        optimizer=train.adam(model, 1e-2),
        key=(0, 1, 2),
    )
    assert equal(model.state_dict(), expected.state_dict())
    assert fitted.losses == pytest.approx(means, rel=1e-6)
    assert fitted.images_seen == 16
    assert fitted.seconds > 0


@pytest.mark.parametrize("mu", [0.3, 2.0])
def test_the_gradient_of_the_proximal_term_is_mu_times_the_way_gone(mu):
    """d/dw mu/2 ||w - w_0||^2 = mu (w - w_0), on top of the loss's own gradient."""
    images, masks, _ = epoch(examples())[0]
    found = []
    for strength in (0.0, mu):
        model = models.build("micro")
        held = train.proximal(train.LOSSES["dice"], model, strength)
        begun = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += 0.01 * (number + 1)
        value = held(model(images), masks, None)
        value.backward()
        found.append((value.item(), [parameter.grad for parameter in model.parameters()]))
    way = [0.01 * (number + 1) * torch.ones_like(weight) for number, weight in enumerate(begun)]
    for plain, held, gone in zip(found[0][1], found[1][1], way, strict=True):
        torch.testing.assert_close(held, plain + mu * gone, rtol=1e-4, atol=1e-6)
    energy = mu / 2 * sum(gone.square().sum().item() for gone in way)
    assert found[1][0] - found[0][0] == pytest.approx(energy, rel=1e-3)


def test_the_mean_loss_weights_batches_by_their_images():
    """5 images in batches of 2, 2 and 1: losses 1, 0 and 0 have the mean 2/5, not 1/3."""
    values = iter([1.0, 0.0, 0.0])
    model = torch.nn.Conv2d(1, 1, 1)
    fitted = train.fit(
        model,
        examples(range(5)),
        lambda logits, *_: logits.sum() * 0 + next(values),
        epochs=1,
        batch_size=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        key=(0,),
    )
    assert fitted.losses == pytest.approx([0.4])


def test_the_loss_with_cross_entropy_is_the_sum_of_both():
    logits, masks = torch.randn(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    both = train.LOSSES["dice_bce"](logits, masks, None)
    entropy = -logits.sigmoid().log().mean()
    torch.testing.assert_close(both, train.LOSSES["dice"](logits, masks, None) + entropy)


def test_predicting_is_in_the_order_asked_for_and_changes_nothing():
    of = examples()
    model = models.build("micro")
    before = states.state_digest(model.state_dict())
    together = train.predict(model, of.images, torch.tensor([5, 1, 8]))
    one_by_one = [train.predict(model, of.images, torch.tensor([i])) for i in (5, 1, 8)]
    torch.testing.assert_close(together, torch.cat(one_by_one))
    torch.testing.assert_close(
        train.predict(model, of.images, torch.tensor([5, 1, 8]), batch_size=2), together
    )
    assert states.state_digest(model.state_dict()) == before, "BatchNorm's statistics stay"
    assert train.predict(model, of.images, torch.tensor([], dtype=torch.int64)).shape == (0, 1, SIZE, SIZE)


def test_bfloat16_is_used_where_it_is_asked_for():
    of, model = examples(), models.build("micro")
    exact, rounded = (
        train.predict(model, of.images, of.indices[:2], precision=p) for p in ("float32", "bfloat16")
    )
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert torch.equal(exact, train.predict(model, of.images, of.indices[:2], precision="auto")), (
        "not on a CPU"
    )


def test_no_gpu_is_made_to_emulate_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert devices.precision_of(RunConfig(device="cuda")) == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert devices.precision_of(RunConfig(device="cuda")) == "bfloat16"


def test_float32_is_not_shortened_on_a_gpu():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_the_device_is_as_named():
    assert devices.device_of(RunConfig(device="cpu")) == torch.device("cpu")
    assert (devices.device_of(RunConfig()).type == "cuda") == torch.cuda.is_available()


# ------------------------------------------------------------------------------------------ initial states

CFG = DistillConfig(student="micro", proxy_epochs=2)


def begin(name: str, cfg: DistillConfig = CFG, of: Examples | None = None, seed: int = 0, **more):
    return distill.initial_state(
        name, of or examples(range(6), logits=True), cfg, batch_size=3, seed=seed, **more
    )


def test_random_is_the_untrained_student():
    start = begin("random")
    assert equal(start.state, models.build("micro", seed=0).state_dict())
    assert (start.fit.losses, start.fit.images_seen) == ([], 0)


def test_pretraining_is_eq_5_without_the_teacher():
    """alpha = 0, to the last bit: as `fm` with that alpha, and in a loop that still asks the teacher."""
    cfg = DistillConfig(student="tiny_unet", proxy_epochs=2)
    pretrained = begin("pretraining", cfg)
    assert equal(
        begin("fm", DistillConfig(student="tiny_unet", proxy_epochs=2, alpha=0.0)).state, pretrained.state
    )
    of, model = examples(range(6), logits=True), models.build("tiny_unet")
    train.fit(
        model,
        of,
        lambda logits, masks, teacher: losses.distillation_loss(logits, teacher, masks, alpha=0.0),
        epochs=2,
        batch_size=3,
        optimizer=train.adam(model, CFG.proxy_learning_rate),
        key=(0, seeds.PROXY),
    )
    assert equal(model.state_dict(), pretrained.state)
    assert pretrained.fit.images_seen == 12
    assert not equal(pretrained.state, begin("random", cfg).state)


def test_fm_listens_to_the_teacher_and_to_the_temperature():
    pretrained, taught = begin("pretraining"), begin("fm")
    contrary = examples(range(6), logits=True)
    contrary.teacher_logits = -contrary.teacher_logits
    softened = begin("fm", DistillConfig(student="micro", proxy_epochs=2, temperature=3.0))
    found = [pretrained, taught, begin("fm", of=contrary), softened, begin("fm", seed=1)]
    assert len({states.state_digest(start.state) for start in found}) == len(found)


@pytest.fixture
def trained(monkeypatch) -> collections.Counter:
    """Counts how often anything is trained."""
    calls: collections.Counter = collections.Counter()
    fit = train.fit

    def counted(*args, **settings):
        calls["fit"] += 1
        return fit(*args, **settings)

    monkeypatch.setattr(train, "fit", counted)
    return calls


def test_an_initial_state_is_made_once_and_then_read(tmp_path, trained):
    made = begin("fm", file=tmp_path / "fm.safetensors", teacher_key="t")
    found = begin("fm", file=tmp_path / "fm.safetensors", teacher_key="t")
    assert trained["fit"] == 1
    assert (made.reused, found.reused) == (False, True)
    assert equal(made.state, found.state)
    assert found.fit == made.fit, "the cost of making it is remembered"


def test_only_the_start_that_asks_the_teacher_pays_for_it(tmp_path):
    """And it pays once: read from its file, it has cost what it has cost."""
    costs = {}
    for name in ("random", "pretraining", "fm"):
        for _ in range(2):
            start = begin(name, file=tmp_path / f"{name}.safetensors", teacher_seconds=1000.0)
            costs.setdefault(name, []).append(start.fit.seconds)
    assert costs["random"][0] < costs["pretraining"][0] < 1000 < costs["fm"][0] < 2000
    assert all(first == again for first, again in costs.values())


@pytest.mark.parametrize("change", ["teacher", "alpha", "epochs", "seed", "images", "damage", "norm"])
def test_an_initial_state_is_made_anew_when_anything_it_depends_on_changes(tmp_path, trained, change):
    file = tmp_path / "fm.safetensors"
    begin("fm", file=file, teacher_key="t")
    cfg, of, seed, teacher_key = CFG, examples(range(6), logits=True), 0, "t"
    if change == "teacher":
        teacher_key = "another"
    elif change == "alpha":
        cfg = DistillConfig(student="micro", proxy_epochs=2, alpha=0.5)
    elif change == "epochs":
        cfg = DistillConfig(student="micro", proxy_epochs=1)
    elif change == "seed":
        seed = 1
    elif change == "images":
        of.images[3, 0, 9, 9] ^= 1
    elif change == "damage":
        file.write_bytes(file.read_bytes()[:-1])
    norm = "group" if change == "norm" else "local"  # which is no other student than with "average"
    start = begin("fm", cfg, of, seed, file=file, teacher_key=teacher_key, batch_norm=norm)
    assert trained["fit"] == 2
    assert not start.reused


def test_a_start_serves_both_ways_of_averaging_batchnorm_and_group_norm_has_its_own(tmp_path, trained):
    file = tmp_path / "pretraining.safetensors"
    begin("pretraining", file=file, batch_norm="average")
    assert begin("pretraining", file=file, batch_norm="local").reused
    start = begin("pretraining", file=file, batch_norm="group")
    assert trained["fit"] == 2
    assert start.state.keys() == models.build("micro", batch_norm="group").state_dict().keys()
    assert not any("running" in name for name in start.state)


def test_pretraining_does_not_depend_on_the_teacher(tmp_path, trained):
    """Another teacher or alpha changes `fm` alone."""
    file = tmp_path / "pretraining.safetensors"
    begin("pretraining", file=file, teacher_key="t")
    cfg = DistillConfig(student="micro", proxy_epochs=2, alpha=0.9)
    assert begin("pretraining", cfg, file=file, teacher_key="another").reused
    assert trained["fit"] == 1


def test_no_real_client_shares_the_proxy_sets_random_numbers():
    of = examples()
    assert order(of, 0, seeds.PROXY, 1) != order(of, 0, 0, 1)


def test_training_makes_the_student_better():
    """Few steps on easy rectangles: the loss falls by more than a tenth."""
    cfg = DistillConfig(student="micro", proxy_epochs=8, proxy_learning_rate=1e-2)
    fitted = begin("fm", cfg).fit
    assert fitted.losses[-1] < 0.9 * fitted.losses[0]


def test_logits_in_half_precision_are_taken(tmp_path):
    """As they come from the cache."""
    of: Examples = examples(range(6), logits=True)
    assert isinstance(of.teacher_logits, Tensor)
    expected = begin("fm", of=of).state
    of.teacher_logits = of.teacher_logits.half()  # 6 and -6 are exact
    assert equal(begin("fm", of=of).state, expected)


# ------------------------------------------------------------------------------------------ the teacher


def test_fresh_views_ask_the_teacher_about_what_the_student_sees():
    """A teacher that repeats its picture: each batch's logits are the batch's own pixels."""
    seen = []

    def ask(images, masks):
        assert images.dtype == torch.uint8 and masks.shape == images.shape
        seen.append(len(images))
        return images.float()

    plain = examples()
    fresh = Examples(plain.images, plain.masks, plain.indices, ask=ask)
    for images, _, logits in train.batches(fresh, 4, seeds.generator(0)):
        torch.testing.assert_close(logits / 255, images, atol=0.51 / 255, rtol=0)
    assert sum(seen) == len(plain)


def test_hard_labels_look_at_the_teachers_mask_alone():
    """Logits of another size but the same sign teach the same."""
    soft = examples(logits=True)
    larger = Examples(soft.images, soft.masks, soft.indices, 7 * soft.teacher_logits)
    made = {}
    for labels in ("soft", "hard"):
        cfg = DistillConfig(student="micro", alpha=1.0, proxy_epochs=1, teacher_labels=labels)
        made[labels] = [
            states.state_digest(
                distill.initial_state("fm", given, cfg, batch_size=4, seed=0, augmentation="none").state
            )
            for given in (soft, larger)
        ]
    assert made["hard"][0] == made["hard"][1] != made["soft"][0] != made["soft"][1]


def test_predicted_masks_come_from_a_student_that_has_not_seen_the_patient(monkeypatch):
    """Who learned from an image never answers for it, and two images of one patient stay together."""
    plain = examples()
    patients = [f"p{i // 2}" for i in range(len(plain))]
    learned, answered = [], []
    fit, predict = train.fit, train.predict

    def watched_fit(model, given, *arguments, **options):
        learned.append((model, set(given.indices.tolist())))
        return fit(model, given, *arguments, **options)

    def watched_predict(model, images, indices, **options):
        answered.append((model, set(indices.tolist())))
        return predict(model, images, indices, **options)

    monkeypatch.setattr(train, "fit", watched_fit)
    monkeypatch.setattr(train, "predict", watched_predict)
    cfg = DistillConfig(student="micro", proxy_epochs=1)
    masks, seconds = distill.predicted_masks(plain, patients, cfg, batch_size=4, seed=0)
    assert masks.shape == (len(plain), 1, *plain.images.shape[2:]) and masks.dtype == torch.uint8
    assert seconds > 0
    for model, taught in learned:
        (asked,) = [indices for other, indices in answered if other is model]
        assert not {patients[i] for i in taught} & {patients[i] for i in asked}
    assert sorted(i for _, indices in answered for i in indices) == plain.indices.tolist()
    with pytest.raises(UserError, match="two patients"):
        distill.predicted_masks(plain, ["one"] * len(plain), cfg, batch_size=4, seed=0)


def test_the_last_run_has_the_cores_of_those_that_have_ended(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    cpu, together, seen = torch.device("cpu"), threading.Barrier(2), {}

    def beside_another(number: int) -> None:
        together.wait(10)
        seen[number] = len(parallel.places(cpu))
        together.wait(10)

    parallel.side_by_side(beside_another, [0, 1], cpu)
    assert seen == {0: 1, 1: 1}

    def last(number: int) -> None:
        if number:
            time.sleep(0.3)
            seen["last"] = len(parallel.places(cpu))

    parallel.side_by_side(last, [0, 1], cpu)
    assert seen["last"] == 2
    assert len(parallel.places(cpu)) == 2, "outside, a run has all cores"


def test_predictions_are_the_same_whatever_the_number_of_cores():
    model = models.build("tiny_unet")
    images = torch.randint(0, 255, (40, 1, 64, 64), dtype=torch.uint8)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(train.predict(model, images, torch.arange(40)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0].shape == images.shape and not found[0].requires_grad
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ------------------------------------------------------------------------------------------ few masks


def test_passes_show_as_many_images_however_few_there_are():
    assert [distill.epochs_for_equal_steps(15, 40, number) for number in (40, 20, 10, 7)] == [15, 30, 60, 86]
    assert abs(distill.epochs_for_equal_steps(15, 40, 7) * 7 - 15 * 40) < 7


def test_predicted_masks_from_some_masks_look_at_no_others(monkeypatch):
    """The unknown masks may hold anything; the known ones come back as they are."""
    plain, cfg = examples(), DistillConfig(student="micro", proxy_epochs=2)
    patients = [f"p{k}" for k in range(len(plain))]
    known = torch.arange(len(plain)) < 4
    given = dict(batch_size=4, seed=0, known=known)
    masks, seconds = distill.predicted_masks(plain, patients, cfg, **given)
    spoiled = dataclasses.replace(plain, masks=plain.masks.clone())
    spoiled.masks[spoiled.indices[~known]] = 7
    again, _ = distill.predicted_masks(spoiled, patients, cfg, **given)
    assert torch.equal(masks, again) and seconds > 0
    assert torch.equal(masks[known], plain.masks[plain.indices[known]])
    with pytest.raises(UserError, match="needs proxy images with masks"):
        distill.predicted_masks(plain, patients, cfg, **given | {"known": torch.zeros_like(known)})


def test_starts_from_files_are_the_files_and_made_anew_when_these_change(tmp_path):
    file, kept = tmp_path / "given.safetensors", tmp_path / "init.safetensors"
    cfg = DistillConfig(student="micro", init_file=str(file))

    def begin() -> distill.InitialState:
        return distill.initial_state("file", examples(), cfg, batch_size=4, seed=0, file=kept)

    for seed in (1, 2):
        given = models.build("micro", seed=seed).state_dict()
        states.write_state(file, given)
        found = begin()
        assert equal(found.state, given) and not found.reused
        assert found.fit.images_seen == 0 and begin().reused
    with pytest.raises(UserError, match="start 'imagenet' needs a file of weights, but none is named"):
        distill.initial_state("imagenet", examples(), cfg, batch_size=4, seed=0)
    file.unlink()
    with pytest.raises(
        UserError, match=r"start 'file' .*given\.safetensors is not there: set init_file to one"
    ):
        begin()
