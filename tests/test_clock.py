"""Seconds of all arms and starts are of one clock: a CPU's own time, not what other work adds on the wall."""

import time
from threading import Thread
from types import SimpleNamespace

import torch
from torch import nn

from fmfl import losses, train
from fmfl.teacher import cached_logits


class Waiting(nn.Module):
    """A network that waits as long as a busy machine would make it wait."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        time.sleep(0.3)
        return images + self.weight


def test_a_wait_is_charged_neither_to_the_teacher_nor_to_training(tmp_path):
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    network = Waiting()
    who = SimpleNamespace(name="waiting", sha256="", size=32, adapters=False, precision="float32", noise=0,
                          device=torch.device("cpu"),
                          logits=lambda images, _: network(images.float()))  # fmt: skip
    asked = cached_logits(who, images, torch.zeros(4, 2, 4), cache=tmp_path, progress=False)
    trained = train.fit(
        network,
        train.Examples(images, images, torch.arange(4)),
        lambda logits, masks, _: losses.dice_loss(logits, masks.float()),
        epochs=1,
        batch_size=4,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        key=(0,),
        augmentation="none",
    )
    assert 0 <= asked.seconds < 0.2 and 0 <= trained.seconds < 0.2


def test_the_work_of_all_a_teachers_threads_is_charged(tmp_path):
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)

    def logits(images, boxes):
        def work():
            until = time.thread_time() + 0.3
            while time.thread_time() < until:
                pass

        helper = Thread(target=work)
        helper.start()
        helper.join()
        return images.float()

    who = SimpleNamespace(name="threads", sha256="", size=32, adapters=False, precision="float32", noise=0,
                          device=torch.device("cpu"), logits=logits)  # fmt: skip
    asked = cached_logits(who, images, torch.zeros(4, 2, 4), cache=tmp_path, progress=False)
    assert asked.seconds >= 0.3
