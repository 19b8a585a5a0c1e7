"""Parameters of a synthetic dataset: sizes, exponents and planted structure, checked on construction."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from gtc_dist.errors import InputError, hint_at_known

MATRIX_ITEMS = 1 << 16  # up to this many items, the last of several modalities is written as one .npy matrix


@dataclass(frozen=True)
class Spec:
    """Parameters of a dataset. Raises InputError for wrong types and contradictory values."""

    users: int = 3000
    items: int = 1500
    interactions: int = 40_000  # approximately; those of cold-start items come on top
    modalities: dict[str, int] = field(default_factory=lambda: {"visual": 64, "textual": 48, "acoustic": 32})
    factors: int = 16
    groups: int = 30
    kept: int = 4  # factors that a group has a taste for
    strength: float = 2.2  # of taste relative to popularity
    deviation: float = 0.8  # of a user's taste from the group's, relative to the group's
    zipf: float = 0.8  # exponent of item popularity
    activity: float = 2.5  # exponent of the Lomax tail of user activity; a smaller one gives a heavier tail
    minimum: int = 5  # least interactions of a user
    noise: float = 1.0  # variance of the nuisance factors in the features, relative to the content factors
    nuisance: int = 8  # nuisance factors of each modality; all modalities share half of them
    cold_share: float = 0.0  # share of cold-start items, whose only interactions are in cold/
    missing_share: float = 0.0  # share of items without a vector, drawn for each modality
    drift: float = 0.0  # amplitude of the logarithm of an item's popularity over time; 0: constant
    seed: int = 0
    user_chunk: int = 1 << 14  # users per part; another size gives other random streams
    item_chunk: int = 1 << 15  # items per part

    def __post_init__(self):
        for known in dataclasses.fields(self):
            _check_type(known.name, known.type, getattr(self, known.name))
        for name in ("users", "items", "factors", "groups", "kept", "minimum", "user_chunk", "item_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("strength", "deviation", "zipf", "noise", "nuisance", "drift", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("cold_share", "missing_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.activity <= 1:
            raise InputError(
                f"activity is {self.activity}; it must be above 1, because the mean activity is infinite otherwise"
            )
        if not self.modalities or any(width < 1 for width in self.modalities.values()):
            raise InputError(f"modalities are {self.modalities}; name at least one, each with a positive width")
        if self.kept > self.factors:
            raise InputError(f"kept is {self.kept}, but there are only {self.factors} factors")
        self._check_interactions()

    def _check_interactions(self):
        found = f"{self.interactions} interactions of {self.users} users are {self.mean:.1f} per user"
        if self.mean < self.minimum:
            raise InputError(f"{found}; the minimum is {self.minimum}")
        if self.mean > self.warm / 4:
            raise InputError(f"{found}, more than a quarter of the {self.warm} warm items")

    @property
    def parameters(self) -> dict[str, Any]:
        """The fields by name; without drift if it is 0, as before there was drift."""
        values = dataclasses.asdict(self)
        return values if self.drift else {name: value for name, value in values.items() if name != "drift"}

    @property
    def mean(self) -> float:
        """Interactions per user."""
        return self.interactions / self.users

    @property
    def warm(self) -> int:
        """Number of warm items."""
        return self.items - round(self.items * self.cold_share)

    @property
    def npy_modality(self) -> str | None:
        """The modality that is written as one .npy matrix with an id file; the others are Parquet.

        The matrix is built in memory, so large datasets have none.
        """
        return list(self.modalities)[-1] if len(self.modalities) > 1 and self.items <= MATRIX_ITEMS else None


def check_spec(values: dict[str, Any], origin: str) -> None:
    """Check keys and types of a parameter file: `out` (a URI) and the fields of `Spec`.

    Raises:
        InputError: unknown key (with the nearest known one) or wrong type; names the file and the key.
    """
    known = {"out": str} | {known.name: known.type for known in dataclasses.fields(Spec)}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{origin}: unknown key {name!r}; {hint_at_known(name, known)}")
        try:
            _check_type(name, known[name], value)
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None


def _check_type(name: str, kind: type, value: Any) -> None:
    """Integers are accepted as floats; booleans are not accepted as numbers."""
    if kind is str:
        if not isinstance(value, str):
            raise InputError(f"{name} is {value!r}; expected text, such as a folder or s3://BUCKET/raw")
        return
    if name == "modalities":
        if not isinstance(value, dict):
            raise InputError(f"{name} is {value!r}; expected names and widths, such as {{visual: 64, textual: 48}}")
        for modality, width in value.items():
            if not isinstance(modality, str) or not modality.replace("_", "").replace("-", "").isalnum():
                raise InputError(
                    f"{name} has the name {modality!r}, which becomes a folder; use only letters, digits, '_' and '-'"
                )
            _check_type(f"{name}.{modality}", int, width)
        return
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) or not math.isfinite(value):
        wanted = "a whole number" if kind is int else "a finite number"
        raise InputError(f"{name} is {value!r}; expected {wanted}")
