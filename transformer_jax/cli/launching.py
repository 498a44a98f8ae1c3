"""launch and doctor: from a laptop to a pod; and the verbs of jobs.py, for what was launched."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import jax

from transformer_jax.cli import jobs
from transformer_jax.cli.planning import CLOSE
from transformer_jax.cli.training import TrainOptions
from transformer_jax.cli.verb import Tree, Verb, experiment_of, out, parse
from transformer_jax.config import Experiment, flatten
from transformer_jax.errors import UserError, closest
from transformer_jax.launch import doctor, secrets, store, watch
from transformer_jax.launch.command import shell
from transformer_jax.launch.gke import Gke
from transformer_jax.launch.job import Backend, Budget, Job, commands
from transformer_jax.launch.local import Local, machine_gpus
from transformer_jax.launch.on_slices import OnSlices
from transformer_jax.launch.slices import find_slice, sizes_of
from transformer_jax.launch.slurm import Slurm
from transformer_jax.launch.source import Source, inside, read_source
from transformer_jax.launch.store import Record
from transformer_jax.launch.tpu_vm import TpuVm
from transformer_jax.logs import print_json, say
from transformer_jax.planning.plan import Plan
from transformer_jax.planning.planner import plan
from transformer_jax.planning.report import GIB
from transformer_jax.planning.target import find_target
from transformer_jax.sharding import BATCH_AXES, mesh_sizes


@dataclass(frozen=True, kw_only=True)
class WhereOptions:
    """Where a job runs."""

    on: str = ""
    """A Cloud TPU slice (v5e-16, v4-32, v5p-128), "slurm", or "local"."""
    project: str = ""
    """Google Cloud project."""
    zone: str = ""
    """Zone of the slice; zone or region of the cluster."""
    bucket: str = ""
    """gs://BUCKET or gs://BUCKET/FOLDER, in the same region; the run is written to a folder of the job's name."""
    slices: int = 1
    """Slices, joined over the data-centre network."""
    spot: bool = False
    """Spot machines: cheaper, and may be taken away at any time."""
    reserved: bool = False
    """Cloud TPU: take the slices from the project's reservation."""
    valid_until: str = ""
    """Cloud TPU: how long the request may wait in the queue, as 6h."""
    service_account: str = ""
    """Account of the machines (Cloud TPU: an address; GKE: a Kubernetes service account)."""
    network: str = ""
    subnetwork: str = ""
    internal_ip: bool = False
    """Cloud TPU: machines without external addresses."""
    cluster: str = ""
    """GKE: run the slice as pods of this cluster."""
    namespace: str = "default"
    """GKE."""
    image: str = "python:3.12"
    """GKE: container image; it needs Python, and is faster with the packages in it."""
    nodes: int = 1
    """SLURM."""
    gpus_per_node: int = 8
    """SLURM: one process each; 0 for nodes without."""
    partition: str = ""
    """SLURM."""
    account: str = ""
    """SLURM."""
    qos: str = ""
    """SLURM."""
    time: str = ""
    """SLURM: time limit, as 24:00:00; a job that reaches it saves and takes another turn."""
    sbatch: tuple[str, ...] = ()
    """SLURM: NAME=VALUE ...: more options of sbatch, as cpus-per-task=12 mem=0 constraint=h100."""
    processes: int = 2
    """local: processes on this machine."""
    devices_per_process: int = 0
    """local: simulated CPU devices of each process; 0 for the devices of this machine."""
    port: int = 0
    """local: port of the coordinator; a free one unless given."""
    retries: int = 10
    """Times that a job may be taken away and go on."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(WhereOptions):
    """Train an experiment somewhere else. Typed again, it looks after the job that runs, or resumes the run."""

    experiment: Tree
    job: str = ""
    """Name of the job; that of the recipe unless given."""
    out: str = ""
    """Run folder there; BUCKET/JOB on Google Cloud and runs/JOB elsewhere unless given."""
    allow_dirty: bool = False
    """Carry along what was changed since the last commit, and keep the difference beside the job."""
    setup: str = ""
    """Shell command that installs the tree on a worker, instead of the usual one."""
    env: tuple[str, ...] = ()
    """NAME=VALUE ...: environment of the processes; never for secrets."""
    env_file: str = ""
    """File of NAME=VALUE lines that only you can read, for secrets."""
    secret: tuple[str, ...] = ()
    """VARIABLE=NAME ...: stored secrets (Cloud TPU: of Secret Manager; GKE: Kubernetes SECRET/KEY)."""
    price: float = 0.0
    """Price of one chip (GPU) for an hour, in your currency."""
    max_cost: float = 0.0
    """Stop the job when it has cost this much."""
    keep: bool = False
    """Cloud TPU: leave the slice when training has ended; it goes on costing."""
    doctor: bool = True
    """Make the checks of `tjax doctor` first, and launch nothing if one fails."""
    detach: bool = False
    """Return when the job is launched, instead of looking after it."""
    poll: float = 30.0
    """Seconds between two questions to the backend."""
    dry_run: bool = False
    """Print what would be run, as a shell script, and do nothing."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(WhereOptions):
    """Check what can be checked before money is spent; or, with --job, the hosts of a job that runs."""

    job: str = ""
    """Ask every host of this job about itself."""
    json: bool = False
    """Print one JSON object."""


