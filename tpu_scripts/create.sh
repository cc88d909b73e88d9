#!/usr/bin/env bash
# Create a TPU VM, or do nothing if it is there.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
create.sh --name NAME --zone ZONE --type TYPE [--spot] [OPTIONS]

Create a TPU VM and wait until it is READY. A node that is READY is left as it is, one that is being made is waited
for, a stopped one is started. A preempted node is reported with exit code 75: resume.sh deletes it and makes it anew.
Exit code 75 also says that the zone has no capacity now.

  tpu_scripts/create.sh --name digits --zone us-west4-a --type v5litepod-16 --spot --dry-run
HELP
}

start "$@"
need_type
node_state ABSENT
while [[ $state == @(DELETING|STOPPING) ]]; do
  say "$TPU_NAME is $state, waiting"
  sleep "$TPU_POLL"
  node_state ABSENT
done
case $state in
  READY) say "$TPU_NAME is READY: nothing to do" && exit 0 ;;
  ABSENT)
    request gcloud compute tpus tpu-vm create "$TPU_NAME" "${location[@]}" "--accelerator-type=$TPU_TYPE" \
      "--version=$TPU_VERSION" ${TPU_SPOT:+--spot} "${create_with[@]}"
    ;;
  STOPPED) run gcloud compute tpus tpu-vm start "$TPU_NAME" "${location[@]}" ;;
  *) if is_lost; then lost "$TPU_NAME is $state; resume.sh replaces it"; fi ;;
esac
wait_until_ready
