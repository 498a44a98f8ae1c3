"""The working tree that travels: a commit, or a commit and what was changed since."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from transformer_jax.errors import UserError
from transformer_jax.launch.command import Command, ask

OWN = "runs"
"""Folder of run and job files, which never travels."""


@dataclass(frozen=True)
class Source:
    """A git working tree at a commit."""

    root: str
    """Its top folder; "." if that is the current one."""
    commit: str
    """Forty hexadecimal digits."""
    changed: bool = False
    """Whether the tree differs from its commit; the difference then travels, and is kept beside the job."""

    @property
    def label(self) -> str:
        """What names the source in provenance: the commit, with "+changes" if the tree differs."""
        return self.commit + ("+changes" if self.changed else "")

    def pack(self, folder: str) -> list[Command]:
        """Return the steps that write `folder`/code.tar.gz, and `folder`/changes.patch if the tree was changed."""
        room = Command("make a folder for the files of this launch", ("mkdir", "-p", folder))
        git = ("git",) if self.root == "." else ("git", "-C", self.root)
        archive = f"--output={folder}/code.tar.gz"
        if not self.changed:
            purpose = f"pack the working tree at commit {self.commit[:12]}"
            return [room, Command(purpose, (*git, "archive", "--format=tar.gz", archive, self.commit))]
        # A second index, so that the user's own is not touched.
        own = ("env", f"GIT_INDEX_FILE={folder}/index", *git)
        paths = ("--", ".", f":(exclude){OWN}")
        difference = (*own, "diff", "--cached", "--binary", f"--output={folder}/changes.patch", self.commit)
        tree = f'git -C "$0" archive --format=tar.gz --output="$1/code.tar.gz" \\\n    "$({_TREE})"'
        return [
            room,
            Command(f"start from commit {self.commit[:12]}", (*own, "read-tree", self.commit)),
            Command("add what was changed since, new files included", (*own, "add", "--all", *paths)),
            Command("keep the difference as a patch", difference),
            Command("pack the working tree with these changes", ("sh", "-c", tree, self.root, folder)),
        ]

    def check_install(self, setup: str) -> None:
        """Raise `UserError` if nothing says how the tree is installed on the workers."""
        project, name = Path(self.root) / "pyproject.toml", ""
        if project.is_file():
            name = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("name", "")
        if not setup and name != "transformer_jax":
            raise UserError(
                f"{Path(self.root).resolve()} is not a checkout of transformer_jax: say how workers install it, "
                "for example --setup 'pip install transformer_jax[tpu] -e .'"
            )


_TREE = 'GIT_INDEX_FILE="$1/index" git -C "$0" write-tree'


def read_source(*, allow_changes: bool, folder: str = ".") -> Source:
    """Look at the git working tree around `folder`.

    Raises:
        UserError: it is none, or it was changed since its last commit and `allow_changes` is off.
    """
    top = ask(("git", "-C", folder, "rev-parse", "--show-toplevel"))
    if top.code:
        where = "this folder" if folder == "." else folder
        raise UserError(f"a launch carries a commit, and {where} is not a git checkout: `git init`, then commit.")
    root = os.path.relpath(top.out.strip(), Path(folder).resolve())
    root = "." if root == "." else top.out.strip()
    head = ask(("git", "-C", root, "rev-parse", "--verify", "HEAD"))
    if head.code:
        raise UserError(f"{root} has no commit yet; a launch carries one: `git commit` first.")
    status = ask(("git", "-C", root, "status", "--porcelain", "--", ".", f":(exclude){OWN}"))
    changes = status.out.splitlines()
    if changes and not allow_changes:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise UserError(
            f"the working tree was changed since its last commit ({changes[0].strip()}{more}): commit it, or carry "
            "the changes along with --allow-dirty."
        )
    return Source(root, head.out.strip(), bool(changes))


def inside(target: str, source: Source) -> str:
    """Return a recipe's name as it is read at the root of the tree, `path/to/mine.py:function` included.

    Raises:
        UserError: its file lies outside the tree, so that no worker would have it.
    """
    if not re.search(r"\.py:", target):
        return target
    path, function = target.rsplit(":", 1)
    full, root = Path(path).resolve(), Path(source.root).resolve()
    if not full.is_relative_to(root):
        raise UserError(f"{path} lies outside the working tree {root}, which is all that travels; move it there.")
    return f"{full.relative_to(root)}:{function}"
