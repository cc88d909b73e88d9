#!/usr/bin/env bash
# Ask for a TPU VM through a queued resource, and wait until it is there.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
queue.sh --name NAME --zone ZONE --type TYPE [--spot] [--valid-until 6h] [OPTIONS]

Ask for a TPU VM through a queued resource of the same name, and wait until it is ACTIVE and the node READY, for hours
if need be: stopping this script leaves the request in the queue, and the same command goes on waiting for it. A
request that FAILED or expired ends with exit code 1; one whose node was preempted (SUSPENDED) with 75: resume.sh asks
anew. Suspended and failed requests count against the quota until delete.sh removes them.

  tpu_scripts/queue.sh --name digits --zone us-west4-a --type v5litepod-16 --spot --valid-until 6h --dry-run
HELP
}

start "$@"
need_type
queue_state ABSENT
if [[ $state == ABSENT ]]; then
  request gcloud compute tpus queued-resources create "$TPU_NAME" "${location[@]}" "--node-id=$TPU_NAME" \
    "--accelerator-type=$TPU_TYPE" "--runtime-version=$TPU_VERSION" ${TPU_SPOT:+--spot} \
    ${TPU_VALID_UNTIL:+"--valid-until-duration=$TPU_VALID_UNTIL"} "${create_with[@]}"
  queue_state ACTIVE
fi
while [[ $state != ACTIVE ]]; do
  if [[ $state == FAILED ]]; then failed "the request $TPU_NAME FAILED or expired; delete.sh removes it"; fi
  if is_lost; then lost "the request $TPU_NAME is $state; resume.sh asks anew"; fi
  say "the request $TPU_NAME is ${state:-new}, waiting"
  sleep "$TPU_POLL"
  queue_state ACTIVE
done
wait_until_ready
