"""Names of everything inside a run folder. All other modules take them from here.

<run>/config.yaml                          resolved configuration of the last command that trained
<run>/metrics.jsonl                        validation metrics, one line per validation
<run>/metrics.json                         final result; exists once the run is finished
<run>/tensorboard/                         event files
<run>/report.html                          page of `gtc report`
<run>/checkpoints/epoch-00012/             best checkpoint: the weights of the best validation so far
<run>/checkpoints/step-000000001234/       training state after that many steps: weights, optimizer, progress
<run>/checkpoints/<name>/manifest.json     written last: a checkpoint without it is incomplete
<run>/lease.json                           run lock of the command that trains (launch/run_lock.py; the name of 0.1)
<run>/stop                                 request to save and stop, written on SIGTERM
<run>/failed.json                          error of a rank that a retry would only repeat
<run>/not-finite-epoch-1-step-5-rank-0.npz batch and weights of a step whose loss or gradient was not finite
<run>/ray/                                 Ray Train's own folder of a training
<run>/ray-1a2b3c4d/                        the same of another command on ranks, such as evaluate; removed at its end
"""

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
METRICS_LOG = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
REPORT_FILE = "report.html"

CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_MANIFEST = "manifest.json"
EPOCH_PREFIX = "epoch-"
STEP_PREFIX = "step-"

REFRESH_FILES = ("manifest.json", "refreshing.json")  # a folder of `gtc refresh` has one of them beside these
LOCK_FILE = "lease.json"  # the run lock; the name is that of version 0.1
STOP_FILE = "stop"
FAILURE_FILE = "failed.json"
RAY_FOLDER = "ray"


def step_name(step: int) -> str:
    """Name of the checkpoint with the training state after `step` steps."""
    return f"{STEP_PREFIX}{step:012d}"


def not_finite_name(place: str, rank: int) -> str:
    """Name of the file with a step that was not finite on a rank; `place` is "epoch 1, step 5"."""
    return f"not-finite-{place.replace(', ', '-').replace(' ', '-')}-rank-{rank}.npz"


def epoch_name(epoch: int) -> str:
    """Name of a best checkpoint, found at the validation after `epoch`."""
    return f"{EPOCH_PREFIX}{epoch:05d}"