def backend_of(where: WhereOptions) -> Backend:
    """Build the backend that the options describe.

    Raises:
        UserError: no such slice, or an option that says nothing about the place chosen.
    """
    if not where.on:
        raise UserError("where to? --on v5e-16 (any Cloud TPU slice), --on slurm, or --on local.")
    kind: type[Backend]
    extra: dict[str, Any] = {}
    if where.on == "slurm":
        kind = Slurm
    elif where.on == "local":
        kind, extra = Local, {"gpus": machine_gpus()}
    elif "-" not in where.on:
        sizes = f" Of {where.on} there are {', '.join(found)}." if (found := sizes_of(where.on)) else ""
        near = closest(where.on, ["slurm", "local"])
        raise UserError(f"--on {where.on}: a slice with its size as v5e-16, slurm, or local.{sizes or near}")
    else:
        kind, extra = Gke if where.cluster else TpuVm, {"slice": find_slice(where.on)}
    fields = {field.name for field in dataclasses.fields(cast(Any, kind))} - extra.keys()
    given = {field.name: getattr(where, field.name) for field in dataclasses.fields(WhereOptions)}
    given["bucket"] = given["bucket"].rstrip("/")
    known = fields | ({"on", "retries"} if kind is TpuVm else {"on"})
    for field in dataclasses.fields(WhereOptions):
        if field.name not in known and given[field.name] != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} says nothing about --on {where.on}.")
    if where.retries < 0:
        raise UserError(f"--retries cannot be negative, got {where.retries}.")
    return kind(**{name: value for name, value in given.items() if name in fields}, **extra)


def overrides(before: Experiment, after: Experiment) -> list[str]:
    """Return the options that turn one experiment into the other, as `tjax train` reads them.

    Raises:
        UserError: options cannot say it.
    """
    old, options = dict(flatten(before)), []
    for key, value in flatten(after):
        if old.get(key, ...) != value:
            name = key.replace("_", "-")
            if isinstance(value, bool):
                group, _, leaf = name.rpartition(".")
                options.append(f"--{group}{'.' if group else ''}{'' if value else 'no-'}{leaf}")
            elif isinstance(value, tuple):
                options += [f"--{name}", *map(str, _leaves(value))]
            else:
                options += [f"--{name}", str(value)]
    if parse(TrainOptions, TrainOptions(before), options, "tjax train").experiment != after:
        raise UserError("these changes cannot be passed on as options: write the variant as a recipe of your own.")
    return options


def _leaves(value: Iterable[Any]) -> Iterable[Any]:
    for one in value:
        yield from _leaves(one) if isinstance(one, tuple) else (one,)


def check_mesh(experiment: Experiment, devices: int | None, slices: int = 1) -> None:
    """Raise `UserError` if that many devices cannot hold the mesh, or the mesh cannot divide a batch."""
    if devices is None or devices < 1:  # of fewer, the check of the job tells
        return
    sizes = mesh_sizes(experiment.mesh, devices, slices)
    parts = math.prod(sizes[axis] for axis in BATCH_AXES) * experiment.train.accumulate
    if rows := experiment.data.rows_multiple % parts and experiment.data.rows_multiple:
        raise UserError(
            f"every batch has a multiple of data.rows_multiple={rows} rows, and {parts} parts (shards x accumulation) "
            f"there do not divide it; set --data.rows-multiple {parts}, or another mesh."
        )


def job_of(target: str, options: LaunchOptions) -> Job:
    """Put the job together that the options describe; nothing is written or run but git."""
    experiment = options.experiment
    experiment.check()
    backend = backend_of(options)
    check_mesh(experiment, backend.devices, backend.slices if isinstance(backend, OnSlices) else 1)
    name = options.job or re.sub(r"[^a-z0-9]+", "-", target.rsplit(":", 1)[-1].lower()).strip("-")[:40].rstrip("-")
    if isinstance(backend, Local) and (options.detach or options.max_cost):
        raise UserError("a local launch stays with its processes until they end: --detach and --max-cost say nothing.")
    if options.keep and not isinstance(backend, TpuVm):
        raise UserError(f"--keep says nothing about --on {options.on}.")
    source, recipe = None, target
    if not isinstance(backend, Local):
        source = read_source(allow_changes=options.allow_dirty)
        source.check_install(options.setup)
        recipe = inside(target, source)
    folder, run = _folders(name, source, backend)
    if isinstance(backend, OnSlices) and options.out and not options.out.startswith("gs://"):
        raise UserError(f"--out {options.out} would go with the machines that it lies on: name a folder of a bucket.")
    changed = overrides(experiment_of(target), experiment)
    command = ("tjax", "train", recipe, *changed, "--out", options.out or run)
    secrets.refuse_secrets(command)
    return Job(
        name=name,
        command=command,
        backend=backend,
        folder=folder,
        source=source,
        setup=options.setup,
        env=secrets.environment(options.env),
        env_file=options.env_file,
        secrets=secrets.references(options.secret),
        budget=Budget(options.price, options.max_cost),
        keep=options.keep,
    )


