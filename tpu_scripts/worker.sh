#!/usr/bin/env bash
# Runs on the workers of a TPU VM, where setup.sh copies it; the other scripts call it through ssh.
#
#   setup TAR [BUCKET]                              unpack and install the code, mount the bucket
#   start [--env N=V] [--secret N=S] -- COMMAND …   start it, detached, unless one runs
#   status | log OFFSET | tail | stop
set -euo pipefail

base=$HOME/vlora
code=$base/code
session=$base/run
mkdir -p "$session"

# A lock, not the pid, says whether a run is going on: pids come back after a restart of the worker.
running() { ! flock --shared --nonblock "$session/lock" true; }

install_code() {
  local stamp
  stamp=$(sha256sum "$1" | cut -d ' ' -f 1)
  if [[ -f $code/.installed && $(<"$code/.installed") == "$stamp" ]]; then
    echo "$(hostname): this code is installed"
    return
  fi
  rm -rf "$code"
  mkdir "$code"
  tar --extract --gzip --file "$1" --directory "$code"
  cd "$code"
  # The images come with Python 3.10, the library wants a newer one; uv brings it.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[plan]'
  echo "$stamp" >.installed
}

mount_bucket() {
  mkdir -p "$base/bucket"
  if mountpoint --quiet "$base/bucket"; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    curl --silent --show-error --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update --quiet=2
    sudo apt-get install --quiet=2 --yes gcsfuse
  fi
  gcsfuse --implicit-dirs "$1" "$base/bucket"
}

setup() {
  if running; then
    echo "$(hostname): a run is going on, its code stays"
    return
  fi
  (install_code "$1")
  if (($# > 1)); then mount_bucket "$2"; fi
}

start() {
  if running; then
    echo "$(hostname): a run is going on, no second one is started"
    return
  fi
  while [[ $1 != -- ]]; do
    if [[ $1 == --env ]]; then
      export "${2?}"
    else
      local value
      value=$(gcloud secrets versions access latest "--secret=${2#*=}")
      export "${2%%=*}=$value"
    fi
    shift 2
  done
  shift
  rm -f "$session/exit" "$session/pid"
  if [[ -f $session/log ]]; then mv "$session/log" "$session/log.before"; fi
  printf '%q ' "$@" >"$session/command"
  cd "$code"
  PATH=$code/.venv/bin:$PATH PYTHONUNBUFFERED=1 nohup setsid flock --timeout 5 --close "$session/lock" \
    bash "$base/worker.sh" supervise "$@" >"$session/log" 2>&1 </dev/null &
  for _ in {1..200}; do
    if [[ -f $session/pid ]]; then break; fi
    sleep 0.05
  done
  [[ -f $session/pid ]] && echo "$(hostname): started as process $(<"$session/pid")"
}

# The process in `pid` is the training itself, so that a signal to it makes it save and exit with 75.
supervise() {
  local result=0
  "$@" &
  echo $! >"$session/pid.new" && mv "$session/pid.new" "$session/pid"
  wait $! || result=$?
  echo "$result" >"$session/exit.new" && mv "$session/exit.new" "$session/exit"
}

status() {
  if running; then
    echo "worker $(hostname) running"
  elif [[ -f $session/exit ]]; then
    echo "worker $(hostname) exit $(<"$session/exit")"
  elif [[ -f $session/pid ]]; then
    echo "worker $(hostname) vanished"
  else
    echo "worker $(hostname) none"
  fi
}

stop() {
  local grace=${TPU_GRACE:-120} signal=TERM
  while running; do
    kill -"$signal" "$(<"$session/pid")" 2>/dev/null || true
    for ((second = 0; second < grace; second++)); do
      running || return 0
      sleep 1
    done
    signal=KILL
  done
}

case $1 in
  setup | start) "$@" ;;
  supervise) "$@" ;;
  status | stop) "$1" ;;
  log) tail -c "+$(($2 + 1))" "$session/log" ;;
  tail) tail -n 20 "$session/log" | sed "s/^/$(hostname): /" ;;
  *) echo "worker.sh: unknown verb $1" >&2 && exit 2 ;;
esac
