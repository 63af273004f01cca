"""Every parameter has one type and one range, the notebooks show the defaults, mistakes get one sentence."""

import ast
import json
import math
from pathlib import Path

import pytest
import yaml
from papermill.translators import PythonTranslator

from fmfl import config, paths, split
from fmfl.analysis import statistics
from fmfl.errors import UserError
from fmfl.sources import phantom

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("0*.ipynb"))


def refused(name, value) -> str:
    """The sentence with which a value is refused: one, and it names the parameter."""
    with pytest.raises(UserError) as caught:
        config.validate(name, value)
    sentence = str(caught.value)
    assert name in sentence
    assert "\n" not in sentence
    return sentence


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


# ------------------------------------------------------------------------------------------ one value


@pytest.mark.parametrize(("given", "meant"), [("num_rouds", "num_rounds"), ("Alpha", "alpha")])
def test_an_unknown_parameter_is_named_with_the_likely_one(given, meant):
    assert f"did you mean {meant}?" in refused(given, 3)


@pytest.mark.parametrize(
    ("short", "meant"),
    [
        ("lr", "learning_rate"),
        ("LR", "learning_rate"),
        ("bs", "batch_size"),
        ("epochs", "local_epochs"),
        ("rounds", "num_rounds"),
        ("clients", "num_clients"),
    ],
)
def test_a_usual_short_name_is_refused_with_the_parameter_that_is_meant(short, meant):
    assert f"parameter {short!r} is unknown: did you mean {meant}?" in refused(short, 3)


def test_short_names_stand_for_parameters_and_are_none():
    assert set(config.SHORT.values()) <= config.PARAMETERS.keys()
    assert not config.SHORT.keys() & config.PARAMETERS.keys()


def test_an_unknown_parameter_like_no_other_gets_the_command_that_lists_all():
    assert "`fmfl params` lists them all" in refused("zzzz", 3)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("num_rounds", True, "a whole number"),  # in Python, True is 1
        ("num_rounds", 3.0, "a whole number"),
        ("num_rounds", "3", "a whole number"),
        ("num_rounds", None, "a whole number"),
        ("alpha", True, "a number"),
        ("alpha", "0.6", "a number"),
        ("strict", 1, "True or False"),
        ("strict", "yes", "True or False"),
        ("run_name", 7, "a text"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, what):
    assert f"must be {what}" in refused(name, value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("learning_rate", "1e-3", 1e-3), ("dirichlet_concentration", "5E-1", 0.5), ("num_rounds", "1e2", 100)],
)
def test_a_number_that_yaml_reads_as_text_is_the_number(name, text, value):
    """YAML 1.1, which papermill reads, asks for a point in a number with an exponent."""
    assert yaml.safe_load(text) == text
    assert config.validate(name, text) == value
    assert type(config.validate(name, text)) is type(value)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_a_text_that_papermill_makes_of_a_truth_is_the_truth(text, value):
    """Its -p reads True and False alone."""
    assert config.validate("strict", text) is value


@pytest.mark.parametrize("text", ["1e", "one", "e-3", "1e-3.5", "1e400", "1e-1000000 m"])
def test_a_text_that_is_no_such_number_is_refused(text):
    refused("learning_rate", text)
    refused("num_rounds", "1e-3")


def test_a_whole_number_serves_as_a_number():
    value = config.validate("alpha", 1)
    assert value == 1.0
    assert type(value) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", math.nan),
        ("learning_rate", math.inf),
        ("temperature", 0.0),
        ("num_clients", 0),
        ("num_rounds", -1),
        ("proxy", math.nan),
        ("proxy", -0.5),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(name, value):
    sentence = refused(name, value)
    assert "between" in sentence or "at least" in sentence


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 0.0), ("alpha", 1.0), ("num_clients", 1), ("size", 32)]
)
def test_the_ends_of_a_range_are_inside(name, value):
    assert config.validate(name, value) == value


def test_a_size_that_no_unet_can_halve_five_times_is_refused():
    assert "multiple of 32, such as 96" in refused("size", 100)


def test_choices_are_listed_where_the_choice_is_unknown():
    assert "'cosine'" in refused("split", "cosine")
    assert "iid, age, quantity, site, dirichlet" in refused("split", "cosine")


