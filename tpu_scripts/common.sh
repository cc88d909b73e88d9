# shellcheck shell=bash disable=SC2034
# What the verbs share: options, printing and running commands, the states of a node. Sourced, never run by itself.
#
# Exit codes are those of `vlora-jax train`: 0 done, 1 failed, 2 wrong input, 75 lost or stopped: the same again helps.
set -euo pipefail

readonly LOST=75
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here") delete_when_done=''

: "${TPU_NAME:=}" "${TPU_ZONE:=}" "${TPU_PROJECT:=}" "${TPU_TYPE:=}" "${TPU_VERSION:=}" "${TPU_SPOT:=}"
: "${TPU_QUEUED:=}" "${TPU_VALID_UNTIL:=}" "${TPU_COMMIT:=HEAD}" "${TPU_BUCKET:=}" "${TPU_CONFIG:=}"
: "${TPU_ATTEMPTS:=100}" "${TPU_POLL:=30}" "${TPU_TRIES:=5}"
dry=''
secrets_instead='put it into Secret Manager and say --secret NAME=ITS_NAME_THERE'
create_with=() ssh_with=() variables=() overrides=() location=()

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
wrong() { say "$@" && exit 2; }
failed() { say "$@" && exit 1; }
lost() { say "$@" && exit "$LOST"; }

options() {
  cat <<'HELP'

Options of all TPU scripts, which take them alike (in brackets the environment variable that does the same):
  --name NAME          of the node, and of its queued resource [TPU_NAME]
  --zone ZONE          such as us-west4-a [TPU_ZONE]
  --project PROJECT    gcloud's own default if not given [TPU_PROJECT]
  --type TYPE          accelerator type: v5litepod-16, v5p-128, v6e-8 … [TPU_TYPE]
  --version VERSION    runtime version; by default the one for JAX that suits the type [TPU_VERSION]
  --spot               cheaper, and may be taken away at any time [TPU_SPOT=1]
  --queued             ask through a queued resource, which waits for capacity [TPU_QUEUED=1]
  --valid-until TIME   how long to stay queued, such as 6h [TPU_VALID_UNTIL]
  --create-with FLAG   one more flag for the create command, such as --network=mine; repeat it for several
  --ssh-with FLAG      one more flag for ssh and scp, such as --internal-ip; repeat it for several
  --commit COMMIT      what is copied to the node; files that are not committed never are [TPU_COMMIT, HEAD]
  --bucket BUCKET      Cloud Storage bucket, mounted at ../bucket seen from the code [TPU_BUCKET]
  --config FILE        the config of the run, seen from the repository [TPU_CONFIG]
  --env NAME=VALUE     an environment variable of the run; repeat it for several. Names of secrets are refused
  --secret NAME=SECRET a variable whose value every worker reads from Secret Manager as the run starts
  KEY=VALUE …          changes to the config, as `vlora-jax train` takes them
  --dry-run            print every command, quoted for a shell, and run none, not even those that only read
  --help               this text

[TPU_POLL] is the number of seconds between two looks at a state (30), [TPU_TRIES] how often a look may fail (5).
HELP
}

# A word of a name that says what it holds: HF_TOKEN and data.api_key do, TOKENIZERS_PARALLELISM and token_rows don't.
is_secret() {
  local pattern='(^|[._-])(token|secret|password|passwd|pass|credentials?|key|apikey|auth)$'
  local name=${1,,}
  [[ $name =~ $pattern || $name =~ (secret|credential|password|access_key|api_key|private_key) ]]
}

refuse_secret() {
  local name=${1%%=*} value=${1#*=} pattern='^(hf_|ghp_|glpat-|sk-)[A-Za-z0-9_-]{16,}|PRIVATE KEY-----'
  if is_secret "$name" || [[ $value =~ $pattern ]]; then
    wrong "$name looks like a secret and is not sent; $secrets_instead"
  fi
}

parse() {
  while (($#)); do
    if [[ $1 == --?*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
      --help | -h) usage && options && exit 0 ;;
      --dry-run) dry=1 ;;
      --spot) TPU_SPOT=1 ;;
      --queued) TPU_QUEUED=1 ;;
      --delete-when-done) delete_when_done=1 ;;
      --name | --zone | --project | --type | --version | --valid-until | --commit | --bucket | --config | --attempts | \
        --create-with | --ssh-with | --env | --secret)
        (($# > 1)) || wrong "$1 needs a value; --help explains it"
        set_option "$1" "$2"
        shift
        ;;
      --) ;;
      -*) wrong "unknown option $1; --help lists them" ;;
      *=*) refuse_secret "$1" && overrides+=("$1") ;;
      *) wrong "$1 is neither an option nor KEY=VALUE; --help lists the options" ;;
    esac
    shift
  done
}

