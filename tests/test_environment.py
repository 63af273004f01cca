"""pyproject.toml, requirements.lock and environment.yml name one environment; the code needs no other."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain

import pytest
import torch
import torchvision
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fmfl import __version__, paths

PYTHONS = ("3.11", "3.12", "3.13")
SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"))

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())
CONDA = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
LOCK_TEXT = (paths.ROOT / "requirements.lock").read_text()
LOCK = [Requirement(line) for line in LOCK_TEXT.splitlines() if line and not line.lstrip().startswith("#")]


def direct_dependencies():
    """Name -> Requirement with its range, the extras' included."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def locked_versions(python, system="linux", machine="x86_64"):
    """Name -> the versions that the lock pins there."""
    there = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system],
        "os_name": "nt" if system == "win32" else "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    pins = {}
    for requirement in LOCK:
        if requirement.marker is None or requirement.marker.evaluate(there):
            pins.setdefault(canonicalize_name(requirement.name), []).append(exact_version(requirement))
    return pins


def exact_version(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} is not one version"
    return Version(specifier.version)


def conda_python():
    (python,) = [entry for entry in CONDA["dependencies"] if str(entry).startswith("python=")]
    return python.split("=")[1]


def conda_pip_lines():
    (pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    return pip


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), SYSTEMS)
def test_the_lock_has_one_version_of_each_direct_dependency_in_its_range(python, system, machine):
    pins = locked_versions(python, system, machine)
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
    for name, requirement in direct_dependencies().items():
        assert name in pins, f"{name} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(pins[name][0]), f"{requirement} leaves out {pins[name][0]}"


def test_the_lock_names_versions_only():
    """No index, host or path, which hold on one machine; no extra, which a constraint may not have."""
    for requirement in LOCK:
        exact_version(requirement)
        assert requirement.url is None and not requirement.extras
    text = LOCK_TEXT.replace("-c (workspace)", "")  # uv's note of the constraints in pyproject.toml
    assert re.findall(r"\S*://\S*|(?:^|\s)(?:--?[a-z]\S*|/\S+|[A-Za-z]:\\\S*)", text) == []


def test_environment_yml_has_exactly_the_direct_dependencies_at_the_locks_versions():
    lines = [Requirement(line) for line in conda_pip_lines() if not line.startswith("-")]
    assert len(lines) == len({canonicalize_name(line.name) for line in lines})
    named = {canonicalize_name(line.name): exact_version(line) for line in lines}
    pins = locked_versions(conda_python())
    assert named == {name: pins[name][0] for name in direct_dependencies()}


def test_environment_yml_installs_this_folder_under_the_lock():
    extras = ",".join(sorted(PROJECT["project"]["optional-dependencies"]))
    options = [line for line in conda_pip_lines() if line.startswith("-")]
    assert options == ["--constraint requirements.lock", f"-e .[{extras}]"]
    assert conda_python() in PYTHONS


def test_environment_yml_gives_each_package_a_reason():
    text = (paths.ROOT / "environment.yml").read_text()
    pinned = [line for line in text.splitlines() if "==" in line]
    assert len(pinned) == len(direct_dependencies())
    assert [line for line in pinned if not re.search(r" # \S", line)] == []


def test_torch_and_torchvision_are_moved_together():
    """As torchvision's metadata admits builds of torch that it fails to import with."""
    constraints = [Requirement(line) for line in PROJECT["tool"]["uv"]["constraint-dependencies"]]
    pair = {line.name: [exact_version(line)] for line in constraints if line.name.startswith("torch")}
    assert set(pair) == {"torch", "torchvision"}
    for python in PYTHONS:
        for system, machine in SYSTEMS:
            pins = locked_versions(python, system, machine)
            assert {name: pins[name] for name in pair} == pair


def test_the_installed_torchvision_works_with_the_installed_torch():
    """Its compiled operators are what a wrong pair misses. Of two boxes with IoU 0.9, the better stays."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), iou_threshold=0.5)
    assert kept.tolist() == [1, 2]


def test_the_package_has_one_version():
    assert PROJECT["project"]["version"] == __version__
    assert yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())["version"] == __version__


def imported_names(source):
    """Top-level names of the modules that this code imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def sources():
    """(path, code) of every module, test and notebook."""
    for folder in ("fmfl", "tests", "bench", "tools"):
        for path in sorted((paths.ROOT / folder).rglob("*.py")):
            yield path, path.read_text()
    for path in sorted(paths.NOTEBOOKS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
        yield path, "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def test_every_import_is_a_declared_dependency():
    """A package that came along with another one may be gone with that one's next version."""
    declared = {*direct_dependencies(), "fmfl", "bench", "docs", "tools"}
    distributions = packages_distributions()
    missing = set()
    for path, code in sources():
        for name in imported_names(code):
            if name in sys.stdlib_module_names or (path.parent / f"{name}.py").exists():
                continue
            owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
            if not owners & declared:
                missing.add((str(path.relative_to(paths.ROOT)), name))
    assert missing == set()
