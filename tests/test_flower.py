"""The study behind Flower's messages: the same bytes, faults that cost no round, nothing of the data sent."""

import dataclasses
import importlib.util
import math

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_fab_config
from torch import nn

from fmfl import config, devices, federate, models, runs, states
from fmfl.analysis import landscape
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import UserError
from fmfl.flower import client, deploy, engine, messages, server
from fmfl.flower.nodes import Nodes, train_round
from fmfl.runs import Run
from fmfl.study import execute, grid, stages
from fmfl.train import FitResult

SIZE = 32
TEST = torch.tensor([12, 13])
PARTS = [torch.arange(3), torch.arange(3, 8), torch.arange(8, 12)]


@pytest.fixture(autouse=True)
def _micro_student(monkeypatch):
    """A student that trains in milliseconds, with BatchNorm and its integer buffers; on one thread."""
    monkeypatch.setitem(
        models.STUDENTS,
        "micro",
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
        ),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_cohort() -> Cohort:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(20, 120, (14, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    masks = torch.zeros_like(images)
    for i in range(14):
        masks[i, :, 6 + i % 4 : 20 + i % 5, 5 + i % 3 : 24] = 1
    images[masks == 1] += 100
    table = pd.DataFrame(
        {
            "image_id": [f"picture-of-{i}" for i in range(14)],
            "patient_id": [f"Jane-Doe-{i}" for i in range(14)],
            "site": "Saint Nowhere",
            "age": np.arange(14) + 0.8125,
        }
    )
    return Cohort(images, masks, table, pd.DataFrame(), fingerprint="cohort")


def settings(folder, **given) -> config.Settings:
    usual = {"num_rounds": 3, "batch_size": 4, "learning_rate": 1e-2, "student": "micro", "size": SIZE}
    quick = {"round_timeout": 1.0, "join_timeout": 0.0, "engine": "flower", "device": "cpu"}
    return config.settings(usual | quick | {"run_name": folder} | given)


def test_a_node_and_a_server_are_as_deterministic_as_the_run(tmp_path, monkeypatch):
    """Of their own images, and where a server has none to score on."""
    asked = []
    monkeypatch.setattr(devices, "set_determinism", asked.append)
    monkeypatch.setattr(client.data, "load", lambda *args, **how: a_cohort())
    cfg = settings(tmp_path, deterministic=True)
    client.load("a folder", cfg)
    server._test_images(cfg)
    server._test_images(
        dataclasses.replace(cfg, flower=dataclasses.replace(cfg.flower, test_data="a folder"))
    )
    assert asked == [cfg.run] * 3


def start(cfg: config.Settings, parts=PARTS) -> Run:
    cohort = a_cohort()
    model = models.build("micro", batch_norm=cfg.federate.batch_norm)
    return runs.start_or_resume(
        cfg.run_dir,
        InitialState("random", model.state_dict(), FitResult()),
        runs.clients_of(cohort, parts),
        cfg.federate,
        student="micro",
        cohort=cohort,
        test=TEST,
        engine=stages.engine_key(cfg),
    )


def finish(run: Run, train, rounds: int | None = None) -> Run:
    """The notebook's loop, to the end or stopped after some rounds."""
    cohort = a_cohort()
    for number in run.remaining_rounds():
        run.finish_round(federate.aggregate(train(run)), cohort, TEST)
        if number == rounds:
            break
    return run


def at(nodes: Nodes):
    """Train at these nodes."""
    return lambda run: train_round(nodes, run)


LOCAL = landscape.watched(runs.train_clients)


def digests(run: Run) -> list[str]:
    return [done["sha256"] for done in run.rounds]


# ------------------------------------------------------------------------------------------ the same study


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optimizer_state": "keep", "local_epochs": 2},
        {"batch_norm": "local"},
        {"batch_norm": "group", "server": "adam"},
        {"participation": 0.6, "proximal": 0.1, "client_weights": "uniform"},
    ],
)
def test_the_rounds_are_the_local_engines_to_the_last_bit(tmp_path, given):
    local = finish(start(settings(tmp_path / "local", engine="local", num_rounds=5, **given)), LOCAL)
    cfg = settings(tmp_path / "flower", num_rounds=5, **given)
    behind_messages = finish(start(cfg), stages.engine(cfg))
    assert digests(behind_messages) == digests(local) and len(set(digests(local))) == 6
    compared = ["dice", "iou", "hd95", "images_seen"]
    tables = [pd.DataFrame(run.history) for run in (behind_messages, local)]
    assert tables[0][compared].equals(tables[1][compared])
    assert list(tables[0]) == list(tables[1])
    one, other = (landscape.drift_by_round([run]) for run in (behind_messages, local))
    assert one.equals(other) and one.update_norm.notna().all()