def _folders(name: str, source: Source | None, backend: Backend) -> tuple[str, str]:
    """Return the folder of the job here, and that of the run there."""
    folder = store.JOBS / name
    if isinstance(backend, TpuVm | Gke):
        here = folder if source and source.root == "." else folder.absolute()
        return str(here), f"{backend.bucket}/{name}"
    return str(folder.absolute()), str((store.JOBS.parent / name).absolute())


def _launch(target: str, options: LaunchOptions) -> int:
    job = job_of(target, options)
    if options.env_file:
        secrets.read_env_file(options.env_file)
    if options.dry_run:
        job = watch.ready(Record(job))
        sys.stdout.write(watch.dry_run(job, commands(job)))
        return 0
    job.check()
    before = store.load(job.name) if (store.JOBS / job.name / "job.json").is_file() else None
    runs = before is not None and not (before := watch.look(before)).over
    if before and runs and (isinstance(before.job.backend, Local) or before.job.command != job.command):
        raise UserError(
            f"{job.name} runs already, as `{shell(before.job.command)}`: `tjax stop {job.name}` first, or give another "
            "--job."
        )
    if isinstance(job.backend, Local):
        return watch.run_local(Record(job))
    if before and runs:
        say(f"{job.name} runs already; looking after it (Ctrl-C leaves it running)")
        record = before
    else:
        if options.doctor:
            _refuse_if_failed(job.backend)
            _refuse_if_too_large(options.experiment, job.backend)
        # A run that goes on under the same name goes on with the same budget.
        spent = before.periods if before else ()
        record = watch.start(Record(job, periods=spent), options.poll)
        say(f"launched {job.name}: {job.backend.where}, run folder {job.command[-1]}")
    if options.detach:
        say(f"`tjax jobs` shows how it does; `tjax logs {job.name}`, `tjax stop {job.name}`")
        return 0
    try:
        record = watch.follow(record, options.retries, options.poll)
    except KeyboardInterrupt:
        say(f"{job.name} goes on without being watched; `tjax logs {job.name}`, `tjax stop {job.name}`")
        return 0
    if record.phase == "failed":
        say(f"tjax: {job.name} failed: {record.detail}. `tjax logs {job.name}` shows what it wrote.")
    return {"done": 0, "stopped": 143}.get(record.phase, 1)


def _refuse_if_failed(backend: Backend) -> None:
    """Make the checks that are possible before anything is asked for; a changed tree was judged before."""
    for check in doctor.check_backend(backend):
        if check.status == "failed" and check.name not in ("working tree", "ssh to all workers"):
            raise UserError(f"{check.name}: {check.detail}. To mend it: {check.mend}. (--no-doctor launches anyway)")


def _refuse_if_too_large(experiment: Experiment, backend: Backend) -> None:
    """Ask the estimate of `tjax plan` whether a training step fits the chips; launch nothing that is far from it."""
    if not isinstance(backend, OnSlices):
        return
    jax.config.update("jax_platforms", "cpu")  # devices of this machine are left alone
    target = find_target(backend.slice.name, backend.slices)
    found = plan(experiment, target, compile=False)
    if isinstance(found, Plan) and found.memory.total > CLOSE * found.memory.available:
        raise UserError(
            f"{experiment.name} does not fit {target.label}: {found.memory.total / GIB:.1f} GiB a device of "
            f"{found.memory.available / GIB:.2f} (estimate). `tjax plan` with the same options and {target.typed} "
            "names what would fit. (--no-doctor launches anyway)"
        )


def _doctor(_: str, options: DoctorOptions) -> int:
    if options.on:
        backend = backend_of(options)
        Job("doctor", (), backend, "").check()
    checks = list(doctor.check_job(store.load(options.job))) if options.job else list(doctor.check_here())
    if options.on:
        checks += doctor.check_backend(backend)
    if options.json:
        print_json({"checks": [dataclasses.asdict(check) for check in checks]})
    else:
        width = max(len(check.status) for check in checks)
        for check in checks:
            mend = f"; to mend it: {check.mend}" if check.mend else ""
            out().print(f"{check.status:{width}}  {check.name}: {check.detail}{mend}", markup=False)
    return int(any(check.status == "failed" for check in checks))


VERBS = {
    "launch": Verb(
        "RECIPE",
        "train on a Cloud TPU slice, GKE, SLURM, or N processes here",
        LaunchOptions,
        lambda target: LaunchOptions(experiment=experiment_of(target)),
        _launch,
    ),
    "doctor": Verb("", "checks before money is spent", DoctorOptions, lambda _: DoctorOptions(), _doctor),
} | jobs.VERBS
