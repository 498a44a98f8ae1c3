"""gcloud: queued resources, TPU VMs, buckets, quotas, secrets. A bucket is a folder."""

import json
import os
import sys
from pathlib import Path

from world import FAKES, called, option, recall, refuse, remember, scenario, take_turn

# The options of the real commands, as `gcloud ... --help` lists them; any other is refused.
AT = {"project", "zone", "format", "quiet"}
OPTIONS = {
    "compute tpus queued-resources create": AT
    | {"node-id", "node-count", "node-prefix", "accelerator-type", "runtime-version", "metadata-from-file", "labels"}
    | {"spot", "reserved", "valid-until-duration", "service-account", "network", "subnetwork", "internal-ips", "async"},
    "compute tpus queued-resources describe": AT,
    "compute tpus queued-resources delete": AT | {"force", "async"},
    "compute tpus queued-resources ssh": AT | {"node", "worker", "command", "internal-ip", "batch-size"},
    "compute tpus tpu-vm ssh": AT | {"worker", "command", "internal-ip"},
    "compute tpus tpu-vm list": AT | {"filter"},
    "compute tpus accelerator-types list": AT | {"filter"},
    "storage cp": {"project"},
    "storage cat": {"project", "display-url"},
    "storage ls": {"project"},
    "storage rm": {"project"},
    "storage buckets describe": {"format"},
    "beta quotas info list": {"service", "project", "format"},
    "container clusters get-credentials": {"location", "project"},
    "secrets versions access": {"secret", "project"},
    "auth list": {"filter", "format"},
}

SIGNED_OUT = """\
ERROR: (gcloud.{where}) You do not currently have an active account selected.
Please run:

  $ gcloud auth login

to obtain new credentials."""


def main():
    words = sys.argv[2:]
    called("gcloud")
    verb = next((name for name in OPTIONS if words[: len(name.split())] == name.split()), None)
    if verb is None:
        refuse(f"ERROR: (gcloud) Invalid choice: '{' '.join(words[:3])}'.", 2)
    where = verb.replace(" ", ".")
    for word in words:
        if word.startswith("--") and word[2:].partition("=")[0] not in OPTIONS[verb]:
            refuse(f"ERROR: (gcloud.{where}) unrecognized arguments: {word}", 2)
    if verb != "auth list" and scenario("signed_out"):
        refuse(SIGNED_OUT.format(where=where))
    names = [word for word in words[len(verb.split()) :] if not word.startswith("--")]
    answers = {
        "compute tpus queued-resources create": create,
        "compute tpus queued-resources describe": describe,
        "compute tpus queued-resources delete": delete,
        "compute tpus queued-resources ssh": ssh,
        "compute tpus tpu-vm ssh": ssh,
        "compute tpus tpu-vm list": nodes,
        "compute tpus accelerator-types list": accelerator_types,
        "storage cp": copy,
        "storage cat": cat,
        "storage ls": ls,
        "storage rm": rm,
        "storage buckets describe": bucket,
        "beta quotas info list": quotas,
        "container clusters get-credentials": lambda *_: print("kubeconfig entry generated for c.", file=sys.stderr),
        "secrets versions access": lambda *_: print(scenario("secret", "told-by-the-manager"), end=""),
        "auth list": lambda *_: None if scenario("signed_out") else print("me@example.com"),
    }
    answers[verb](where, names)


def resource(name):
    return f"projects/{option('project')}/locations/{option('zone')}/queuedResources/{name}"


def create(where, names):
    if trouble := scenario("create"):
        refuse(f"ERROR: (gcloud.{where}) {trouble}")
    if names[0] in recall("requests", {}):
        refuse(f"ERROR: (gcloud.{where}) ALREADY_EXISTS: Resource '{resource(names[0])}' already exists")
    files = dict(pair.split("=") for pair in option("metadata-from-file").split(","))
    if set(files) != {"startup-script", "shutdown-script"} or not all(map(os.path.isfile, files.values())):
        refuse(f"ERROR: (gcloud.{where}) Unable to read file: {files}")
    script = files["startup-script"]
    lives = recall("lives", 0)
    remember("lives", lives + 1)
    remember("requests", recall("requests", {}) | {names[0]: {"life": lives, "script": Path(script).read_text()}})
    print(f"Create request issued for: [{names[0]}]", file=sys.stderr)


