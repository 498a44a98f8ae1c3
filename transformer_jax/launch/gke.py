"""Google Kubernetes Engine: one JobSet, one Job a slice, one pod a host.

The tree comes from the bucket through an init container, so that the image only has to hold Python. kubectl takes
JSON, which needs no library here.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from transformer_jax.errors import UserError
from transformer_jax.launch.command import Command, ask, shell
from transformer_jax.launch.job import Job, State
from transformer_jax.launch.on_slices import OnSlices
from transformer_jax.launch.slices import check_slices
from transformer_jax.launch.tpu_vm import check_cloud
from transformer_jax.launch.vendors import explain
from transformer_jax.launch.worker import TIMED_OUT, limited

INSTALL = (
    """version=$(python -c 'import sys; print("%d%d" % sys.version_info[:2])') && """
    "pip install --quiet --constraint constraints/py$version.txt --editable '.[tpu]'"
)
FETCHER = "gcr.io/google.com/cloudsdktool/google-cloud-cli:slim"
BEGAN = "/code/.began"
BAD_INPUT = 2
"""Exit code of `tjax` for what trying again will not mend."""
NAME_LABEL = "jobset.sigs.k8s.io/jobset-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
SLICE_LABEL = "jobset.sigs.k8s.io/job-index"


@dataclass(frozen=True)
class Gke(OnSlices):
    """TPU slices as node pools of a GKE cluster."""

    cluster: str = field(kw_only=True)
    namespace: str = "default"
    image: str = "python:3.12"
    service_account: str = ""
    """Kubernetes service account that may read and write the bucket."""
    retries: int = 10

    @property
    def node_labels(self) -> dict[str, str]:
        """Labels of the nodes that the pods need."""
        labels = {
            "cloud.google.com/gke-tpu-accelerator": self.slice.generation.gke,
            "cloud.google.com/gke-tpu-topology": self.slice.topology_name,
        }
        return labels | ({"cloud.google.com/gke-spot": "true"} if self.spot else {})

    @property
    def where(self) -> str:
        """Slices and cluster."""
        return f"{self.times}{self.slice.name}{' spot' if self.spot else ''} in cluster {self.cluster}"

    def check(self, job: Job) -> None:
        """Raise `UserError` for what GKE would refuse."""
        if not self.slice.generation.gke:
            raise UserError(f"{self.slice.name} is not launched through GKE here; leave --cluster out.")
        if self.slices > 1 and self.slice.hosts == 1:
            raise UserError(f"GKE joins several slices only if each has several hosts, and {self.slice.name} has one.")
        check_slices(self.slice, self.slices)
        check_cloud(self.project, self.zone if self.zone.count("-") == 2 else f"{self.zone}-a", self.bucket)
        if wrong := [name for name, reference in job.secrets.items() if "/" not in reference]:
            raise UserError(f"--secret {wrong[0]}: on GKE it is given as VARIABLE=SECRET/KEY, of a Kubernetes Secret.")

    def notes(self, job: Job) -> list[str]:
        """The same in terms of xpk, and what the name of the slice means."""
        xpk = ["xpk", "workload", "create", f"--workload={job.name}", f"--cluster={self.cluster}"]
        xpk += [f"--project={self.project}"]
        xpk += [f"--zone={self.zone}"] if self.zone.count("-") == 2 else []  # it knows no regions, and then asks gcloud
        xpk += [f"--tpu-type={self.slice.accelerator_type}"]
        xpk += [f"--num-slices={self.slices}", f"--max-restarts={self.retries}", f"--docker-image={self.image}"]
        xpk += ["--spot"] if self.spot else []
        xpk += [f"--command={shlex.join(job.command)}"]
        return [self.describe(), "With xpk, from an image that holds the tree and its packages:", shell(xpk)]

    def commands(self, job: Job) -> list[Command]:
        """Pack, upload, reach the cluster, then apply the JobSet."""
        assert job.source is not None
        names = ["code.tar.gz"] + (["changes.patch"] if job.source.changed else [])
        upload = ("gcloud", "storage", "cp", *(f"{job.folder}/{name}" for name in names), f"{self._launch(job)}/")
        reach = ("gcloud", "container", "clusters", "get-credentials", self.cluster, f"--location={self.zone}")
        secret = []
        if job.env_file:
            name, source = f"{job.name}-env", f"--from-env-file={job.env_file}"
            secret = [
                Command(
                    "remove the environment of an earlier launch",
                    self.kubectl("delete", "secret", name, "--ignore-not-found"),
                ),
                Command(
                    "keep the environment file as a Secret", self.kubectl("create", "secret", "generic", name, source)
                ),
            ]
        manifest = json.dumps(self.manifest(job), indent=2)
        return [
            *job.source.pack(job.folder),
            Command("upload it", upload),
            Command("let kubectl reach the cluster", (*reach, f"--project={self.project}")),
            *secret,
            Command(
                "remove what is left of an earlier launch",
                self.kubectl("delete", "jobset", job.name, "--ignore-not-found"),
            ),
            Command(
                "hand the JobSet to the cluster",
                self.kubectl("apply", f"--filename={job.folder}/jobset.json"),
                {f"{job.folder}/jobset.json": manifest},
            ),
        ]

    def _launch(self, job: Job) -> str:
        return f"{self.bucket}/{job.name}/launch"

    def kubectl(self, *argv: str) -> tuple[str, ...]:
        """Begin a kubectl command that can only reach this cluster."""
        context = f"--context=gke_{self.project}_{self.zone}_{self.cluster}"
        verb = argv[: next((at for at, word in enumerate(argv) if word.startswith("--")), len(argv))]
        return ("kubectl", *verb, context, f"--namespace={self.namespace}", *argv[len(verb) :])

    def _main(self, job: Job) -> str:
        install = job.setup or INSTALL
        agree = "python -m transformer_jax.launch.probe --agree"
        return f"{install} && {agree} && {limited(job, shlex.join(job.command), BEGAN)}"

    def _fetch(self, job: Job) -> str:
        """Return the shell of the init container: the tree, and under a cap the time of the first start."""
        fetch = f"set -o pipefail; gcloud storage cat {self._launch(job)}/code.tar.gz | tar -xz -C /code"
        if not job.seconds:
            return fetch
        kept = f"{self._launch(job)}/began/{job.attempt}"
        return (
            f"{fetch} && {{ gcloud storage cat {kept} > {BEGAN} || "
            f"{{ date +%s > {BEGAN} && gcloud storage cp {BEGAN} {kept}; }}; }}"
        )

    def manifest(self, job: Job) -> dict[str, Any]:
        """Return the JobSet (jobset.x-k8s.io/v1alpha2)."""
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": job.name,
                "namespace": self.namespace,
                "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
            },
            "spec": {
                "failurePolicy": {
                    "maxRestarts": self.retries,
                    "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
                },
                "replicatedJobs": [
                    {"name": "slice", "replicas": self.slices, "template": {"spec": self._job_spec(job)}}
                ],
            },
        }

    def _job_spec(self, job: Job) -> dict[str, Any]:
        # Bad input is final, and so is the end of the budget; everything else is tried again.
        final = [BAD_INPUT, TIMED_OUT]
        return {
            "parallelism": self.slice.hosts,
            "completions": self.slice.hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "train", "operator": "In", "values": final},
                    }
                ]
            },
            "template": {"spec": self._pod_spec(job)},
        }

    def _pod_spec(self, job: Job) -> dict[str, Any]:
        mount = [{"name": "code", "mountPath": "/code"}]
        chips = str(self.slice.chips_per_host)
        plain = ({"TJAX_COMMIT": job.source.label} if job.source else {}) | dict(job.env)
        env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
        for name, reference in job.secrets.items():
            secret, key = reference.split("/", 1)
            env.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
        train: dict[str, Any] = {
            "name": "train",
            "image": self.image,
            "workingDir": "/code",
            "command": ["bash", "-c", self._main(job)],
            "env": env,
            "ports": [{"containerPort": 8471}, {"containerPort": 8482}, {"containerPort": 8080}],
            "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
            "volumeMounts": mount,
        }
        if job.env_file:
            train["envFrom"] = [{"secretRef": {"name": f"{job.name}-env"}}]
        tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
        if self.spot:
            tolerations.append(
                {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
            )
        spec: dict[str, Any] = {
            "restartPolicy": "Never",
            "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "terminationGracePeriodSeconds": 300,
            "nodeSelector": self.node_labels,
            "tolerations": tolerations,
            "initContainers": [
                {
                    "name": "fetch",
                    "image": FETCHER,
                    "command": ["bash", "-c", self._fetch(job)],
                    "volumeMounts": mount,
                }
            ],
            "containers": [train],
            "volumes": [{"name": "code", "emptyDir": {}}],
        }
        return spec | ({"serviceAccountName": self.service_account} if self.service_account else {})

    def state(self, job: Job, handle: str) -> State:
        """Read the status of the JobSet."""
        argv = self.kubectl("get", "jobset", job.name, "--output=json")
        answer = ask(argv)
        if answer.code:
            if "NotFound" in answer.err:
                return State("stopped", "the JobSet is gone")
            raise explain(argv, answer.code, answer.err)
        status = json.loads(answer.out).get("status", {})
        restarts = status.get("restarts", 0)
        again = f"restarted {restarts} of {self.retries} times" if restarts else ""
        if status.get("terminalState") == "Completed":
            return State("done", again)
        if status.get("terminalState") == "Failed":
            if TIMED_OUT in self._exit_codes(job):
                return State("stopped", "the spend cap is reached", TIMED_OUT)
            failed = [c for c in status.get("conditions", []) if c.get("type") == "Failed"]
            return State("failed", failed[0].get("message", "") if failed else again, 1)
        ready = sum(group.get("ready", 0) for group in status.get("replicatedJobsStatus", []))
        if ready < self.slices:
            return State("queued", again or "its pods wait for nodes")
        return State("running", again)

    def _exit_codes(self, job: Job) -> set[int]:
        """Ask how the containers ended, as far as their pods are still there."""
        path = "{.items[*].status.containerStatuses[*].state.terminated.exitCode}"
        answer = ask(self.kubectl("get", "pods", f"--selector={NAME_LABEL}={job.name}", f"--output=jsonpath={path}"))
        return {int(code) for code in answer.out.split()} if answer.code == 0 else set()

    def _pod_of(self, job: Job, worker: str) -> str:
        """Return the selector of one worker's pod, slices numbered through."""
        number, index = divmod(int(worker), self.slice.hosts)
        return f"{NAME_LABEL}={job.name},{SLICE_LABEL}={number},{INDEX_LABEL}={index}"

    def logs(self, job: Job, handle: str, worker: str, lines: int, follow: bool, *, over: bool = False) -> Command:
        """Read the log of one pod, or of all with their names before each line."""
        selector = f"{NAME_LABEL}={job.name}" if worker == "all" else self._pod_of(job, worker)
        argv = ["logs", f"--selector={selector}", "--container=train", f"--tail={lines}"]
        argv += ["--prefix", f"--max-log-requests={self.hosts}"] if worker == "all" else []
        argv += ["--follow"] if follow else []
        return Command("read the log", self.kubectl(*argv))

    def ssh(self, job: Job, handle: str, worker: str) -> Command:
        """Open a shell in one pod."""
        pod = shell(self.kubectl("get", "pods", f"--selector={self._pod_of(job, worker)}", "--output=name"))
        line = f'exec {shell(self.kubectl("exec", "-it"))} "$({pod})" --container=train -- bash'
        return Command("open a shell", ("sh", "-c", line))

    def probe(self, job: Job, handle: str) -> Command | None:
        """Ask every pod about itself."""
        pods = shell(self.kubectl("get", "pods", f"--selector={NAME_LABEL}={job.name}", "--output=name"))
        line = "python -m transformer_jax.launch.probe"
        each = f'{shell(self.kubectl("exec"))} "$pod" --container=train -- {line}'
        return Command("ask every pod", ("sh", "-c", f"for pod in $({pods}); do {each} & done; wait"))

    def stop(self, job: Job, handle: str) -> list[Command]:
        """Delete the JobSet; its pods get SIGTERM and five minutes to save."""
        commands = [
            Command(
                "let every pod save, and remove the JobSet",
                self.kubectl("delete", "jobset", job.name, "--ignore-not-found"),
            )
        ]
        if job.env_file:
            remove = self.kubectl("delete", "secret", f"{job.name}-env", "--ignore-not-found")
            commands.append(Command("remove the environment", remove))
        return commands
