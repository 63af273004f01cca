"""What `flwr run` takes: the installed package's two apps. Every node needs the same version of fmfl."""

from fmfl.flower.engine import client_app as client
from fmfl.flower.engine import server_app as server

__all__ = ["client", "server"]
