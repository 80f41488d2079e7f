"""A LoRA fine-tuning loop for causal language models, written to be audited by reading it.

In Python: `from loop import Config, train`, then `train(Config(...))`."""

import importlib
import logging
import os
import signal
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loop.config import Config as Config
    from loop.train import train as train

__version__ = "0.1.0"
# Training uses no token. transformers 5.23 lists a repository's files with the one of the user's login otherwise,
# token=False or not. The Hub's client reads this when it is imported.
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # else it names torch and what it runs under, and asks for a list of these
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at each import it recommends a package for inference

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # `python -m loop.train` imports for seconds: Ctrl-C just ends that


class _Package(ModuleType):
    """Loads the two names when they are asked for. `train` is the function, also once the module is loaded too."""

    @property
    def Config(self) -> Any:
        return importlib.import_module("loop.config").Config

    @property
    def train(self) -> Any:
        return importlib.import_module("loop.train").train

    @train.setter
    def train(self, _module: ModuleType) -> None:
        """Python binds the module `loop.train` here when it is imported; it stays in sys.modules."""


sys.modules[__name__].__class__ = _Package