@pytest.mark.usefixtures("diverging")
@pytest.mark.parametrize("given", [{"optimizer_state": "keep"}, {"batch_norm": "local"}])
def test_a_client_that_diverged_comes_back_as_with_the_local_engine(tmp_path, given):
    """Its update is left out of the round; what it keeps for the next one is its own affair."""
    with pytest.warns(UserWarning, match="is not finite"):
        local = finish(start(settings(tmp_path / "local", engine="local", num_rounds=4, **given)), LOCAL)
    cfg = settings(tmp_path / "flower", num_rounds=4, **given)
    behind_messages = finish(start(cfg), stages.engine(cfg))
    assert behind_messages.rounds[2]["clients"] == [0, 2]
    assert digests(behind_messages) == digests(local)


@pytest.mark.parametrize("given", [{}, {"optimizer_state": "keep"}, {"batch_norm": "local"}])
def test_a_run_that_was_stopped_goes_on_in_the_same_bytes(tmp_path, given):
    whole_cfg, cfg = settings(tmp_path / "whole", **given), settings(tmp_path / "stopped", **given)
    whole = finish(start(whole_cfg), engine.connect(whole_cfg))
    finish(start(cfg), engine.connect(cfg), rounds=2)
    again = start(cfg)
    assert again.round_number == 2
    finish(again, engine.connect(cfg))
    assert digests(again) == digests(whole)


def test_an_engine_does_not_take_the_others_rounds_for_its_own(tmp_path):
    """Its bytes are measured, the local engine's estimated."""
    finish(start(settings(tmp_path, engine="local")), LOCAL)
    assert start(settings(tmp_path)).round_number == 0


def test_the_study_puts_flower_between_the_federated_runs_alone(tmp_path):
    estimated, measured = {}, {}
    for arm in ("federated", "centralised"):
        for engine_name, of in (("local", estimated), ("flower", measured)):
            run = dataclasses.replace(start(settings(tmp_path / engine_name, engine=engine_name)), arm=arm)
            assert len(list(stages.engine(settings(tmp_path, engine=engine_name))(run))) == 3
            of[arm] = run.traffic
    assert measured["federated"].clients == [0, 1, 2]
    assert measured["centralised"] is None and list(estimated.values()) == [None, None]


@pytest.mark.slow
def test_the_notebook_gives_the_same_results_with_either_engine(tmp_path):
    """All columns, but for what is measured: the bytes, and the seconds."""
    tables = {}
    for name in ("local", "flower"):
        given = {"size": 32, "num_phantoms": 40, "num_rounds": 2, "proxy_epochs": 1, "inits": "random"}
        cfg = config.settings(
            given | {"student": "tiny_unet", "run_name": str(tmp_path / name), "engine": name}
        )
        (cell,) = [c for c in grid.plan(cfg, [0], ["iid"]) if c.notebook == "04_federate"]
        assert cell.parameters["engine"] == name and "min_clients" in cell.parameters
        execute.plain(cell, tmp_path / name / "out.ipynb")
        tables[name] = pd.read_csv(tmp_path / name / "cells" / cell.name / "results.csv")
    measured = ["seconds", "bytes_up", "bytes_down"]
    local, flowers = tables["local"], tables["flower"]
    assert list(local) == list(flowers) and set(local.arm) == {"federated", "centralised", "standalone"}
    assert local.drop(columns=measured).equals(flowers.drop(columns=measured))
    last = local["round"] == 2
    assert (flowers.bytes_up[last & (local.arm == "federated")] > local.bytes_up[last].max()).all()
    assert (flowers.bytes_up[local.arm != "federated"] == 0).all()


# ------------------------------------------------------------------------------------------ what crosses


class Recorded(engine.InProcess):
    """Keeps every byte that crosses, both ways."""

    def __init__(self, *given):
        super().__init__(*given)
        self.crossed = []

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        self.crossed += [self.posted[name] for name in ids]
        return ids

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        self.crossed += [engine.message_to_proto(reply).SerializeToString() for reply in replies]
        return replies


def grid_of(nodes: Nodes, kind=engine.InProcess, **given):
    """The same nodes behind another kind of grid."""
    nodes.grid = kind(nodes.grid.app, nodes.grid.contexts.values(), **given)
    return nodes.grid


