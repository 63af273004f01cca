"""The course: open exercises say what to do, typical mistakes are named, solutions pass, copies are safe.

A part is played once with its solutions, in this process and with few images. The variables before each cell
are kept. A cell with a mistake is run on a copy of them, and the check below it has to name the mistake.
"""

import json
import os
import re
from itertools import pairwise
from types import SimpleNamespace

import nbformat
import pytest
import torch
from typer.testing import CliRunner

from fmfl import config, paths
from fmfl.course import __main__ as commands
from fmfl.course import answers, classroom, exercises, server
from fmfl.course.answers import NotYet

PARTS = ["1_look", "2_server", "3_teach", "4_break", "5_start", "6_ledger"]
FEW = {"num_phantoms": 40, "num_rounds": 1, "epochs": 1}


def source(part):
    return exercises.SOURCES / f"{part}.py"


def code_cells(part, solutions):
    cells = exercises.notebook(source(part), solutions=solutions).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def run(code, variables):
    exec(compile(code, "<cell>", "exec"), variables)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Each part played once: for each code cell its open and solved text, and the variables before it."""
    known = {}

    def play(part):
        if part not in known:
            variables, steps, folder = {"__name__": "__main__"}, [], tmp_path_factory.mktemp(part)
            for open_cell, cell in zip(code_cells(part, False), code_cells(part, True), strict=True):
                steps.append(
                    SimpleNamespace(open=open_cell.source, solved=cell.source, before=dict(variables))
                )
                run(cell.source, variables)
                inject(cell, variables, folder)
            known[part] = steps
        return known[part]

    return play


def play_open(part, folder):
    """Run a part as it is handed out, up to its first error."""
    variables = {"__name__": "__main__"}
    for cell in code_cells(part, False):
        run(cell.source, variables)
        inject(cell, variables, folder)


def inject(cell, variables, folder):
    """After the cell of parameters, set a folder of its own and few images."""
    if "parameters" in cell.metadata.get("tags", []):
        few = {name: value for name, value in FEW.items() if name in variables}
        variables |= few | {"participant": str(folder)}


def verdict(steps, number, code):
    """Run other code in the place of a cell, then the check below; the mistake that is named, or None."""
    variables = dict(steps[number].before)
    try:
        run(code, variables)
        if steps[number].open.count("answers.predict") + steps[number].open.count("answers.choose") == 0:
            run(steps[number + 1].solved, variables)
    except NotYet as error:
        return error
    return None


def place(steps, name):
    """The number of the open cell in which the participant writes `name`."""
    pattern = rf"^(def {name}\(|{name} = \.\.\.|{name} = \{{)"
    (number,) = [k for k, s in enumerate(steps) if s.open != s.solved and re.search(pattern, s.open, re.M)]
    return number


def written(step, name, code):
    """A cell with the participant's lines in the place of the open ones."""
    if step.open.startswith("def "):
        head = step.open.split('"""')
        body = "\n".join(f"    {line}" for line in code.splitlines())
        return f'{head[0]}"""{head[1]}"""\n{body}\n'
    return re.sub(rf"^{name} = .*(\n .*)*", lambda _: code, step.open, flags=re.M)


# ---------------------------------------------------------------------------------------- the solutions


def test_these_are_the_parts():
    assert [file.stem for file in exercises.sources()] == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_the_solution_passes(played, part, capsys):
    steps = played(part)
    assert sum(step.open != step.solved for step in steps) >= 3


@pytest.mark.parametrize("part", PARTS)
def test_untouched_every_open_cell_says_what_to_do(played, part):
    steps = played(part)
    for number, step in enumerate(steps):
        if step.open != step.solved:
            error = verdict(steps, number, step.open)
            assert error is not None, step.open
            assert error.mistake in ("still open", "the prediction is open"), (step.open, error)
            assert "three dots" in str(error) or "Choose a word" in str(error) or "Fill in" in str(error)
            assert error._render_traceback_()[0].startswith("Not yet: ")


