"""What ``flwr run`` takes: the installed package's two apps. Every node needs the same version of fmfl."""

from fmfl.engines.flower import client_app as client
from fmfl.engines.flower import server_app as server

__all__ = ["client", "server"]
