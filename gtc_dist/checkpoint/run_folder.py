"""Names of everything inside a run folder. All other modules take them from here.

<run>/config.yaml                          resolved configuration of the last command that trained
<run>/metrics.jsonl                        validation metrics, one line per validation
<run>/metrics.json                         final result; exists once the run is finished
<run>/tensorboard/                         event files
<run>/checkpoints/epoch-00012/             best weights so far
<run>/checkpoints/step-000000001234/       full training state after that many steps
<run>/checkpoints/<name>/manifest.json     written last: a checkpoint without it is incomplete
<run>/lease.json                           run lock of the command that trains (launch/run_lock.py)
<run>/stop                                 request to save and stop, written on SIGTERM
<run>/failed.json                          error of a rank that a retry would only repeat
<run>/ray/                                 Ray Train's own folder
"""

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
METRICS_LOG = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_MANIFEST = "manifest.json"
EPOCH_PREFIX = "epoch-"
STEP_PREFIX = "step-"

LOCK_FILE = "lease.json"
STOP_FILE = "stop"
FAILURE_FILE = "failed.json"
RAY_FOLDER = "ray"


def step_name(step: int) -> str:
    """Checkpoint name of the training state after `step` steps."""
    return f"{STEP_PREFIX}{step:012d}"


def epoch_name(epoch: int) -> str:
    """Checkpoint name of the best weights, found at the validation after `epoch`."""
    return f"{EPOCH_PREFIX}{epoch:05d}"
