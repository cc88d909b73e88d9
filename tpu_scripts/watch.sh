#!/usr/bin/env bash
# Follow a run until it ends, and return its exit code.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
watch.sh --name NAME --zone ZONE [OPTIONS]

Print the log of worker 0 as it grows, and end as the run does, with its exit code: 0 done, 1 failed, 2 wrong input
(then with the last lines of every worker's log), 75 stopped and saved. 75 also says that the node was preempted or
restarted below the run; run.sh and resume.sh go on from there. Where workers differ, 2 counts most, then 75, then
other failures; what still runs on the others is stopped. Leaving with Ctrl-C stops the watching, not the run.
HELP
}

# verdict FILE: "running", "none" or an exit code, from one line a worker: "worker HOST running | exit N | vanished".
verdict() {
  local _ host what code all=none
  while read -r _ host what code; do
    case $what in
      running) [[ $all != @(none|0) ]] || all=running ;;
      vanished) say "the run on $host ended without a word: the worker was restarted" && code=$LOST ;;&
      exit | vanished)
        if [[ $all == none || $code == 2 ]] || [[ $all == @(0|running) && $code != 0 ]]; then
          all=$code
        elif [[ $all != 2 && $code == "$LOST" ]]; then
          all=$LOST
        fi
        ;;
    esac
  done < <(grep '^worker ' "$1")
  echo "$all"
}

start "$@"
if [[ -n $dry ]]; then
  echo "# every $TPU_POLL seconds until the run has ended:"
  node_state READY
  on_workers all bash vlora/worker.sh status
  on_workers 0 bash vlora/worker.sh log 0
  exit 0
fi

offset=0 misses=0 late=0 result=running
while :; do
  # Before ssh, which tries for minutes to reach a node that is gone.
  node_state READY
  if is_lost; then lost "$TPU_NAME is $state"; fi
  if on_workers all bash vlora/worker.sh status >"$scratch/status" 2>"$scratch/errors"; then
    misses=0
    result=$(verdict "$scratch/status")
    [[ $result != none ]] || failed "no run was started on $TPU_NAME; launch.sh starts one"
    if on_workers 0 bash vlora/worker.sh log "$offset" >"$scratch/log" 2>"$scratch/errors"; then
      cat "$scratch/log"
      ((offset += $(wc -c <"$scratch/log"))) || true
    fi
    # Peers of a worker that stopped may still be saving.
    if [[ $result != running ]]; then
      if ! grep -q '^worker .* running' "$scratch/status" || ((++late > 2)); then break; fi
    fi
  else
    ((++misses < TPU_TRIES)) || lost "the workers of $TPU_NAME do not answer: $(tail -n 1 "$scratch/errors")"
  fi
  sleep "$TPU_POLL"
done

# Peers of a worker that ended may wait for it forever, and would be in the way of the next start.
if [[ $result != 0 ]] && grep -q '^worker .* running' "$scratch/status"; then
  on_workers all bash vlora/worker.sh stop || true
fi
# A failure may be the first that is seen of a preemption.
if [[ $result != @(0|2|"$LOST") ]]; then
  node_state READY
  if is_lost; then lost "$TPU_NAME is $state"; fi
fi
case $result in
  0) say "the run on $TPU_NAME is done" ;;
  "$LOST") say "the run on $TPU_NAME stopped and is to be continued" ;;
  *)
    on_workers all bash vlora/worker.sh tail || true
    say "the run on $TPU_NAME ended with exit code $result"
    ;;
esac
exit "$result"
