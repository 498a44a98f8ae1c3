"""Checks of Google Cloud before money is spent: account, zone, bucket, quota, cluster."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

from transformer_jax.errors import UserError
from transformer_jax.launch.checks import Check, failed, ok, unchecked
from transformer_jax.launch.command import Answer, ask
from transformer_jax.launch.gke import Gke
from transformer_jax.launch.slices import Slice
from transformer_jax.launch.tpu_vm import TpuVm
from transformer_jax.launch.vendors import explain, sentence


def _signed_in() -> Check:
    argv = ("gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)")
    try:
        answer = ask(argv)
    except UserError as error:
        return failed("gcloud", str(error), "install it")
    if answer.code or not answer.out.strip():
        return failed("gcloud", "no account is signed in", "`gcloud auth login`")
    return ok("gcloud", f"signed in as {answer.out.strip()}")


def check_tpu(backend: TpuVm) -> Iterator[Check]:
    """Look at account, zone, bucket and quota for slices of the Cloud TPU API."""
    signed_in = _signed_in()
    yield signed_in
    if signed_in.status != "ok":
        yield unchecked("zone, bucket, quota", "nobody is signed in")
        return
    yield _offered(backend)
    yield from _bucket(backend.bucket, backend.zone)
    yield _quota(backend)
    if backend.hosts > 1:
        keys = ask(("ssh-add", "-l")) if shutil.which("ssh-add") else Answer(1, "", "")
        name = "ssh to all workers"
        if keys.code:
            mend = 'eval "$(ssh-agent)" && ssh-add ~/.ssh/google_compute_engine (for logs, stop and doctor)'
            yield failed(name, "the SSH agent holds no key", mend)
        else:
            yield ok(name, "the SSH agent holds a key")


def _offered(backend: TpuVm) -> Check:
    """Look whether the zone has this slice."""
    at = (f"--project={backend.project}", f"--zone={backend.zone}", "--format=value(type)")
    argv = ("gcloud", "compute", "tpus", "accelerator-types", "list", *at)
    answer, name = ask(argv), "slice in the zone"
    if answer.code:
        return failed(name, str(explain(argv, answer.code, answer.err)), "check --project and --zone")
    offered = answer.out.split()
    if backend.slice.accelerator_type not in offered:
        own = [one for one in offered if one.startswith(f"{backend.slice.generation.prefix}-")]
        has = f"of this generation it has {', '.join(own)}" if own else "it has none of this generation"
        return failed(name, f"{backend.zone} does not offer {backend.slice.accelerator_type}; {has}", "another zone")
    return ok(name, f"{backend.zone} offers {backend.slice.accelerator_type}")


def _bucket(bucket: str, zone: str) -> Iterator[Check]:
    """Look whether the bucket is near and can be written."""
    root = "/".join(bucket.split("/")[:3])
    argv = ("gcloud", "storage", "buckets", "describe", root, "--format=json")
    answer = ask(argv)
    if answer.code:
        mend = f"`gcloud storage buckets create {root} --location={region_of(zone)}`"
        yield failed("bucket region", str(explain(argv, answer.code, answer.err)), mend)
    else:
        yield judge_region(json.loads(answer.out), zone)
    mark = f"{bucket}/.tjax-can-write"
    answer = ask(("gcloud", "storage", "cp", "/dev/null", mark))
    if answer.code:
        mend = f"grant roles/storage.objectAdmin on {root} to your account and to the service account of the machines"
        yield failed("bucket writable", sentence(answer.err), mend)
        return
    ask(("gcloud", "storage", "rm", mark))
    yield ok("bucket writable", "from here; the machines use their own service account")


def region_of(zone: str) -> str:
    """Return us-central2 for us-central2-b; a region is its own."""
    return zone.rsplit("-", 1)[0] if zone.count("-") == 2 else zone


def judge_region(bucket: dict[str, Any], zone: str) -> Check:
    """Compare the location of a bucket with a zone: data that crosses regions is slow, and is paid for."""
    place, region, name = str(bucket.get("location", "")).lower(), region_of(zone), "bucket region"
    parts = bucket.get("data_locations") or bucket.get("custom_placement_config", {}).get("dataLocations") or []
    if place == region or region in [part.lower() for part in parts]:
        return ok(name, f"{place}, as {zone}")
    continents = {"us": "us", "eu": "europe", "asia": "asia"}
    if continents.get(place) == region.split("-")[0]:
        return ok(name, f"{place} (multi-region) holds {region}")
    if not place or re.fullmatch(r"[a-z]+\d+", place):  # a predefined dual-region, as nam4
        return unchecked(name, f"'{place}' may or may not hold {region}")
    return failed(name, f"{place}, but the machines are in {region}", f"take a bucket in {region}, or another zone")


def _quota(backend: TpuVm) -> Check:
    listing = ("gcloud", "beta", "quotas", "info", "list", "--service=tpu.googleapis.com")
    answer = ask((*listing, f"--project={backend.project}", "--format=json"))
    if answer.code:
        return unchecked("quota", sentence(answer.err))
    return judge_quota(json.loads(answer.out or "[]"), backend.slice, backend.slices, backend.zone, backend.spot)


def judge_quota(infos: list[dict[str, Any]], one: Slice, slices: int, zone: str, spot: bool) -> Check:
    """Compare what Cloud Quotas grants for this generation and zone with what the job needs."""
    generation = {"v5e": "v5slitepod"}.get(one.generation.name, one.generation.name)
    limits = []
    for info in infos:
        quota = str(info.get("quotaId", ""))
        plain = quota.lower().replace("preemptible", "")
        spot_kind = "preemptible" in quota.lower()
        if not plain.startswith(f"tpu{generation}") or "serving" in plain or spot_kind != spot:
            continue
        for entry in info.get("dimensionsInfos", []):
            places = set(entry.get("applicableLocations", [])) | set(entry.get("dimensions", {}).values())
            if places & {zone, region_of(zone)}:
                limits.append((int(entry.get("details", {}).get("value", 0)), quota))
    chips, name = one.chips * slices, "quota"
    if not limits:
        return unchecked(name, f"no quota of TPU {one.generation.name} is listed for {zone}")
    limit, quota = min(limits)
    if limit == -1 or limit >= one.number * slices:
        return ok(name, f"{quota} allows {'any number' if limit == -1 else limit}; how much of it is in use is unknown")
    if limit < chips:
        mend = "ask for more (https://cloud.google.com/tpu/docs/quota), or take another zone or slice"
        return failed(name, f"{quota} allows {limit} in {zone}, and {chips} chips are needed", mend)
    return unchecked(name, f"{quota} allows {limit}; whether it counts chips ({chips}) or TensorCores is not said")


def check_cluster(backend: Gke) -> Iterator[Check]:
    """Look at account, bucket, cluster, JobSet controller and nodes for slices of GKE."""
    signed_in = _signed_in()
    yield signed_in
    if signed_in.status != "ok":
        yield unchecked("bucket, cluster, JobSet, nodes", "nobody is signed in")
        return
    yield from _bucket(backend.bucket, backend.zone)
    reach = ("gcloud", "container", "clusters", "get-credentials", backend.cluster)
    answer = ask((*reach, f"--location={backend.zone}", f"--project={backend.project}"))
    if answer.code:
        yield failed("cluster", sentence(answer.err), "check --cluster, --zone and --project")
        return
    yield ok("cluster", f"{backend.cluster} in {backend.zone}")
    argv = backend.kubectl("get", "crd", "jobsets.jobset.x-k8s.io", "--output=name")
    answer = ask(argv)
    if answer.code:
        install = "install it: https://jobset.sigs.k8s.io/docs/installation/"
        yield failed("JobSet", str(explain(argv, answer.code, answer.err)), install)
    else:
        yield ok("JobSet", "the controller is installed")
    chosen = ",".join(f"{key}={value}" for key, value in backend.node_labels.items())
    pool = r"{.items[*].metadata.labels.cloud\.google\.com/gke-nodepool}"
    answer = ask(backend.kubectl("get", "nodes", f"--selector={chosen}", f"--output=jsonpath={pool}"))
    # All hosts of a slice are in one node pool, and another slice is in another.
    there = sum(nodes // backend.slice.hosts for nodes in Counter(answer.out.split()).values())
    name, each = backend.slice.name, f"{backend.slice.hosts} node{'s' if backend.slice.hosts > 1 else ''} in one pool"
    if answer.code:
        yield unchecked("nodes", sentence(answer.err))
    elif there < backend.slices:
        more = "a node pool that scales up may bring the others"
        yield unchecked("nodes", f"{there} of {backend.slices} slices of {name} are there ({each} each); {more}")
    else:
        yield ok("nodes", f"{there} slices of {name} are there ({each} each)")
    yield unchecked("quota", "GKE takes it from Compute Engine when it makes nodes")
