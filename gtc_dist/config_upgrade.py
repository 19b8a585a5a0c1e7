"""Configuration keys of older versions: errors that say what to write now, and the upgrade of a run's own config.yaml.

Version 0.2.0 removed switches that no shipped configuration used, made one `model.variant` of six, and renamed a few
keys; later versions removed some more. A configuration with such a key is refused with one line per key. The
config.yaml in a run folder, which holds every key, is upgraded in memory: older runs open, evaluate, export and resume.
"""

from typing import Any

from gtc_dist.errors import InputError

SINCE = "0.2.0"
# What went after 0.2.0: in which version, and the last one that opens a run with another value.
LATER = {
    "model.masked_width": ("0.3.0", "0.2"),
    "model.diffusion.condition": ("0.6.0", "0.5"),
    "model.hybrid.enabled": ("0.6.0", "0.5"),
}

RENAMED = {
    "model.walk.spectral": "model.hybrid.graph_filter",
    "model.walk.profile": "model.hybrid.content_profile",
    "model.correlation.rows": "train.tc_rows",
    "train.average": "train.ema_decay",
    "train.checkpoint.minutes": "train.checkpoint_minutes",
    "eval.chunk": "eval.block_rows",
}
# Removed keys: the value that version 0.2 always has, and what to write now.
DROP_LINE = "remove the line"
REMOVED: dict[str, tuple[Any, str]] = {
    "model.sampler": ("neighbor", DROP_LINE),
    "model.correlation.temperature": (0.2, DROP_LINE),
    "model.correlation.learn_temperature": (True, DROP_LINE),
    "model.diffusion.trained": (True, DROP_LINE),
    "model.diffusion.beta_start": (1e-4, DROP_LINE),
    "model.diffusion.beta_end": (0.02, DROP_LINE),
    "model.diffusion.ddim_steps": (1, DROP_LINE),
    "model.diffusion.hidden": (128, DROP_LINE),
    "model.diffusion.condition_dropout": (0.1, DROP_LINE),
    "model.walk.user_exponent": (0.6, DROP_LINE),
    "model.walk.item_exponent": (0.33, DROP_LINE),
    "train.negatives.popularity": (0.0, DROP_LINE),
    "train.negatives.correct": (True, DROP_LINE),
    "train.user_discount": (0.0, DROP_LINE),
    "train.w_personal": (0.1, DROP_LINE),
    "graph.item_neighbours": (10, DROP_LINE),
    "model.masked_width": (0, "write model.masked_members"),
    "model.diffusion.condition": ("audience", DROP_LINE),
    "model.user_fanout": (5, "model.item_fanout serves both"),  # a run's value must be that of model.item_fanout
}
# Switches that became something else; `upgrade` translates them.
VARIANT = "write model.variant: paper or gated"
REPLACED = {
    "model.content": VARIANT,
    "model.unit_rows": VARIANT,
    "model.join": VARIANT,
    "model.gate": VARIANT,
    "model.init_std": VARIANT,
    "model.correlation.of": VARIANT,
    "model.correlation.critic": VARIANT,
    "model.correlation.enabled": "write train.w_tc: 0 to switch the total correlation off",
    "model.diffusion.enabled": "write train.w_diff: 0 to switch the content filter off",
    "model.walk.enabled": "write model.hybrid.graph_filter: 0 and model.hybrid.content_profile: 0 for false",
    "model.hybrid.enabled": "write model.hybrid.graph_filter: 0 and model.hybrid.content_profile: 0 for false",
    "data.split.train_label": "write data.split.labels: [TRAIN, VALID, TEST]",
    "data.split.valid_label": "write data.split.labels: [TRAIN, VALID, TEST]",
    "data.split.test_label": "write data.split.labels: [TRAIN, VALID, TEST]",
}
# Keys that older runs lack, with what those runs had; a new configuration has another default.
ADDED = {"model.masked_members": 0}
# Keys without an effect on the weights that a run learns: an upgrade leaves them out, whatever their value.
IGNORED = {
    "dataset": "give the generator's parameters to tools/make_dataset.py --spec FILE",
    "graph.search": DROP_LINE,
    "graph.probes": DROP_LINE,
    "graph.user_neighbours": DROP_LINE,
    "graph.hub_cap": DROP_LINE,
    "train.prefetch": DROP_LINE,
    "train.checkpoint.keep": DROP_LINE,
    "eval.item_block": "write eval.block_rows",
    "eval.user_block": "write eval.block_rows",
    "eval.head_items": "give --head-items to python -m gtc_dist.evaluate",
}
_VARIANTS = {  # content, unit_rows, join, gate, correlation.of, correlation.critic
    "paper": ("vector", True, "concat", True, "inputs", "multilinear"),
    "gated": ("gate", False, "sum", False, "outputs", "additive"),
}


