"""One stage of a pipeline that generates: its layers of a Llama, between the stages before and behind it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from executor.runtime.mesh import Mesh, receive, send

__all__ = ["LlamaStage", "stage_layers"]


def stage_layers(edges: Sequence[int], stage: int, layers: int) -> range:
    """Return the layers of a stage whose model was cut at ``edges``: its first part embeds, its last finds logits."""
    first, end = (min(max(edge - 1, 0), layers) for edge in edges[stage : stage + 2])
    return range(first, end)


class LlamaStage:
    """This rank's part of a Llama, for `executor.runtime.generation.LlamaSteps` in place of a `LlamaForCausalLM`.

    It is called with what every rank knows of a pass, which is all but the hidden states: they come from the stage
    before and go to the one behind. Only the last stage returns logits; those of the others are of no token.

    Args:
        module: The whole model, with the parts of this stage on this device.
        edges: See `executor.runtime.stage_model.Cut`.
        mesh: This rank's place.

    Attributes:
        config: Of the whole model.
        dtype: Of its weights.
        layers: Those of this stage, by their numbers in the model.
        run_s: Seconds that it computed since this was set to 0.
    """

    def __init__(self, module: Any, edges: Sequence[int], mesh: Mesh) -> None:
        self.config, self.dtype = module.config, module.dtype
        self.layers = stage_layers(edges, mesh.stage, module.config.num_hidden_layers)
        self.run_s = 0.0
        body = module.model
        # Parts of other stages are not kept.
        self._embed = None if mesh.stage else body.embed_tokens
        self._layers = [body.layers[layer] for layer in self.layers]
        self._rotary = body.rotary_emb
        self._head = (body.norm, module.lm_head) if mesh.stage == mesh.pp - 1 else None
        self._mesh = mesh

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: object,
        logits_to_keep: int | torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Run this stage's part of a pass over tokens, and hand it over."""
        mesh = self._mesh
        hidden = receive(mesh.device, mesh.rank - mesh.tp) if mesh.stage else input_ids
        start = time.perf_counter()
        if self._embed is not None:
            hidden = self._embed(hidden)
        turned = self._rotary(hidden, position_ids=position_ids) if self._layers else None
        for layer in self._layers:
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                position_embeddings=turned,
                position_ids=position_ids,
                past_key_values=past_key_values,
            )
        logits = self._logits(hidden, logits_to_keep)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        self.run_s += time.perf_counter() - start
        if self._head is None:
            send(hidden, mesh.rank + mesh.tp)
        return {"logits": logits}

    def _logits(self, hidden: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
        """Return the logits of what is kept, which is the last so many positions or those of an index."""
        if self._head is None:
            return hidden.new_empty((0, self.config.vocab_size))
        norm, vocabulary = self._head
        kept = hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep]
        logits: torch.Tensor = vocabulary(norm(kept))
        return logits
