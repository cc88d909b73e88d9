#!/usr/bin/env bash
# From nothing to a finished run: create or queue, set up, launch, watch, and again after every preemption.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
run.sh --name NAME --zone ZONE --type TYPE [--spot] [--queued] [--bucket BUCKET] [--config FILE] [OPTIONS] [KEY=VALUE …]

Get a node (create.sh, or queue.sh with --queued), set it up, launch the run and watch it. After a preemption, or when
the training exits with 75, the same is done again with the same command until it exits with 0; exit codes 1 and 2 end
it at once and show the end of the log. Every step first looks at what is there, so run.sh itself may be stopped and
started again at any time, also from another machine. Without --bucket each preemption would begin at step 0.

  --attempts N         how often to start before giving up with 75 [TPU_ATTEMPTS, 100]
  --delete-when-done   delete the node when the run is done or has failed; otherwise it stays, and costs

  tpu_scripts/run.sh --name digits --zone us-west4-a --type v5litepod-16 --spot --bucket my-runs \
    --config configs/default.yaml run_dir=../bucket/digits steps=2000 --dry-run
HELP
}

start "$@"
if [[ -n $dry ]]; then
  TPU_DRY_STATE=ABSENT "$here/resume.sh" "$@"
  "$here/watch.sh" "$@"
  echo "# after a preemption, or exit code 75, the same again: at most $TPU_ATTEMPTS times"
  [[ -z $delete_when_done ]] || "$here/delete.sh" "$@"
  exit 0
fi

for ((attempt = 1; ; attempt++)); do
  code=0
  if "$here/resume.sh" "$@"; then "$here/watch.sh" "$@" || code=$?; else code=$?; fi
  [[ $code == "$LOST" ]] || break
  if ((attempt >= TPU_ATTEMPTS)); then
    say "not done after $attempt attempts"
    break
  fi
  say "attempt $attempt ended early; the same again in $TPU_POLL seconds"
  sleep "$TPU_POLL"
done
[[ -z $delete_when_done ]] || "$here/delete.sh" "$@"
exit "$code"