def old_keys(tree: dict) -> dict[str, str]:
    """Keys of older versions in a configuration, each with what to do about it, in the order of the configuration."""
    found = {}
    for key in flatten_keys(tree):
        if key in RENAMED:
            found[key] = f"was renamed in {SINCE}; write {RENAMED[key]}"
        elif key in REMOVED:
            found[key] = f"was removed in {_since(key)}; {REMOVED[key][1]}"
        elif key in REPLACED:
            found[key] = f"was replaced in {_since(key)}; {REPLACED[key]}"
        else:
            for name, advice in IGNORED.items():
                if key == name or key.startswith(f"{name}."):
                    found[name] = f"was removed in {SINCE}; {advice}"
    return found


def upgrade(tree: dict, origin: str) -> dict:
    """The configuration of a run with the keys of this version: keys that only older runs have are translated, and keys
    that they lack get the values that those runs had.

    Raises:
        InputError: the run was trained with a switch that this version does not have any more.
    """
    old = flatten_keys(tree)
    if not old_keys(tree):
        return _nest(ADDED | old)
    new = ADDED | {key: value for key, value in old.items() if not _is_old(key)}
    new |= {RENAMED[key]: value for key, value in old.items() if key in RENAMED}
    if old.get("model.correlation.enabled") is False:
        new["train.w_tc"] = 0.0
    if old.get("model.diffusion.enabled") is False:
        new["train.w_diff"] = 0.0
    for key in ("model.hybrid.enabled", "model.walk.enabled"):
        if key in old and not (old.get("model.propagation") == "full" if old[key] is None else old[key]):
            new |= {"model.hybrid.graph_filter": 0, "model.hybrid.content_profile": 0}
    has_tc, has_filter = new.get("train.w_tc", 0.4) > 0, new.get("train.w_diff", 0.7) > 0
    for part, on in (("correlation", has_tc), ("diffusion", has_filter)):
        if old.get(f"model.{part}.enabled") and not on:
            _refuse(origin, f"model.{part}.enabled", "true together with a loss weight of 0")
    _check_removed(old, has_tc, has_filter, origin)
    if old.get("train.loss") == "bpr+softmax":
        _refuse(origin, "train.loss", "'bpr+softmax'")
    if "model.variant" not in old:  # early runs of version 0.2 have it, and some removed keys
        new["model.variant"] = _variant(old, has_tc, origin)
    if "data.split.labels" not in old:
        defaults = {"train": 0, "valid": 1, "test": 2}
        new["data.split.labels"] = [old.get(f"data.split.{split}_label", label) for split, label in defaults.items()]
    return _nest(new)


def _check_removed(old: dict[str, Any], has_tc: bool, has_filter: bool, origin: str) -> None:
    """Refuse a run that was trained with another value of a removed key than this version's, if its network used it."""
    constants = {key: constant for key, (constant, _) in REMOVED.items()}
    constants["model.user_fanout"] = old.get("model.item_fanout", constants["model.user_fanout"])
    used = {
        "model.diffusion.": has_filter,
        "model.correlation.": has_tc,
        "model.user_fanout": old.get("model.propagation") == "sampled",
    }
    for key, constant in constants.items():
        unused = any(key.startswith(prefix) and not on for prefix, on in used.items())
        if not unused and old.get(key, constant) != constant:
            _refuse(origin, key, f"{old[key]!r}")


def _variant(old: dict[str, Any], has_tc: bool, origin: str) -> str:
    """The variant that the six switches of version 0.1 amount to."""
    names = ("content", "unit_rows", "join", "gate", "correlation.of", "correlation.critic")
    switches = tuple(old.get(f"model.{name}", paper) for name, paper in zip(names, _VARIANTS["paper"], strict=True))
    compared = 6 if has_tc else 4
    for variant, values in _VARIANTS.items():
        if switches[:compared] == values[:compared]:
            return variant
    shown = ", ".join(f"{name}: {value}" for name, value in zip(names, switches, strict=True))
    raise InputError(
        f"{origin}: the run's network ({shown}) is neither of model.variant paper or gated, the two that version "
        f"{SINCE} has; open the run with version 0.1"
    )


def _refuse(origin: str, key: str, value: str) -> None:
    since, last = LATER.get(key, (SINCE, "0.1"))
    if value == "'user'":  # of model.diffusion.condition
        since, last = "0.3.0", "0.2"
    raise InputError(
        f"{origin}: the run was trained with {key} {value}, which was removed in {since}; open the run with version "
        f"{last}"
    )


def _since(key: str) -> str:
    return LATER[key][0] if key in LATER else SINCE


def _is_old(key: str) -> bool:
    return key in RENAMED or key in REMOVED or key in REPLACED or any(f"{key}.".startswith(f"{n}.") for n in IGNORED)


def flatten_keys(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a nested configuration."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flatten_keys(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _nest(flat: dict[str, Any]) -> dict:
    tree: dict = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