@pytest.mark.parametrize("part", PARTS)
def test_untouched_a_part_stops_at_its_prediction_before_anything_is_shown(part, tmp_path):
    with pytest.raises(NotYet, match="the prediction is open"):
        play_open(part, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- the mistakes

EQ3 = """total = sum(number for _, number in updates)
first = updates[0][0]
average = dict(first)
for name, value in first.items():
    if value.is_floating_point():
        average[name] = {expression}
return average"""
WEIGHTED = "sum(number * state[name] for state, number in updates) / total"
KL = """p, q = (teacher_logits.detach() / temperature).sigmoid(), (student_logits / temperature).sigmoid()
return {expression}"""
COIN = "p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()"
SWAPPED = "q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()"
FORGET = """average = fmfl.federate.aggregate(updates)
return {{name: {expression} for name in average}}"""
STATISTIC = 'name.endswith(("running_mean", "running_var"))'
AGE = "(results.split == 'age')"
FEDERATED = "(results.arm == 'federated')"
LAST = "(results['round'] == results['round'].max())"


def difference(condition, then="100 * (ends['fm'] - ends['random'])", rows="rows"):
    return f"rows = results[{condition}]\nends = {rows}.groupby('init').dice.mean()\nreturn float({then})"


def chosen(name, right, **others):
    return f"{name} = {right | {key.lstrip('_'): value for key, value in others.items()}!r}"


READINGS = {
    "fm less random": "higher",
    "fm less pretraining": "equivalent",
    "pretraining less random": "higher",
}
DECISIONS = {"A": "random", "B": "pretraining", "C": "fm"}
FAULTS = {
    "A": "best round",
    "B": "fair",
    "C": "seeds chosen",
    "D": "two splits",
    "E": "two rounds",
    "F": "two arms",
}
SENTENCES = {
    "1": "holds",
    "2": "noise",
    "3": "cost left out",
    "4": "too wide",
    "5": "a limit",
    "6": "many tests",
    "7": "no test",
    "8": "no evidence",
}

#: Part, what is filled in, the participant's code, and the name that the check has to give it.
MISTAKES = [
    ("1_look", "num_patients", "num_patients = len(table)", "images counted"),
    ("1_look", "num_patients", "num_patients = table.site.nunique()", "sites counted"),
    ("1_look", "num_patients", "num_patients = table.age.nunique()", "ages counted"),
    (
        "1_look",
        "num_patients",
        "num_patients = int((table.patient_id.value_counts() > 1).sum())",
        "visits more than one counted",
    ),
    ("1_look", "num_patients", "num_patients = 3", "another answer"),
    ("1_look", "shared_patients", "return set(one) & set(other)", "images compared"),
    (
        "1_look",
        "shared_patients",
        "return set(table.patient_id.loc[one]) & set(table.patient_id.loc[other])",
        "labels taken for positions",
    ),
    (
        "1_look",
        "shared_patients",
        "return set(table.patient_id.iloc[one]) | set(table.patient_id.iloc[other])",
        "both sides joined",
    ),
    (
        "1_look",
        "shared_patients",
        "return len(set(table.patient_id.iloc[one]) & set(table.patient_id.iloc[other]))",
        "a number instead of names",
    ),
    ("1_look", "shared_patients", "return table.patients", "it stops with AttributeError"),
    (
        "1_look",
        "leak",
        "leak = table.patient_id.iloc[test].isin(shared).mean()",
        "a fraction where per cent are asked",
    ),
    (
        "1_look",
        "leak",
        "leak = 100 * len(shared) / table.patient_id.iloc[test].nunique()",
        "patients counted instead of images",
    ),
    ("1_look", "leak", "leak = 100 * len(set(training) & set(test)) / len(test)", "images compared"),
    (
        "1_look",
        "deal_by_age",
        "order = sorted(rows, key=lambda row: table.age.iloc[row])\n"
        "return [list(part) for part in np.array_split(order[1:] + order[:1], num_hospitals)]",
        "images dealt instead of patients",
    ),
    (
        "1_look",
        "deal_by_age",
        "names = sorted(set(table.patient_id.iloc[rows]))\n"
        "pieces = [set(piece) for piece in np.array_split(names, num_hospitals)]\n"
        "return [[row for row in rows if table.patient_id.iloc[row] in piece] for piece in pieces]",
        "not sorted by age",
    ),
    (
        "1_look",
        "deal_by_age",
        "ages = table.iloc[rows].groupby('patient_id').age.mean().sort_values()\n"
        "size = len(ages) // num_hospitals\n"
        "pieces = [set(ages.index[k * size:(k + 1) * size]) for k in range(num_hospitals)]\n"
        "return [[row for row in rows if table.patient_id.iloc[row] in piece] for piece in pieces]",
        "images lost",
    ),
    (
        "1_look",
        "deal_by_age",
        "ages = table.iloc[rows].groupby('patient_id').age.mean().sort_values(ascending=False)\n"
        "pieces = [set(piece) for piece in np.array_split(ages.index, num_hospitals)]\n"
        "return [[row for row in rows if table.patient_id.iloc[row] in piece] for piece in pieces]",
        "the oldest first",
    ),
    ("1_look", "deal_by_age", "return [rows, rows]", "an image dealt twice"),
    ("1_look", "deal_by_age", "return [rows, []]", "a hospital without images"),
    ("2_server", "untrained", "untrained = 100 * len(trained) / len(setting.random)", "the trained ones"),
    (
        "2_server",
        "untrained",
        "untrained = 1 - len(trained) / len(setting.random)",
        "a fraction where per cent are asked",
    ),
    (
        "2_server",
        "untrained",
        "numbers = {name: value.numel() for name, value in setting.random.items()}\n"
        "untrained = 100 - 100 * sum(numbers[name] for name in trained) / sum(numbers.values())",
        "numbers counted instead of tensors",
    ),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression="sum(state[name] for state, _ in updates) / len(updates)"),
        "unweighted mean",
    ),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression="sum(-(-number // 8) * state[name] for state, number in updates) / 6"),
        "weighted by batches",
    ),
    ("2_server", "aggregate", EQ3.format(expression=WEIGHTED.replace(" / total", "")), "not divided"),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression=WEIGHTED.replace("total", "len(updates)")),
        "divided by the number of hospitals",
    ),
    ("2_server", "aggregate", EQ3.format(expression="updates[-1][0][name]"), "only the last hospital"),
    ("2_server", "aggregate", "return dict(updates[0][0])", "only the first hospital"),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression=WEIGHTED).replace("value.is_floating_point()", "True"),
        "integer buffers averaged",
    ),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression=WEIGHTED).replace(
            "value.is_floating_point()",
            f"not {STATISTIC} and 'count' not in name and value.is_floating_point()",
        ),
        "running statistics forgotten",
    ),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression=WEIGHTED)
        .replace("dict(first)", "{}")
        .replace("value.is_floating_point()", "'running' not in name and 'num' not in name"),
        "running statistics forgotten",
    ),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression=WEIGHTED).replace("value.is_floating_point()", "name in trained"),
        "running statistics forgotten",
    ),
    (
        "2_server",
        "aggregate",
        EQ3.format(expression=WEIGHTED).replace(
            "        average[name] =", "        first[name] *= 1.5\n        average[name] ="
        ),
        "an input is changed",
    ),
    ("2_server", "aggregate", "return updates[0][0]['bias']", "it stops with KeyError"),
    ("2_server", "aggregate", "average = {}", "nothing comes back"),
    ("3_teach", "kl", KL.format(expression=f"temperature**2 * ({SWAPPED}).mean()"), "arguments swapped"),
    (
        "3_teach",
        "kl",
        KL.format(expression="temperature**2 * (p * (p / q).log()).mean()"),
        "the background is missing",
    ),
    ("3_teach", "kl", KL.format(expression=f"({COIN}).mean()"), "T squared is forgotten"),
    ("3_teach", "kl", KL.format(expression=f"temperature * ({COIN}).mean()"), "T instead of T squared"),
    ("3_teach", "kl", KL.format(expression=f"temperature**2 * ({COIN}).sum()"), "a sum instead of the mean"),
    ("3_teach", "kl", KL.format(expression=f"temperature**2 * ({COIN})"), "one value a pixel"),
    ("3_teach", "kl", KL.format(expression=f"-temperature**2 * ({COIN}).mean()"), "the sign is turned"),
    (
        "3_teach",
        "kl",
        KL.format(expression="temperature**2 * F.binary_cross_entropy(q, p)"),
        "cross-entropy instead of the divergence",
    ),
    (
        "3_teach",
        "kl",
        KL.format(expression=f"temperature**2 * ({COIN}).mean()").replace(
            "student_logits / temperature", "student_logits"
        ),
        "only the teacher is softened",
    ),
    (
        "3_teach",
        "kl",
        KL.format(expression=f"temperature**2 * ({COIN}).mean()").replace(
            "teacher_logits.detach() / temperature", "teacher_logits"
        ),
        "only the student is softened",
    ),
    (
        "3_teach",
        "kl",
        KL.format(expression=f"temperature**2 * ({COIN}).mean()").replace(".sigmoid()", ""),
        "logits taken for probabilities",
    ),
    (
        "3_teach",
        "kl",
        "p, q = teacher_logits / temperature, student_logits / temperature\n"
        "ratio = p.log_softmax(1) - q.log_softmax(1)\n"
        "return temperature**2 * (p.softmax(1) * ratio).sum(1).mean()",
        "softmax over one channel",
    ),
    (
        "3_teach",
        "kl",
        KL.format(expression=f"temperature**2 * ({COIN}).mean()"),
        "infinite where the teacher is certain",
    ),
    (
        "3_teach",
        "kl",
        "return fmfl.losses.kl_divergence(student_logits.detach(), teacher_logits, temperature)",
        "no gradient reaches the student",
    ),
    (
        "3_teach",
        "kl",
        "t, s = teacher_logits / temperature, student_logits / temperature\n"
        "ratio = F.logsigmoid(t) - F.logsigmoid(s) + (-t).sigmoid() * (s - t)\n"
        "return temperature**2 * ratio.mean()",
        "a gradient flows into the teacher",
    ),
    *(
        (
            "3_teach",
            "eq5",
            f"distil, segment = kl(student_logits, teacher_logits, temperature), "
            f"fmfl.losses.dice_loss(student_logits, masks)\nreturn {wrong}",
            name,
        )
        for wrong, name in (
            ("(1 - alpha) * distil + alpha * segment", "alpha stands at the other term"),
            ("alpha * distil + segment", "1 - alpha is missing"),
            ("distil + segment", "alpha is missing"),
            (
                "alpha * kl(student_logits, teacher_logits, 1) + (1 - alpha) * segment",
                "the temperature is lost",
            ),
            (
                "alpha * kl(teacher_logits, student_logits, temperature) + (1 - alpha) * segment",
                "arguments swapped",
            ),
            ("alpha * distil + (1 - alpha) * (1 - segment)", "Dice instead of its loss"),
            (
                "alpha * distil + (1 - alpha) * fmfl.losses.dice_loss(teacher_logits, masks)",
                "Dice with the teacher",
            ),
        )
    ),
    ("4_break", "forget_statistics", "return fmfl.federate.aggregate(updates)", "nothing is broken"),
    (
        "4_break",
        "forget_statistics",
        FORGET.format(expression='start[name] if "norm" in name or "bn" in name else average[name]'),
        "too much is forgotten",
    ),
    (
        "4_break",
        "forget_statistics",
        FORGET.format(expression=f"updates[0][0][name] if {STATISTIC} else average[name]"),
        "statistics of one hospital",
    ),
    (
        "4_break",
        "forget_statistics",
        FORGET.format(
            expression=f"0 * average[name] + name.endswith('var') if {STATISTIC} else average[name]"
        ),
        "statistics reset",
    ),
    (
        "4_break",
        "forget_statistics",
        FORGET.format(expression="start[name] if name.endswith('running_mean') else average[name]"),
        "nothing is broken",
    ),
    (
        "4_break",
        "forget_statistics",
        FORGET.format(expression="average[name]").replace("in average", f"in average if not {STATISTIC}"),
        "running statistics forgotten",
    ),
    ("4_break", "forget_sizes", "return fmfl.federate.aggregate(updates)", "nothing is broken"),
    ("4_break", "forget_sizes", "return dict(updates[0][0])", "only the first hospital"),
    ("4_break", "forget_sizes", EQ3.format(expression="sum(state[name] for state, _ in updates)"), "a sum"),
    (
        "4_break",
        "gap",
        "dice = history[history['round'] == number].set_index('start').dice\n"
        "return dice['random'] - dice['informed']",
        "the sign is turned",
    ),
    (
        "4_break",
        "gap",
        "dice = history[history['round'] == number - 1].set_index('start').dice\n"
        "return dice['informed'] - dice['random']",
        "the round before",
    ),
    (
        "4_break",
        "gap",
        "dice = history.groupby('start').dice.max()\nreturn dice['informed'] - dice['random']",
        "the best round",
    ),
    (
        "4_break",
        "gap",
        "dice = {name: rows.dice.iloc[number] for name, rows in history.groupby('start')}\n"
        "return dice['informed'] - dice['random']",
        "rows taken by position",
    ),
    (
        "4_break",
        "gap",
        "dice = history[history['round'] == history['round'].max()].set_index('start').dice\n"
        "return dice['informed'] - dice['random']",
        "the last round",
    ),
    (
        "5_start",
        "images",
        "images = {'random': 3230, 'pretraining': 0, 'fm': 0}",
        "the making of the start is left out",
    ),
    ("5_start", "images", "images = {'random': 3.33, 'pretraining': 0, 'fm': 0}", "rounds instead of images"),
    ("5_start", "images", "images = {'random': 3333, 'pretraining': 6368, 'fm': 6368}", "another split"),
    ("5_start", "images", "images = {'random': 6783, 'pretraining': 6368, 'fm': 6368}", "another target"),
    (
        "5_start",
        "images",
        "images = {'random': 9690, 'pretraining': 15089, 'fm': 15089}",
        "a limit read as a result",
    ),
    (
        "5_start",
        "readings",
        chosen("readings", READINGS | {"fm less pretraining": "higher"}),
        "noise read as a difference",
    ),
    (
        "5_start",
        "readings",
        chosen("readings", READINGS | {"fm less random": "equivalent"}),
        "a difference overlooked",
    ),
    (
        "5_start",
        "readings",
        chosen("readings", READINGS | {"fm less random": "better"}),
        "none of the choices",
    ),
    ("5_start", "price", "price = 0.0106", "a fraction instead of points"),
    ("5_start", "price", "price = -1.06", "the sign is turned"),
    ("5_start", "price", "price = 9.25", "the paper's number"),
    ("5_start", "price", "price = 1.00", "another difference"),
    ("5_start", "price", "price = 0.6", "another split"),
    ("5_start", "decisions", chosen("decisions", DECISIONS, A="fm"), "no proxy set, no informed start"),
    ("5_start", "decisions", chosen("decisions", DECISIONS, B="fm"), "a cost without a gain"),
    ("5_start", "decisions", chosen("decisions", DECISIONS, C="pretraining"), "masks that are not there"),
    (
        "6_ledger",
        "fair_difference",
        difference(f"{FEDERATED} & {AGE} & {LAST}", "100 * (ends['random'] - ends['fm'])"),
        "the sign is turned",
    ),
    (
        "6_ledger",
        "fair_difference",
        difference(f"{FEDERATED} & {AGE} & {LAST}", "ends['fm'] - ends['random']"),
        "a fraction instead of points",
    ),
    ("6_ledger", "fair_difference", difference(f"{FEDERATED} & {AGE}"), "all rounds averaged"),
    ("6_ledger", "fair_difference", difference(f"{FEDERATED} & {LAST}"), "all splits together"),
    ("6_ledger", "fair_difference", difference(f"{AGE} & {LAST}"), "all arms together"),
    (
        "6_ledger",
        "fair_difference",
        difference(f"{FEDERATED} & {AGE} & {LAST} & (results.seed == 0)"),
        "one seed",
    ),
    (
        "6_ledger",
        "fair_difference",
        difference(f"{FEDERATED} & {AGE}", rows="rows.groupby(['init', 'seed']).dice.max().reset_index()"),
        "the best round",
    ),
    ("6_ledger", "faults", chosen("faults", FAULTS, A="fair"), "a round chosen by the test score"),
    ("6_ledger", "faults", chosen("faults", FAULTS, D="fair"), "two things changed at once"),
    ("6_ledger", "faults", chosen("faults", FAULTS, E="best round"), "different amounts of training"),
    ("6_ledger", "sentences", chosen("sentences", SENTENCES, _2="holds"), "noise read as a difference"),
    ("6_ledger", "sentences", chosen("sentences", SENTENCES, _4="holds"), "an interval asked for too much"),
    ("6_ledger", "sentences", chosen("sentences", SENTENCES, _5="holds"), "a limit read as a result"),
    ("6_ledger", "sentences", chosen("sentences", SENTENCES, _8="holds"), "no evidence read as evidence"),
]