@pytest.mark.parametrize("value", ["random,fm", "random, fm", "fm"])
def test_several_choices_are_joined_by_commas(value):
    assert set(config.split_list(config.validate("inits", value))) <= set(config.INITS)


def test_a_list_serves_as_its_comma_separated_text():
    assert config.validate("inits", ["random", "fm"]) == "random,fm"
    assert config.validate("data", [Path("a"), "phantom"]) == "a,phantom"
    assert config.validate("checkpoint", Path("w.safetensors")) == "w.safetensors"


def test_numbers_are_joined_by_commas_and_may_be_none():
    for value in ("", "0,0.6,1", "0.5", "1e-1, 1"):
        assert config.validate("alpha_sweep", value) == value
    assert config.float_list("0, 0.6,1") == [0, 0.6, 1]
    assert config.validate("alpha_sweep", 0.5) == "0.5", "as papermill reads a list of one"
    assert config.validate("temperature_sweep", [1, 2.5]) == "1,2.5"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("alpha_sweep", "0,half", "alpha_sweep holds 'half': give numbers joined by commas, such as 0,1"),
        ("alpha_sweep", "0;1", "alpha_sweep holds '0;1': give numbers"),
        ("alpha_sweep", "0,1.1", "alpha_sweep holds 1.1: each must lie between 0 and 1"),
        ("alpha_sweep", "nan", "alpha_sweep holds nan: each must lie between 0 and 1"),
        ("alpha_sweep", 2, "alpha_sweep holds 2: each must lie"),
        ("temperature_sweep", "1,0", "temperature_sweep holds 0: each must lie between 0.01 and 100"),
        ("alpha_sweep", "1,1.0", "'1,1.0' names one number twice"),
        ("alpha_sweep", True, "alpha_sweep must be a text, not True"),
        ("variants", "kl", "variants is 'kl': choose some of kl_only, dice_only"),
        ("variants", "hard,hard", "names one choice twice"),
    ],
)
def test_a_wrong_sweep_is_refused(name, value, says):
    assert says in refused(name, value)


def test_no_variant_may_be_chosen():
    assert config.validate("variants", "") == ""


@pytest.mark.parametrize("value", ["", " , ", "random,magic", "random,random", "fm, fm"])
def test_no_choice_a_wrong_one_and_one_twice_are_refused(value):
    refused("inits", value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("alpha", "1", 1.0),
        ("num_rounds", "3", 3),
        ("num_rounds", "3.0", 3),
        ("num_rounds", "1e2", 100),
        ("strict", "true", True),
        ("strict", " False ", False),
        ("run_name", "3", "3"),
        ("inits", "random,fm", "random,fm"),
    ],
)
def test_text_of_a_command_line_gets_the_parameters_type(name, text, value):
    parsed = config.parse(name, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("num_rounds", "3.5"),
        ("num_rounds", "many"),
        ("num_rounds", "nan"),
        ("num_rounds", "inf"),
        ("alpha", "nan"),
        ("alpha", ""),
        ("strict", "1"),
        ("num_rouds", "3"),
    ],
)
def test_text_that_cannot_be_the_parameter_is_refused(name, text):
    with pytest.raises(UserError, match=name):
        config.parse(name, text)


# ------------------------------------------------------------------------------------------ all together


def test_names_are_unique_over_the_stages():
    """Else a parameter in a notebook would mean two things."""
    names = [name for kind in config.STAGES.values() for name in kind.__dataclass_fields__]
    assert len(names) == len(set(names)) == len(config.PARAMETERS)
    assert config.PARAMETERS["seed"].stage == "federate"


def test_every_parameter_says_what_it_means_in_one_line_and_who_takes_it():
    for name, about in config.PARAMETERS.items():
        assert about.meaning and "\n" not in about.meaning and not about.meaning.endswith("."), name
        assert set(about.by) <= {*config.ALL, "6"} and set(about.by) & set("12345"), name
        assert set(about.tags.split()) <= set(config.TAGS), name
    assert set(config.TAGS) == {tag for about in config.PARAMETERS.values() for tag in about.tags.split()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("size", "a whole number from 32 to 1024, a multiple of 32"),
        ("proxy", "a number from 0"),
        ("strict", "True or False"),
        ("mask_class", "a text"),
        ("split", "one of iid, age, quantity, site, dirichlet"),
        ("inits", "some of random, pretraining, fm, imagenet, file"),
        ("alpha_sweep", "numbers from 0 to 1, joined by commas"),
    ],
)
def test_a_range_is_said_in_words(name, words):
    assert config.PARAMETERS[name].range == words