set_option() {
  case $1 in
    --name) TPU_NAME=$2 ;;
    --zone) TPU_ZONE=$2 ;;
    --project) TPU_PROJECT=$2 ;;
    --type) TPU_TYPE=$2 ;;
    --version) TPU_VERSION=$2 ;;
    --valid-until) TPU_VALID_UNTIL=$2 ;;
    --commit) TPU_COMMIT=$2 ;;
    --bucket) TPU_BUCKET=${2#gs://} ;;
    --config) TPU_CONFIG=$2 ;;
    --attempts) TPU_ATTEMPTS=$2 ;;
    --create-with) create_with+=("$2") ;;
    --ssh-with) ssh_with+=("$2") ;;
    --env | --secret)
      [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || wrong "$1 takes NAME=VALUE, not $2"
      [[ $1 == --secret ]] || refuse_secret "$2"
      variables+=("$1" "$2")
      ;;
  esac
}

# start OPTIONS: what every verb does first.
start() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || wrong "needs bash 4.4 or newer, this is $BASH_VERSION"
  parse "$@"
  [[ -n $TPU_NAME ]] || wrong "which node? Say --name NAME, or set TPU_NAME"
  [[ $TPU_NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || wrong "$TPU_NAME is no name of a node: a-z, 0-9 and - inside"
  [[ -n $TPU_ZONE ]] || wrong "in which zone? Say --zone ZONE, or set TPU_ZONE"
  [[ $TPU_ATTEMPTS =~ ^[0-9]+$ ]] || wrong "--attempts takes a number, not $TPU_ATTEMPTS"
  location=("--zone=$TPU_ZONE" ${TPU_PROJECT:+"--project=$TPU_PROJECT"})
  [[ -z $dry ]] || return 0
  command -v gcloud >/dev/null || wrong "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
}

quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# run COMMAND …: the one place where anything is changed; under --dry-run it is printed instead.
run() {
  if [[ -n $dry ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# describe KIND FIELD EXPECTED: sets state, ABSENT if there is no such thing. A dry run goes on as if it were EXPECTED.
describe() {
  local attempt command=(gcloud compute tpus "$1" describe "$TPU_NAME" "${location[@]}" "--format=value($2)")
  if [[ -n $dry ]]; then
    run "${command[@]}"
    state=$3
    return
  fi
  for ((attempt = 1; ; attempt++)); do
    if state=$("${command[@]}" 2>"$scratch/errors"); then return; fi
    state=ABSENT
    if grep -q NOT_FOUND "$scratch/errors"; then return; fi
    if ((attempt >= TPU_TRIES)) || grep -Eq 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT' "$scratch/errors"; then
      failed "gcloud does not tell the state of $TPU_NAME: $(tail -n 1 "$scratch/errors")"
    fi
    sleep "$TPU_POLL"
  done
}

node_state() { describe tpu-vm state "$1"; }
queue_state() { describe queued-resources state.state "$1"; }

# Spot nodes can't be started again, only made anew; a node on hold for maintenance comes back by itself.
is_lost() {
  [[ $state == @(ABSENT|PREEMPTED|TERMINATED|DELETING|STOPPING|STOPPED|HIDING|HIDDEN|SUSPENDING|SUSPENDED) ]]
}

wait_until_ready() {
  while node_state READY && [[ $state != READY ]]; do
    if is_lost; then lost "$TPU_NAME is $state before it was ready; resume.sh replaces it"; fi
    say "$TPU_NAME is ${state:-starting}, waiting"
    sleep "$TPU_POLL"
  done
}

# The versions of https://cloud.google.com/tpu/docs/runtimes for JAX and PyTorch.
runtime_version() {
  case $TPU_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) wrong "no runtime version is known for ${TPU_TYPE}; say --version VERSION" ;;
  esac
}

need_type() {
  [[ -n $TPU_TYPE ]] || wrong "which accelerator? Say --type TYPE, such as v5litepod-16"
  [[ -n $TPU_VERSION ]] || TPU_VERSION=$(runtime_version)
}

# request COMMAND …: a create command; 75 if the zone has nothing left, which may be otherwise in a while.
request() {
  local code=0
  if [[ -n $dry ]]; then
    run "$@"
    return
  fi
  say "asking for $TPU_TYPE in $TPU_ZONE, which may take minutes"
  run "$@" 2>"$scratch/errors" || code=$?
  cat "$scratch/errors" >&2
  [[ $code != 0 ]] || return 0
  if grep -Eqi 'no more capacity|insufficient.*capacity|RESOURCE_EXHAUSTED' "$scratch/errors"; then
    lost "no capacity for $TPU_TYPE in $TPU_ZONE now; --queued waits in Google's queue instead"
  fi
  failed "$TPU_NAME could not be had"
}

# on_workers WHICH COMMAND …: on the node; WHICH is all or a number. Dead connections end instead of hanging.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${location[@]}" "--worker=$1" --ssh-flag=-oConnectTimeout=30 \
    --ssh-flag=-oServerAliveInterval=30 "${ssh_with[@]}" "--command=$(quoted "${@:2}")"
}

# reached COMMAND …: run it; if that fails, tell a node that is gone (75) from one that is there (1).
reached() {
  if "$@"; then return; fi
  node_state READY
  if [[ $state == READY ]]; then failed "$TPU_NAME is there, but the command failed (see above)"; fi
  lost "$TPU_NAME is $state"
}
