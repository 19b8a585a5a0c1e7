"""GTC at scale: distributed training of a multi-modal recommender (arXiv 2604.03014).

    import gtc_dist

    gtc_dist.prepare("shop.yaml")
    run = gtc_dist.train("shop.yaml", "train.epochs=30")

The functions and the class `Run` are those of `gtc_dist.api`. `gtc_dist.prepare` and `gtc_dist.train` are modules, too:
the commands `python -m gtc_dist.prepare` and `python -m gtc_dist.train`. `__init__.pyi` shows type checkers the
functions.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.9.2"


class _CallableModule(ModuleType):
    """A module that is called as the function of its name in `gtc_dist.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        api = importlib.import_module("gtc_dist.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package. It loads its functions and `Run`, and with them torch and Ray, when they are used first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("prepare", "train"):  # set by Python when it imports the module
            value.__class__ = _CallableModule
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("prepare", "train"):
            return importlib.import_module(f"{self.__name__}.{name}")
        if name == "Run":
            return importlib.import_module(f"{self.__name__}.api").Run
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), "prepare", "train", "Run"})


sys.modules[__name__].__class__ = _Package