def test_no_image_no_mask_and_no_row_of_the_table_crosses(tmp_path):
    cfg = settings(tmp_path)
    run = start(cfg)
    nodes = engine.simulated(cfg, run)
    grid = grid_of(nodes, Recorded)
    first = run.theta["0.weight"].numpy().tobytes()
    finish(run, at(nodes))
    crossed = b"".join(grid.crossed)
    assert first in crossed, "weights are found, so an image would be"
    cohort = a_cohort()
    for i in range(14):
        row = cohort.images[i, 0, SIZE // 2]
        for form in (row, row.float(), row.float() / 255, row.half(), row.to(torch.int64)):
            assert form.numpy().tobytes()[:64] not in crossed
        mask = cohort.masks[i, 0]
        for form in (mask[8:12], mask[8:12].bool(), mask[8:12].float()):
            assert form.numpy().tobytes() not in crossed
        assert np.packbits(mask[8:16].numpy()).tobytes() not in crossed
        for name in ("image_id", "patient_id", "site"):
            assert cohort.table[name][i].encode() not in crossed
        assert np.float64(cohort.table.age[i]).tobytes() not in crossed


def test_bytes_are_those_of_the_messages_and_hardly_more_than_the_weights(tmp_path):
    given = {"student": "tiny_unet", "num_rounds": 1}
    cfg = settings(tmp_path, **given)
    cohort = a_cohort()
    model = models.build("tiny_unet")
    run = runs.start_or_resume(
        tmp_path, InitialState("random", model.state_dict(), FitResult()), runs.clients_of(cohort, PARTS),
        cfg.federate, student="tiny_unet", cohort=cohort, test=TEST,
    )  # fmt: skip
    nodes = engine.simulated(cfg, run)
    grid = grid_of(nodes, Recorded)
    finish(run, at(nodes))
    weights = 3 * models.num_bytes(model.state_dict())
    row = run.history[-1]
    assert weights < row["bytes_up"] < 1.01 * weights and weights < row["bytes_down"] < 1.01 * weights
    asking = sum(len(sent) for sent in grid.crossed if len(sent) < 10_000)
    whole = sum(map(len, grid.crossed)) - asking
    assert row["bytes_up"] + row["bytes_down"] == pytest.approx(whole, abs=200), "but for the messages' names"


def test_a_state_is_packed_and_unpacked_bit_by_bit():
    state = models.build("tiny_unet").state_dict()
    found = messages.unpack(messages.pack(state), state)
    assert list(found) == list(state) and states.state_digest(found) == states.state_digest(state)
    assert len(messages.pack(state)) == 2, "two arrays cross instead of hundreds"


# ------------------------------------------------------------------------------------------ faults


class Faulty(engine.InProcess):
    """Nodes of which one answers otherwise, from some round on."""

    def __init__(self, *given, client=1, since=2, tamper=None):
        super().__init__(*given)
        self.client, self.since, self.tamper = client, since, tamper

    def pull_messages(self, message_ids):
        found = []
        for name in list(message_ids):
            message = engine.message_from_proto(engine.MessageProto.FromString(self.posted[name]))
            group = message.metadata.group_id
            faulty = message.metadata.dst_node_id == 1000 + self.client and group
            if faulty and int(group) >= self.since:
                if self.tamper is None:  # hangs
                    continue
                (reply,) = super().pull_messages([name])
                found.append(self.tamper(reply))
            else:
                found += super().pull_messages([name])
        return found


def with_records(**records):
    """Puts other records into a reply."""

    def tamper(reply: Message) -> Message:
        for name, change in records.items():
            reply.content[name] = change(reply.content[name])
        return reply

    return tamper


def spoilt(value: float):
    def change(record: ArrayRecord) -> ArrayRecord:
        numbers = record["float32"].numpy().copy()
        numbers[7] = value
        return ArrayRecord({**record, "float32": Array(numbers)})

    return change


def no_images(record: MetricRecord) -> MetricRecord:
    return MetricRecord({**record, "weight": 0})


def shorter(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({**record, "float32": Array(record["float32"].numpy()[:-1].copy())})


def other_names(record: ConfigRecord) -> ConfigRecord:
    return ConfigRecord({**record, "layout": "another"})


def somebody_else(record: ConfigRecord) -> ConfigRecord:
    return ConfigRecord({**record, "client": 0})


FAULTS = {
    "hangs": (None, "gave no answer within 1 s"),
    "NaN": (with_records(weights=spoilt(math.nan)), "weights that are not finite"),
    "infinite": (with_records(weights=spoilt(math.inf)), "weights that are not finite"),
    "shape": (with_records(weights=shorter), "not as many numbers"),
    "kind": (with_records(weights=lambda r: ArrayRecord({"float32": r["float32"]})), "no int64 numbers"),
    "empty": (with_records(weights=lambda _: ArrayRecord()), "no float32 numbers"),
    "names": (with_records(about=other_names), "tensors of other names"),
    "no images": (with_records(numbers=no_images), "with weight 0"),
    "somebody else": (with_records(about=somebody_else), "answers as client 0"),
}


@pytest.mark.parametrize(("tamper", "says"), FAULTS.values(), ids=list(FAULTS))
def test_a_round_goes_on_without_a_client_that_fails(tmp_path, caplog, tamper, says):
    """It ends where the others alone would have brought it."""
    cfg = settings(tmp_path / "faulty", num_rounds=2)
    run = start(cfg)
    nodes = engine.simulated(cfg, run)
    grid_of(nodes, Faulty, tamper=tamper)
    finish(run, at(nodes))
    assert [done["clients"] for done in run.rounds] == [[], [0, 1, 2], [0, 2]]
    assert list(run.rounds[2]["faults"]) == [1] and says in run.rounds[2]["faults"][1]
    assert "client 1" in caplog.text and says in caplog.text
    stored = states.read_record(run.file)["rounds"][2]
    assert says in stored["faults"]["1"], "JSON's keys are texts"

    local = finish(start(settings(tmp_path / "local", engine="local", num_rounds=2)), LOCAL, rounds=1)
    finish(local, lambda run: runs.train_clients(run, [0, 2]))
    assert digests(run) == digests(local)
    assert run.images_seen == 12 + 7


def test_a_client_whose_training_raises_is_left_out_with_its_own_words(tmp_path):
    cfg = settings(tmp_path, num_rounds=1)
    run = start(cfg)
    nodes = engine.simulated(cfg, run)
    run.clients[2].images = torch.empty(0, 1, SIZE, SIZE, dtype=torch.uint8)  # its folder was emptied
    finish(run, at(nodes))
    assert run.rounds[1]["clients"] == [0, 1]
    assert "failed: index" in run.rounds[1]["faults"][2] and "<class" not in run.rounds[1]["faults"][2]


def test_too_few_good_updates_stop_the_run_and_it_goes_on_at_that_round(tmp_path):
    cfg = settings(tmp_path, min_clients=3)
    run = start(cfg)
    nodes = engine.simulated(cfg, run)
    grid_of(nodes, Faulty, tamper=with_records(weights=spoilt(math.nan)))
    with pytest.raises(UserError, match=r"round 2 has 2 good updates and min_clients asks for 3 \(client 1 "):
        finish(run, at(nodes))
    again = start(cfg)
    assert again.round_number == 1
    finish(again, engine.connect(cfg))
    whole = finish(start(settings(tmp_path / "local", engine="local")), LOCAL)
    assert digests(again) == digests(whole)


def test_one_client_alone_needs_no_second(tmp_path):
    cfg = settings(tmp_path, num_rounds=1, num_clients=1)
    run = start(cfg, PARTS[:1])
    finish(run, engine.connect(cfg))
    assert run.rounds[1]["clients"] == [0]


class Arriving(engine.InProcess):
    """Nodes that come and go: round -> those who are there from its beginning on."""

    def __init__(self, *given, there):
        super().__init__(*given)
        self.there, self.round_number = there, 1

    def get_node_ids(self):
        return [1000 + k for k in self.there[min(self.round_number, max(self.there))]]


def test_a_client_that_joins_late_takes_part_from_then_on_and_one_that_leaves_is_missed(tmp_path):
    cfg = settings(tmp_path, num_rounds=4, join_timeout=0.3)
    run = start(cfg)
    nodes = engine.simulated(cfg, run)
    grid = grid_of(nodes, Arriving, there={1: [0, 1], 2: [0, 1, 2], 3: [1, 2], 4: [0, 1, 2]})
    for number in run.remaining_rounds():
        grid.round_number = number
        run.finish_round(federate.aggregate(train_round(nodes, run)), a_cohort(), TEST)
    assert [done["clients"] for done in run.rounds[1:]] == [[0, 1], [0, 1, 2], [1, 2], [0, 1, 2]]
    assert [done.get("faults") for done in run.rounds[1:]] == [
        {2: "is not there"}, None, {0: "is not there"}, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (7, None, "client 7, and there is none of that number"),
        (0, None, "client 0, which is there already"),
        (1, "other code", "another version of fmfl"),
    ],
)
def test_a_node_is_not_taken_in(tmp_path, caplog, number, code, says):
    """One that claims another's number would push the other out."""
    cfg = settings(tmp_path, num_rounds=1)
    run = start(cfg)
    nodes = engine.simulated(cfg, run)
    inner = nodes.grid.app

    def app(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if context.node_id == 1001 and "about" in reply.content and "weights" not in reply.content:
            about = {**reply.content["about"], "client": number}
            reply.content["about"] = ConfigRecord(about | ({"code": code} if code else {}))
        return reply

    nodes.grid.app = app
    finish(run, at(nodes))
    assert run.rounds[1]["clients"] == [0, 2] and run.rounds[1]["faults"] == {1: "is not there"}
    assert says in caplog.text


# ------------------------------------------------------------------------------------------ a client's images


def test_a_nodes_own_part_is_the_studys(tmp_path):
    given = {"num_phantoms": 40, "num_clients": 2, "split": "iid"}
    cfg = settings(tmp_path, **given)
    cohort = stages.load_cohort(cfg)
    expected = stages.partition(cohort, stages.holdout(cfg, cohort).federated, cfg.federate)
    for k in range(2):
        context = Context(1, 2, {"partition-id": k}, RecordDict(), {})
        held = client.own_images(context, cfg)
        assert held.number == k and torch.equal(held.examples.indices, expected[k])
        assert torch.equal(held.examples.images, cohort.images)


@pytest.mark.parametrize("number", [None, -1, 3, "one"])
def test_a_node_without_a_number_is_told_so(tmp_path, number):
    context = Context(1, 2, {} if number is None else {"partition-id": number}, RecordDict(), {})
    with pytest.raises(UserError, match=r"partition-id is .*: give it a number from 0 to 2"):
        client.own_images(context, settings(tmp_path))


def test_what_a_client_keeps_stays_in_its_context():
    context = Context(1, 2, {}, RecordDict(), {})
    memory = {
        "adam/0/exp_avg": torch.randn(2, 3),
        "adam/0/step": torch.tensor(4.0),
        "norm/a": torch.ones(1),
    }
    assert client.recall(context) == {}
    client.remember(context, memory)
    assert states.state_digest(client.recall(context)) == states.state_digest(memory)


# ------------------------------------------------------------------------------------------ the app


def test_the_app_lists_every_parameter_with_the_runs_values(tmp_path):
    """As Flower itself reads it: a parameter that is not listed is refused by `flwr run --run-config`."""
    given = {"num_rounds": 7, "learning_rate": 1e-4, "strict": True, "run_name": 'a "quoted" \\\\ folder é'}
    deploy.write_app(tmp_path, given)
    built = build_fab_from_disk(tmp_path)
    listed = get_fab_config(built)["tool"]["flwr"]["app"]["config"]
    assert listed == deploy.run_config() | given
    assert set(listed) >= {"num_rounds", "batch_norm", "start", "test_data", "min_clients", "size"}
    spec = importlib.util.spec_from_file_location("fmfl_app", tmp_path / "fmfl_app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    assert app.client is client.client_app and app.server is server.server_app


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"numrounds": 3}, "parameter 'numrounds' is unknown: did you mean num_rounds?"),
        ({"num_rounds": "3"}, "num_rounds must be a whole number"),
        ({"min_clients": 0}, "min_clients is 0"),
    ],
)
def test_flowers_run_config_is_under_the_contract_of_parameters(given, says):
    with pytest.raises(UserError, match=says):
        client.settings_of(Context(1, 2, {}, RecordDict(), deploy.run_config() | given))


