#!/usr/bin/env bash
# Bring a run back, whatever became of its node.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
resume.sh --name NAME --zone ZONE --type TYPE [--spot] [--queued] [OPTIONS] [KEY=VALUE …]

Make sure that there is a READY node and that the run goes on there: a preempted node, or a suspended or failed
request, is deleted and asked for anew (through the queue with --queued), then come setup.sh and launch.sh. Give it
the options of the first time; the run continues from the checkpoints in its run_dir. It does not wait for the run:
watch.sh does.
HELP
}

start "$@"
ask=create.sh replace='' request=''
if [[ -n $TPU_QUEUED ]]; then
  ask=queue.sh
  queue_state "${TPU_DRY_STATE:-SUSPENDED}"
  request=$state
fi
if [[ $request == @(SUSPENDING|SUSPENDED|FAILED) ]]; then
  replace=1
else
  node_state "${TPU_DRY_STATE:-PREEMPTED}"
  # A request that is ACTIVE without its node will never make another one.
  case $state in
    ABSENT) [[ $request != ACTIVE ]] || replace=1 ;;
    STOPPED | STOPPING | DELETING) ;;
    *) if is_lost; then replace=1; fi ;;
  esac
fi
if [[ -n $replace ]]; then "$here/delete.sh" "$@"; fi
"$here/$ask" "$@"
"$here/setup.sh" "$@"
"$here/launch.sh" "$@"