@pytest.mark.parametrize(
    ("part", "name", "code", "mistake"), MISTAKES, ids=[f"{m[0]}-{m[1]}-{m[3]}" for m in MISTAKES]
)
def test_a_typical_mistake_is_named(played, part, name, code, mistake):
    steps = played(part)
    number = place(steps, name)
    error = verdict(steps, number, written(steps[number], name, code))
    assert error is not None, "the check takes it for right"
    assert error.mistake == mistake, error
    assert len(str(error)) > len(f"Not yet: {mistake}.") + 20, "it says what to do"


def test_each_thing_to_fill_in_has_three_mistakes_with_names_of_their_own(played):
    named = {}
    for part, name, _, mistake in MISTAKES:
        if not re.match("another answer|it stops|still open|nothing comes back|none of the choices", mistake):
            named.setdefault((part, name), set()).add(mistake)
    for part in PARTS:
        tasks = [cell for cell in code_cells(part, False) if "task" in cell.metadata.get("tags", [])]
        assert sum(key[0] == part for key in named) == len(tasks), part
    few = {key: names for key, names in named.items() if len(names) < 3 and key[1] != "readings"}
    assert few == {}


#: The same answers, written in another way than in the solution.
OTHERS = [
    (
        "1_look",
        "shared_patients",
        "return {p for p in table.patient_id.iloc[one] if p in list(table.patient_id.iloc[other])}",
    ),
    (
        "2_server",
        "aggregate",
        "states, numbers = zip(*updates)\nweights = torch.tensor(numbers) / sum(numbers)\n"
        "return {name: (torch.stack([s[name] for s in states]).moveaxis(0, -1) @ weights).to(value.dtype)"
        " if value.dtype == torch.float32 else value.clone() for name, value in states[0].items()}",
    ),
    (
        "3_teach",
        "kl",
        "Coin = torch.distributions.Bernoulli\n"
        "p, q = Coin(logits=teacher_logits.detach() / temperature), Coin(logits=student_logits / "
        "temperature)\n"
        "return temperature**2 * torch.distributions.kl_divergence(p, q).mean()",
    ),
    (
        "3_teach",
        "eq5",
        "return fmfl.losses.distillation_loss(student_logits, teacher_logits, masks, alpha, temperature)",
    ),
    (
        "4_break",
        "gap",
        "rows = history.query('round == @number')\n"
        "return rows.pivot(index='round', columns='start', values='dice').eval('informed - random').item()",
    ),
]