@pytest.mark.parametrize("test_data", ["held_out", ""])
def test_a_deployments_results_have_the_columns_of_every_study(tmp_path, test_data):
    """From a start in a file, with the server's own test images or without any."""
    cfg = settings(tmp_path, num_phantoms=40, student="tiny_unet", num_rounds=2, test_data=test_data)
    file = tmp_path / "init-fm-seed0.safetensors"
    state = models.build("tiny_unet", seed=5).state_dict()
    fit = {"losses": [], "images_seen": 11, "seconds": 2.5}
    states.write_state(file, state, init="fm", fit=fit)
    cfg = dataclasses.replace(cfg, flower=dataclasses.replace(cfg.flower, start=str(file)))
    cohort = stages.load_cohort(cfg)
    clients = stages.partition(cohort, stages.holdout(cfg, cohort).federated, cfg.federate)
    held = runs.clients_of(cohort, clients)
    app = client.make_client_app(
        lambda c, _: client.ClientData(c.node_config["partition-id"], held[c.node_config["partition-id"]])
    )
    contexts = [Context(1, k, {"partition-id": k}, RecordDict(), cfg.flat()) for k in held]
    run = server.serve(engine.InProcess(app, contexts), cfg)

    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table) == [
        *("arm", "init", "split", "seed", "round", "dice", "iou", "hd95", "seconds"),
        *("bytes_up", "bytes_down", "images_seen"),
    ]
    assert list(table["init"]) == ["fm"] * 3 and table.images_seen[0] == 11
    assert table.dice.notna().all() == bool(test_data)
    assert run.rounds[0]["sha256"] == states.state_digest(state)
    assert (tmp_path / "per_image.csv").exists() == bool(test_data)
    assert list(pd.read_csv(tmp_path / "faults.csv")) == ["round", "client", "fault"]
    assert server.serve(engine.InProcess(app, contexts), cfg).rounds == run.rounds, "nothing is left to do"


