"""statex: a bigger memory for pretrained recurrent language models.

    statex.expand(checkpoint, out, ...)   rewrite the heads so that the state grows
    statex.load(path)                     a transformers model, expanded or not
    statex.finetune(...), statex.evaluate(...), statex.verify(...), statex.export_native(...), statex.export_hf(...)

Importing this package does not import torch: the names are resolved on first use.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "expand": ("statex.surgery", "expand_checkpoint"),
    "load": ("statex.models", "load"),
    "finetune": ("statex.recipes", "finetune"),
    "evaluate": ("statex.evals", "evaluate"),
    "compare": ("statex.evals", "compare"),
    "verify": ("statex.evals", "verify"),
    "diagnose": ("statex.evals", "diagnose"),
    "auto_layers": ("statex.evals", "auto_layers"),
    "report": ("statex.evals.reports", "report"),
    "inspect": ("statex.checkpoints", "inspect_checkpoint"),
    "export_native": ("statex.checkpoints", "export_native"),
    "export_hf": ("statex.models.remote_code", "export_hf"),
}

__version__ = "0.1.0"
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statex' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
