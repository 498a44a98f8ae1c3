"""kubectl: one cluster, with or without the JobSet controller."""

import json
import sys
from pathlib import Path

from world import called, option, recall, refuse, remember, scenario, take_turn

words = [word for word in sys.argv[2:] if not word.startswith("-")]
called("kubectl")
if scenario("unauthorized"):
    refuse("error: You must be logged in to the server (Unauthorized)")
if not option("context"):
    refuse("error: the fake wants every call to name its context")

if words[0] == "apply":
    manifest = json.loads(Path(option("filename")).read_text())
    if scenario("no_jobset"):
        refuse(
            f'error: resource mapping not found for name: "{manifest["metadata"]["name"]}" namespace: "default" from '
            f'"{option("filename")}": no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"\n'
            "ensure CRDs are installed first"
        )
    if scenario("forbidden"):
        refuse(
            f'Error from server (Forbidden): error when creating "{option("filename")}": jobsets.jobset.x-k8s.io is '
            'forbidden: User "me@example.com" cannot create resource "jobsets" in API group "jobset.x-k8s.io" in the '
            'namespace "default": requires one of ["container.thirdPartyObjects.create"] permission(s).'
        )
    remember("jobset", manifest)
    print(f"jobset.jobset.x-k8s.io/{manifest['metadata']['name']} created")
elif words[:2] == ["get", "jobset"]:
    if recall("jobset", None) is None:
        refuse(f'Error from server (NotFound): jobsets.jobset.x-k8s.io "{words[2]}" not found')
    print(json.dumps({"status": take_turn("status", scenario("status", [{"terminalState": "Completed"}]))}))
elif words[:2] == ["get", "crd"]:
    if scenario("no_jobset"):
        refuse(
            "Error from server (NotFound): customresourcedefinitions.apiextensions.k8s.io "
            '"jobsets.jobset.x-k8s.io" not found'
        )
    print("customresourcedefinition.apiextensions.k8s.io/jobsets.jobset.x-k8s.io")
elif words[:2] == ["get", "nodes"]:
    pools = scenario("nodes_ready", {"tpu-0": 4})
    print(" ".join(pool for pool, nodes in pools.items() for _ in range(nodes)))
elif words[:2] == ["get", "pods"]:
    print(scenario("exit_codes", "1"))
elif words[:2] == ["delete", "jobset"]:
    remember("jobset", None)
elif words[0] in ("create", "delete", "logs", "exec"):
    print(scenario("logs", ""), end="")
else:
    refuse(f'error: unknown command "{words[0]}" for "kubectl"')