def test_every_default_and_every_profile_is_valid():
    for name, value in config.defaults().items():
        assert config.validate(name, value) == value
        assert type(config.validate(name, value)) is type(value), "an int as the default of a float"
    for profile, changes in config.PROFILES.items():
        for name, value in changes.items():
            assert config.validate(name, value) == value
            assert type(value) is type(config.defaults()[name])
        assert config.settings(profile=profile).flat() == config.defaults() | changes


def test_the_paper_profile_has_the_papers_numbers():
    cfg = config.settings(profile="paper")
    assert (cfg.data.size, cfg.data.num_phantoms, cfg.distill.alpha) == (256, 6504, 0.6)
    assert (round(cfg.data.proxy * 6504), round(cfg.data.test * 6504)) == (1504, 500)
    federate = cfg.federate
    assert (federate.num_clients, federate.num_rounds, federate.local_epochs) == (3, 100, 5)
    assert (federate.learning_rate, federate.loss, cfg.distill.temperature) == (1e-4, "dice", 1.0)


def test_the_papers_values_are_those_that_its_profile_sets():
    """All but the teacher, whose weights do not come with the package."""
    stated = {name: about.paper for name, about in config.PARAMETERS.items() if about.paper is not None}
    assert stated.pop("teacher") == "sam-med2d"
    for name, value in stated.items():
        assert config.validate(name, value) == value == config.settings(profile="paper").flat()[name]


def test_what_is_given_goes_before_the_profile():
    cfg = config.settings({"num_rounds": 2, "alpha": 0}, profile="paper")
    assert (cfg.federate.num_rounds, cfg.distill.alpha, cfg.federate.local_epochs) == (2, 0.0, 5)


def test_changed_lists_what_differs_from_the_quick_run():
    assert config.settings().changed() == {}
    assert config.settings({"seed": 3, "num_rounds": 5}).changed() == {"seed": 3}


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(UserError, match="smoke, class, paper"):
        config.settings(profile="papre")


def test_a_run_folder_is_below_runs_or_as_given(tmp_path):
    assert config.settings({"run_name": "x"}).run_dir == paths.RUNS / "x"
    assert config.settings({"run_name": tmp_path}).run_dir == tmp_path


# ------------------------------------------------------------------------------------------ notebooks

OWN_CELL = '# Parameters: the quick run. papermill injects others after this cell.\nseed = 0\nsplit = "age"\n'


#: A file for `papermill -f`, read by YAML 1.1.
PARAMETERS_FILE = """
learning_rate: 1e-3
inits: [random, fm]
alpha_sweep: [1e-3, 0.5]
alpha: 1
deterministic: yes
"""


def papermills(text: str) -> str:
    """Return the lines that papermill injects for a file of parameters."""
    read = yaml.safe_load(text)
    return PythonTranslator.codify(read)


def notebook(*cells: str) -> dict:
    """The variables of a kernel that has run these cells."""
    namespace: dict = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


def test_the_injected_cell_goes_before_the_notebooks_own():
    cfg = config.from_notebook(notebook(OWN_CELL, '# Parameters\nseed = 4\nproxy = 0.5\nsplit = "iid"\n'))
    assert cfg.changed() == {"seed": 4, "proxy": 0.5, "split": "iid"}


def test_parameters_may_have_types():
    typed = '# Parameters: the quick run\nseed: int = 3\nsplit: str = "iid"\n'
    assert config.from_notebook(notebook(typed)).changed() == {"seed": 3, "split": "iid"}
    assert config.from_notebook(notebook(typed, "# Parameters\nseed = 4\n")).changed()["seed"] == 4


def test_a_type_without_a_value_is_no_parameter():
    assert config.from_notebook(notebook(OWN_CELL + "alpha: float\n")).changed() == {}


def test_names_of_other_cells_are_no_parameters():
    cfg = config.from_notebook(notebook(OWN_CELL, "data = 3\nnum_rounds = 'x'\n"))
    assert cfg == config.settings()


