"""Recorded steps: one code with and without a recording, and memory that stays where a recording needs it.

A CUDA graph reads and writes the addresses that it was recorded with. A CPU has no graphs: there a recording
is stood in for by the call itself, which checks at each replay that every address is still the same.
"""

import contextlib
import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import measure
from fmfl import capture, data, distill, federate, losses, models, runs, seeds, states, train
from fmfl.config import DistillConfig, FederateConfig
from fmfl.train import Examples

SIZE = 32
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _micro_student(monkeypatch):
    """A student of one BatchNorm and two convolutions, so that a step costs a millisecond."""
    monkeypatch.setitem(
        models.STUDENTS,
        "micro",
        lambda: torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 1, 1),
        ),
    )


def a_cohort(number: int = 24, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Images of noise and masks of discs."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 1, SIZE, SIZE), dtype=torch.uint8, generator=rng)
    masks = (torch.rand(number, 1, SIZE, SIZE, generator=rng) > 0.7).to(torch.uint8)
    return images.to(device), masks.to(device)


def addresses(model: torch.nn.Module, resident: capture.Resident, *more: torch.Tensor) -> list[int]:
    """Memory that a recording of the model's step holds."""
    kept = resident.kept.values()
    moments = [
        value
        for optimizer in kept
        if isinstance(optimizer, torch.optim.Optimizer)
        for state in optimizer.state.values()
        for value in state.values()
    ]
    anchors = [value for term in kept if isinstance(term, train.Proximal) for value in term.begun]
    tensors = [*model.parameters(), *model.buffers(), *moments, *anchors, *more]
    return [value.data_ptr() for value in tensors]


@pytest.fixture
def recordings(monkeypatch):
    """Let steps be recorded on the CPU; the list has the batch size of each recording."""
    made = []

    def record(function, buffers, resident):
        # Held weakly, as a graph holds memory and no model.
        model = weakref.proxy(next(model for model, own in capture._residents.items() if own is resident))
        resident = weakref.proxy(resident)
        before = addresses(model, resident, *buffers)
        made.append(len(buffers[0]))

        def replay():
            assert addresses(model, resident, *buffers) == before, (
                "a recording would write to memory that has moved"
            )
            return function(*buffers)

        return replay

    monkeypatch.setattr(capture, "usable", lambda device: True)
    monkeypatch.setattr(capture, "record", record)
    return made


def rounds(cfg: FederateConfig, sizes: list[int], number: int = 3, student: str = "micro") -> states.State:
    """Train clients of these sizes in turn, some rounds of Eq. 2 and 3, and return the global state."""
    images, masks = a_cohort(sum(sizes))
    clients = [Examples(images, masks, part) for part in torch.arange(sum(sizes)).split(sizes)]
    model = models.build(student, batch_norm=cfg.batch_norm)
    theta, memory = models.copy_state(model), {}
    for turn in range(1, number + 1):
        updates = []
        for k, examples in enumerate(clients):
            update = federate.train_client(
                model, theta, examples, cfg, key=(0, k, turn), memory=memory.get(k)
            )
            memory[k] = update.memory
            updates.append(update)
        theta = federate.aggregate(updates)
    return theta


CASES = {
    "plain": {},
    "kept moments": {"optimizer_state": "keep"},
    "proximal": {"proximal": 0.5},
    "own BatchNorm": {"batch_norm": "local", "optimizer_state": "keep"},
    "cross-entropy": {"loss": "dice_bce"},
}


@pytest.mark.parametrize("changed", CASES.values(), ids=CASES)
def test_rounds_of_recorded_steps_give_the_bytes_of_plain_ones(recordings, monkeypatch, changed):
    cfg = FederateConfig(batch_size=4, local_epochs=3, **changed)
    recorded = rounds(cfg, [12, 9, 3])
    # 12 in fours; 9 in threes; 3 at once.
    assert sorted(recordings) == [3, 4], "one recording a batch size, over all clients and rounds"
    monkeypatch.setattr(capture, "usable", lambda device: False)
    plain = rounds(cfg, [12, 9, 3])
    assert states.state_digest(recorded) == states.state_digest(plain)


def test_another_learning_rate_is_recorded_anew(recordings):
    images, masks = a_cohort(8)
    model = models.build("micro")
    examples = Examples(images, masks, torch.arange(8))
    theta, cfg = models.copy_state(model), FederateConfig(batch_size=2, local_epochs=2)
    for rate in (1e-3, 1e-3, 1e-2):
        federate.train_client(model, theta, examples, replace(cfg, learning_rate=rate), key=(0, 0, 1))
    assert recordings == [2, 2]


def test_distillation_is_recorded_with_its_teacher(recordings, monkeypatch):
    images, masks = a_cohort(12)
    logits = torch.randn(12, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    proxy = Examples(images, masks, torch.arange(12), teacher_logits=logits)
    begin = partial(
        distill.initial_state,
        proxy=proxy,
        cfg=DistillConfig(student="micro", proxy_epochs=4),
        batch_size=4,
        seed=0,
    )
    recorded = {name: begin(name) for name in ("pretraining", "fm")}
    assert recordings == [4, 4], "one model a start"
    monkeypatch.setattr(capture, "usable", lambda device: False)
    for name, start in recorded.items():
        plain = begin(name)
        assert states.state_digest(start.state) == states.state_digest(plain.state)
        assert start.fit.losses == plain.fit.losses


def test_a_teacher_that_is_asked_and_images_elsewhere_are_not_recorded(recordings):
    images, masks = a_cohort(8)
    asked = Examples(images, masks, torch.arange(8), ask=lambda images, masks: masks - 0.5)
    for examples, augmentation in (
        (asked, "device"),
        (Examples(images, masks, torch.arange(8)), "albumentations"),
    ):
        model = models.build("micro")
        train.fit(
            model,
            examples,
            lambda logits, masks, _: losses.dice_loss(logits, masks),
            epochs=5,
            batch_size=4,
            optimizer=train.adam(model, 1e-3),
            key=(0,),
            augmentation=augmentation,
        )
    assert recordings == []


def test_the_first_steps_run_as_they_are_and_buffers_stay():
    seen, made = [], []

    def function(value):
        seen.append(value.data_ptr())
        return 2 * value

    def record(function, buffers):
        made.append(len(seen))
        return partial(function, *buffers)

    step = capture.Step(function, (torch.zeros(3),), record)
    for number in range(6):
        assert step(torch.full((3,), float(number))).tolist() == [2.0 * number] * 3
    assert made == [capture.EAGER_STEPS] and len(set(seen)) == 1


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once():
    """Recording fails here for want of a GPU, where there is one for want of a recordable function."""
    resident = capture.Resident(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    numbers = torch.arange(3.0, device="cuda" if torch.cuda.is_available() else "cpu")
    parts, warned = ("a step",), []
    for _ in range(capture.EAGER_STEPS + 3):
        with pytest.warns() if len(warned) == capture.EAGER_STEPS else _no_warning() as given:
            result = resident.step(parts, lambda value: value * value.sum().item(), numbers)
        warned.append(len(given or ()))
        assert result.tolist() == [0.0, 3.0, 6.0]
    assert warned == [0, 0, 0, 1, 0, 0]


def test_a_model_whose_step_cannot_be_recorded_is_not_tried_again_for_another_batch_size():
    """An attempt waits for the device; and after a broken one PyTorch's memory pool takes no other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    resident = capture.Resident(torch.device(device))

    def steps(size: int) -> None:
        for _ in range(capture.EAGER_STEPS + 2):
            ones = torch.ones(size, device=device)
            assert resident.step(("a step",), lambda x: x * x.sum().item(), ones).tolist() == [size] * size

    with pytest.warns() as given:
        steps(3)
    assert len(given) == 1
    with _no_warning():
        steps(4)


def test_the_sentence_has_the_first_error_not_that_of_the_broken_recording(monkeypatch):
    """CUDA's end of a recording that has failed raises an error of its own, which names no cause."""

    class Broken:
        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Broken)

    def function(value):
        raise RuntimeError("this operation waits for the device\nhint: none")

    with pytest.warns(UserWarning, match=r"this operation waits for the device\)$"):
        capture.record(function, [torch.zeros(1)], capture.Resident(CPU))


def test_work_after_a_training_that_was_interrupted_waits_for_its_steps(monkeypatch):
    """After Ctrl-C a notebook loads weights while replays are still queued on the model's stream."""
    order = []

    class Stream:
        device = torch.device("cuda")

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            order.append((self.name, other.name))

    resident = capture.Resident(CPU)
    resident.stream, outside = Stream("own"), Stream("outside")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: outside)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with pytest.raises(KeyboardInterrupt), resident.own_stream():
        raise KeyboardInterrupt
    assert order == [("own", "outside"), ("outside", "own")]


class _no_warning:
    """A context in which a warning is an error."""

    def __enter__(self):
        import warnings

        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("error")

    def __exit__(self, *error):
        self.caught.__exit__(*error)


def test_recordings_are_few_and_the_oldest_goes():
    resident = capture.Resident(CPU)
    for number in range(capture.MAX_RECORDINGS + 4):
        resident.step(("one",), lambda value: value, torch.zeros(number + 1))
    assert [key[-1] for key in resident.steps] == [
        (number,) for number in range(5, capture.MAX_RECORDINGS + 5)
    ]


def test_what_stays_beside_a_model_goes_with_it(recordings):
    model = models.build("micro")
    images, masks = a_cohort(8)
    federate.train_client(
        model,
        models.copy_state(model),
        Examples(images, masks, torch.arange(8)),
        FederateConfig(batch_size=2, local_epochs=2, proximal=0.1),
        key=(0, 0, 1),
    )
    assert recordings == [2]
    # Without the garbage collector, which does not know that a GPU's memory is short.
    gone = [weakref.ref(model), weakref.ref(capture.resident(model, CPU))]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_a_run_that_has_ended_gives_its_recordings_back(recordings, tmp_path):
    """A study trains run after run: what each keeps for its recordings would add up."""
    cohort = data.load("phantom", size=SIZE, num_phantoms=20, cache=None, progress=False)
    cfg = FederateConfig(batch_size=2, local_epochs=1, num_rounds=2)
    run = measure.a_run(tmp_path, cohort, list(torch.arange(16).split(8)), cfg, "micro", "float32")
    residents, train_again = [], []
    for _ in run.remaining_rounds():
        updates = list(runs.train_clients(run, devices=[CPU]))
        residents.append(weakref.ref(capture.resident(run.model, CPU)))
        train_again.append(len(recordings))
        run.finish_round(federate.aggregate(updates), cohort, torch.arange(16, 20))
    assert train_again == [1, 1], "the recording of the first round serves the second"
    gc.collect()
    assert residents[0]() is residents[1]() is None
    assert all(weight.grad is None for weight in run.model.parameters())
    assert run.per_image(cohort, torch.arange(16, 20)).dice.between(0, 1).all(), "the model still answers"


def test_a_broken_recording_is_left_with_its_stream_and_its_pool(monkeypatch):
    """Older PyTorch stays in both; a newer one says that it has left the pool."""

    class Stream:
        device, device_index = torch.device("cuda", 0), 0

    class Broken:
        def __init__(self, *arguments, **options):
            raise RuntimeError("no recording here")

    left = []

    def end(device, pool):
        left.append((device, pool))
        raise RuntimeError("beginAllocateToPool was not called")

    resident, outside = capture.Resident(CPU), Stream()
    resident.stream, resident.pool = Stream(), (0, 7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: outside)
    monkeypatch.setattr(torch.cuda, "set_stream", left.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    with pytest.warns(UserWarning, match="no recording here"):
        capture.record(lambda value: value, [torch.zeros(1)], resident)
    assert left == [outside, (0, (0, 7))] and not resident.recordable


@needs_gpu
@pytest.mark.parametrize("student", ["tiny_unet", "resnet18_unet", "unet"])
def test_a_graph_gives_the_bytes_of_launches_one_by_one(monkeypatch, student):
    """The same training on a GPU with every step launched, and with steps replayed."""
    images, masks = a_cohort(24, "cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        digests = []
        for eager in (capture.EAGER_STEPS, 10**9):
            monkeypatch.setattr(capture, "EAGER_STEPS", eager)
            model = models.build(student, device="cuda")
            examples = Examples(images, masks, torch.arange(24, device="cuda"))
            for turn in (1, 2):
                update = federate.train_client(
                    model,
                    models.copy_state(models.build(student, device="cuda")),
                    examples,
                    FederateConfig(batch_size=4, local_epochs=3),
                    key=(seeds.POOLED, 0, turn),
                    precision="bfloat16",
                )
            digests.append(states.state_digest(update.state))
            assert capture.resident(model, CPU).recordable
            made = [step.replay is not None for step in capture.resident(model, CPU).steps.values()]
            assert made == [eager < 10**9]
        assert digests[0] == digests[1]
    finally:
        torch.use_deterministic_algorithms(False)
