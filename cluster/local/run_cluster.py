"""Run a local cluster with S3 object storage and TensorBoard until Ctrl-C or SIGTERM.

    python cluster/local/run_cluster.py --nodes 2 --cpus 2

prints the commands that make a catalog and submit a job; `up.sh` runs it in the background.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from local_cluster import BUCKET, LocalCluster
from tensorboard_server import TensorBoardServer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WELCOME = f"""
The cluster is up. In a shell in the project's folder and its environment (. .venv/bin/activate):

    source {{env}}
    python tools/make_dataset.py --out s3://{BUCKET}/demo/raw
    python -m gtc_dist.prepare --config configs/demo.yaml \\
        data.raw=s3://{BUCKET}/demo/raw data.catalog=s3://{BUCKET}/demo/catalog
    python cluster/upload_size.py .
    ray job submit --working-dir . -- \\
        python -m gtc_dist.train --config configs/demo.yaml cluster.workers={{nodes}} \\
        data.catalog=s3://{BUCKET}/demo/catalog run.storage=s3://{BUCKET}/demo/runs

The sourced file holds the storage's credentials and the path of the token; only you can read it.
TensorBoard: {{tensorboard}}
Ray's dashboard: {{address}} (it asks for the token: `ray get-auth-token` prints it)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--nodes", type=int, default=2, help="number of nodes, including the head (default %(default)s)"
    )
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each node (default %(default)s)")
    parser.add_argument(
        "--object-store-mb", type=int, default=256, help="shared memory of each node, MiB (default %(default)s)"
    )
    parser.add_argument("--env-file", type=Path, help="where to write the file to source (default: a new folder)")
    args = parser.parse_args()
    if args.nodes < 1 or args.cpus < 1:
        parser.error("--nodes and --cpus must be at least 1")

    def interrupt(*_) -> None:
        for number in SIGNALS:  # a second signal must not interrupt the clean-up
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)
    print(f"starting {args.nodes} Ray nodes with {args.cpus} CPUs each, object storage and TensorBoard ...", flush=True)
    try:
        with (
            LocalCluster(args.nodes, args.cpus, object_store_mb=args.object_store_mb) as cluster,
            TensorBoardServer(f"s3://{BUCKET}", cluster.env) as board,
        ):
            env = cluster.write_env_file(args.env_file)
            print(
                WELCOME.format(env=env, address=cluster.address, nodes=args.nodes, tensorboard=board.address)
                + ("" if args.env_file else "Ctrl-C ends the cluster and removes its data."),
                flush=True,
            )
            while (ended := cluster.dead()) is None:
                time.sleep(1)
            print(f"error: a node ended with status {ended.returncode}\n{cluster.log_tails()}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        print("the cluster has ended", flush=True)
        return 0


if __name__ == "__main__":
    sys.exit(main())
