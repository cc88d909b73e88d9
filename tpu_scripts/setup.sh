#!/usr/bin/env bash
# Copy a commit of this repository to every worker and install it there.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
setup.sh --name NAME --zone ZONE [--commit COMMIT] [--bucket BUCKET] [OPTIONS]

Copy COMMIT (HEAD if not given) as a tar file to ~/vlora/code of every worker and install it with jax[tpu] into
~/vlora/code/.venv; with --bucket, mount the bucket at ~/vlora/bucket with gcsfuse. Files that are not committed are
not copied. Nothing is installed twice, and the code under a run that is going on stays.

Checkpoints must survive the node and be seen by all of its workers, so let run_dir lie in the bucket:

  tpu_scripts/setup.sh --name digits --zone us-west4-a --bucket my-runs
  tpu_scripts/launch.sh --name digits --zone us-west4-a --bucket my-runs run_dir=../bucket/digits

The service account of the node needs to read and write the bucket. Secrets are not copied; see launch.sh --help.
HELP
}

start "$@"
archive=$root/dist/$TPU_NAME.tar.gz
run git -C "$root" log -1 --format='%H %s' "$TPU_COMMIT" || wrong "no commit $TPU_COMMIT in $root"
run mkdir -p "$root/dist"
run git -C "$root" archive --format=tar.gz "--output=$archive" "$TPU_COMMIT"
# READY comes a little before sshd answers.
for ((attempt = 1; ; attempt++)); do
  if on_workers all mkdir -p vlora; then break; fi
  ((attempt < TPU_TRIES)) || reached false
  sleep "$TPU_POLL"
done
reached run gcloud compute tpus tpu-vm scp "$archive" "$here/worker.sh" "$TPU_NAME:vlora/" "${location[@]}" \
  --worker=all "${ssh_with[@]}"
reached on_workers all bash vlora/worker.sh setup "vlora/$TPU_NAME.tar.gz" ${TPU_BUCKET:+"$TPU_BUCKET"}