@pytest.mark.parametrize(("part", "name", "code"), OTHERS, ids=[f"{o[0]}-{o[1]}" for o in OTHERS])
def test_another_way_to_write_it_passes(played, part, name, code):
    steps = played(part)
    number = place(steps, name)
    assert verdict(steps, number, written(steps[number], name, code)) is None


def test_eq3_by_hand():
    """30 and 10 images: three quarters and one quarter. (0, 8) and (4, 0) make (1, 6)."""
    one, other = server.states()
    assert server.weighted(one, other)[server.WEIGHT][0].tolist() == [1, 6]


def test_no_two_mistakes_of_a_check_look_alike():
    """Else one of them would be called by the other's name."""
    from fmfl.course import distillation

    one, other = server.states()
    for mistakes in (
        server.weighting_mistakes(one[server.WEIGHT], other[server.WEIGHT]),
        distillation.kl_mistakes(),
    ):
        values = [torch.as_tensor(mistake.answer).double() for mistake in mistakes]
        for k, value in enumerate(values):
            twins = {
                mistakes[j].name for j, rest in enumerate(values) if j != k and answers.same(value, rest)
            }
            assert not twins, mistakes[k].name


# -------------------------------------------------------------------------------------- the predictions


@pytest.mark.parametrize(
    ("value", "mistake"),
    [
        (..., "the prediction is open"),
        ("half", "the prediction is no number"),
        (True, "the prediction is no number"),
        (0.4, "a fraction where per cent are asked"),
        (140, "a prediction out of range"),
    ],
)
def test_a_prediction_has_to_be_written_and_to_be_possible(tmp_path, value, mistake):
    with pytest.raises(NotYet) as caught:
        answers.predict(tmp_path, "share", value, 0, 100, "%")
    assert caught.value.mistake == mistake
    assert not (tmp_path / "predictions.json").exists()


