"""Embeddings seen through a mask."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from .layer import PruningLayer


class PrunedEmbedding(PruningLayer):
    """`nn.Embedding`, whose matrix has a row for each token."""

    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        base = cast(Any, self.get_base_layer())
        # gradients of the scores are dense, whatever `base.sparse` says of those of the weight
        return F.embedding(x, weight, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
