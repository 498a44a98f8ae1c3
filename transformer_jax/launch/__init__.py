"""Carry a training run to a Cloud TPU slice, a Kubernetes or SLURM cluster, or N processes of this machine.

`commands(job)` is a pure function: every file that is written and every program that is run. The command line prints
it (`tjax launch RECIPE --on v5e-16 --dry-run`) or takes the steps.
"""

from transformer_jax.launch.command import Command
from transformer_jax.launch.gke import Gke
from transformer_jax.launch.job import Backend, Budget, Job, State, commands
from transformer_jax.launch.local import Local
from transformer_jax.launch.slices import Slice, find_slice
from transformer_jax.launch.slurm import Slurm
from transformer_jax.launch.source import Source, read_source
from transformer_jax.launch.tpu_vm import TpuVm

__all__ = [
    "Backend",
    "Budget",
    "Command",
    "Gke",
    "Job",
    "Local",
    "Slice",
    "Slurm",
    "Source",
    "State",
    "TpuVm",
    "commands",
    "find_slice",
    "read_source",
]
