"""The job scripts, run by bash with stand-ins for the cluster: their commands, signals and requeueing."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").iterdir())
JOBS = [path for path in SCRIPTS if path.suffix == ".sbatch"]
KNOWN = {"job-name", "ntasks", "ntasks-per-node", "requeue", "signal", "open-mode"}
SITES = {"partition", "account", "qos", "constraint", "nodelist", "chdir", "mail-user"}
# Records its arguments; as $LONG, waits for SIGTERM and ends with $ON_TERM; else ends with $STATUS.
STAND_IN = """#!/usr/bin/env bash
printf '%s' "{name}" >> "$CALLS"; printf ' %q' "$@" >> "$CALLS"; echo >> "$CALLS"
if [ "{name}" = "${{LONG:-}}" ]; then
  trap 'sleep 0.3; echo "{name} received TERM" >> "$CALLS"; exit "$ON_TERM"' TERM
  touch "$CALLS.ready"
  for k in $(seq 100); do sleep 0.1; done
fi
exit "${{STATUS:-0}}"
"""


@pytest.fixture
def cluster(tmp_path):
    """Start a job script with stand-ins: `start(script, *words, **variables)` -> process, and `calls()`."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    for k in range(4):
        (tmp_path / "data" / f"P{k}").mkdir(parents=True)
    for name in ("python", "srun"):
        (bin_folder / name).write_text(STAND_IN.format(name=name))
    hosts = 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo node7; echo node9; fi\n'
    (bin_folder / "scontrol").write_text("#!/usr/bin/env bash\n" + hosts)
    for path in bin_folder.iterdir():
        path.chmod(0o755)
    environment = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "4321",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "3", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip

    def start(script, *words, **variables):
        command = ["bash", str(ROOT / "slurm" / script), *words]
        return subprocess.Popen(command, cwd=tmp_path, env=environment | variables, stderr=subprocess.PIPE, text=True)

    return start, lambda: calls.read_text().splitlines(), tmp_path / "calls.ready"


def ended(process):
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def stopped(process, ready):
    """End a job as the cluster does, once its work has begun."""
    end = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return ended(process)[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_its_options_are_known_and_not_specific_to_a_site(path):
    lines = path.read_text().splitlines()
    options = dict(
        re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in lines if "#SBATCH" in line
    )
    assert set(options) <= KNOWN and not set(options) & SITES
    assert options["signal"] == "B:TERM@120" and "requeue" in options
    first = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")], (
        "sbatch stops reading at the first command"
    )


def test_a_task_makes_the_run_of_its_index(cluster):
    start, calls, _ = cluster
    assert ended(start("sweep.sbatch", "my grid.yaml"))[0] == 0
    assert calls() == [r"python -m ldm_lib sweep my\ grid.yaml --only 3"]


def test_the_tasks_of_an_array_inpaint_every_patient_once(cluster, tmp_path):
    """Whatever the array looks like, and one task that is repeated takes its own patients."""
    start, calls, _ = cluster
    for name in ("P0", "P1", "P2", "P3", "P 4", "derivatives"):
        (tmp_path / "data" / name).mkdir(exist_ok=True)
        (tmp_path / "data" / name / f"of {name}").touch()
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text('#!/usr/bin/env bash\nls "$5"/*/ >> "$CALLS"; shift 5; printf "%s|" "$@" >> "$CALLS"\n')
    for task in ("0", "1", "2", "1"):
        process = start("inpaint.sbatch", "data", "my out", "3", "--steps", "4", SLURM_ARRAY_TASK_ID=task)
        assert ended(process) == (0, "")
    text = "\n".join(calls())
    assert re.findall(r"--output\|(.*?)\|--steps\|4\|", text) == [f"my out/part-{k}" for k in (0, 1, 2, 1)]
    of_tasks = [re.findall(r"of (\w+ ?\d?)$", part, re.MULTILINE) for part in text.split("--output")]
    assert of_tasks[:4] == [["P 4", "P2"], ["P0", "P3"], ["P1"], ["P0", "P3"]]


@pytest.mark.parametrize(("task", "parts", "status"), [("6", "7", 0), ("7", "7", 2), ("0", "none", 2), ("0", "0", 2)])
def test_a_task_without_patients_ends_and_one_without_a_part_is_refused(cluster, task, parts, status):
    start, _, ready = cluster
    assert ended(start("inpaint.sbatch", "data", "out", parts, SLURM_ARRAY_TASK_ID=task))[0] == status
    assert not (ready.parent / "calls").exists()


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (143, True)])
@pytest.mark.parametrize(
    "words", [("sweep.sbatch", "grid.yaml"), ("inpaint.sbatch", "data", "out", "4"), ("train.sbatch", "brats", "full")]
)
def test_only_what_was_stopped_is_requeued(cluster, words, status, again):
    start, calls, _ = cluster
    assert ended(start(*words, STATUS=str(status)))[0] == status
    assert ("scontrol requeue 4321" in calls()) == again


@pytest.mark.parametrize(
    ("words", "long", "code"),
    [
        (("sweep.sbatch", "grid.yaml"), "python", 143),
        (("inpaint.sbatch", "data", "out", "4"), "python", 143),
        (("train.sbatch", "brats", "full"), "srun", 143),
        (("train.sbatch", "brats", "full"), "srun", 1),  # what torchrun ends with when it is stopped
        (("train.sbatch", "brats", "full"), "python", 143),  # while the stage is being finished
    ],
)
def test_sigterm_is_forwarded_and_the_job_is_requeued(cluster, words, long, code):
    start, calls, ready = cluster
    assert stopped(start(*words, LONG=long, ON_TERM=str(code)), ready) == code
    assert calls()[-2:] == [f"{long} received TERM", "scontrol requeue 4321"]


def test_work_that_finishes_despite_sigterm_is_not_requeued(cluster):
    start, calls, ready = cluster
    assert stopped(start("sweep.sbatch", "grid.yaml", LONG="python", ON_TERM="0"), ready) == 0
    assert calls()[-1] == "python received TERM"


def test_a_training_starts_one_launcher_a_node_and_finishes_its_stage(cluster):
    start, calls, _ = cluster
    assert ended(start("train.sbatch", "brats", "full", "max_epochs=9", "data_dir=a b"))[0] == 0
    _, launched, finished = calls()
    assert launched == (
        "srun python -m torch.distributed.run --nnodes=2 --nproc-per-node=4 --rdzv-id=4321 --rdzv-backend=c10d "
        "--rdzv-endpoint=node7:24321 -m ldm_lib.experiment.launch -- --stage 04 --run brats "
        r"--preset full --set max_epochs=9 --set data_dir=a\ b"
    )
    assert finished == (
        r"python -m ldm_lib run 04 --run brats --preset full --set devices=8 --set max_epochs=9 --set data_dir=a\ b"
    )


def test_a_stage_whose_training_failed_is_not_finished(cluster):
    start, calls, _ = cluster
    assert ended(start("train.sbatch", "brats", "full", STATUS="1"))[0] == 1
    assert [call.split()[0] for call in calls()] == ["scontrol", "srun"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_without_arguments_it_prints_its_usage(cluster, path):
    start, _, _ = cluster
    status, errors = ended(start(path.name))
    assert status != 0 and "usage: sbatch" in errors
