"""Locks that let several processes, on one machine or on machines that see one folder, share a study.

They are the operating system's and end with the process that holds them, so what a dead one held is free.
"""

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fmfl.errors import UserError
from fmfl.study import outputs
from fmfl.study.cells import Cell

#: Folders of a study in which its files are written.
OWN_FOLDERS = ("cells", "figures", "notebooks", "weights")

#: Names that `states.write_bytes` gives to files that it has not finished: hidden, with the process's number.
UNFINISHED = re.compile(r"\..+\.(csv|json|html|ipynb|png|safetensors)\.\d+")


class CellLocks:
    """Locks on the cells that this process has taken.

    One lock, the gate, is held for a moment by whoever takes or gives back a cell. Each cell taken has a lock
    of its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "claims"
        self.locks: dict[str, FileLock] = {}

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Keep the study's other processes out."""
        self.folder.mkdir(exist_ok=True)
        try:
            with FileLock(self.folder / "gate.lock"):
                self.folder.mkdir(exist_ok=True)
                yield
        except NotImplementedError:
            raise UserError(
                f"--out {self.root} lies where files cannot be locked: name a folder of another file system"
            ) from None

    def take(self, cells: Iterable[Cell], is_done: Callable[[Cell], bool]) -> Cell | None:
        """Take the first cell that no process holds and that is not done; None if there is none."""
        with self.gate():
            for cell in cells:
                lock = FileLock(self.folder / f"{cell.key.replace('/', '~')}.lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                if not is_done(cell):
                    self.locks[cell.key] = lock
                    return cell
                self._unlock(lock)
        return None

    def release(self, cell: Cell) -> None:
        """Give a cell back."""
        with self.gate():
            self._unlock(self.locks.pop(cell.key))

    @staticmethod
    def _unlock(lock: FileLock) -> None:
        # Behind the gate no other process can be opening the file that goes.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

    def held(self) -> Iterator[Path]:
        """Yield the locks that living processes hold."""
        for file in self.folder.glob("*.lock"):
            if file.name != "gate.lock":
                try:
                    with FileLock(file).acquire(timeout=0):
                        pass
                except Timeout:
                    yield file

    def sweep(self) -> None:
        """Remove the files that killed processes were writing, unless another process is at work."""
        if any(_unfinished(self.root)):
            with self.gate():
                if not any(self.held()):
                    for file in _unfinished(self.root):
                        file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder of locks once all cells are done, unless other processes have more to do."""
        if not any(self.held()):
            shutil.rmtree(self.folder, ignore_errors=True)


def _unfinished(root: Path) -> Iterator[Path]:
    places = [root.glob(".*")]
    for folder in (root, *(root / outputs.VARY).glob("*")):
        places += [(folder / part).rglob(".*") for part in OWN_FOLDERS]
    return (file for file in itertools.chain(*places) if UNFINISHED.fullmatch(file.name) and file.is_file())
