#!/usr/bin/env bash
# Start the training on every worker, where it goes on without this machine.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
launch.sh --name NAME --zone ZONE [--config FILE] [--env NAME=VALUE] [--secret NAME=SECRET] [OPTIONS] [KEY=VALUE …]

Start `python train.py --config FILE KEY=VALUE …` on every worker of a node that setup.sh has seen, detached from ssh.
Beside the code, ~/vlora/run holds log, pid, command and, when the run ended, exit. Where a run is going on no second
one is started. A run that stopped is continued by the same command from the checkpoints in its run_dir, which
therefore must be on storage that outlives the node and that all workers share: run_dir=../bucket/NAME, with setup.sh
--bucket.

Secrets never pass through here; variables that are named like one are refused. Put a secret into Secret Manager, let
the node's service account read it, and give its name: every worker fetches the value as the run starts.

  gcloud secrets create hf-token --data-file=-        # type or pipe the token, then end the input
  tpu_scripts/launch.sh --name digits --zone us-west4-a --secret HF_TOKEN=hf-token \
    --config configs/llama_gsm8k_lora.yaml run_dir=../bucket/gsm8k
HELP
}

start "$@"
reached on_workers all bash vlora/worker.sh start "${variables[@]}" -- \
  python train.py ${TPU_CONFIG:+--config "$TPU_CONFIG"} "${overrides[@]}"
