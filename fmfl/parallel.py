"""Independent trainings side by side, on the cores of a CPU and on several GPUs."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

#: Set while trainings that run side by side shall end at their next epoch.
interrupted = threading.Event()


def side_by_side(task: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """Run independent trainings at once: on a CPU one a core, each on a single thread; else one by one.

    A small network's layers are too short to be worth dividing: two trainings beside each other took 0.5 to
    0.7 of the time of one after the other on both cores (`python -m bench threads`). A single thread also
    adds in one order only, so the same seed gives the same bytes whatever the number of cores.

    Args:
        task: called once for each item; it must not use the global random state.
        items: what to train.
        device: where the tensors are.

    Returns:
        The tasks' results, in the items' order.

    Raises:
        Exception: the first one that a task raised; the others end at their next epoch.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:  # one core, or beside another training already
        return [task(item) for item in items]
    items = list(items)
    left = CoreBudget(cores, len(items))

    def counted(item: T) -> R:
        try:
            return task(item)
        finally:
            left.end_one()

    with one_thread(device), left:
        try:
            with ThreadPoolExecutor(cores) as pool:
                running = [pool.submit(counted, item) for item in items]
                try:
                    return [future.result() for future in running]
                except BaseException:  # Ctrl-C as well
                    interrupted.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            interrupted.clear()


class CoreBudget:
    """Count of the trainings that still run side by side, so that the last ones may use idle cores."""

    now: "CoreBudget | None" = None

    def __init__(self, cores: int, trainings: int) -> None:
        self.cores, self.trainings, self.lock = cores, trainings, threading.Lock()

    def __enter__(self) -> None:
        CoreBudget.now = self

    def __exit__(self, *error: object) -> None:
        CoreBudget.now = None

    def end_one(self) -> None:
        """Count a training that has ended."""
        with self.lock:
            self.trainings -= 1

    def cores_each(self) -> int:
        """Return the cores for each training that still runs."""
        return max(1, self.cores // max(1, self.trainings))


def ordered_map(task: Callable[[T, int], R], items: Sequence[T], where: Sequence[int]) -> Iterator[R]:
    """Yield task(item, place) in the items' order; places work side by side, each on one item at a time.

    At most two results a place wait to be taken. With one place nothing runs ahead, and no thread is started.

    Args:
        task: called once for each item, on its place's own thread.
        where: each item's place, numbered from 0.
    """
    if len(set(where)) < 2:
        yield from map(task, items, where)
        return
    with contextlib.ExitStack() as stack:
        pools = {place: stack.enter_context(ThreadPoolExecutor(1)) for place in sorted(set(where))}
        waiting: deque[Future[R]] = deque()
        try:
            for item, place in zip(items, where, strict=True):
                waiting.append(pools[place].submit(task, item, place))
                if len(waiting) == 2 * len(pools):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # Ctrl-C, and a round that is given up
            for future in waiting:
                future.cancel()


def places(device: torch.device) -> list[torch.device]:
    """List the places where the clients of one run can train side by side: cores of a CPU, or every GPU.

    Beside other runs (`side_by_side`) a run has one core, and more when fewer runs than cores are left.
    """
    if device.type == "cpu":
        return [device] * (CoreBudget.now.cores_each() if CoreBudget.now else torch.get_num_threads())
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        first = device.index or 0
        number = torch.cuda.device_count()
        return [device, *(torch.device("cuda", (first + k) % number) for k in range(1, number))]
    return [device]


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU let every operation run on a single thread: it adds in one order, so it gives one result."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
