#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A folder of pinned wheels and its installer, for a site where nothing can be downloaded.

Run it where packages can be had; carry the folder over; ``bash install.sh`` there installs from it alone. It may be
made for another platform and another Python than those it runs on.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: what the playbooks need at run time; its closure is pinned by the controller's requirements
CONTROLLER = ("ansible-core", "PyYAML", "prometheus_client", "requests", "kubernetes")
PARTS = ("controller", "cuda")
MIB = 2**20

INSTALL = """\
#!/usr/bin/env bash
# bash install.sh [PYTHON]: install these wheels with PYTHON's pip (default: python3). Nothing is downloaded.
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
python=${{1:-python3}}
"$python" -c 'import sys; found = "%d.%d" % sys.version_info[:2]; sys.exit(
    0 if found == "{python}" else f"These wheels are for Python {python}; {{sys.executable}} is Python {{found}}.")'
wheels=$(mktemp -d); trap 'rm -rf "$wheels"' EXIT
find "$here" -name '*.whl' -exec ln -sf {{}} "$wheels/" \\;
# A wheel that was too large for one parcel comes in numbered parts.
find "$here" -name '*.whl.part-01' -printf '%f\\n' | while read -r first; do
  name=${{first%.part-01}}
  find "$here" -name "$name.part-*" -printf '%f %p\\n' | sort | cut -d' ' -f2- | tr '\\n' '\\0' | xargs -0 cat > "$wheels/$name"
done
(cd "$wheels" && sha256sum --check --quiet "$here/SHA256SUMS")
"$python" -m pip install --no-index --no-deps --disable-pip-version-check --find-links "$wheels" -r "$here/requirements.txt"
"""


class WheelhouseError(Exception):
    """What is missing, and what to do."""


def main() -> int:
    options = arguments()
    try:
        here = build(options)
    except WheelhouseError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    sizes = [path.stat().st_size for path in here.rglob("*.whl*")]
    print(f"wheelhouse: {sum(sizes) / MIB:.0f} MiB in {len(sizes)} files in {here}. There: bash install.sh")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--for", dest="parts", nargs="+", choices=PARTS, default=["controller"], help="what to bring along")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist/wheelhouse", help="folder to write; must not exist")
    parser.add_argument("--python", default="3.12", help="the Python there, such as 3.12")
    parser.add_argument("--machine", default="x86_64", help="the processor there: uname -m")
    parser.add_argument("--glibc", default="2.34", help="the C library there: ldd --version")
    parser.add_argument(
        "--installed", type=pathlib.Path, help="what is there already and is left out: pip freeze, or a name a line"
    )
    parser.add_argument("--leave-out", nargs="*", default=[], help="packages to do without")
    parser.add_argument("--parcel-mib", type=int, default=0, help="distribute over folders of at most this size")
    return parser.parse_args()


def build(options: argparse.Namespace) -> pathlib.Path:
    """Fetch, leave out, distribute, describe; the folder appears whole or not at all."""
    out: pathlib.Path = options.out
    if out.exists():
        raise WheelhouseError(f"{out} exists already. Remove it, or give another --out.")
    left_out = {normal(name) for name in options.leave_out} | installed_there(options.installed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".wheelhouse-") as folder:
        staging = pathlib.Path(folder) / out.name
        wheels = staging / "wheels"
        wheels.mkdir(parents=True)
        for part in options.parts:
            fetch(wheels, requirements(part, left_out), options)
        for path in wheels.iterdir():
            if normal(path.name.split("-")[0]) in left_out:
                path.unlink()
        found = sorted(wheels.iterdir())
        if not found:
            raise WheelhouseError("everything asked for is there already.")
        (staging / "requirements.txt").write_text("".join(f"{pin(path)}\n" for path in found))
        (staging / "SHA256SUMS").write_text("".join(f"{sha256(path)}  {path.name}\n" for path in found))
        (staging / "install.sh").write_text(INSTALL.format(python=options.python))
        if options.parcel_mib:
            parcel(wheels, options.parcel_mib * MIB)
        staging.rename(out)
    return out


def requirements(part: str, left_out: set[str]) -> list[str]:
    """pip's arguments for one part: for the controller its closure, for the engine the whole pinned list."""
    if part == "controller":
        return ["--constraint", str(ROOT / "requirements/controller.txt"), *CONTROLLER]
    lines = (ROOT / f"requirements/{part}.txt").read_text().splitlines()
    return ["--no-deps", *(line for line in names(lines) if normal(name_of(line)) not in left_out)]


def fetch(wheels: pathlib.Path, wanted: list[str], options: argparse.Namespace) -> None:
    """Download wheels for the platform there. pip matches a C library's version exactly, so every older one is named."""
    major, minor = map(int, options.glibc.split("."))
    platforms = [f"manylinux_{major}_{step}_{options.machine}" for step in range(minor, 4, -1)]
    platforms += [f"manylinux{name}_{options.machine}" for name in ("2014", "2010", "1")]
    platforms += [f"linux_{options.machine}"]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(wheels),
        "--only-binary=:all:", "--python-version", options.python, "--implementation", "cp",
        *(word for platform in platforms for word in ("--platform", platform)), *wanted,
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        reason = " / ".join(line for line in answer.stderr.splitlines() if line.startswith("ERROR"))
        raise WheelhouseError(f"pip could not fetch all wheels for Python {options.python} on {options.machine}: {reason}")


def parcel(wheels: pathlib.Path, limit: int) -> None:
    """Distribute the wheels over ``parcel-NN`` folders, largest first; one larger than a parcel goes in parts."""
    pieces = []
    for path in sorted(wheels.iterdir()):
        pieces += split(path, limit) if path.stat().st_size > limit else [path]
    room: list[int] = []
    for piece in sorted(pieces, key=lambda path: -path.stat().st_size):
        size = piece.stat().st_size
        number = next((index for index, left in enumerate(room) if left >= size), len(room))
        if number == len(room):
            room.append(limit)
        room[number] -= size
        folder = wheels.parent / f"parcel-{number + 1:02d}"
        folder.mkdir(exist_ok=True)
        piece.rename(folder / piece.name)
    wheels.rmdir()


def split(path: pathlib.Path, limit: int) -> list[pathlib.Path]:
    parts = []
    with path.open("rb") as stream:
        while left := path.stat().st_size - stream.tell():
            part = path.with_name(f"{path.name}.part-{len(parts) + 1:02d}")
            with part.open("wb") as target:
                for size in [MIB] * (min(limit, left) // MIB) + [min(limit, left) % MIB]:
                    target.write(stream.read(size))
            parts.append(part)
    path.unlink()
    return parts


def installed_there(path: pathlib.Path | None) -> set[str]:
    if path is None:
        return set()
    if not path.is_file():
        raise WheelhouseError(f"{path} does not exist. Make it there: python3 -m pip freeze > {path.name}")
    return {normal(name_of(line)) for line in names(path.read_text().splitlines())}


def names(lines: list[str]) -> list[str]:
    """Lines that name a package, without comments, options and blank lines."""
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith(("#", "-"))]


def name_of(line: str) -> str:
    return re.split(r"[\s=<>!~;@\[]", line, maxsplit=1)[0]


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pin(wheel: pathlib.Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version}"


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
