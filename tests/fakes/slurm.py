"""sbatch, squeue, scancel, scontrol, sinfo, srun: one job, number 4711."""

import os
import subprocess
import sys
from pathlib import Path

from world import FAKES, called, option, recall, refuse, remember, scenario, take_turn

program, words = sys.argv[1], sys.argv[2:]
called(program)

# Options of sbatch that a script may hold, as its manual lists them.
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "partition", "account", "qos", "time", "signal"}
SBATCH |= {"output", "open-mode", "requeue", "cpus-per-task", "mem", "constraint"}

if program == "sbatch":
    script = Path(words[-1]).read_text().splitlines()
    for line in [line.removeprefix("#SBATCH --") for line in script if line.startswith("#SBATCH --")]:
        name, _, value = line.partition("=")
        if name not in SBATCH:
            refuse(f"sbatch: unrecognized option '--{name}'\nTry \"sbatch --help\" for more information")
        if name == "partition" and value not in scenario("partitions", ["gpu"]):
            refuse(
                f"sbatch: error: invalid partition specified: {value}\n"
                "sbatch: error: Batch job submission failed: Invalid partition name specified"
            )
    if trouble := scenario("sbatch"):
        refuse(f"sbatch: error: Batch job submission failed: {trouble}")
    remember("queue", True)
    print("4711" if "--parsable" in words else "Submitted batch job 4711")
elif program == "squeue":
    state = take_turn("squeue", scenario("squeue", ["RUNNING node[1-2]"]))
    if not recall("queue", False) or state == "gone":
        if code := scenario("exit"):
            (FAKES.parent / "work" / "runs" / "jobs" / scenario("job") / "exit").write_text(code + "\n")
        refuse("slurm_load_jobs error: Invalid job id specified")
    print(state)
elif program == "sinfo":
    if (option("partition") or "gpu") not in scenario("partitions", ["gpu"]):
        sys.exit(0)  # the real one prints nothing either
    print(scenario("sinfo", "8 gpu:h100:8 1-00:00:00"))
elif program == "srun":  # runs the command once, here
    command = words[next(at for at, word in enumerate(words) if not word.startswith("--")) :]
    ranks = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "here"}
    sys.exit(subprocess.run(command, env=os.environ | ranks, check=False).returncode)
elif program == "scontrol" and words[:2] == ["show", "hostnames"]:
    print("here")
