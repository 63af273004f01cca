"""Progress of a study: what is done counts in estimated seconds, and the time left follows the machine."""

import pytest

from fmfl import config, states
from fmfl.study import grid, progress
from fmfl.study.cost import Cost
from fmfl.study.progress import Watch


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def checkpoints(monkeypatch):
    """The last finished round of each run, by the name of its file."""
    rounds = {}
    monkeypatch.setattr(states, "read_record", lambda file: {"round_number": rounds.get(file.stem, 0)})
    return rounds


@pytest.fixture
def cells(tmp_path):
    """Four cells: 01, 02, 03, then two runs of ten rounds, and 05."""
    cfg = config.settings({"run_name": tmp_path, "inits": "random,fm", "num_rounds": 10, "arms": "federated"})
    return grid.plan(cfg, [0], ["iid"])


#: 01 is done before; 04 takes 100 s, of which 80 are rounds.
COSTS = {
    "02_teacher": Cost(0, 10.0),
    "03_distill-seed0": Cost(0, 20.0),
    "04_federate-iid-seed0": Cost(0, 100.0, rounds=80.0),
    "05_analysis": Cost(0, 20.0),
}


def test_a_cell_moves_by_the_clock_and_stays_below_its_end(cells, clock, checkpoints):
    watch = Watch(cells, COSTS)
    assert (watch.total, watch.done()) == (150, 0)
    watch.begin(cells[1])
    assert watch.title() == "2 of 5: 02_teacher"
    clock[0] += 4
    assert watch.done() == pytest.approx(4)
    clock[0] += 50
    assert watch.done() == pytest.approx(9.5)
    watch.end(cells[1])
    assert watch.done() == 10


def test_a_look_while_a_cell_ends_is_no_error(cells, clock, checkpoints):
    """The bar's thread looks at any moment: here a cell runs at the first look and has ended at the next."""

    class Ending(Watch):
        @property
        def running(self):
            now, self.next = self.next, None
            return now

        @running.setter
        def running(self, value):
            self.next = value

    watch = Ending(cells, COSTS)
    watch.begin(cells[1])
    assert watch.title() == "2 of 5: 02_teacher"
    watch.begin(cells[1])
    clock[0] += 4
    assert watch._within(cells[1], COSTS["02_teacher"]) == pytest.approx(4)


def test_rounds_move_by_their_checkpoints_also_those_of_another_process(cells, clock, checkpoints):
    watch = Watch(cells, COSTS)
    checkpoints["federated-iid-fm-seed0"] = 5  # 5 of 20 rounds
    assert watch.done() == pytest.approx(20)
    for cell in cells[1:3]:
        watch.begin(cell)
        watch.end(cell)
    watch.pace = 1.0
    watch.begin(cells[3])
    clock[0] += 7
    assert watch.done() == pytest.approx(30 + 20 + 7)
    checkpoints["federated-iid-random-seed0"] = 10
    clock[0] += 1000
    assert watch.done() == pytest.approx(30 + 60 + 0.95 * 20)


def test_the_next_cell_is_expected_at_the_pace_of_the_last(cells, clock, checkpoints):
    """A machine of half the speed: 02 took 20 s instead of 10."""
    watch = Watch(cells, COSTS)
    watch.begin(cells[1])
    clock[0] += 20
    watch.end(cells[1])
    watch.begin(cells[2])
    clock[0] += 20
    assert watch.done() == pytest.approx(10 + 10)


def test_the_time_left_is_right_from_a_quarter_on_though_the_machine_is_three_times_slower(
    cells, clock, checkpoints
):
    """The bar's own speed corrects the estimate: time gone over work done, times what is left."""
    watch, took = Watch(cells, COSTS), {key: 3 * cost.seconds for key, cost in COSTS.items()}
    begun, whole = clock[0], sum(took.values())
    for cell in cells[1:]:
        watch.begin(cell)
        for step in range(10):
            clock[0] += took[cell.key] / 10
            for init in ("random", "fm"):
                if cell.rounds:
                    checkpoints[f"federated-iid-{init}-seed0"] = step + 1
            gone, done = clock[0] - begun, watch.done()
            if gone >= whole / 4 and gone < 0.95 * whole:
                left = (watch.total - done) * gone / done
                assert 0.5 <= left / (whole - gone) <= 2, f"{gone:.0f} s gone"
        watch.end(cell)
    assert watch.done() == watch.total and watch.title() == "study"
