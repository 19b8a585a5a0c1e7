#!/usr/bin/env bash
# Start several Ray nodes, an S3 server (SeaweedFS) and TensorBoard on this machine, in the background.
#
#   cluster/local/up.sh --nodes 2 --cpus 2    # the options of run_cluster.py; returns when all are ready
#   source /tmp/gtc-local-$UID/env            # the storage's credentials, the token's path, the address for ray job
#   cluster/local/down.sh                     # ends this cluster alone and removes its data
#
# Run it in the project's environment (. .venv/bin/activate). GTC_LOCAL_DIR replaces the folder /tmp/gtc-local-$UID.
set -euo pipefail
umask 077

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${GTC_LOCAL_DIR:-/tmp/gtc-local-$UID}

if [ -e "$state" ]; then
  if [ ! -O "$state" ]; then
    echo "error: $state belongs to another user; set GTC_LOCAL_DIR to a folder of your own" >&2
    exit 2
  fi
  if [ -e "$state/pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$state/pid")/cmdline" | grep -q run_cluster.py; then
    echo "error: a cluster is up already; source $state/env, or end it with cluster/local/down.sh" >&2
    exit 2
  fi
  rm -rf "$state" # what is left of a cluster that was killed
fi
mkdir -m 700 "$state"

# a session of its own: it outlives this terminal, and Ctrl-C does not reach it
setsid nohup python "$here/run_cluster.py" --env-file "$state/env" "$@" >"$state/log" 2>&1 </dev/null &
pid=$!
echo "$pid" >"$state/pid"

trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
until [ -e "$state/env" ]; do
  if ! kill -0 "$pid" 2>/dev/null; then
    cat "$state/log" >&2
    rm -rf "$state"
    exit 1
  fi
  sleep 0.2
done
until grep -q '^TensorBoard' "$state/log" && grep -q '^Ray.s dashboard' "$state/log"; do sleep 0.1; done
cat "$state/log"
echo "cluster/local/down.sh ends the cluster and removes its data."
