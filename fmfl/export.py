"""Export of a student to ONNX, with its input contract in the file, and its check by another runtime."""

import importlib.util
import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fmfl.augment import to_float
from fmfl.errors import UserError
from fmfl.parallel import one_thread
from fmfl.sources import phantom
from fmfl.states import write_bytes

#: Packages that write and run ONNX files, and the command that brings them.
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INSTALL = "pip install -c requirements.lock -e '.[export]'"

#: Largest difference of two logits that the check allows.
TOLERANCE = 1e-4

#: Synthetic X-rays of the check.
IMAGES = 8

#: Names of the tensors in a file.
INPUT, OUTPUT = "image", "logits"


def check_packages() -> None:
    """Raise a UserError where a package is missing that export needs."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export to ONNX needs the packages {', '.join(missing)}: {INSTALL}")


def contract(size: int) -> dict[str, str]:
    """Return the input and the output of an exported student in words, by name."""
    return {
        "input": f"{INPUT}: float32 [B, 1, {size}, {size}], grey values 0..1 (8-bit values / 255), bright is "
        f"bone; the whole image squeezed to {size} x {size} pixels without padding, antialiased bilinear",
        "output": f"{OUTPUT}: float32 [B, 1, {size}, {size}]; the sigmoid is the organ's probability, and "
        "above 0 is the organ; bring the logits to the image's own size by bilinear interpolation before",
        "use": "research only; not a medical device",
    }


def to_onnx(model: nn.Module, size: int, metadata: Mapping[str, str]) -> bytes:
    """Return a student as an ONNX file: any number of images of one size.

    Args:
        model: a student; it is left in evaluation mode on the CPU.
        size: pixels a side.
        metadata: texts that the file carries beside the `contract`.

    Raises:
        UserError: a package is missing.
    """
    check_packages()
    import onnx

    model.to("cpu").eval()
    example = torch.zeros(2, 1, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own parts
        program = torch.onnx.export(
            model,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, contract(size) | dict(metadata))
    file = io.BytesIO()
    onnx.save_model(proto, file)
    return file.getvalue()


def check_file(file: Path, weights_sha256: str = "", *, overwrite: bool = False) -> None:
    """Refuse to export where a package is missing, or over a file that is not to be lost.

    Args:
        file: to be written.
        weights_sha256: of the weights; "" stands for those that an earlier export has.
        overwrite: an export of other weights may be lost.

    Raises:
        UserError: a package is missing, no export of fmfl made the file, or one of other weights did.
    """
    check_packages()
    import onnx

    if file.suffix.lower() != ".onnx":
        raise UserError(f"--onnx {file}: give a file name that ends in .onnx")
    if not file.exists():
        return
    try:
        made_of = {
            entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props
        }
    except Exception:  # the parser of arbitrary bytes raises nearly anything
        made_of = {}
    if "weights_sha256" not in made_of:
        raise UserError(f"--onnx {file} is there, and no export of fmfl made it: name another file")
    if not overwrite and weights_sha256 not in ("", made_of["weights_sha256"]):
        raise UserError(
            f"--onnx {file} is there with other weights ({made_of.get('weights')}): name another file, or "
            "add --overwrite"
        )


def write(file: Path, model: nn.Module, size: int, metadata: Mapping[str, str]) -> float:
    """Write a student as an ONNX file, once it gives the network's answers on synthetic X-rays.

    Args:
        file: replaced as a whole.
        model: a student, on the CPU.
        size: pixels a side.
        metadata: texts that the file carries beside the `contract`.

    Returns:
        The largest difference of two logits.

    Raises:
        UserError: a package is missing, or the difference is too large; then nothing is written.
    """
    content = to_onnx(model, size, metadata)
    images, _, _ = phantom.generate(IMAGES, size, seed=0)
    difference = largest_difference(content, model, torch.from_numpy(images)[:, None])
    if not difference <= TOLERANCE:
        raise UserError(
            f"the ONNX file differs from the network by up to {difference:.2g} (allowed {TOLERANCE:g}), so "
            f"{file} is not written: use the weights with fmfl"
        )
    write_bytes(file, content)
    return difference


def largest_difference(file: bytes, model: nn.Module, images: Tensor) -> float:
    """Return the largest difference between an ONNX file's logits and the network's.

    Args:
        file: an exported student.
        model: the student, on the CPU.
        images: [N, 1, S, S] uint8, at least 3; they are given in batches of 1, 2 and the rest.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model.eval()
    largest = 0.0
    for batch in to_float(images).tensor_split([1, 3]):
        with torch.inference_mode(), one_thread(batch.device):
            expected = model(batch)
        (answer,) = session.run([OUTPUT], {INPUT: batch.numpy()})
        largest = max(largest, float((torch.from_numpy(answer) - expected).abs().max()))
    return largest