@pytest.mark.parametrize("line", ["sead = 1", "sead: int = 1", "seed, sead = 1, 1"])
def test_an_injected_name_that_is_no_parameter_is_an_error(line):
    with pytest.raises(UserError, match="'sead' is unknown: did you mean seed"):
        config.from_notebook(notebook(OWN_CELL, f"# Parameters\n{line}\n"))


def test_an_injected_value_is_checked():
    with pytest.raises(UserError, match="seed must be a whole number"):
        config.from_notebook(notebook(OWN_CELL, "# Parameters\nseed = 'one'\n"))


def test_a_notebooks_own_variables_take_the_parameters_types():
    """Else 04 would hand the text 1e-3 to Adam, and split a list of starts like a text."""
    own = "# Parameters: the quick run\nlearning_rate = 1e-4\n"
    variables = notebook(own, f"# Parameters\n{papermills(PARAMETERS_FILE)}")
    cfg = config.from_notebook(variables)
    assert variables["learning_rate"] == cfg.federate.learning_rate == 1e-3
    assert variables["inits"] == "random,fm" and variables["alpha_sweep"] == "1e-3,0.5"
    assert (variables["alpha"], type(variables["alpha"])) == (1.0, float)
    assert variables["deterministic"] is True


def test_what_was_given_is_known_apart_from_what_it_makes():
    """A value at its default was given too."""
    variables = notebook(OWN_CELL, "# Parameters\nalpha: float = 1\n", "size = 64\n")
    assert config.given(variables) == {"seed": 0, "split": "age", "alpha": 1}


def test_a_corrected_cell_leaves_no_trace_of_its_mistake():
    """A kernel remembers every version of a cell; only the last one counts."""
    wrong = OWN_CELL + "sead = 1\nnum_rounds = 9\n"
    assert config.from_notebook(notebook(wrong, OWN_CELL)).changed() == {}


def test_there_are_six_notebooks():
    assert [notebook.stem for notebook in NOTEBOOKS] == [
        "01_data",
        "02_teacher",
        "03_distill",
        "04_federate",
        "05_analysis",
        "06_use",
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebooks_parameters_are_the_defaults_as_literals(notebook):
    """Whoever opens a notebook sees the quick run's numbers, and those are the ones in config.py."""
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(cells) == 1, "papermill injects after the one cell tagged `parameters`"
    source = cells[0]["source"]
    assert source.startswith(config.PARAMETERS_COMMENT)
    found = {}
    for node in ast.parse(source).body:
        assert isinstance(node, ast.AnnAssign), f"line {node.lineno}"
        assert ast.unparse(node.annotation) == config.PARAMETERS[node.target.id].kind.__name__
        found[node.target.id] = ast.literal_eval(node.value)
    assert "run_name" in found
    assert set(found) <= config.taken_by(notebook.stem)
    for name, value in found.items():
        assert (name, value, type(value)) == (
            name,
            config.defaults()[name],
            type(config.defaults()[name]),
        )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_every_notebook_checks_its_parameters_before_it_does_anything(notebook):
    sources = [cell["source"] for cell in code_cells(notebook)]
    assert sources[0].startswith(config.PARAMETERS_COMMENT)
    assert "config.from_notebook(globals())" in sources[1]


def test_a_notebook_whose_parameters_cell_was_not_run_is_told_so():
    with pytest.raises(UserError, match="run the parameters cell"):
        config.from_notebook({"In": ["size = 64"], "size": 64})


def test_a_runner_without_history_gives_its_plain_variables():
    """nbval asks the kernel to keep no history."""
    kernel = {"In": [""], "Out": {}, "_dh": ["."], "pd": ast, "exit": print, "RULES": ("a",), "split": "iid"}
    assert config.from_notebook({**kernel, "seed": 4}).changed() == {"seed": 4, "split": "iid"}
    with pytest.raises(UserError, match="'sead' is unknown: did you mean seed"):
        config.from_notebook({**kernel, "sead": 4})


def test_the_built_in_study_has_the_test_patients_that_an_interval_needs():
    """Else the report of `make study` could only say that they are too few."""
    number = config.settings(profile="class").data.num_phantoms
    _, _, table = phantom.generate(number, 16, config.defaults()["phantom_seed"])
    table["patient_id"] = table.site + ":" + table.patient_id
    test = split.holdout(table, config.defaults()["holdout_seed"]).test
    assert table.patient_id.iloc[test.tolist()].nunique() >= statistics.MIN_PATIENTS