@pytest.mark.parametrize(
    ("student", "says"), [("micro", "does not hold the weights of student"), (None, "missing")]
)
def test_a_start_that_does_not_fit_is_refused(tmp_path, student, says):
    file = tmp_path / "start.safetensors"
    if student:
        states.write_state(file, models.build(student).state_dict())
    cfg = settings(tmp_path, student="tiny_unet", start=str(file))
    with pytest.raises(UserError, match=says):
        server.serve(engine.InProcess(None, []), cfg)


def test_a_start_with_batchnorm_is_no_start_of_a_network_with_groupnorm(tmp_path):
    """It holds tensors of all the names that GroupNorm has, and statistics that would be dropped."""
    file = tmp_path / "start.safetensors"
    states.write_state(file, models.build("unet").state_dict())
    cfg = settings(tmp_path, student="unet", start=str(file), batch_norm="group")
    with pytest.raises(UserError, match="with batch_norm 'group': choose the student and the batch_norm"):
        server.serve(engine.InProcess(None, []), cfg)


def nodes_of(cfg: config.Settings) -> engine.InProcess:
    held = runs.clients_of(a_cohort(), PARTS)
    app = client.make_client_app(lambda c, _: client.ClientData(c.node_id, held[c.node_id]))
    return engine.InProcess(app, [Context(1, k, {}, RecordDict(), cfg.flat()) for k in held])


