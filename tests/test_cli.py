"""A person's mistake is one sentence and exit code 2, found before anything is written."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fmfl as fmfl_package
from fmfl import config, paths, teacher
from fmfl.study import cli, grid

SMALL = ["-p", "size=32", "-p", "num_phantoms=40", "-p", "num_rounds=1", "-p", "proxy_epochs=1", "--plain"]
TINY = [*SMALL, "-p", "student=tiny_unet"]


@pytest.fixture
def fmfl(monkeypatch, capsys):
    """The command as a shell runs it: exit code, what it says, what it complains of."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fmfl", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def sentence(code: int, out: str, err: str) -> str:
    """The one sentence of a refusal."""
    assert code == 2
    assert out == ""
    assert err.startswith("fmfl: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "lr=1e-4"], "parameter 'lr' is unknown: did you mean learning_rate?"),
        (["-p", "numrounds=3"], "parameter 'numrounds' is unknown: did you mean num_rounds?"),
        (["-p", "zzz=3"], "parameter 'zzz' is unknown"),
        (["-p", "num_rounds=three"], "parameter num_rounds must be a whole number, not 'three'"),
        (["-p", "num_rounds=1.5"], "parameter num_rounds must be a whole number, not 1.5"),
        (["-p", "num_rounds="], "parameter num_rounds must be a whole number, not ''"),
        (["-p", "strict=perhaps"], "parameter strict must be True or False"),
        (["-p", "num_rounds=0"], "parameter num_rounds is 0: it must lie between 1 and"),
        (["-p", "alpha=1.5"], "parameter alpha is 1.5: it must lie between 0 and 1"),
        (["-p", "alpha=nan"], "parameter alpha is nan"),
        (["-p", "size=100"], "parameter size is 100: it must be a multiple of 32"),
        (["-p", "loss=mse"], "parameter loss is 'mse': choose one of dice"),
        (["-p", "inits=random,best"], "parameter inits is 'best': choose some of random"),
        (["-p", "num_rounds"], "-p num_rounds has no value: write -p NAME=VALUE"),
        (["-p", "=3"], "parameter '' is unknown"),
        (["-p", "size=32", "-p", "size=64"], "-p size is given twice: name each parameter once"),
        (["-p", "seed=1"], "-p seed has an option of its own: use --seeds"),
        (["-p", "split=iid"], "-p split has an option of its own: use --splits"),
        (["-p", "run_name=x"], "-p run_name has an option of its own: use --out"),
        (["-p", "data=phantom"], "-p data has an option of its own: use --data"),
        (["-p", "teacher=builtin"], "-p teacher has an option of its own: use --teacher"),
        (["-p", "checkpoint=x"], "-p checkpoint has an option of its own: use --checkpoint"),
        (["-p", "device=cpu"], "-p device has an option of its own: use --device"),
        (["--profile", "huge"], "profile 'huge' is unknown: choose one of smoke, class, paper"),
        (["--splits", "iid,random"], "--splits is 'random': choose one of iid"),
        (["--splits", "iid,iid"], "--splits names one twice (iid, iid)"),
        (["--splits", ","], "--splits is empty"),
        (["--seeds", "one"], "--seeds must be a whole number, not 'one'"),
        (["--seeds", "-1"], "--seeds is -1"),
        (["--seeds", "0,00"], "--seeds names one twice (0, 0)"),
        (["--device", "tpu"], "parameter device is 'tpu': choose one of auto, cpu, cuda"),
        (["--engine", "spark"], "parameter engine is 'spark': choose one of local, flower"),
        (["--data", "phantom,no/such/folder"], "no/such/folder: there is no such folder"),
        (["--data", "phantom,phantom"], "--data names one twice"),
        (["--data", ""], "--data is empty"),
        (["--checkpoint", "no/such/file"], "no/such/file: there is no such file"),
    ],
)
def test_a_typing_mistake_is_one_sentence(tmp_path, fmfl, arguments, says):
    assert says in sentence(*fmfl("study", *arguments, "--out", tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--teacher", "oracle"], "teacher 'oracle' is unknown: choose builtin"),
        (["-p", "student=genius"], "student 'genius' is unknown: choose one of tiny_unet"),
        (["--checkpoint", __file__], "test_cli.py is no checkpoint: neither PyTorch's format nor"),
        (["-p", "num_clients=39"], "num_clients is 39, but split 'iid' has only"),
        (["--splits", "iid,site", "-p", "num_clients=6"], "num_clients is 6, but split 'site' finds"),
        (["-p", "proxy=39"], "leave none of the 40 images for the clients"),
    ],
)
def test_what_would_stop_a_later_notebook_stops_the_study_at_once(tmp_path, fmfl, arguments, says):
    usual = SMALL if "student=genius" in arguments else TINY
    assert says in sentence(*fmfl("study", *usual, *arguments, "--out", tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path, fmfl, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wrong = sentence(*fmfl("study", *TINY, "--device", "cuda", "--out", tmp_path / "run"))
    assert "device is cuda, but PyTorch finds no GPU here: choose auto or cpu" in wrong
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_of_data_is_one_sentence(tmp_path, fmfl):
    (tmp_path / "empty").mkdir()
    wrong = sentence(*fmfl("study", *TINY, "--data", tmp_path / "empty", "--out", tmp_path / "run"))
    assert str(tmp_path / "empty") in wrong
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_study_is_one_sentence_that_names_the_way_out(tmp_path, fmfl):
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"settings": {"num_rounds": 100}}')
    for more in ([], ["--dry-run"]):
        wrong = sentence(*fmfl("study", *TINY, "--out", run, *more))
        assert f"--out {run} holds another study (num_rounds is 100 there and" in wrong
        assert f"add --replace, which first moves that one to {run}.1" in wrong
    assert [file.name for file in run.iterdir()] == ["manifest.json"]


def test_results_below_a_file_are_one_sentence(tmp_path, fmfl):
    (tmp_path / "file").touch()
    wrong = sentence(*fmfl("study", *TINY, "--out", tmp_path / "file" / "run"))
    assert f"--out {tmp_path / 'file' / 'run'} cannot be written to" in wrong


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_results_in_a_folder_of_somebody_else_are_one_sentence(tmp_path, fmfl):
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in sentence(*fmfl("study", *TINY, "--out", tmp_path / "run"))
    finally:
        tmp_path.chmod(0o700)


def test_a_typing_mistake_does_not_wait_for_torch():
    """In a process of its own, as this one has torch already."""
    code = (
        "import sys\n"
        "from fmfl.study import cli\n"
        "sys.argv = ['fmfl', 'study', '--seeds', '0,1', '-p', 'numrounds=3']\n"
        "try:\n    cli.main()\n"
        "finally:\n    print(sorted({'torch', 'numpy', 'pandas'} & set(sys.modules)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "[]\n")
    assert ended.stderr == "fmfl: parameter 'numrounds' is unknown: did you mean num_rounds?\n"


def test_two_values_lists_of_one_axis_are_refused(fmfl):
    sentence = "fmfl: --vary alpha is given twice: name each parameter once\n"
    assert fmfl("study", "--vary", "alpha=0", "--vary", "alpha=1") == (2, "", sentence)


def test_a_server_of_flower_knows_its_own_options(tmp_path, fmfl):
    for name, option in (("run_name", "--out"), ("start", "--start"), ("test_data", "--test-data")):
        wrong = sentence(*fmfl("flower", "server", "--keys", tmp_path, "-p", f"{name}=x"))
        assert f"-p {name} has an option of its own: use {option}" in wrong


def test_version_and_module(fmfl):
    assert fmfl("--version") == (0, f"fmfl {fmfl_package.__version__}\n", "")
    ended = subprocess.run([sys.executable, "-m", "fmfl", "--version"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, f"fmfl {fmfl_package.__version__}\n")


def test_a_shell_completes_commands_options_and_parameters(fmfl):
    def completed(*words):
        """What bash is offered after these words, by typer's protocol."""
        line = " ".join(["fmfl", *words])
        about = {"_FMFL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        ended = subprocess.run(
            [Path(sys.executable).with_name("fmfl")], env=os.environ | about, capture_output=True, text=True
        )
        return set(ended.stdout.split())

    assert completed("pa") == {"params"}
    assert {"--seeds", "--splits", "--profile"} <= completed("study", "--")
    assert completed("study", "--device", "c") == {"cpu", "cuda"}
    assert completed("study", "-p", "num_") == {"num_phantoms=", "num_clients=", "num_rounds="}
    assert "--install-completion" in fmfl("--help")[1]


# ------------------------------------------------------------------------------------------ fmfl params


def listed(text: str) -> dict[str, tuple[str, str]]:
    """Each parameter that `fmfl params` names, with its two lines."""
    lines = text.splitlines()
    return {a.split(" = ")[0]: (a, b.strip()) for a, b in zip(lines[::2], lines[1::2], strict=True)}


def test_params_lists_every_parameter_once_with_all_that_is_declared(fmfl):
    code, out, err = fmfl("params")
    assert (code, err) == (0, "")
    assert list(listed(out)) == list(config.PARAMETERS)
    about, meaning = listed(out)["size"]
    assert about.startswith("size = 96 (paper: 256): a whole number from 32 to 1024, a multiple of 32; ")
    assert about.endswith("; notebooks 01 02 03 04 05")
    assert meaning == "pixels a side; a U-Net halves it five times"


@pytest.mark.parametrize("notebook", config.NOTEBOOKS)
def test_a_notebook_takes_the_parameters_of_its_own_cell(fmfl, notebook):
    content = json.loads((paths.NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))
    (cell,) = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    stored = (n for n in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(n, ast.Name))
    own = {node.id for node in stored if isinstance(node.ctx, ast.Store)}
    takers = {
        name: about.split("; notebooks ")[1].split() for name, (about, _) in listed(fmfl("params")[1]).items()
    }
    assert own and all(notebook[:2] in takers[name] for name in own)


def test_params_finds_a_word_in_name_meaning_and_range(fmfl):
    assert list(listed(fmfl("params", "num_")[1])) == ["num_phantoms", "num_clients", "num_rounds"]
    assert "proximal" in listed(fmfl("params", "FedProx")[1])
    assert "split" in listed(fmfl("params", "dirichlet")[1])
    assert "no parameter has 'zzz' in its text" in sentence(*fmfl("params", "zzz"))


def test_an_unknown_option_is_no_traceback(fmfl):
    code, out, err = fmfl("study", "--rounds", "3")
    assert code == 2 and out == "" and "--rounds" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("typed", "meant"), [("studdy", "study"), ("teacher chek", "check"), ("flower clinet", "client")]
)
def test_a_mistyped_command_is_answered_with_the_likely_one_once(fmfl, typed, meant):
    code, out, err = fmfl(*typed.split())
    assert (code, out) == (2, "")
    assert err.count(f"Did you mean '{meant}'?") == err.count("Did you mean") == 1


def test_the_contracts_options_are_there(fmfl):
    code, out, _ = fmfl("study", "--help")
    options = ("profile", "data", "teacher", "checkpoint", "out", "seeds", "splits", "device", "engine")
    assert code == 0 and all(f"--{name}" in out for name in options) and "-p" in out


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, fmfl):
    """160 synthetic images: 37 proxy, 12 test and 111 federated ones, by the paper's shares."""
    code, out, _ = fmfl(
        *("study", "--profile", "smoke", "--dry-run", "-p", "num_rounds=4", "--seeds", "0,2"),
        *("--vary", "labelled=10", "--out", tmp_path / "run"),
    )
    assert code == 0
    said = [
        re.sub(r"(, |: )[\d.]+ (seconds|minutes|hours|days)( at)?", "", line) for line in out.splitlines()
    ]
    # The pre-trained start, the teacher's student, and the third value of alpha.
    of_a_seed = [
        f"03_distill-seed{{}}: {3 * 15 * 37:,} images",
        f"04_federate-iid-seed{{}}: 12 rounds, {12 * 111:,} images",
        f"04_federate-age-seed{{}}: 20 rounds, {20 * 111:,} images",
        f"04_federate-quantity-seed{{}}: 12 rounds, {12 * 111:,} images",
    ]
    of_a_variant = [
        f"labelled=10/03_distill-seed{{}}: {3 * 15 * 37:,} images",
        f"labelled=10/04_federate-age-seed{{}}: 8 rounds, {8 * 111} images",
    ]
    cells = [line.format(seed) for part in (of_a_seed, of_a_variant) for seed in (0, 2) for line in part]
    # The analysis repeats the first round of three starts.
    ends = ["01_data", f"02_teacher: {15 * 37} images"], [f"05_analysis: {3 * 111} images"]
    assert said[:-1] == [*ends[0], *cells, *ends[1]]
    images = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) images", "\n".join(said[:-1])))
    assert said[-1].startswith(f"15 of 15 notebooks to run: about {images:,} images to train on")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("axis", "sentence"),
    [
        ("labeled=10", "parameter 'labeled' is unknown: did you mean labelled?"),
        ("labelled", "--vary labelled has no value: write --vary NAME=VALUE"),
        ("seed=1,2", "--vary seed has an option of its own: use --seeds"),
        ("inits=fm", "--vary inits is no axis of the map: use -p inits"),
        ("alpha_sweep=0,1", "--vary alpha_sweep is no axis of the map: use -p alpha_sweep"),
        ("alpha=0.5,2", "--vary alpha is 2.0: it must lie between 0 and 1"),
        ("alpha=0.5,0.5", "--vary alpha names one twice (0.5, 0.5): name each once"),
    ],
)
def test_an_axis_of_the_map_is_checked(fmfl, axis, sentence):
    assert fmfl("study", "--vary", axis) == (2, "", f"fmfl: {sentence}\n")


