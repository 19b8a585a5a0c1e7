"""The run that selected what a final fit takes: the number of epochs and the weights of the scorers.

A final fit (`train.final_fit`) is a second run on the same catalog, with the same configuration. It trains on train and
valid together, from the same initial weights, for as many epochs as the selection chose on valid, and keeps the weights
of the scorers that were tuned there. So it has nothing of its own to choose, valid is free to be trained on, and test
is seen by neither. Its figures would not be comparable, so its metrics are those of the selection.

It is a run of its own, not a second phase of the first: both stay, each resumes by itself, and what is deployed has
another name than what was measured.
"""

from gtc_dist.checkpoint.existing_run import RunRef, differences, find_run
from gtc_dist.checkpoint.run_folder import METRICS_FILE
from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError


def with_selection(config: Config, catalog: Catalog) -> Config:
    """The configuration of a final fit, with the epochs and the initial weights of its selection.

    Raises:
        InputError: the selection has not ended, or is of another catalog or configuration (the keys are named).
    """
    uri = config.train.final_fit
    selection = find_selection(uri)
    before = Catalog(selection.config.data.catalog)
    if before.manifest.fingerprint != catalog.manifest.fingerprint:
        raise InputError(
            f"train.final_fit: {uri} was trained on {before.uri}, not on {catalog.uri}; select on the same"
        )
    if selection.config.train.final_fit is not None:
        raise InputError(f"train.final_fit: {uri} is a final fit itself; give the run that selected")
    taken = {"epochs": selection.epoch, "init_from": selection.config.train.init_from}
    config = config.model_copy(update={"train": config.train.model_copy(update=taken)})
    alike = config.model_copy(update={"train": config.train.model_copy(update={"final_fit": None})})
    if changed := differences(selection.config, alike):
        shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(changed.items())[:5])
        raise InputError(f"train.final_fit: {uri} has another configuration ({shown}); use the same for both")
    return config


def find_selection(uri: str, verify: str | None = None) -> RunRef:
    """The finished run that selected. Raises InputError: there is none, or it has not ended."""
    selection = find_run(uri, verify=verify)
    if not storage.exists(storage.join(selection.uri, METRICS_FILE)):
        raise InputError(f"train.final_fit: {uri} has not ended, so nothing is selected yet; train it to its end first")
    return selection