def test_a_run_with_other_settings_is_not_written_over(tmp_path):
    cfg = settings(tmp_path, num_rounds=1)
    first = server.serve(nodes_of(cfg), cfg)
    before = first.file.read_bytes()
    for changed in ({"num_rounds": 2}, {"learning_rate": 1e-3}):
        other = settings(tmp_path, **{"num_rounds": 1} | changed)
        with pytest.raises(UserError, match=r"holds 1 rounds made with other settings.*--out"):
            server.serve(nodes_of(other), other)
    assert first.file.read_bytes() == before
    table = (tmp_path / "results.csv").read_bytes()
    other = settings(tmp_path, num_rounds=1, seed=1)
    with pytest.raises(UserError, match=r"is of another run than federated-age-random-seed1: .*--out"):
        server.serve(nodes_of(other), other)
    (tmp_path / "cells" / "01_data").mkdir(parents=True)
    (tmp_path / "cells" / "01_data" / "cell.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a study: name another folder with --out"):
        server.serve(nodes_of(cfg), cfg)
    assert first.file.read_bytes() == before and (tmp_path / "results.csv").read_bytes() == table


@pytest.mark.parametrize("client_weights", ["images", "uniform"])
def test_a_client_cannot_choose_its_weight(tmp_path, client_weights):
    def heavier(record: MetricRecord) -> MetricRecord:
        return MetricRecord({**record, "weight": 10**9})

    cfg = settings(tmp_path, num_rounds=2, client_weights=client_weights)
    run = start(cfg)
    nodes = engine.simulated(cfg, run)
    grid_of(nodes, Faulty, tamper=with_records(numbers=heavier))
    finish(run, at(nodes))
    assert run.rounds[2]["clients"] == [0, 2]
    due = 5 if client_weights == "images" else 1
    assert run.rounds[2]["faults"] == {1: f"asks for weight 1000000000 where it has {due}"}