def test_paths_are_those_of_the_shell_and_the_profile_fills_the_rest(tmp_path, fmfl, monkeypatch):
    """Notebooks run in another folder than the one in which a person types a path."""
    seen = []
    monkeypatch.setattr(
        grid, "run", lambda cells, **options: seen.append((cells, options)) or (len(cells), 0)
    )
    (tmp_path / "weights").touch()
    (tmp_path / "rays").mkdir()
    monkeypatch.chdir(tmp_path)
    code, out, _ = fmfl(
        "study", "--profile", "paper", "--data", "phantom,rays", "--checkpoint", "weights", "--out", "run",
        "-p", "num_rounds=7", "--seeds", "3", "--splits", "iid", "--plain",
    )  # fmt: skip
    ((cells, options),) = seen
    settings = cells[-1].cfg.flat()
    assert code == 0 and options["plain"]
    assert settings["data"] == f"phantom,{tmp_path / 'rays'}"
    assert settings["checkpoint"] == str(tmp_path / "weights")
    assert cells[0].cfg.run_dir == tmp_path / "run"
    assert (settings["num_rounds"], settings["local_epochs"], settings["student"]) == (7, 5, "unet")
    assert [cell.name for cell in cells][3] == "04_federate-iid-seed3"
    assert out.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"