def describe(where, names):
    request = recall("requests", {}).get(names[0])
    if request is None:
        refuse(f"ERROR: (gcloud.{where}) NOT_FOUND: Resource '{resource(names[0])}' was not found")
    lives = scenario("lives", [["ACTIVE"]])
    life = lives[min(request["life"], len(lives) - 1)]
    state = take_turn(f"state of life {request['life']}", life)
    if state == "NO NETWORK":
        refuse(f"ERROR: (gcloud.{where}) Unable to find the server at tpu.googleapis.com")
    if state.startswith("EXIT"):  # the workers report, as startup.sh does
        attempt = next(word for word in request["script"].split() if word.startswith("attempt=")).partition("=")[2]
        launch = next(word for word in request["script"].split() if word.startswith("launch=")).partition("=")[2]
        for worker, code in enumerate(state.split()[1:]):
            path = place(f"{launch}/exit/{attempt}/w-{worker}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"w-{worker} {code}\n")
        state = "ACTIVE"
    initiator = {"SUSPENDED": {"stateInitiator": "SERVICE"}}.get(state, {})
    failed = {"failedData": {"error": {"code": 8, "message": scenario("failed", "")}}} if state == "FAILED" else {}
    if option("format") == "json":
        print(json.dumps({"name": resource(names[0]), "state": {"state": state, **initiator, **failed}}))
    else:
        print(state)


def delete(where, names):
    requests = recall("requests", {})
    if names[0] not in requests:
        refuse(f"ERROR: (gcloud.{where}) NOT_FOUND: Resource '{resource(names[0])}' was not found")
    remember("requests", {name: value for name, value in requests.items() if name != names[0]})
    print(f"Delete request issued for: [{names[0]}]", file=sys.stderr)


def ssh(where, names):
    if option("command") is None and option("worker") == "all":
        refuse(
            f"ERROR: (gcloud.{where}) Invalid value for [--worker]: cannot target multiple workers without the "
            "`--command` flag."
        )
    if scenario("ssh_fails"):
        refuse(
            f'ERROR: (gcloud.{where}) SSH Key is not present in the SSH agent. Please run "ssh-add '
            '~/.ssh/google_compute_engine" to add it, and try again.'
        )
    print(scenario("ssh", ""), end="")


def nodes(where, names):
    print(scenario("nodes", "READY"))


def accelerator_types(where, names):
    if option("zone") not in scenario("zones", ["us-west4-a", "us-central2-b", "us-east5-a"]):
        refuse(f"ERROR: (gcloud.{where}) NOT_FOUND: Location {option('zone')} is not found or access is unauthorized.")
    print("\n".join(scenario("offers", ["v5litepod-1", "v5litepod-8", "v5litepod-16", "v4-8", "v4-32", "v5p-8"])))


def place(url):
    """The path that stands for gs://bucket/object."""
    return FAKES / "gs" / url.removeprefix("gs://")


def copy(where, names):
    *sources, target = names
    bucket = target.removeprefix("gs://").split("/")[0]
    if bucket in scenario("forbidden_buckets", []):
        refuse(
            "ERROR: (gcloud.storage.cp) HTTPError 403: me@example.com does not have storage.objects.create access to "
            f"the Google Cloud Storage object. Permission 'storage.objects.create' denied on resource '{bucket}' (or "
            "it may not exist)."
        )
    for source in sources:
        to = place(target) / source.split("/")[-1] if target.endswith("/") else place(target)
        to.parent.mkdir(parents=True, exist_ok=True)
        if source == "-":
            to.write_bytes(sys.stdin.buffer.read())
        else:
            to.write_bytes(Path(source).read_bytes())


def matching(where, names):
    found = [path for name in names for path in sorted((FAKES / "gs").glob(name.removeprefix("gs://")))]
    if not found:
        listed = "\n".join(f"-{name}" for name in names)
        refuse(f"ERROR: (gcloud.{where}) The following URLs matched no objects or files:\n{listed}")
    return found


def cat(where, names):
    for path in matching(where, names):
        sys.stdout.buffer.write(path.read_bytes())


def ls(where, names):
    for path in matching(where, names):
        print(path)


def rm(where, names):
    for path in matching(where, names):
        path.unlink()


def bucket(where, names):
    place_of = scenario("bucket", {"location": "US-WEST4", "location_type": "region"})
    if place_of is None:
        refuse(f"ERROR: (gcloud.{where}) {names[0]} not found: 404.")
    print(json.dumps({"name": names[0].removeprefix("gs://"), **place_of}))


def quotas(where, names):
    print(json.dumps(scenario("quotas", [])))


main()
