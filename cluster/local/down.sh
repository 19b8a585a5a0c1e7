#!/usr/bin/env bash
# End the cluster that up.sh started, and remove its data. Other Ray clusters of the machine are not touched.
set -euo pipefail

state=${GTC_LOCAL_DIR:-/tmp/gtc-local-$UID}
if [ ! -e "$state/pid" ]; then
  echo "no cluster is up: $state/pid does not exist"
  exit 0
fi

pid=$(cat "$state/pid")
# the number may belong to another program by now, after a restart of the machine
if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q run_cluster.py; then
  kill "$pid" # it ends all its processes, then itself
  if ! timeout 60 tail --pid="$pid" -f /dev/null; then
    echo "error: process $pid has not ended after 60 seconds; see $state/log" >&2
    exit 1
  fi
fi
rm -rf "$state"
echo "the cluster has ended"
