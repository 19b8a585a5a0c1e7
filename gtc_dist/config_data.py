"""Configuration of the raw data and the catalog (`data.*`), with the base class and the types of all sections."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Modalities cannot have these names: checkpoints have the view `id` and weights of these names beside the modalities'.
RESERVED = ("id", "members", "length", "walked", "spectral", "cold")

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]  # of a file or folder, or a URI
FileFormat = Literal["auto", "parquet", "csv", "tsv", "jsonl"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class InteractionsConfig(Section):
    """Raw interactions: files and the meaning of their columns. Paths are relative to `data.raw`, or full URIs."""

    files: list[str] = Field([], description="File names or globs. Not used by `split.method: given`.")
    format: FileFormat = Field(
        "auto", description="File format; auto decides by file name (`.inter` is TSV; `.gz` is allowed)."
    )
    user: str = Field("user_id", description="Column with the user id.")
    item: str = Field("item_id", description="Column with the item id.")
    columns: list[Name] | None = Field(
        None,
        description="Names of all columns, for CSV and TSV files without a header line. null: the header names them.",
    )
    separator: Name | None = Field(
        None, description="Text between the columns of CSV files, such as `;` or `::`. null: a comma, or a tab for TSV."
    )
    rating: str | None = Field(None, description="Column with the rating; needed by `min_rating`.")
    weight: str | None = Field(
        None,
        description="Column with the weight of an interaction, a positive number such as a count or the rating: in the "
        "graphs, the untrained scorers and the losses. null: all weigh the same.",
    )
    event: str | None = Field(None, description="Column with the kind of event, for `event_weights`.")
    event_weights: dict[Name, Weight] = Field(
        {},
        description="Kind of event: its weight, times that of `weight`, such as `{view: 1, cart: 3, buy: 5}`. 0 leaves "
        "such events out; kinds that are not named are bad rows.",
    )
    repeats: PositiveInt = Field(
        1,
        description="Of several interactions of a user with an item the heaviest count, at most so many, and their "
        "weights are added. The time is that of the first. In splits by time, interactions after those of train do not "
        "count in train.",
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        "error",
        description="Rows that cannot be read: error refuses the files and names such rows; skip leaves them out, "
        "counts them, and lists them in `interactions/rejected.parquet` of the catalog.",
    )
    time: str | None = Field(
        None, description="Column with the time; needed by splits that order by time and by `recency_half_life`."
    )
    min_rating: float | None = Field(None, description="Drop interactions with a lower rating.")
    k_core: NonNegativeInt = Field(
        0, description="Keep users and items with at least this many interactions, iterated to a fixed point. 0: off."
    )

    @model_validator(mode="after")
    def _columns(self):
        if self.user == self.item:
            raise ValueError(f"user and item are both column {self.user!r}; name two columns")
        if self.min_rating is not None and self.rating is None:
            raise ValueError("min_rating needs the name of the rating column in data.interactions.rating")
        if (self.event is None) != (not self.event_weights):
            raise ValueError("event, a column, and event_weights, the weights of its values, go together; set both")
        if self.event_weights and not any(self.event_weights.values()):
            raise ValueError("event_weights has only zeros, which leave every interaction out")
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns is {self.columns}; name each column once")
        return self

    @property
    def has_weights(self) -> bool:
        """Whether interactions may weigh differently, whatever their age."""
        return self.weight is not None or bool(self.event_weights) or self.repeats > 1


class SplitConfig(Section):
    """Split of the interactions into train, valid and test."""

    method: Literal["given", "label", "global_time", "ratio", "leave_last_out"] = Field(
        "ratio",
        description="given: one set of files per split. label: a column names the split. global_time: by two points in "
        "time. ratio: each user's interactions by shares, at random. "
        "leave_last_out: each user's last interaction is test, the one before valid.",
    )
    train: list[str] = Field(["train.parquet"], description="given: files or globs of the train split.")
    valid: list[str] = Field(["valid.parquet"], description="given: files or globs of the valid split.")
    test: list[str] = Field(["test.parquet"], description="given: files or globs of the test split.")
    label: str = Field("x_label", description="label: the column that names the split.")
    labels: list[str | int] = Field(
        [0, 1, 2], description="label: the column's values for train, valid and test (MMRec writes 0, 1, 2)."
    )
    valid_share: Share = Field(
        0.1, description="global_time, ratio: share of the interactions in valid (of each user's, for ratio)."
    )
    test_share: Share = Field(0.1, description="global_time, ratio: share of the interactions in test.")
    seed: NonNegativeInt = Field(0, description="Seed of random splits.")
    repeats: Literal["error", "drop"] = Field(
        "error",
        description="given, label: interactions of valid and test that are also in train: an error, or dropped there.",
    )

    @property
    def orders_by_time(self) -> bool:
        """Whether valid and test are later than train, of all users or of each."""
        return self.method in ("global_time", "leave_last_out")

    @model_validator(mode="after")
    def _shares(self):
        if len(self.labels) != 3:
            raise ValueError(f"labels is {self.labels}; name three values: of train, valid and test")
        if self.method in ("global_time", "ratio") and not (self.valid_share and self.test_share):
            raise ValueError(
                "valid_share and test_share must be above 0: valid selects the epoch, test gives the final metrics"
            )
        if self.valid_share + self.test_share >= 1:
            raise ValueError(
                f"valid_share + test_share = {self.valid_share + self.test_share:g} leaves nothing to train on"
            )
        return self


class ModalityConfig(Section):
    """Raw features of one modality (visual, textual, ...): a matrix or tables. An item without a vector has no row, or
    null or empty text in its place. A `.npz` file has the arrays `ids` and `vectors`. A `.pt` file has a tensor (row
    number = id), a dict of `ids` and `vectors`, or a dict id -> vector; no code in it is run."""

    path: Name = Field(
        description="File relative to `data.raw`, or a URI: `.npy`, `.npz`, `.pt`, Parquet, CSV, TSV or JSON lines, "
        "of these the text files also as `.gz`. Files that have ids may be a glob."
    )
    ids: Name | None = Field(
        None, description="`.npy` only: file with one item id per row (.npy, .txt or .parquet). null: row number = id."
    )
    id_column: str = Field("item_id", description="Tables: column with the item id (also in `ids`).")
    vector_column: str = Field(
        "vector",
        description="Tables: column with the vectors: lists of numbers; in text files also text, numbers separated by "
        "spaces, commas or `|`, with or without brackets. A pattern such as `v*`: one column of numbers for each "
        "dimension, in the order of the file.",
    )
    pca: PositiveInt | None = Field(None, description="Reduce the features to this many principal components.")
    weight: Weight = Field(1.0, description="Weight of this modality in the item-item graph's similarity.")


class DataConfig(Section):
    """Raw data, and the catalog that prepare makes of it."""

    raw: Name = Field(
        description="Folder with the raw tables and features (relative to the working directory), or a URI."
    )
    catalog: Name = Field(description="Folder or URI that prepare writes and training reads.")
    interactions: InteractionsConfig = InteractionsConfig()
    split: SplitConfig = SplitConfig()
    features: dict[str, ModalityConfig] = Field({}, description="Modality name -> its raw features.")
    ids: Literal["auto", "text", "integer"] = Field(
        "auto",
        description="Ids of users and items. auto: text where any file has text, as it is written. text: always, so "
        "that an id with a letter may come later. integer: other ids are refused.",
    )
    items: Literal["interactions", "all"] = Field(
        "interactions", description="Items of the catalog: those with interactions, or all that have features, too."
    )
    recency_half_life: PositiveFloat | None = Field(
        None,
        description="Days after which a train interaction has half the weight, counted back from the newest train "
        "interaction: in the user-item and user-user graphs, the untrained scorers and the ranking loss. Needs "
        "`interactions.time`; numbers in that column are seconds. null: all weigh the same.",
    )
    verify: Literal["checksum", "size"] = Field(
        "checksum", description="Check of the catalog's files against its manifest when a command opens it."
    )

    @model_validator(mode="after")
    def _recency(self):
        if self.recency_half_life is not None and self.interactions.time is None:
            raise ValueError("recency_half_life needs the name of the time column in data.interactions.time")
        return self

    @property
    def weight_settings(self) -> list[str]:
        """Settings by which train interactions weigh differently, in words."""
        interactions, age = self.interactions, self.recency_half_life
        found = [] if age is None else [f"data.recency_half_life is {age:g}"]
        for key in ("weight", "event_weights", "repeats") if interactions.has_weights else ():
            value = getattr(interactions, key)
            if value != type(interactions).model_fields[key].default:
                found.append(f"data.interactions.{key} is {value}")
        return found

    @field_validator("features")
    @classmethod
    def _names(cls, features: dict[str, ModalityConfig]) -> dict[str, ModalityConfig]:
        for name in features:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"the modality name {name!r} may have letters, digits, '_' and '-' only")
            if name in RESERVED:
                raise ValueError(f"{name!r} is a name that checkpoints use; call the modality something else")
        return features
