"""What gcloud, kubectl and Slurm say when they refuse, in one line that tells how to mend it."""

from __future__ import annotations

import re

from transformer_jax.errors import UserError

INSTALL = {
    "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)",
    "kubectl": "`gcloud components install kubectl gke-gcloud-auth-plugin`",
    "sbatch": "launch from a login node of the cluster",
    "squeue": "launch from a login node of the cluster",
    "git": "install git",
}

JOBSET = "https://jobset.sigs.k8s.io/docs/installation/"

# (what the message holds, what it means and how to mend it); {line} is the vendor's own sentence, \1 a group.
KNOWN = (
    (
        r"do not currently have an active account|gcloud auth login|Reauthentication|invalid_grant",
        "gcloud is not signed in: run `gcloud auth login`.",
    ),
    (r"must be logged in to the server|Unauthorized", "the cluster does not know you: run `gcloud auth login`."),
    (
        r"Quota limit '([^']+)' has been exceeded",
        "{line} Ask for more of \\1 (https://cloud.google.com/tpu/docs/quota), or take another zone or slice.",
    ),
    (
        r"(?i)RESOURCE_EXHAUSTED.*quota|quota.*exceeded|exceeded quota",
        "{line} Ask for more (https://cloud.google.com/tpu/docs/quota), or take another zone or slice.",
    ),
    (
        r"no more capacity in the zone|Insufficient (reserved )?capacity",
        "{line} Try another zone, or leave the request in the queue (--valid-until 24h).",
    ),
    (
        r"SERVICE_DISABLED|has not been used in project|API .*not enabled",
        "an API is switched off in this project: `gcloud services enable tpu.googleapis.com`. ({line})",
    ),
    (
        r"(?i)the accelerator \S+ was not found|accelerator.?type .*not (found|available|supported)",
        "{line} `gcloud compute tpus accelerator-types list --zone=ZONE` lists what a zone has.",
    ),
    (
        r"(?i)Location (\S+) is not found|Invalid value for \[?--zone|unknown zone|Unexpected location",
        "{line} `gcloud compute tpus locations list` lists the zones.",
    ),
    (
        r"(?i)ALREADY_EXISTS|already exists",
        "{line} `tjax jobs` shows what runs; --job gives another name.",
    ),
    (
        r"not present in the SSH agent",
        'several workers are reached through the SSH agent: eval "$(ssh-agent)"; ssh-add ~/.ssh/google_compute_engine.',
    ),
    (
        r'no matches for kind "JobSet"|resource type "jobsets?',
        f"the cluster has no JobSet controller; install it: {JOBSET}",
    ),
    (
        r"PERMISSION_DENIED|does not have permission|[Pp]ermission '.*' denied|Forbidden|\b403\b|denied",
        "permission denied: {line} Ask an owner of the project for the role that it names.",
    ),
    (r"(?i)invalid partition specified", "{line} `sinfo` lists the partitions."),
    (r"(?i)invalid account", "{line} `sacctmgr show associations user=$USER` lists your accounts."),
    (r"(?i)Unable to connect to the server|dial tcp", "the cluster does not answer: {line}"),
    (r"(?i)bucket.*(not found|does not exist)|404.*bucket", "{line} Create it: `gcloud storage buckets create`."),
)


def explain(argv: tuple[str, ...], code: int, text: str) -> UserError:
    """Turn the failure of a program into the one line a person needs."""
    program = argv[0]
    if code == 127 and not text:
        mend = INSTALL.get(program, f"install {program}")
        return UserError(f"{program} is not on PATH: {mend}.")
    line = sentence(text) or f"exit code {code}"
    for pattern, meaning in KNOWN:
        if match := re.search(pattern, text):
            return UserError(match.expand(meaning.replace("{line}", "\0")).replace("\0", line))
    words = [word for word in argv if not word.startswith("-")][:4]
    return UserError(f"`{' '.join(words)} ...` failed with exit code {code}: {line}")


def sentence(text: str) -> str:
    """Return the line of a vendor's output that says what was wrong, without its frame."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(?i)(ERROR|error|fatal|\w+: error|Error from server)", line)]
    chosen = (errors or lines[-1:] or [""])[0]
    chosen = re.sub(r"^(?i:error|fatal):?\s*", "", re.sub(r"^\w+: (?=error:)", "", chosen))
    chosen = re.sub(r"^\(gcloud[\w.-]*\)\s*", "", chosen)
    chosen = re.sub(r"\s*\[EID: \w+\]", "", chosen)
    return chosen if not chosen or chosen.endswith((".", "!")) else chosen + "."