def test_ctrl_c_says_how_to_go_on(tmp_path, fmfl, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "run", stopped)
    code, out, err = fmfl("study", "--out", tmp_path / "run")
    assert (code, out, err) == (130, "", "fmfl: stopped; the same command continues where it stopped\n")


# ------------------------------------------------------------------------------------------ fmfl data


@pytest.fixture
def folder(tmp_path):
    """Three X-rays with masks, and a fourth whose file is cut short."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "rays" / name).mkdir(parents=True)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:15] = 255
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(
            tmp_path / f"rays/images/x{k}.png"
        )
        Image.fromarray(mask).save(tmp_path / f"rays/masks/x{k}.png")
    bad = tmp_path / "rays" / "images" / "x3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    return tmp_path / "rays"


def test_a_bad_file_is_named_and_the_rest_is_counted(folder, fmfl):
    code, out, err = fmfl("data", folder, "--size", "32")
    assert code == 0
    assert re.search(r"^3 images of 3 patients, fingerprint [0-9a-f]{64}$", out, re.MULTILINE)
    (line,) = [line for line in err.splitlines() if "left out" in line]
    assert "images/x3.png" in line


def test_with_strict_a_bad_file_is_an_error(folder, fmfl):
    assert "x3.png" in sentence(*fmfl("data", folder, "--size", "32", "--strict"))


def test_what_is_worth_a_look_is_said_and_drawn(folder, fmfl, tmp_path):
    code, out, err = fmfl("data", folder, "--size", "32", "--sheet", tmp_path / "sheet.png")
    assert code == 0 and "rays: no image has a patient_id" in err
    assert out.splitlines()[-1] == f"sheet: {tmp_path / 'sheet.png'} with 3 images"
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
    assert "ends in .png" in sentence(*fmfl("data", folder, "--size", "32", "--sheet", tmp_path / "s.txt"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/such/folder"], "no/such/folder: there is no such folder"),
        ([""], "sources is empty"),
        (["phantom", "--size", "3"], "size is 3"),
        (["phantom", "--mask-class", ""], "mask_class is ''"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(fmfl, arguments, says):
    assert says in sentence(*fmfl("data", *arguments))


def test_the_synthetic_source_says_what_it_holds(fmfl):
    code, out, err = fmfl("data", "phantom", "--size", "32")
    assert code == 0 and out.splitlines()[0].split() == ["images", "patients", "ages", "known"]
    assert out.splitlines()[-1].startswith("300 images of ")
    assert "left out" not in err


# ------------------------------------------------------------------------------------------ fmfl report


def test_a_folder_without_results_has_no_report(tmp_path, fmfl):
    for place in (tmp_path, tmp_path / "nowhere"):
        assert f"{place / 'results.csv'} is missing" in sentence(*fmfl("report", place))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ teachers


def test_teacher_check_says_what_a_file_is(fmfl):
    code, out, err = fmfl("teacher", "check", teacher.BUILTIN_WEIGHTS, "--teacher", "builtin")
    assert (code, err) == (0, "")
    assert hashlib.sha256(teacher.BUILTIN_WEIGHTS.read_bytes()).hexdigest() in out
    assert "published as builtin" in out
    assert "all keys fit builtin, 1,764,032 parameters, input of 128 pixels" in out


def test_teacher_check_refuses_what_fits_no_teacher(fmfl, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(4, 3, 3, 3)}, other)
    code, out, err = fmfl("teacher", "check", other)
    assert code == 2 and "--teacher" in err
    code, out, err = fmfl("teacher", "check", other, "--teacher", "sam_vit_b")
    assert code == 2 and hashlib.sha256(other.read_bytes()).hexdigest() in out
    assert "does not fit teacher 'sam_vit_b'" in err and err.count("\n") == 1
    assert "177 keys of the image encoder missing" in err and "1 keys of the rest unexpected" in err
    assert "mask decoder missing" in err and "masks would be noise" in err
    code, out, err = fmfl("teacher", "check", other, "--teacher", "sam3")
    assert "is unknown" in sentence(code, "", err)
    assert "are not there" in sentence(
        *fmfl("teacher", "check", tmp_path / "none.pth", "--teacher", "medsam")
    )


def test_teacher_download_says_where_the_others_are(fmfl):
    assert "fetch it by hand from" in sentence(*fmfl("teacher", "download", "medsam"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("server", "--port", "99999"),
        ("server", "--port", "0"),
        ("client", "--port", "70000", "--data", "d", "--server", "x:1"),
    ],
)
def test_a_port_that_no_machine_has_is_refused(arguments, fmfl, tmp_path):
    code, out, err = fmfl("flower", *arguments, "--keys", tmp_path)
    assert code == 2 and out == "" and "Traceback" not in err
    assert "not in the range" in err


def test_an_empty_folder_is_refused(fmfl):
    """An unset $OUT would put the study between the other runs."""
    assert sentence(*fmfl("study", "--out", "")) == "fmfl: --out is empty: name a folder\n"


def test_help_tells_what_a_positional_argument_is(fmfl):
    """Typer with click 8.5 left it out."""
    _, out, _ = fmfl("data", "--help")
    assert "phantom, or folders" in out
