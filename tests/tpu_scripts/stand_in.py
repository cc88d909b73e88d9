"""Stand-ins for the programs that the scripts call: `stand_in.py PROGRAM ARGUMENTS…`, started by wrappers on PATH.

Every call of gcloud, kubectl, srun and scontrol becomes a line of `calls.jsonl` in $STAND_IN, where `world.json` says
what there is and what is to happen; a worker of the TPU VM is a home directory beside them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PLACE = Path(os.environ.get("STAND_IN", "."))
WORLD = {}


def save():
    (PLACE / "world.json").write_text(json.dumps(WORLD))


def append(name, value):
    with (PLACE / name).open("a") as file:
        file.write(json.dumps(value) + "\n")


def homes():
    return [PLACE / f"worker-{index}" for index in range(WORLD["workers"])]


def not_found():
    print("ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/x' was not found", file=sys.stderr)
    return 1


def take_away():
    """The node and everything on it."""
    for home in homes():
        pid = home / "vlora/run/pid"
        if pid.exists() and not (home / "vlora/run/exit").exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)
            until(lambda home=home: (home / "vlora/run/exit").exists())
        shutil.rmtree(home, ignore_errors=True)


def until(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.01)


def describe(kind):
    """Each look at a state takes the next of the states that are to come; the last one stays."""
    states = WORLD[kind]
    if not states:
        return not_found()
    print(states[0])
    if len(states) > 1:
        states.pop(0)
    save()
    return 0


def create(kind):
    if WORLD["errors"]:
        print(f"ERROR: (gcloud) {WORLD['errors'].pop(0)}", file=sys.stderr)
        save()
        return 1
    WORLD[kind] = list(WORLD["coming"][kind])
    if kind == "queue":
        WORLD["node"] = list(WORLD["coming"]["node"])
    save()
    return 0


def delete(kind):
    if not WORLD[kind]:
        return not_found()
    WORLD[kind] = []
    if kind == "queue":
        WORLD["node"] = []
    take_away()
    save()
    return 0


def ssh(arguments):
    command = next(each.removeprefix("--command=") for each in arguments if each.startswith("--command="))
    which = next(each.removeprefix("--worker=") for each in arguments if each.startswith("--worker="))
    verb = command.split()[2] if command.startswith("bash vlora/worker.sh") else ""
    if verb == "status":
        WORLD["looks"] += 1
        save()
        if WORLD["looks"] == WORLD["preempt_at"]:
            WORLD["node"] = ["PREEMPTED"]
            WORLD["queue"] = ["SUSPENDED"] if WORLD["queue"] else []
            save()
            take_away()
    if not WORLD["node"] or WORLD["node"][0] != "READY":
        print("ssh: connect to host 10.0.0.1 port 22: Connection timed out", file=sys.stderr)
        return 255
    chosen = homes() if which == "all" else [homes()[int(which)]]
    if verb == "status" and WORLD["patient"]:
        until(lambda: all((home / "vlora/run/exit").exists() for home in chosen))
    results = []
    for home in chosen:
        home.mkdir(exist_ok=True)
        env = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "STAND_IN": str(PLACE),
            "WORKER": home.name,
            "TPU_GRACE": "2",
        }
        results.append(subprocess.run(["bash", "-c", command], cwd=home, env=env, check=False).returncode)
    return max(results)


def scp(arguments):
    *sources, target = [each for each in arguments if not each.startswith("--")]
    for home in homes():
        for source in sources:
            shutil.copy(source, home / target.partition(":")[2])
    return 0


def gcloud(arguments):
    append("calls.jsonl", arguments)
    kinds = {"tpu-vm": "node", "queued-resources": "queue"}
    match arguments:
        case ["secrets", "versions", "access", "latest", name]:
            print(f"value of {name.removeprefix('--secret=')}")
            return 0
        case ["compute", "tpus", group, "describe", *_]:
            return describe(kinds[group])
        case ["compute", "tpus", group, "create", *_]:
            return create(kinds[group])
        case ["compute", "tpus", group, "delete", *_]:
            return delete(kinds[group])
        case ["compute", "tpus", "tpu-vm", "ssh", _, *rest]:
            return ssh(rest)
        case ["compute", "tpus", "tpu-vm", "scp", *rest]:
            return scp(rest)
    print(f"ERROR: (gcloud) unrecognized arguments: {arguments}", file=sys.stderr)
    return 2


def uv(arguments):
    """`uv venv` makes an environment whose python is the training below."""
    if arguments[0] == "venv":
        python = Path(arguments[-1]) / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} train "$@"\n')
        python.chmod(0o755)
        append("installs.jsonl", os.environ["WORKER"])
    return 0


def train(arguments):
    """A training that exits with the next of the codes, or hangs until it is told to stop."""
    name = os.environ.get("WORKER", "worker-0")
    file = PLACE / f"runs-{name}.jsonl"
    past = len(file.read_text().splitlines()) if file.exists() else 0
    append(file.name, {"argv": arguments, "env": dict(os.environ)})
    code = WORLD["codes"][min(past, len(WORLD["codes"]) - 1)]
    if isinstance(code, list):
        code = code[int(name.removeprefix("worker-"))]
    print(f"{name}: this is run {past}", flush=True)
    if code == "hang":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (PLACE / "hanging").touch()
        time.sleep(20)
        code = 1
    return code


def recorded(arguments):
    append("calls.jsonl", arguments)
    return 0


def kubectl(arguments):
    append("calls.jsonl", arguments)
    if "--filename=-" in arguments:
        (PLACE / "manifest.yaml").write_text(sys.stdin.read())
    return 0


def srun(arguments):
    append("calls.jsonl", arguments)
    return train(arguments[arguments.index("python") + 1 :])


if __name__ == "__main__":
    WORLD.update(json.loads((PLACE / "world.json").read_text()))
    programs = {"gcloud": gcloud, "uv": uv, "train": train, "kubectl": kubectl, "srun": srun, "scontrol": recorded}
    sys.exit(programs[sys.argv[1]](sys.argv[2:]))
