"""Cloud TPU virtual machines, through queued resources: one request, every worker, given back at the end.

Everything the workers need lies in the bucket, so a slice that was taken away is asked for again and goes on.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from transformer_jax.errors import UserError
from transformer_jax.launch.command import GONE, Command, ask
from transformer_jax.launch.job import Job, State
from transformer_jax.launch.on_slices import OnSlices
from transformer_jax.launch.slices import check_slices
from transformer_jax.launch.vendors import explain
from transformer_jax.launch.worker import (
    HOME,
    SAVE,
    SHUTDOWN,
    TIMED_OUT,
    exports,
    exports_of,
    read_env,
    startup,
)
from transformer_jax.pulse import LOST

WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")


@dataclass(frozen=True)
class TpuVm(OnSlices):
    """One or more slices of Cloud TPU."""

    reserved: bool = False
    """Take the slices from the project's reservation."""
    valid_until: str = ""
    """How long the request may wait, as 6h; for ever unless given."""
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    internal_ip: bool = False
    """No external addresses: the machines are reached from inside their network."""

    @property
    def where(self) -> str:
        """Slices and zone."""
        return f"{self.times}{self.slice.name}{' spot' if self.spot else ''} in {self.zone}"

    def check(self, job: Job) -> None:
        """Raise `UserError` for what the Cloud TPU API would refuse."""
        if not self.slice.generation.runtime:
            raise UserError(
                f"{self.slice.name} is not offered by the Cloud TPU API, only by GKE and Compute Engine: name a GKE "
                "cluster with --cluster."
            )
        if self.spot and self.reserved:
            raise UserError("--spot and --reserved exclude each other: capacity is spare, or it is reserved.")
        if not re.fullmatch(r"(\d+[dhms])*", self.valid_until):
            raise UserError(f"--valid-until {self.valid_until}: a duration looks like 6h, 90m or 1d12h.")
        check_slices(self.slice, self.slices)
        check_cloud(self.project, self.zone, self.bucket)

    def notes(self, job: Job) -> list[str]:
        """What the name of the slice means, and what the pod does by itself."""
        ends = "stays until `tjax stop`" if job.keep else "is given back by its first worker, watched or not"
        what = "slice" if self.slices == 1 else "request with all its slices"
        return [self.describe(), f"When training ends the {what} {ends}."]

    # What is run here.

    def commands(self, job: Job) -> list[Command]:
        """Pack, upload, then ask for the slice; its machines do the rest."""
        assert job.source is not None
        names = ["code.tar.gz"] + (["changes.patch"] if job.source.changed else [])
        upload = ("gcloud", "storage", "cp", *(f"{job.folder}/{name}" for name in names), f"{self._launch(job)}/")
        steps = [*job.source.pack(job.folder), Command("upload it", upload)]
        if job.env_file:
            steps.append(
                Command(
                    "upload the environment file; it is removed when the job ends",
                    ("gcloud", "storage", "cp", job.env_file, f"{self._launch(job)}/env"),
                )
            )
        return [*steps, self._create(job)]

    def again(self, job: Job) -> list[Command]:
        """Remove what is left of the old request, and ask again."""
        return [self._delete(job), self._create(job)]

    def _create(self, job: Job) -> Command:
        script, shutdown = f"{job.folder}/startup.sh", f"{job.folder}/shutdown.sh"
        create = ["gcloud", "compute", "tpus", "queued-resources", "create", job.name, *self._at]
        if self.slices == 1:
            create.append(f"--node-id={job.name}")
        else:
            create += [f"--node-count={self.slices}", f"--node-prefix={job.name}"]
        create += [
            f"--accelerator-type={self.slice.accelerator_type}",
            f"--runtime-version={self.slice.generation.runtime}",
            f"--metadata-from-file=startup-script={script},shutdown-script={shutdown}",
            f"--labels=tjax-job={job.name}",
        ]
        create += ["--spot"] if self.spot else ["--reserved"] if self.reserved else []
        create += [f"--valid-until-duration={self.valid_until}"] if self.valid_until else []
        create += [f"--service-account={self.service_account}"] if self.service_account else []
        create += [f"--network={self.network}"] if self.network else []
        create += [f"--subnetwork={self.subnetwork}"] if self.subnetwork else []
        create += ["--internal-ips"] if self.internal_ip else []
        what = f"{self.times}{self.slice.name} ({self.chips} chips)"
        purpose = f"ask for {what}; every worker runs startup.sh when it comes"
        return Command(purpose, tuple(create), {script: self._startup(job), shutdown: SHUTDOWN})

    @property
    def _at(self) -> tuple[str, str]:
        return (f"--project={self.project}", f"--zone={self.zone}")

    def _describe(self, job: Job, *form: str) -> tuple[str, ...]:
        return ("gcloud", "compute", "tpus", "queued-resources", "describe", job.name, *self._at, *form)

    def _ssh(self, job: Job, worker: str) -> tuple[str, ...]:
        """Begin an ssh command to one worker or all; several slices are nodes of one queued resource."""
        tail = (*self._at, *(("--internal-ip",) if self.internal_ip else ()))
        if self.slices == 1:
            return ("gcloud", "compute", "tpus", "tpu-vm", "ssh", job.name, *tail, f"--worker={worker}")
        node, within = ("all", "all") if worker == "all" else map(str, divmod(int(worker), self.slice.hosts))
        chosen = (f"--node={node}", f"--worker={within}")
        return ("gcloud", "compute", "tpus", "queued-resources", "ssh", job.name, *tail, *chosen)

    def _launch(self, job: Job) -> str:
        """The folder of the bucket that holds what a launch needs and leaves."""
        return f"{self.bucket}/{job.name}/launch"

    def state(self, job: Job, handle: str) -> State:
        """Read the state of the request, and the exit codes that workers left in the bucket."""
        answer = ask(self._describe(job, "--format=json"))
        gone = answer.code != 0 and "NOT_FOUND" in answer.err
        if answer.code and not gone:
            raise explain(self._describe(job), answer.code, answer.err)
        described = {} if gone else json.loads(answer.out).get("state", {})
        state = described.get("state", "")
        if state in WAITING:
            return State("queued", state.lower().replace("_", " "))
        if state in ("SUSPENDING", "SUSPENDED"):
            by_user = described.get("stateInitiator") == "USER"
            return State("stopped", "suspended by a user") if by_user else State("preempted", "taken away")
        if state == "FAILED":
            why = described.get("failedData", {}).get("error", {}).get("message", "the request could not be fulfilled")
            return State("failed", why, 1)
        if ended := self._ended(job):
            return ended
        if state != "ACTIVE":
            return State("stopped", "the slice is gone")
        return State("preempted", "taken away") if self._taken(job) else State("running")

    def _ended(self, job: Job) -> State | None:
        """Judge by the exit codes in the bucket; None while workers still train."""
        argv = ("gcloud", "storage", "cat", f"{self._launch(job)}/exit/{job.attempt}/*")
        answer = ask(argv)
        if answer.code:
            if "matched no objects" in answer.err:
                return None
            raise explain(argv, answer.code, answer.err)
        codes = {host: int(code) for host, code in re.findall(r"^(\S+) (\d+)$", answer.out, re.M)}
        bad = {host: code for host, code in codes.items() if code not in (0, TIMED_OUT)}
        if bad:
            # Who was lost comes before who noticed it.
            host, code = min(bad.items(), key=lambda one: (one[1] == LOST, one[0]))
            return State("failed", f"{host} ended with exit code {code}", code)
        if TIMED_OUT in codes.values():
            return State("stopped", "the spend cap is reached", TIMED_OUT)
        return State("done") if len(codes) >= self.hosts else None

    def _taken(self, job: Job) -> bool:
        """Look whether a machine of an active request was preempted."""
        chosen = (f"--filter=labels.tjax-job={job.name}", "--format=value(state)")
        argv = ("gcloud", "compute", "tpus", "tpu-vm", "list", *self._at, *chosen)
        answer = ask(argv)
        if answer.code:
            raise explain(argv, answer.code, answer.err)
        return any(state in ("PREEMPTED", "TERMINATED") for state in answer.out.split())

    def logs(self, job: Job, handle: str, worker: str, lines: int, follow: bool, *, over: bool = False) -> Command:
        """Read the log on the machine while it is there, and in the bucket afterwards."""
        if over:
            kept = f"{self._launch(job)}/logs/{job.attempt}/*"
            return Command("read the logs that were kept", ("gcloud", "storage", "cat", "--display-url", kept))
        tail = f"tail -n {lines} {'-F ' if follow else ''}{HOME}/log"
        if worker == "all":
            tail += ' | sed -u "s/^/[$(hostname)] /"'
        return Command("read the log", (*self._ssh(job, worker), f"--command={tail}"))

    def ssh(self, job: Job, handle: str, worker: str) -> Command:
        """Open a shell on one worker."""
        if self.slices == 1:
            return Command("open a shell", self._ssh(job, worker))
        # `queued-resources ssh` only runs commands; a node has the prefix and a number as its name.
        node, within = divmod(int(worker), self.slice.hosts)
        argv = ("gcloud", "compute", "tpus", "tpu-vm", "ssh", f"{job.name}-{node}", *self._at, f"--worker={within}")
        return Command("open a shell", argv)

    def stop(self, job: Job, handle: str) -> list[Command]:
        """Let every worker save, then give the slice back."""
        save = f"sudo {SAVE}; true"
        return [
            Command("let every worker save (up to 5 minutes)", (*self._ssh(job, "all"), f"--command={save}")),
            *self.finish(job),
        ]

    def finish(self, job: Job) -> list[Command]:
        """Delete the request and its machines, and the environment file in the bucket."""
        remove = ("gcloud", "storage", "rm", f"{self._launch(job)}/env")
        return [self._delete(job)] + (
            [Command("remove the environment file", remove, lenient=GONE)] if job.env_file else []
        )

    def _delete(self, job: Job) -> Command:
        delete = ("gcloud", "compute", "tpus", "queued-resources", "delete", job.name, *self._at, "--force", "--quiet")
        return Command("give the slice back", delete, lenient=GONE)

    def _startup(self, job: Job) -> str:
        """Return the script that every worker runs as root when it boots."""
        read = f"gcloud secrets versions access latest --secret={{}} --project={self.project}"
        secrets = {name: read.format(secret) for name, secret in job.secrets.items()}
        own = '(umask 077 && gcloud storage cat "$launch/env" > ../env)\n' if job.env_file else ""
        last = [shlex.join([*self._delete(job).argv, "--async"])]
        last += ['gcloud storage rm "$launch/env"'] if job.env_file else []
        return startup(
            job,
            self._launch(job),
            self.hosts,
            environment=exports(job) + exports_of(secrets) + own + (read_env("../env") if job.env_file else ""),
            give_back=":" if job.keep else "\n".join(last),
        )

    def probe(self, job: Job, handle: str) -> Command | None:
        """Ask every worker about itself."""
        line = f"cd {HOME}/code && ../venv/bin/python -m transformer_jax.launch.probe"
        return Command("ask every worker", (*self._ssh(job, "all"), f"--command={line}"))


def check_cloud(project: str, zone: str, bucket: str) -> None:
    """Raise `UserError` for what no Google Cloud service could accept."""
    needed = {"project": project, "zone": zone, "bucket": bucket}
    if missing := [f"--{name}" for name, value in needed.items() if not value]:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed to launch on Cloud TPU."
        )
    if not re.fullmatch(r"[a-z][a-z0-9.:-]*", project):
        raise UserError(f"--project {project}: the ID of a project looks like my-project-123; its name will not do.")
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
        raise UserError(f"--zone {zone}: a zone looks like us-central2-b.")
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]{2,}(/[^\s/]+)*", bucket):
        raise UserError(
            f"--bucket {bucket}: a bucket is given as gs://NAME or gs://NAME/FOLDER; NAME has three characters or more."
        )
