"""The benchmarks at sizes that take no time: both sides do the same work, and the result can be read."""

import gc
import json
import mmap
import subprocess
import sys
import tarfile
import weakref
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from typer.testing import CliRunner

from bench import experiments, gpu, kills, measure, memory, pack, rounds, scale
from bench.__main__ import app, main
from fmfl import capture, data, models, paths


def result(*arguments: str) -> dict:
    """The last line that a benchmark prints."""
    ended = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert ended.exit_code == 0
    found = json.loads(ended.stdout.splitlines()[-1])
    assert {"bench", "settings", "rows", "machine", "versions"} <= set(found)
    return found


def test_rounds_compares_loops_that_end_in_the_same_weights(tmp_path):
    """Both average the same clients after the same steps; they only add in another order."""
    small = ("--size", 32, "--images", 4, "--batch-size", 4, "--student", "tiny_unet")
    found = result("rounds", *small, "--repeats", 1, "--out", tmp_path / "rounds.json")
    assert found["largest_difference_of_weights"] < 1e-5
    assert found["steps"] == 3 * 5
    for ratio in ("fmfl_over_plain_cpu", "plain_over_bare_cpu", "fmfl_over_plain_wall"):
        assert 0 < found[ratio]["low"] <= found[ratio]["median"] <= found[ratio]["high"]
    assert json.loads((tmp_path / "rounds.json").read_text()) == found


def test_a_round_is_measured_in_the_precision_that_is_asked_for(tmp_path):
    """In bfloat16 as well both loops end in the same weights, which are not those of float32."""
    sides = {
        precision: rounds.Sides(tmp_path / precision, 32, "tiny_unet", 4, 4, "cpu", precision)
        for precision in ("float32", "bfloat16")
    }
    exact, rounded = (side.fmfl() for side in sides.values())
    assert rounds.difference(rounded, sides["bfloat16"].plain()) < 1e-5
    assert rounds.difference(rounded, exact) > 1e-4


@pytest.mark.slow
def test_gpu_measures_what_fits_and_names_what_does_not(tmp_path):
    """On a CPU, with every part made small; then with no time at all."""
    small = ("--device", "cpu", "--size", 32, "--students", "tiny_unet:4,unet:2", "--scale", 0.1)
    found = result("gpu", *small, "--minutes", 60, "--out", tmp_path)
    assert found["left out"] == {}
    assert [(row["student"], row["batch"]) for row in found["rows"]] == [("tiny_unet", 4), ("unet", 2)]
    assert found["deterministic twice"] == "equal"
    assert found["tiny_unet, 3 clients at once, largest difference"] == 0, "the order of the clients stays"
    for name in ("02_teacher, seconds", "smoke study, seconds", "scoring on cpu, ms an image"):
        assert found[name] > 0
    assert json.loads((tmp_path / "gpu-cpu.json").read_text()) == found
    found = result("gpu", *small, "--minutes", 0, "--out", tmp_path)
    assert found["rows"] == [] and "0.0 minutes were left" in found["left out"]["tiny_unet, batch 4"]


def test_gpu_keeps_what_it_has_measured_when_it_is_ended_early(tmp_path, monkeypatch):
    """A machine that is lent for minutes ends the command, with the last part under way."""

    def ended():
        raise KeyboardInterrupt

    def parts(bench):
        yield "one", 0.0, lambda: bench.single.update(one=1.5)
        yield "two", 0.0, ended

    monkeypatch.setattr(gpu, "parts_of", parts)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(device="cpu", out=tmp_path)
    assert json.loads((tmp_path / "gpu-cpu.json").read_text())["one"] == 1.5


