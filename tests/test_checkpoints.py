"""Files from elsewhere: whole ones in every form, wrong ones in one sentence each, none of their code run."""

import hashlib
import pickle
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from fmfl import checkpoints
from fmfl.checkpoints import compare, read
from fmfl.errors import UserError

STATE = {
    "image_encoder.pos_embed": torch.arange(8.0).reshape(1, 2, 2, 2),
    "image_encoder.blocks.0.Adapter.norm.weight": torch.ones(2),
    "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 3),
    "mask_decoder.iou_token.weight": torch.full((1, 3), 5.0),
}


def bare(file):
    torch.save(STATE, file)


def legacy(file):
    torch.save(STATE, file, _use_new_zipfile_serialization=False)


def under_model(file):
    torch.save({"model": STATE, "epoch": 3}, file)


def under_state_dict(file):
    torch.save({"state_dict": STATE}, file)


def beside_an_optimizers_state(file):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    torch.save({"model": STATE, "optimizer": optimizer.state_dict()}, file)


def beside_a_whole_optimizer(file):
    optimizer = torch.optim.Adam([weight := torch.nn.Parameter(torch.ones(3))])
    weight.sum().backward()
    optimizer.step()
    torch.save({"model": STATE, "optimizer": optimizer}, file)


def from_a_parallel_run(file):
    torch.save({"model": {f"module.{key}": value for key, value in STATE.items()}}, file)


def as_safetensors(file):
    save_file(STATE, file)


@pytest.mark.parametrize(
    "write",
    [
        bare,
        legacy,
        under_model,
        under_state_dict,
        beside_an_optimizers_state,
        beside_a_whole_optimizer,
        from_a_parallel_run,
        as_safetensors,
    ],
)
def test_every_form_gives_the_same_tensors(tmp_path, write):
    """The name says nothing about the form."""
    file = tmp_path / "weights.pth"
    write(file)
    found = read(file)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


# ------------------------------------------------------------------------------------------ wrong files


class Malicious:
    """What a pickle can hold: a command that runs when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.file)],)


def malicious(file):
    torch.save({"model": STATE, "optimizer": Malicious(file.with_name("ran"))}, file)


def malicious_legacy(file):
    torch.save([Malicious(file.with_name("ran"))], file, _use_new_zipfile_serialization=False)


def malicious_plain(file):  # not from PyTorch
    file.write_bytes(pickle.dumps(Malicious(file.with_name("ran")), protocol=2))


def test_the_malicious_file_does_run_where_code_is_allowed(tmp_path):
    """Otherwise the next test would show nothing."""
    malicious(tmp_path / "weights.pth")
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", [malicious, malicious_legacy, malicious_plain])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, write):
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises(UserError, match="asks to run code when it is read, which is refused"):
        read(file)
    assert list(tmp_path.iterdir()) == [file]


def test_no_code_of_an_optimizer_runs(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    beside_a_whole_optimizer(file)

    def called(*args):
        raise AssertionError("the optimizer's own code ran")

    monkeypatch.setattr(torch.optim.Adam, "__setstate__", called)
    assert read(file).keys() == STATE.keys()


def not_there(file):
    pass


def folder(file):
    file.mkdir()


def empty(file):
    file.write_bytes(b"")


def page(file):
    file.write_text("\n<!DOCTYPE html>\n<html><body>Virus scan warning</body></html>\n")


def text(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\n")


def truncated(file):
    torch.save({"weight": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:3000])


def truncated_legacy(file):
    legacy(file)
    file.write_bytes(file.read_bytes()[:-40])


def truncated_early(file):
    legacy(file)
    file.write_bytes(file.read_bytes()[:40])


def truncated_safetensors(file):
    as_safetensors(file)
    file.write_bytes(file.read_bytes()[:-10])


def whole_network(file):
    torch.save(torch.nn.Linear(2, 2), file)


def a_list(file):
    torch.save([torch.zeros(2)], file)


def numbers(file):
    torch.save({"lr": 0.1}, file)


def nothing(file):
    torch.save({}, file)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (not_there, "are not there: name an existing file"),
        (folder, "is a folder, not a file"),
        (empty, "is empty"),
        (page, "is a web page, not weights"),
        (text, "is no checkpoint: neither PyTorch's format nor safetensors"),
        (truncated, "is truncated"),
        (truncated_legacy, "damaged or truncated"),
        (truncated_early, "damaged or truncated"),
        (truncated_safetensors, "damaged or truncated safetensors"),
        (whole_network, "asks to run code"),
        (a_list, "holds no state dict"),
        (numbers, "holds no tensor at 'lr'"),
        (nothing, "holds no state dict"),
    ],
)
def test_a_wrong_file_gets_one_sentence_with_its_name(tmp_path, write, says):
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises(UserError, match=says) as caught:
        read(file)
    sentence = str(caught.value)
    assert str(file) in sentence
    assert "\n" not in sentence
    assert len(sentence) < len(str(file)) + 200
    assert caught.value.__cause__ is None


# ------------------------------------------------------------------------------------------ the report


def test_what_agrees_has_no_report():
    fit = compare(STATE, STATE)
    assert fit.matched == list(STATE)
    assert fit.problems == []
    assert fit.sentence() == ""


def test_each_difference_is_named_with_its_part_and_what_it_would_have_meant():
    state = dict(STATE) | {"head.bias": torch.zeros(1), "image_encoder.pos_embed": torch.zeros(1, 4, 4, 2)}
    del state["mask_decoder.iou_token.weight"], state["image_encoder.blocks.0.Adapter.norm.weight"]
    fit = compare(state, STATE)
    assert fit.reshaped == {"image_encoder.pos_embed": ((1, 4, 4, 2), (1, 2, 2, 2))}
    assert fit.unexpected == ["head.bias"]
    assert fit.matched == ["prompt_encoder.no_mask_embed.weight"]
    assert fit.sentence() == (
        "1 keys of the adapters missing (such as image_encoder.blocks.0.Adapter.norm.weight): the image "
        "encoder would see X-rays as the photographs of plain SAM; "
        "1 keys of the mask decoder missing (such as mask_decoder.iou_token.weight): masks would be noise, "
        "however good the image encoder is; "
        "1 keys of the rest unexpected (such as head.bias); "
        "1 keys of the image encoder of another shape (such as image_encoder.pos_embed): images would be "
        "turned into noise"
    )
    assert fit.without(["mask_decoder.*", "*.Adapter.*", "head.bias"]).problems == ["image_encoder.pos_embed"]
    assert fit.without(["*"]).sentence() == ""


def test_the_digest_is_of_the_file(tmp_path):
    file = tmp_path / "weights.pth"
    bare(file)
    assert checkpoints.sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