def test_the_first_prediction_counts(tmp_path, capsys):
    with pytest.raises(NotYet, match="no prediction"):
        answers.compare(tmp_path, "share", 44.0, "%")
    answers.predict(tmp_path, "share", 10, 0, 100, "%")
    answers.predict(tmp_path, "share", 44, 0, 100, "%")
    answers.compare(tmp_path, "share", 44.0, "%")
    assert json.loads((tmp_path / "predictions.json").read_text()) == {"share": 10}
    *_, second, shown = capsys.readouterr().out.splitlines()
    assert second.endswith("Your first one, 10, counts.")
    assert shown == "share: you predicted 10 %, and it is 44.00 %."


# ------------------------------------------------------------------------------------- notebooks and copies


@pytest.mark.parametrize("part", PARTS)
def test_the_committed_notebook_is_the_sources_and_has_no_output(part):
    file = exercises.FOLDER / f"{part}.ipynb"
    made = exercises.notebook(source(part))
    nbformat.validate(made)
    assert file.read_text(encoding="utf-8") == exercises.text_of(made), "run python -m fmfl.course build"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in made.cells)


def test_no_other_notebook_lies_among_the_exercises():
    assert sorted(file.stem for file in exercises.FOLDER.rglob("*.ipynb")) == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_an_open_notebook_holds_no_solution_and_a_solved_one_no_mark(part):
    open_text = exercises.text_of(exercises.notebook(source(part)))
    solved_text = exercises.text_of(exercises.notebook(source(part), solutions=True))
    for text in (open_text, solved_text):
        assert not re.search("(BEGIN|END) (STUB|SOLUTION)", text)
    for lines in re.findall(r"# BEGIN SOLUTION\n(.*?) *# END SOLUTION", source(part).read_text(), re.S):
        first = json.dumps(lines.strip().splitlines()[-1])[1:-1]
        assert first in solved_text and (first not in open_text or first == "}")


