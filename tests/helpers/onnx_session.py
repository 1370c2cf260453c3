"""Causal language models in onnxruntime, step by step."""

from __future__ import annotations

import numpy as np


class OnnxModel:
    """A file of `export_onnx(..., use_cache=True)`."""

    def __init__(self, path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]

    def empty(self, batch):
        return [np.zeros((batch, v.shape[1], 0, v.shape[3]), np.float32) for v in self.past]

    def __call__(self, ids, mask, past=None):
        """Logits and the new past: ids (batch, new), mask (batch, past + new)."""
        past = self.empty(len(ids)) if past is None else past
        names = [value.name for value in self.past]
        feed = {"input_ids": ids, "attention_mask": mask} | dict(zip(names, past, strict=True))
        logits, *present = self.session.run(None, feed)
        return logits, present

    def greedy(self, ids, mask, tokens):
        """The tokens that follow prompts, as `generate(do_sample=False)` finds them: prompt and continuation."""
        new, past = ids, None
        for _ in range(tokens):
            logits, past = self(new, mask, past)
            new = logits[:, -1:].argmax(-1)
            ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
        return ids
