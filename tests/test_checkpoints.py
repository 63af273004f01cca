"""Files from elsewhere: whole ones in every form, wrong ones in one sentence each, none of their code run."""

import hashlib
import pickle
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from fmfl import paths
from fmfl.errors import UserError
from fmfl.teachers import checkpoints
from fmfl.teachers.checkpoints import Published, differences, download, read

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
    assert differences(STATE, STATE) == ""


def test_each_difference_is_named_with_its_part_and_what_it_would_have_meant():
    state = dict(STATE) | {"head.bias": torch.zeros(1), "image_encoder.pos_embed": torch.zeros(1, 4, 4, 2)}
    del state["mask_decoder.iou_token.weight"], state["image_encoder.blocks.0.Adapter.norm.weight"]
    assert differences(state, STATE) == (
        "1 keys of the adapters missing (such as image_encoder.blocks.0.Adapter.norm.weight): the image "
        "encoder would see X-rays as the photographs of plain SAM; "
        "1 keys of the mask decoder missing (such as mask_decoder.iou_token.weight): masks would be noise, "
        "however good the image encoder is; "
        "1 keys of the rest unexpected (such as head.bias); "
        "1 keys of the image encoder of another shape (such as image_encoder.pos_embed): images would be "
        "turned into noise"
    )


def test_the_digest_is_of_the_file(tmp_path):
    file = tmp_path / "weights.pth"
    bare(file)
    assert checkpoints.sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------ published files

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An address that gives CONTENT, and a list of the paths that it was asked for."""
    asked: list[str] = []
    settings = {"cut": None, "content": CONTENT}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/weights.pth":
                return self.send_error(404)
            asked.append(self.path)
            body = settings["content"]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: settings["cut"]])

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    known = Published(
        "weights.pth",
        "https://example.org/page",
        hashlib.sha256(CONTENT).hexdigest(),
        f"http://127.0.0.1:{running.server_port}/weights.pth",
    )
    monkeypatch.setitem(checkpoints.PUBLISHED, "sam_vit_b", known)
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path / "weights")
    yield asked, settings
    running.shutdown()
    running.server_close()


def test_a_download_is_the_published_file_and_is_fetched_once(server):
    asked, _ = server
    file = download("sam_vit_b", progress=False)
    assert file.read_bytes() == CONTENT
    assert download("sam_vit_b", progress=False) == file
    assert len(asked) == 1
    assert [entry.name for entry in file.parent.iterdir()] == ["weights.pth"]


def test_a_broken_download_leaves_nothing_and_is_fetched_again(server):
    asked, settings = server
    settings["cut"] = 3000
    with pytest.raises(UserError, match=r"was cut off .*: try again or save it by hand as .*weights\.pth"):
        download("sam_vit_b", progress=False)
    assert list(paths.WEIGHTS.iterdir()) == []
    settings["cut"] = None
    assert download("sam_vit_b", progress=False).read_bytes() == CONTENT
    assert len(asked) == 2


def test_another_file_than_the_published_one_is_deleted(server):
    _, settings = server
    settings["content"] = b"<html>please log in</html>"
    with pytest.raises(UserError, match="gave another file than the published one"):
        download("sam_vit_b", progress=False)
    assert list(paths.WEIGHTS.iterdir()) == []


def test_a_file_that_is_there_and_is_another_is_not_overwritten(server):
    asked, _ = server
    file = checkpoints.PUBLISHED["sam_vit_b"].file
    file.parent.mkdir()
    file.write_bytes(b"mine")
    with pytest.raises(UserError, match="is not the published file"):
        download("sam_vit_b", progress=False)
    assert file.read_bytes() == b"mine" and asked == []


def test_what_cannot_be_fetched_is_said_in_a_sentence(server, monkeypatch):
    known = checkpoints.PUBLISHED["sam_vit_b"]
    nowhere = Published(known.file_name, known.page, known.sha256, known.url + "x")
    monkeypatch.setitem(checkpoints.PUBLISHED, "sam_vit_b", nowhere)
    with pytest.raises(UserError, match=r"could not be fetched \(Not Found\)"):
        download("sam_vit_b", progress=False)
    with pytest.raises(UserError, match="no direct address: fetch it by hand from "):
        download("sam-med2d")
    with pytest.raises(UserError, match="no published weights are known for 'builtin'"):
        download("builtin")


def test_published_files_are_recognised():
    checksums = [known.sha256 for known in checkpoints.PUBLISHED.values() if known.sha256]
    assert len(set(checksums)) == 3 and all(re.fullmatch("[0-9a-f]{64}", found) for found in checksums)
    assert checkpoints.published_as(checkpoints.PUBLISHED["sam_vit_h"].sha256) == "sam_vit_h"
    assert checkpoints.published_as("0" * 64) is None
