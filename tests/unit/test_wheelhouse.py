# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wheelhouse: names, parcels and the installer, which runs with a Python of its own here."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import stat
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load():
    spec = importlib.util.spec_from_file_location("wheelhouse", ROOT / "scripts/wheelhouse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wheelhouse = load()


def pins(name: str) -> dict[str, str]:
    lines = wheelhouse.names((ROOT / "requirements" / name).read_text().splitlines())
    return {wheelhouse.normal(wheelhouse.name_of(line)): line.split("==")[1] for line in lines}


def test_the_engine_and_the_controller_agree_where_one_environment_holds_both():
    controller, engine = pins("controller.txt"), pins("cuda.txt")
    needed = {"ansible-core", "pyyaml", "prometheus-client", "requests", "jinja2", "pydantic", "pydantic-core", "aiohttp"}
    assert needed <= set(controller)
    shared = set(controller) & set(engine)
    assert len(shared) > 20
    assert {name: engine[name] for name in shared} == {name: controller[name] for name in shared}


def test_what_is_left_out_is_not_asked_for():
    wanted = wheelhouse.requirements("cuda", {"torch", "typing-extensions"})
    assert wanted[0] == "--no-deps"
    assert "vllm==0.24.0" in wanted
    assert not any(line.startswith(("torch==", "typing_extensions==", "#")) for line in wanted)


def test_what_is_there_already_is_read_from_a_freeze(tmp_path):
    listed = tmp_path / "there.txt"
    listed.write_text("# by pip\nTorch==2.11.0+cu130\nruamel.yaml\nsite_pkg @ file:///opt/x\n-e git+x\n\njinja2[i18n]>=3\n")
    assert wheelhouse.installed_there(listed) == {"torch", "ruamel-yaml", "site-pkg", "jinja2"}


def test_a_list_that_does_not_exist_is_an_error_with_the_way_to_make_it(tmp_path):
    with pytest.raises(wheelhouse.WheelhouseError, match="Make it there: python3 -m pip freeze > none.txt"):
        wheelhouse.installed_there(tmp_path / "none.txt")


def house(folder: pathlib.Path, sizes: dict[str, int], limit: int = 0) -> dict[str, bytes]:
    """A finished wheelhouse of random files, as ``build`` leaves it."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    content = {name: os.urandom(size) for name, size in sizes.items()}
    for name, data in content.items():
        (wheels / name).write_bytes(data)
    found = sorted(wheels.iterdir())
    (folder / "SHA256SUMS").write_text("".join(f"{wheelhouse.sha256(path)}  {path.name}\n" for path in found))
    (folder / "requirements.txt").write_text("".join(f"{wheelhouse.pin(path)}\n" for path in found))
    (folder / "install.sh").write_text(wheelhouse.INSTALL.format(python="3.12"))
    if limit:
        wheelhouse.parcel(wheels, limit)
    return content


def python_that_collects(folder: pathlib.Path, version: str = "3.12") -> pathlib.Path:
    """An interpreter that answers the version check and keeps the wheels that pip would see."""
    program = folder / "python"
    program.write_text(
        f"#!/bin/bash\nif [ \"$1\" = -c ]; then [ {version} = 3.12 ] || {{ echo 'wrong Python' >&2; exit 1; }}; exit 0; fi\n"
        'while [ "$1" != --find-links ]; do shift; done\ncp -L "$2"/* "$(dirname "$0")/seen/"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / "seen").mkdir()
    return program


SIZES = {"large-1.0-py3-none-any.whl": 250_000, "b-2.0-py3-none-any.whl": 60_000, "c-3.0-py3-none-any.whl": 30_000}


def test_parcels_keep_their_size_and_the_installer_joins_them(tmp_path):
    content = house(tmp_path / "house", SIZES, limit=100_000)
    parcels = sorted((tmp_path / "house").glob("parcel-*"))
    for parcel in parcels:
        assert sum(path.stat().st_size for path in parcel.iterdir()) <= 100_000
    assert len(parcels) == 4
    # They may arrive anywhere below the folder, which may have a blank in its name.
    moved = tmp_path / "on a stick"
    (tmp_path / "house").rename(moved)
    python = python_that_collects(tmp_path)
    subprocess.run(["bash", str(moved / "install.sh"), str(python)], check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "seen").iterdir()} == content


def test_a_damaged_wheel_is_not_installed(tmp_path):
    house(tmp_path / "house", SIZES)
    victim = tmp_path / "house/wheels/b-2.0-py3-none-any.whl"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    python = python_that_collects(tmp_path)
    answer = subprocess.run(
        ["bash", str(tmp_path / "house/install.sh"), str(python)], check=False, capture_output=True, text=True
    )
    assert answer.returncode != 0
    assert "b-2.0-py3-none-any.whl: FAILED" in answer.stdout
    assert not list((tmp_path / "seen").iterdir())


def test_another_python_is_refused_before_anything_is_installed(tmp_path):
    house(tmp_path / "house", SIZES)
    python = python_that_collects(tmp_path, version="3.11")
    answer = subprocess.run(["bash", str(tmp_path / "house/install.sh"), str(python)], check=False)
    assert answer.returncode != 0
    assert not list((tmp_path / "seen").iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["wheelhouse.py", "--out", str(tmp_path)])
    assert wheelhouse.main() == 2
    assert f"{tmp_path} exists already" in capsys.readouterr().err
