#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SpecForge's own command line, on a machine without an accelerator.

The one part of SpecForge's offline training that needs a GPU is the EAGLE3 loss, a Triton kernel.
Here it is replaced by the formula that the kernel computes; everything else is SpecForge's.
"""

from __future__ import annotations

import sys

import specforge.algorithms.eagle3.model as eagle3_model
import torch
from specforge.cli import main
from specforge.core import loss


class LogSoftmaxLoss:
    """``-(mask * target * log_softmax(logits)).sum(-1).mean()``, differentiated by autograd.

    Source of the formula: ``_compute_loss`` in SpecForge's ``core/loss.py``, the kernel's reference.
    """

    @staticmethod
    def apply(logits: torch.Tensor, target: torch.Tensor, position_mask: torch.Tensor) -> torch.Tensor:
        """Scalar loss of ``logits[B,T,V]`` against ``target[B,T,V]`` where ``position_mask[B,T,1]`` is 1."""
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        return -(position_mask * (target * log_probabilities)).sum(-1).mean()


if __name__ == "__main__":
    loss.LogSoftmaxLoss = LogSoftmaxLoss
    eagle3_model.LogSoftmaxLoss = LogSoftmaxLoss
    sys.exit(main())
