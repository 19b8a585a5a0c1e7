"""The next day by the commands, on two ranks of Ray, with runs in object storage."""

import pytest
from grown import two_days
from small import write_config
from trainings import train_without_ray

from gtc_dist import train
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import storage

KEYS = ["train.epochs=1", "train.batch_size=128", "model.user_hop=false", "cluster.workers=2", "eval.metric=ndcg@20"]


@pytest.mark.long  # tests/warm_start and tests/final_fit train without Ray
def test_a_run_starts_from_yesterdays_and_is_fitted_to_train_and_valid(ray_local, s3, tmp_path, capsys):
    before, today = two_days(tmp_path)
    earlier = train_without_ray(write_config(tmp_path, before.uri, f"{s3}/runs"), *KEYS, "train.epochs=2")
    words = ["--config", write_config(tmp_path, today.uri, f"{s3}/runs"), *KEYS, f"train.init_from={earlier}"]
    assert train.main([*words, "run.name=today"]) == 0
    metrics = storage.read_json(f"{s3}/runs/today/metrics.json")
    assert metrics["init_from"]["run"] == earlier
    assert metrics["init_from"]["users"] == {"trained": 50, "folded_in": 10, "mean": 0}
    assert metrics["workers"] == 2
    assert find_run(f"{s3}/runs/today").config.train.init_from == earlier
    assert train.main([*words, "run.name=deployed", f"train.final_fit={s3}/runs/today"]) == 0
    shown = capsys.readouterr().out
    assert f"the metrics are those of {s3}/runs/today" in shown
    fitted = storage.read_json(f"{s3}/runs/deployed/metrics.json")
    assert fitted["valid"] == metrics["valid"]
    assert fitted["last_epoch"] == metrics["best_epoch"]
    assert find_run(f"{s3}/runs/deployed").trained_on == {"valid": 60}
