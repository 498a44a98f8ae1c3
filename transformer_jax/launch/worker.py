"""Shell that runs on the workers: environment, and the start-up script of a Cloud TPU machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from textwrap import indent

from transformer_jax.launch.job import Job

TERMINATED, TIMED_OUT = 143, 124
"""Exit codes of a process ended by SIGTERM, and by `timeout` at the spend cap."""

HOME = "/opt/tjax"
"""Where a Cloud TPU worker keeps the tree, its packages, its log, and the number of its training process."""

SAVE = f"kill -TERM $(cat {HOME}/pid) && timeout 300 tail --pid=$(cat {HOME}/pid) -f /dev/null"
"""Lets training save and end."""

SHUTDOWN = f"""\
#!/bin/bash
# Runs when the machine is taken away or reboots: systemd does not pass its SIGTERM on to what a start-up script began.
{SAVE}
"""

INSTALL = """\
python3 -m pip install --quiet --target ../uv uv  # the image's own Python is older than this project needs
../uv/bin/uv venv --quiet --allow-existing --python 3.12 ../venv
../uv/bin/uv pip install --quiet --python ../venv/bin/python --constraint constraints/py312.txt --editable '.[tpu]'"""


def exports(job: Job) -> str:
    """Return the lines that set the plain environment of a job."""
    commit = {"TJAX_COMMIT": job.source.label} if job.source else {}
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in {**commit, **job.env}.items())


def exports_of(programs: Mapping[str, str]) -> str:
    """Return the lines that set each variable to what a program prints; its failure ends the script."""
    return "".join(f'{name}="$({program})"\nexport {name}\n' for name, program in programs.items())


def read_env(file: str) -> str:
    """Return the lines that export what a file of NAME=VALUE lines holds, each value as it stands."""
    return (
        "while IFS= read -r line; do\n"
        "    case $line in '' | '#'*) ;; *) export \"$line\" ;; esac\n"
        f"done < {shlex.quote(file)}\n"
    )


def limited(job: Job, command: str, began: str) -> str:
    """Return a command that is told to save and end when the job has used up its seconds, and is killed 300 s later.

    `began` is a file with the time of the first start: whatever starts the command again does not start the clock anew.
    """
    if not job.seconds:
        return f"exec {command}"
    left = f"left=$(({job.seconds} + $(cat {began}) - $(date +%s)))"
    return f"{left} && exec timeout --signal=TERM --kill-after=300 $((left > 0 ? left : 1)) {command}"


def startup(job: Job, launch: str, hosts: int, *, environment: str, give_back: str) -> str:
    """Return the script that every worker of `hosts` runs as root when it boots.

    Args:
        job: what is run.
        launch: folder of the bucket that holds the tree, and where logs and exit codes go.
        hosts: workers of the job.
        environment: lines of shell that set the environment.
        give_back: lines of shell that the first worker runs when all have ended.
    """
    body = {
        "install": job.setup or INSTALL,
        "environment": environment,
        "train": limited(job, shlex.join(job.command), "../$attempt.began"),
        "give_back": give_back,
    }
    functions = "".join(f"{name}() {{\n{indent(text.rstrip(), '    ')}\n}}\n\n" for name, text in body.items())
    return (
        f"#!/bin/bash\n# Every worker of {job.name} runs this as root when it boots.\n\n"
        f"launch={launch} attempt={job.attempt} hosts={hosts}\n\n{functions}{WORKER}"
    )


WORKER = r"""set -euo pipefail
home=${TJAX_HOME:-/opt/tjax}
export HOME=${HOME:-/root} PATH=$home/venv/bin:$PATH:/snap/bin
mkdir -p "$home/code"
cd "$home/code"
exec >> ../log 2>&1
[ ! -e "../$attempt.exit" ] || exit 0  # it had ended before this boot
[ -e "../$attempt.began" ] || date +%s > "../$attempt.began"

ended() {
    code=$?
    set +e
    trap - EXIT
    rm -f ../pid
    gcloud storage cp ../log "$launch/logs/$attempt/$(hostname).log"
    # Told to stop, by a preemption, a reboot or `tjax stop`: whoever did it knows what comes next.
    [ $code = 143 ] && exit 143
    echo "$(hostname) $code" > "../$attempt.exit"
    gcloud storage cp "../$attempt.exit" "$launch/exit/$attempt/$(hostname)"
    # The first worker gives the slice back once all have reported, whether or not anybody watches.
    number=$(curl -s -H 'Metadata-Flavor: Google' \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
    if [ "$number" = 0 ]; then
        for _ in $(seq 60); do
            [ "$(gcloud storage ls "$launch/exit/$attempt/*" | wc -l)" -ge "$hosts" ] && break
            sleep 5
        done
        give_back
    fi
    exit $code
}
trap ended EXIT

gcloud storage cat "$launch/code.tar.gz" | tar -xz
install
environment
# All workers meet and compare versions, commit, clock and disk; one that is missing is named.
python -m transformer_jax.launch.probe --agree

train < /dev/null &
child=$!
echo $child > ../pid
trap 'kill -TERM $child' TERM
code=0
wait $child || code=$?
while kill -0 $child 2> /dev/null; do  # a signal ends `wait` early
    code=0
    wait $child || code=$?
done
exit $code
"""
