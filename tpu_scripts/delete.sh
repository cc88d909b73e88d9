#!/usr/bin/env bash
# Delete a TPU VM and its queued resource, or do nothing if they are gone.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
delete.sh --name NAME --zone ZONE [OPTIONS]

Delete the queued resource of that name, with its node, and then the node if it is still there; nothing is asked. Both
are looked for in any case, since a request forgotten in the queue may become a node that costs money. What was
written to the node's own disk is lost, what is in the bucket stays.

  tpu_scripts/delete.sh --name digits --zone us-west4-a --dry-run
HELP
}

start "$@"
if [[ -n $TPU_QUEUED ]]; then queue_state ACTIVE; else queue_state ABSENT; fi
if [[ $state != ABSENT ]]; then
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${location[@]}" --force --quiet
fi
if [[ -n $TPU_QUEUED ]]; then node_state ABSENT; else node_state READY; fi
while [[ $state == DELETING ]]; do
  sleep "$TPU_POLL"
  node_state ABSENT
done
if [[ $state == ABSENT ]]; then
  [[ -n $dry ]] || say "no node $TPU_NAME in $TPU_ZONE"
else
  run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${location[@]}" --quiet
fi