def test_a_stub_keeps_its_indentation_and_dots_stand_where_there_is_none():
    code = "def f():\n    # BEGIN SOLUTION\n    return 1\n    # END SOLUTION\n\n"
    code += "# BEGIN STUB\n# a = ...\n# BEGIN SOLUTION\na = 1\n# END SOLUTION\n"
    assert exercises.unsolved(code) == "def f():\n    ...  # your lines\n\na = ...\n"
    assert exercises.solved(code) == "def f():\n    return 1\n\na = 1\n"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_title_goal_time_a_prediction_and_short_cells(part):
    cells = exercises.notebook(source(part)).cells
    assert re.match(rf"# Part {part[0]} · ", cells[0].source) and "**Goal:**" in cells[0].source
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "<details><summary>Hint" in prose and "## Predict" in prose and "## Talk about it" in prose
    assert prose.count("<details>") == prose.count("</details>")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert max(len(text.splitlines()) for text in code) <= 13
    after = [one.cell_type for one, other in pairwise(cells) if other.cell_type == "code"]
    assert after.count("markdown") >= 0.5 * len(after)


@pytest.mark.parametrize("place", [exercises.FOLDER, paths.RUNS / "class" / "ada"])
@pytest.mark.parametrize("part", PARTS)
def test_every_link_of_a_copy_resolves(part, place):
    text = "\n".join(
        c.source for c in exercises.notebook(source(part), folder=place).cells if c.cell_type == "markdown"
    )
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 2
    for link in links:
        here = exercises.FOLDER if link.endswith(".ipynb") else place
        # `place` need not exist, so its `..` are taken away without a look at the disk
        target = (
            (here / link)
            if link.endswith(".ipynb")
            else paths.ROOT / link.removeprefix("../" * link.count("../"))
        )
        assert target.exists(), link


