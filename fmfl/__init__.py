"""Does federated segmentation get better, and faster, from a foundation model's student?"""

import importlib
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Import a module of the package at its first use, so that `import fmfl` gives `fmfl.data.load`."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"package {__name__!r} has no module {name!r}") from None
