# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Ansible refuses to start in a locale that is not UTF-8.
export LC_ALL := C.UTF-8
METHOD ?= eagle3
SITE ?= local
PYTHON := $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))

.PHONY: help setup demo test test-fast bench wheelhouse clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: ## make the environments inside the checkout
	@$(PYTHON) scripts/setup.py

demo: setup ## the whole loop, for real, on a small target (METHOD=eagle3 or dflash, SITE=local or slurm)
	@.venv/bin/python scripts/demo.py --method $(METHOD) --site $(SITE)

test: setup ## every check and test
	@.venv/bin/python scripts/check.py

test-fast: ## what needs no engine and no minutes
	@$(PYTHON) scripts/setup.py --controller-only
	@.venv/bin/python scripts/check.py --fast

bench: setup ## measured figures as JSON
	@.venv/bin/python scripts/bench.py

wheelhouse: ## a folder of pinned wheels for a site without network (WHEELHOUSE="--for controller cuda", see docs/offline.md)
	@$(PYTHON) scripts/setup.py --controller-only
	@.venv/bin/python scripts/wheelhouse.py $(WHEELHOUSE)

clean: ## remove everything that setup, demo and tests made
	rm -rf .venv .engine .collections .demo .ansible .cache dist tests/output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
