#!/usr/bin/env bash
# Fill in gke_jobset.yaml, and hand it to kubectl.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
gke.sh render|apply|delete --name NAME [OPTIONS] [KEY=VALUE …]

Run the training on a TPU slice of a GKE cluster that has the JobSet controller, the Cloud Storage FUSE driver and a
node pool of that accelerator and topology. `render` prints the manifest, `apply` hands it to kubectl (again is no
harm), `delete` removes the JobSet with its pods (gone is no error). The bucket is mounted at /bucket: let run_dir lie
there.

  --name NAME              of the JobSet
  --image IMAGE            with this repository and jax[tpu] in its working directory
  --accelerator NAME       as GKE names it: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu-v4-podslice
  --topology TOPOLOGY      of the slice: 4x4, 2x2x2 …
  --chips N                of one node of the pool [4]
  --bucket BUCKET          Cloud Storage bucket
  --service-account NAME   of Kubernetes, with access to the bucket [default]
  --namespace NAME         kubectl's own default if not given
  --restarts N             how often to start again after a crash; stops and disruptions don't count [10]
  --spot                   nodes of a spot pool
  --config FILE            the config of the run, as the image sees it
  KEY=VALUE …              changes to the config
  --dry-run                print the kubectl command with the manifest, and run nothing

Secrets are not part of the manifest. If the cluster has a Secret NAME-env, its entries are the environment of the run:

  kubectl create secret generic digits-env --from-literal=HF_TOKEN="$HF_TOKEN"
  tpu_scripts/gke.sh apply --name digits --image us-docker.pkg.dev/me/images/vlora --bucket my-runs --spot \
    --accelerator tpu-v5-lite-podslice --topology 4x4 run_dir=/bucket/digits
  kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=digits
HELP
}

# A double-quoted YAML string. Backslashes first, then what else is special there.
yaml() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# Kubernetes replaces $(NAME) in commands, and reads $$ as one dollar.
yaml_command() {
  local word words=()
  for word in "$@"; do words+=("$(yaml "${word//\$/\$\$}")"); done
  local IFS=,
  printf '[%s]' "${words[*]}"
}

options_of_gke() {
  while (($#)); do
    if [[ $1 == --?*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
      --help | -h) usage && exit 0 ;;
      --dry-run) dry=1 ;;
      --spot) spot=1 ;;
      --name | --image | --accelerator | --topology | --chips | --bucket | --service-account | --namespace | \
        --restarts | --config)
        (($# > 1)) || wrong "$1 needs a value; --help explains it"
        option=${1#--}
        given[${option//-/_}]=$2
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

needed() {
  local name
  for name in "$@"; do [[ -n ${given[$name]:-} ]] || wrong "--$name is missing; --help explains it"; done
}

render() {
  local line key nodes=1 size command=(python train.py)
  needed image accelerator topology bucket
  [[ ${given[topology]} =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || wrong "--topology is 4x4 or 2x2x2, not ${given[topology]}"
  [[ ${given[chips]} =~ ^[1-9][0-9]*$ ]] || wrong "--chips takes a number, not ${given[chips]}"
  [[ ${given[restarts]} =~ ^[0-9]+$ ]] || wrong "--restarts takes a number, not ${given[restarts]}"
  for size in ${given[topology]//x/ }; do ((nodes *= size)) || wrong "--topology ${given[topology]} has no chips"; done
  ((nodes % given[chips] == 0)) || wrong "$nodes chips of ${given[topology]} can't be shared out by ${given[chips]}"
  [[ -z ${given[config]:-} ]] || command+=(--config "${given[config]}")
  local -A values=(
    [NAME]=$(yaml "${given[name]}") [RESTARTS]=${given[restarts]} [NODES]=$((nodes / given[chips])) [SPOT]=spot
    [SERVICE_ACCOUNT]=$(yaml "${given[service_account]}") [ACCELERATOR]=$(yaml "${given[accelerator]}")
    [TOPOLOGY]=$(yaml "${given[topology]}") [IMAGE]=$(yaml "${given[image]}") [CHIPS]=${given[chips]}
    [FINAL]=$( ((nodes > given[chips])) && echo '[2]' || echo '[1, 2]')
    [COMMAND]=$(yaml_command "${command[@]}" "${overrides[@]}") [SECRET]=$(yaml "${given[name]}-env")
    [BUCKET]=$(yaml "${given[bucket]#gs://}")
  )
  while IFS= read -r line; do
    if [[ $line == *@SPOT@* && -z $spot ]]; then continue; fi
    # One placeholder a line, filled once: what a value holds is never looked at again.
    if [[ $line =~ ^([^@]*)@([A-Z_]+)@(.*)$ ]]; then
      key=${BASH_REMATCH[2]}
      line=${BASH_REMATCH[1]}${values[$key]}${BASH_REMATCH[3]}
    fi
    printf '%s\n' "$line"
  done <"$here/gke_jobset.yaml"
}

declare -A given=([chips]=4 [service_account]=default [restarts]=10)
spot=''
verb=${1:-}
case $verb in
  --help | -h) usage && exit 0 ;;
  render | apply | delete) shift ;;
  *) wrong "say render, apply or delete; --help explains them" ;;
esac
if [[ $* == *[[:cntrl:]]* ]]; then wrong "values with control characters have no place in the manifest"; fi
secrets_instead="the environment of the run is the cluster's Secret NAME-env; --help shows how to make it"
options_of_gke "$@"
needed name
if [[ ! ${given[name]} =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]]; then
  wrong "${given[name]} is no name of a JobSet: a-z, 0-9 and - inside"
fi
namespace=(${given[namespace]:+"--namespace=${given[namespace]}"})
if [[ $verb != render && -z $dry ]]; then
  command -v kubectl >/dev/null || wrong "kubectl is not installed; see https://kubernetes.io/docs/tasks/tools"
fi
case $verb in
  render) render ;;
  apply)
    manifest=$(render)
    if [[ -n $dry ]]; then
      printf "%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(quoted kubectl apply "${namespace[@]}" --filename=-)" "$manifest"
    else
      run kubectl apply "${namespace[@]}" --filename=- <<<"$manifest"
    fi
    ;;
  delete) run kubectl delete jobset "${given[name]}" "${namespace[@]}" --ignore-not-found ;;
esac
