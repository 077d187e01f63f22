# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A secret that was given in any way stands nowhere afterwards: not in what plays print with -vvv, in facts, or in bundles."""

from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import threading

import pytest
import yaml

from .conftest import BIN, NAMESPACE, run

SECRET = "hf_Canary0f0f0f"
#: prints whether any process of this machine shows the secret among its arguments; nothing of this script itself does
LOOK = """#!/usr/bin/env bash
for file in /proc/[0-9]*/cmdline; do
  words=$(tr '\\0' ' ' 2>/dev/null < "$file") || continue
  [[ $words != *"$HF_TOKEN"* ]] || { echo "shown in $file"; exit 1; }
done
echo "a token of ${#HF_TOKEN} characters"
"""


def play(installed, folder, tasks, *arguments, **environment):
    """Run tasks with -vvv; everything that was printed."""
    path = folder / "play.yml"
    path.write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    return run(
        BIN / "ansible-playbook", path, "-vvv", "--diff", *arguments, env={**installed.environment, **environment}, cwd=folder
    ).stdout


def holds(folder, secret=SECRET):
    """The files below a folder that hold the secret."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_token_in_the_environment_of_a_play(installed, tmp_path):
    """The supported way: jobs inherit it, and nothing records it."""
    settings = {
        "target": str(installed.target),
        "spec_work_dir": str(tmp_path / "work"),
        "spec_verdicts_dir": str(tmp_path / "v"),
    }
    environment, installed.environment = installed.environment, {**installed.environment, "HF_TOKEN": SECRET}
    try:
        printed = installed.play("train_draft", "--tags", "scaffold", "-vvv", **settings)
    finally:
        installed.environment = environment
    assert (tmp_path / "work/tiny-eagle3/spec-decode/experiment.json").exists()
    assert SECRET not in printed and not holds(tmp_path)


@pytest.mark.parametrize("how", ["inherited", "option"])
def test_token_of_a_job(installed, tmp_path, how):
    secret = f"hf_{how}0e0e0e"  # of this test alone, which looks at all processes
    (tmp_path / "look.sh").write_text(LOOK)
    job = {
        "experiment": "secrets", "name": "look", "directory": str(tmp_path / "jobs"), "script": str(tmp_path / "look.sh"),
        "environment": {"LEVEL": "1"}, "poll_interval": 1,
    }  # fmt: skip
    if how == "option":
        job["environment"]["HF_TOKEN"] = "{{ lookup('ansible.builtin.env', 'GIVEN') }}"
    environment = {"GIVEN" if how == "option" else "HF_TOKEN": secret}
    printed = play(installed, tmp_path, [{f"{NAMESPACE}.slurm_job": job}], **environment)
    assert f"a token of {len(secret)} characters" in (tmp_path / "jobs/look/output.log").read_text()
    assert secret not in printed and not holds(tmp_path, secret)


@pytest.mark.parametrize(
    "settings",
    [
        {"spec_job_environment": {"HF_TOKEN": SECRET}},
        {"spec_server_environment": {"VLLM_API_KEY": SECRET}},
        {"spec_server_arguments": [f"--api-key={SECRET}"]},
        {"spec_server_arguments": ["--api-key", SECRET]},
        {"spec_slurm": {"environment": {"HF_TOKEN": SECRET}}},
    ],
    ids="-".join,
)
def test_secret_in_a_setting_is_refused_and_not_repeated(installed, tmp_path, settings):
    given = {"target": str(installed.target), "spec_work_dir": str(tmp_path / "work"), **settings}
    answer = subprocess.run(
        [BIN / "ansible-playbook", f"{NAMESPACE}.train_draft", "-i", installed.inventory, "-vvv", "--tags", "scaffold",
         "-e", json.dumps(given)],
        capture_output=True, text=True, check=False, env=installed.environment, cwd=installed.home,
    )  # fmt: skip
    said = " ".join((answer.stdout + answer.stderr).split())
    assert answer.returncode != 0 and "for others to read" in said and "Traceback" not in said
    assert SECRET not in said and not holds(tmp_path)


@contextlib.contextmanager
def guarded_metrics():
    """A server whose counters are shown to bearers of the secret alone."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers.get("Authorization") == f"Bearer {SECRET}"
            body = b'vllm:prompt_tokens_total{engine="0",model_name="m"} 1.0\n' if good else b"no"
            self.send_response(200 if good else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_bearer_token(installed, tmp_path):
    token = "{{ lookup('ansible.builtin.env', 'GIVEN') }}"
    with guarded_metrics() as url:
        ask = {f"{NAMESPACE}.prom_acceptance": {"urls": [url], "bearer_token": token}, "register": "found", "ignore_errors": True}
        shown = {"ansible.builtin.debug": {"var": "found"}}
        good = play(installed, tmp_path, [ask, shown], GIVEN=SECRET)
        bad = play(installed, tmp_path, [ask, shown], GIVEN=f"{SECRET}-wrong")
    assert '"snapshots": [' in good and "401" in bad
    assert SECRET not in good + bad
