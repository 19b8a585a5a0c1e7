"""Search spaces: which configuration keys a search over settings varies, and how.

A YAML file:

    trials: 24          # settings that are tried
    first_epochs: 10    # epochs after which the worse trials are stopped, then after `factor` times as many, and so on
    factor: 3           # one in so many goes on
    parameters:
      train.table_lr: {log_uniform: [5.0e-4, 1.0e-2]}
      model.layers: {choice: [1, 2, 3]}
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gtc_dist.config import Config
from gtc_dist.config_file import build_config, parse_yaml
from gtc_dist.config_upgrade import flatten_keys
from gtc_dist.errors import InputError

VARIED = ("train.", "model.", "eval.cold_loss")  # what may be varied: what is trained, on one catalog and one split
PARAMETER_KINDS = ("choice", "uniform", "log_uniform", "integer")


class Parameter(BaseModel):
    """How one key varies: `kind` is choice (one of `values`), or uniform, log_uniform or integer between the two
    `values`, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["choice", "uniform", "log_uniform", "integer"]
    values: list[Any]

    @model_validator(mode="before")
    @classmethod
    def _of_yaml(cls, value):
        if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in PARAMETER_KINDS:
            raise ValueError(f"found {value!r}; write one of {', '.join(PARAMETER_KINDS)}, such as {{choice: [1, 2]}}")
        kind, values = next(iter(value.items()))
        if not isinstance(values, list) or not values:
            raise ValueError(f"{kind} is {values!r}; write a list of values")
        return {"kind": kind, "values": values}

    @model_validator(mode="after")
    def _range(self):
        if self.kind == "choice":
            return self
        numbers = int if self.kind == "integer" else int | float
        if len(self.values) != 2 or any(isinstance(v, bool) or not isinstance(v, numbers) for v in self.values):
            raise ValueError(f"{self.kind} is {self.values}; write the lowest and the highest number")
        low, high = self.values
        if not low < high or (self.kind == "log_uniform" and low <= 0):
            positive = " and be positive" if self.kind == "log_uniform" else ""
            raise ValueError(f"{self.kind} is {self.values}; the first must be below the second{positive}")
        return self


class SearchSpace(BaseModel):
    """A search over settings: how many trials, when they are stopped, and what varies."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    trials: Annotated[int, Field(ge=1)]
    first_epochs: Annotated[int, Field(ge=1)] = 10
    factor: Annotated[int, Field(ge=2)] = 3
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]

    def extremes(self) -> list[dict[str, Any]]:
        """Settings in which every value of the file occurs, for checks."""
        longest = max(len(parameter.values) for parameter in self.parameters.values())
        return [
            {key: parameter.values[n % len(parameter.values)] for key, parameter in self.parameters.items()}
            for n in range(longest)
        ]


def read_space(path: str, config: Config) -> SearchSpace:
    """Read a search space and check it against the configuration that it varies.

    Raises:
        InputError: missing file, bad YAML, a key that may not vary, or a value that the configuration refuses.
    """
    if not Path(path).is_file():
        raise InputError(f"search space {path} does not exist")
    try:
        tree = parse_yaml(Path(path).read_text(), path)
        space = SearchSpace.model_validate(tree if isinstance(tree, dict) else {})
    except UnicodeDecodeError as error:
        raise InputError(f"search space {path} is not UTF-8 text: {error}") from None
    except ValidationError as error:
        raise InputError("\n".join(_explain(each, path) for each in error.errors())) from None
    known = flatten_keys(config.model_dump())
    for key in space.parameters:
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}; docs/configuration.md lists the keys")
        if not key.startswith(VARIED):
            raise InputError(f"{path}: {key} cannot vary, since all trials share a catalog, a split and a metric")
    for settings in space.extremes():
        with_settings(config, settings, path)
    return space


def with_settings(config: Config, settings: dict[str, Any], origin: str) -> Config:
    """The configuration with other values of some keys (`a.b`). Raises InputError, which names `origin`."""
    tree = config.model_dump()
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = tree
        for part in parents:
            section = section[part]
        section[last] = value
    return build_config(tree, origin)


def _explain(error: dict, path: str) -> str:
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key {location!r}; known keys: {', '.join(SearchSpace.model_fields)}"
    if error["type"] == "missing":
        return f"{path}: key {location!r} is missing"
    message = error["ctx"]["error"] if error["type"] == "value_error" else f"{error['msg']}; found {error['input']!r}"
    return f"{path}: {location}: {message}"
