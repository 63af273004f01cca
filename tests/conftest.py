"""What holds for every test: figures without a display, caches of its own, no network."""

import os
import re
import signal
import socket
import tempfile

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
# Before fmfl.paths is imported: the tests neither use nor fill the caches of a person's studies.
_cache = tempfile.TemporaryDirectory(prefix="fmfl-tests-")
os.environ["FMFL_CACHE"] = _cache.name


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test that would reach another machine fails; kernels and local servers stay within reach."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture
def handled():
    """Sets what a signal does for the length of a test, whatever started the tests."""
    before = {}

    def handle(number, handler):
        before.setdefault(number, signal.signal(number, handler))

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def diverging(monkeypatch):
    """Client 1's training of round 2 ends in NaN, its Adam's moments too."""
    from fmfl import train

    fit = train.fit

    def diverge(model, *arguments, key, optimizer, **options):
        result = fit(model, *arguments, key=key, optimizer=optimizer, **options)
        if key[1:] == (1, 2):
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
                optimizer.state[parameter]["exp_avg"].fill_(float("nan"))
        return result

    monkeypatch.setattr(train, "fit", diverge)


@pytest.fixture(scope="session")
def emptied():
    """A function that takes out of a page's text all that a command writes between its marks."""
    between = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.S)
    return lambda page: between.sub(r"\1\3", page)