def test_gpus_recorded_steps_let_their_model_go(tmp_path, monkeypatch):
    """Else the memory of all students before counts in the peak of the next."""
    monkeypatch.setattr(capture, "usable", lambda device: True)
    monkeypatch.setattr(capture, "record", lambda function, buffers, resident: partial(function, *buffers))
    bench = gpu.Bench(torch.device("cpu"), 32, [], "float32", "phantom", 1.0, tmp_path)
    built, build = [], models.build
    monkeypatch.setattr(models, "build", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
    recorded, launched = gpu.bare_step(bench, "tiny_unet", 2)
    recorded(capture.EAGER_STEPS + 2)
    launched(1)
    gone = weakref.ref(built.pop())
    del recorded, launched
    gc.collect()
    assert gone() is None


def test_a_benchmark_without_its_package_is_named_and_the_others_are_there():
    """A cluster has neither Flower nor certificates: nothing that the GPU's benchmark imports needs them."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('flwr', 'cryptography', 'papermill', 'nbformat')))\n"
        "from bench.__main__ import app; app()"
    )
    for arguments, expected in ((["gpu", "--help"], 0), (["hosts"], 1)):
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=paths.ROOT, capture_output=True, text=True
        )
        assert ended.returncode == expected, ended.stderr
    assert ended.stderr.strip() == "bench hosts: the package cryptography is not installed"


def test_a_folder_that_is_not_there_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["bench", "experiment", "run", "skew", "--sources", str(tmp_path / "no")]
    )
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bench: {tmp_path / 'no'}: there is no such folder") and said.count("\n") == 1


def test_steps_measures_each_way_of_each_student_against_the_one_that_is_used(monkeypatch):
    """Compiling takes a minute, and not every network can be: here none can."""

    def cannot(images):
        raise NotImplementedError

    monkeypatch.setattr(torch, "compile", lambda model, mode: cannot)
    small = ("--size", 32, "--batch-size", 2, "--students", "tiny_unet", "--steps", 1, "--repeats", 3)
    found = result("steps", *small)
    assert [row["way"] for row in found["rows"]] == ["float32", "bfloat16", "contiguous"]
    assert found["rows"][0]["over_float32"] == 1 and found["rows"][1]["over_float32"] > 0
    assert found["tiny_unet compiled"] == "fails with NotImplementedError"


@pytest.mark.slow
def test_teachers_are_measured_each_in_its_own_process():
    found = result("teachers", "--names", "builtin", "--images", 2, "--size", 64, "--repeats", 1)
    (row,) = found["rows"]
    assert row["teacher"] == "builtin" and row["parameters"] == 1_764_032
    assert row["images_per_second"] > 0 and row["peak_mib"] > 0


def test_scale_states_a_cost_a_client_and_measures_each_number_in_its_own_process(tmp_path):
    small = ("--clients", "1,4", "--images", 8, "--size", 64, "--student", "tiny_unet", "--batch-size", 4)
    found = result("scale", *small, "--repeats", 1)
    assert [row["clients"] for row in found["rows"]] == [1, 4]
    assert all(row["cpu"] > 0 and row["peak_mib"] > 100 for row in found["rows"])
    one, four = (row["cpu"] for row in found["rows"])
    assert found["milliseconds_a_client_cpu"] == pytest.approx(1e3 * (four - one) / 3, rel=1e-6)


def test_ratios_of_two_sides_by_hand():
    """A machine twice as slow in the second of three turns changes neither the median nor the fastest."""
    one = [measure.Taken(3.0, 3.0), measure.Taken(6.6, 6.6), measure.Taken(3.3, 3.3)]
    other = [measure.Taken(2.0, 2.0), measure.Taken(4.0, 4.0), measure.Taken(2.2, 2.2)]
    assert measure.ratio(one, other)["median"] == pytest.approx(1.5)
    assert measure.fastest(one, other) == pytest.approx(1.5)


def test_a_line_through_costs_that_lie_on_one_gives_them_back():
    found = scale.line([3, 30, 300], [2 + 0.01 * clients for clients in (3, 30, 300)])
    assert found["milliseconds_a_client"] == pytest.approx(10)
    assert found["seconds_for_the_images"] == pytest.approx(2)
    assert found["largest_distance_from_the_line"] == pytest.approx(0, abs=1e-9)
    assert scale.line([1, 2, 3], [1, 1, 2])["largest_distance_from_the_line"] > 0.1


def test_memory_grows_with_the_states_that_are_held_and_not_with_the_clients():
    found = result("memory", "--clients", "2,12", "--images", 1, "--student", "tiny_unet", "--repeats", 1)
    peaks = {(row["what"], row["clients"]): row["states"] for row in found["rows"]}
    assert 0 < peaks["aggregation", 12] < 8, "ten states more, had they been kept"
    assert abs(peaks["aggregation", 12] - peaks["aggregation", 2]) < 3


def test_a_peak_is_what_was_held_above_the_beginning():
    def hold() -> None:
        # Pages of its own: the heap may still hold what earlier tests have let go.
        with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            np.frombuffer(pages, np.uint8)[:] = 1

    assert 60 < memory.above(torch.device("cpu"), hold) < 90


@pytest.mark.slow
def test_a_study_killed_while_it_teaches_and_while_it_federates_ends_as_one_left_alone(tmp_path):
    found = result("kills", "--instants", 2, "--only", "02_teacher,04_federate")
    assert found["kills"] == 2 and found["different"] == "nothing"
    assert found["weights_compared"] == 10 and found["rows_compared"] == 20


def test_two_outcomes_that_differ_are_told_apart():
    one = {"weights": {"a": "1"}, "results.csv": ["x", "1"]}
    assert kills.parts_of(one, one) == []
    assert kills.parts_of(one, one | {"results.csv": ["x", "2"]}) == ["results.csv"]


@pytest.mark.slow
def test_flower_ends_where_fmfl_does():
    pytest.importorskip("ray", reason="Flower's simulation needs Ray")
    small = ("--scenarios", "2x4", "--size", 32, "--student", "tiny_unet", "--batch-size", 4)
    found = result("flower", *small, "--num-rounds", 2, "--repeats", 1)
    assert found["2x4_difference_after_one_round"] < 1e-5
    assert [row["side"] for row in found["rows"]] == ["fmfl", "Flower", "Flower, quickstart"]
    assert all(row["round"] > 0 and row["round_cpu"] > 0 for row in found["rows"])


def test_packed_images_are_read_as_they_were_but_for_jpegs_changes(tmp_path):
    cohort = data.load("phantom", size=64, num_phantoms=12, progress=False)
    pack.write(cohort, tmp_path / "packed.tgz")
    with tarfile.open(tmp_path / "packed.tgz") as archive:
        archive.extractall(tmp_path, filter="data")
    read = data.load(str(tmp_path / "packed"), size=64, progress=False)
    assert torch.equal(read.masks, cohort.masks)
    assert (read.images.int() - cohort.images.int()).abs().float().mean() < 3
    kept = ["patient_id", "age", "sex", "site"]
    pandas.testing.assert_frame_equal(read.table[kept], cohort.table[kept], check_dtype=False)