def test_copies_have_folders_of_their_own_and_a_participants_work_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    copied = CliRunner().invoke(commands.app, ["copy", "ada", "bob", "--no-check"])
    assert (
        copied.exit_code == 0 and "6 new notebooks" in copied.output and "Next: `make lab`" in copied.output
    )
    ada, bob = (tmp_path / "class" / name for name in ("ada", "bob"))
    assert sorted(file.stem for file in ada.iterdir()) == PARTS == sorted(file.stem for file in bob.iterdir())
    for folder in (ada, bob):
        cells = nbformat.read(folder / "2_server.ipynb", as_version=4).cells
        (parameters,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        assert parameters.startswith(f'participant: str = "{folder.name}"\n')
        assert answers.folder(folder.name) == folder
    (ada / "2_server.ipynb").write_text("my work")
    (ada / "3_teach.ipynb").unlink()
    again = CliRunner().invoke(commands.app, ["copy", "ada", "--no-check"])
    assert "1 new notebooks, 5 stay as they are" in again.output
    assert (ada / "2_server.ipynb").read_text() == "my work" and (ada / "3_teach.ipynb").exists()


@pytest.mark.parametrize("name", ["../ada", "a b", ""])
def test_a_name_that_makes_no_folder_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    refused = CliRunner().invoke(commands.app, ["copy", name, "--no-check"])
    assert (
        refused.exit_code == 2
        and "Use letters, digits" in refused.output
        and "Traceback" not in refused.output
    )
    assert list(tmp_path.iterdir()) == []


def test_the_faults_are_no_setting_of_the_package():
    """A server that forgets statistics lives in part 4 and in bench/collapse.py alone."""
    words = " ".join(str(parameter) for parameter in config.PARAMETERS.values())
    assert "forget" not in words


def test_the_check_of_all_notebooks_runs_no_open_exercise():
    """`make test` gives nbval the notebooks of the story by name; the solved exercises run below."""
    makefile = (paths.ROOT / "Makefile").read_text()
    (pattern,) = re.findall(r"--nbval-lax (\S+)", makefile)
    assert sorted(file.stem for file in paths.ROOT.glob(pattern)) == [*config.NOTEBOOKS, "06_use"]


# ------------------------------------------------------------------------------------------ in kernels


@pytest.mark.slow
def test_the_whole_course_runs_in_kernels_and_shows_the_finding(tmp_path):
    """Part 4: forgotten running statistics ruin the random start and leave the informed one where it was."""
    ran = dict(classroom.run_solutions(tmp_path))
    assert list(ran) == PARTS
    cells = nbformat.read(tmp_path / "4_break.ipynb", as_version=4).cells
    text = "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))
    came = {
        name: float(value)
        for name, value in re.findall(r"(\w+) start, statistics forgotten: .* it is ([\d.]+)", text)
    }
    assert came["random"] < 60 and came["informed"] > 80
    early, late = map(
        float, re.search(r"after round 1: ([\d.]+) points; after round 8: ([\d.]+) points", text).groups()
    )
    assert early > 2 * late > 0


@pytest.mark.slow
def test_in_a_kernel_an_open_exercise_shows_a_sentence_and_no_traceback(tmp_path):
    import papermill
    from papermill.exceptions import PapermillExecutionError

    out = tmp_path / "out.ipynb"
    with pytest.raises(PapermillExecutionError):
        papermill.execute_notebook(
            exercises.FOLDER / "5_start.ipynb",
            out,
            {"participant": str(tmp_path)},
            kernel_name="python3",
            progress_bar=False,
        )
    shown = [
        o
        for cell in nbformat.read(out, as_version=4).cells
        for o in cell.get("outputs", [])
        if o.output_type == "error"
    ]
    assert [error.traceback[0] for error in shown] == ["Not yet: the prediction is open."]
    assert "Traceback" not in str(shown)


# -------------------------------------------------------------------------------- containers and Binder


def test_a_container_and_binder_switch_off_the_news_as_make_does():
    """Binder reads environment.yml and postBuild at the top; a folder `binder` would hide them."""
    extension = "@jupyterlab/apputils-extension:announcements"
    assert extension in (paths.ROOT / "Makefile").read_text()
    post_build = paths.ROOT / "postBuild"
    assert extension in post_build.read_text() and os.access(post_build, os.X_OK)
    assert (paths.ROOT / "environment.yml").is_file()
    assert not any((paths.ROOT / name).exists() for name in ("binder", ".binder"))
    container = json.loads((paths.ROOT / ".devcontainer" / "devcontainer.json").read_text())
    target = container["postCreateCommand"].removeprefix("make ")
    assert re.search(rf"^{re.escape(target)}:", (paths.ROOT / "Makefile").read_text(), re.M)
