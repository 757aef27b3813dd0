"""Cutting a model into pipeline stages: its parts in the order in which they run, and where to cut between them.

Between two parts one tensor is handed over. Families whose parts hand over more, such as segmenters that merge the
outputs of several depths, cannot be cut and say so.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from plans.errors import InvalidInput

__all__ = ["Part", "balanced", "evened_s", "measured_s", "parts_of"]


class Part(nn.Module):
    """One step of a model: a tensor in, a tensor out; the last part returns a dictionary of tensors.

    Args:
        module: What runs.
        call: How it is called with the tensor; as ``module(hidden)`` when left out.
    """

    def __init__(self, module: nn.Module, call: Callable[[Any, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, hidden: torch.Tensor) -> Any:
        """Run the step."""
        return self.module(hidden) if self._call is None else self._call(self.module, hidden)


def parts_of(module: nn.Module, name: str) -> tuple[Part, ...]:
    """Return the parts of ``module``; run one after the other they give its outputs.

    Raises:
        InvalidInput: Models of this family cannot be cut.
    """
    family = type(module).__name__
    if family not in _FAMILIES:
        raise InvalidInput.of(
            f"a model that can be cut into stages: {', '.join(sorted(_FAMILIES))}",
            where=name,
            field="pp",
            found=family,
            remedy="plan it with pp = 1",
        )
    return tuple(_FAMILIES[family](module))


def measured_s(parts: Sequence[Part], inputs: torch.Tensor, *, repeats: int = 3) -> list[float]:
    """Return the time that each part takes for ``inputs``, the shortest of ``repeats`` runs, seconds."""
    times = [float("inf")] * len(parts)
    for _ in range(repeats):
        hidden: Any = inputs
        for position, part in enumerate(parts):
            _wait(inputs)
            start = time.perf_counter()
            hidden = part(hidden)
            _wait(inputs)
            times[position] = min(times[position], time.perf_counter() - start)
    return times


def evened_s(parts: Sequence[nn.Module], times_s: Sequence[float]) -> list[float]:
    """Return ``times_s`` with the median in place of what parts of equal weights took, shape (part,).

    Layers that repeat take equal times. What differs is chance, by which a model would be cut elsewhere, with other
    weights and another share of key-value memory on each device, than it was when it was profiled.
    """
    shapes = [tuple(tuple(parameter.shape) for parameter in part.parameters()) for part in parts]
    found: dict[object, list[float]] = defaultdict(list)
    for shape, time_s in zip(shapes, times_s, strict=True):
        found[shape].append(time_s)
    return [statistics.median(found[shape]) for shape in shapes]


def balanced(times_s: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut parts into consecutive stages so that the slowest stage is as fast as can be.

    Exact, by dynamic programming over (parts, stages), quadratic in the parts.

    Args:
        times_s: Time of each part.
        stages: Number of stages, at least 1 and at most the number of parts.

    Returns:
        Shape (stages + 1,): stage k has the parts from entry k to entry k + 1, excluded.

    Raises:
        ValueError: There are fewer parts than stages.
    """
    count = len(times_s)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} parts cannot make {stages} stages")
    upto = [0.0]
    for part_s in times_s:
        upto.append(upto[-1] + part_s)
    slowest = list(upto)
    cuts: list[list[int]] = []
    for stage in range(2, stages + 1):
        best = [float("inf")] * (count + 1)
        cut = [0] * (count + 1)
        for end in range(stage, count + 1):
            for start in range(stage - 1, end):
                found = max(slowest[start], upto[end] - upto[start])
                if found < best[end]:
                    best[end], cut[end] = found, start
        slowest = best
        cuts.append(cut)
    edges = [count]
    for cut in reversed(cuts):
        edges.append(cut[edges[-1]])
    return (0, *reversed(edges))


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class _Head(nn.Module):
    """Modules that only live together, so that they move and count as one."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def _resnet(model: Any) -> list[Part]:
    layers = [layer for stage in model.resnet.encoder.stages for layer in stage.layers]
    head = _Head(pooler=model.resnet.pooler, classifier=model.classifier)
    return [
        Part(model.resnet.embedder),
        *map(Part, layers),
        Part(head, lambda own, hidden: {"logits": own.classifier(own.pooler(hidden))}),
    ]


def _mobilenet(model: Any) -> list[Part]:
    body = model.mobilenet_v2
    head = _Head(last=body.conv_1x1, pooler=body.pooler, classifier=model.classifier)
    return [
        Part(body.conv_stem),
        *map(Part, body.layer),
        Part(head, lambda own, hidden: {"logits": own.classifier(own.pooler(own.last(hidden)).flatten(1))}),
    ]


def _vit(model: Any) -> list[Part]:
    head = _Head(norm=model.vit.layernorm, classifier=model.classifier)
    return [
        Part(model.vit.embeddings),
        *map(Part, model.vit.layers),
        Part(head, lambda own, hidden: {"logits": own.classifier(own.norm(hidden)[:, 0])}),
    ]


def _yolos(model: Any) -> list[Part]:
    tokens = model.config.num_detection_tokens
    head = _Head(norm=model.vit.layernorm, labels=model.class_labels_classifier, boxes=model.bbox_predictor)

    def detect(own: Any, hidden: torch.Tensor) -> Mapping[str, torch.Tensor]:
        found = own.norm(hidden)[:, -tokens:]
        return {"logits": own.labels(found), "pred_boxes": own.boxes(found).sigmoid()}

    layers = [Part(layer) for layer in model.vit.encoder.layer]
    if model.config.use_mid_position_embeddings:
        size = tuple(model.config.image_size)
        between = model.vit.encoder.interpolation
        for index in range(len(layers) - 1):
            own = _Head(layer=layers[index].module, between=between)
            layers[index] = Part(own, _followed_by_position(size, index))
    return [Part(model.vit.embeddings), *layers, Part(head, detect)]


def _followed_by_position(size: tuple[int, ...], index: int) -> Callable[[Any, torch.Tensor], Any]:
    return lambda own, hidden: own.layer(hidden) + own.between(size)[index]


def _bert(model: Any) -> list[Part]:
    head = _Head(pooler=model.bert.pooler, classifier=model.classifier)
    return [
        Part(model.bert.embeddings, lambda own, tokens: own(input_ids=tokens)),
        *map(Part, model.bert.encoder.layer),
        Part(head, lambda own, hidden: {"logits": own.classifier(own.pooler(hidden))}),
    ]


def _llama(model: Any) -> list[Part]:
    def decode(own: Any, hidden: torch.Tensor) -> Any:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        turned = own.rotary(hidden, position_ids=positions)
        return own.layer(hidden, attention_mask=None, position_embeddings=turned, position_ids=positions)

    rotary = model.model.rotary_emb
    head = _Head(norm=model.model.norm, vocabulary=model.lm_head)
    return [
        Part(model.model.embed_tokens),
        *(Part(_Head(layer=layer, rotary=rotary), decode) for layer in model.model.layers),
        Part(head, lambda own, hidden: {"logits": own.vocabulary(own.norm(hidden[:, -1:]))}),
    ]


_FAMILIES: Mapping[str, Callable[[Any], list[Part]]] = {
    "BertForSequenceClassification": _bert,
    "LlamaForCausalLM": _llama,
    "MobileNetV2ForImageClassification": _mobilenet,
    "ResNetForImageClassification": _resnet,
    "ViTForImageClassification": _vit,
    "YolosForObjectDetection": _yolos,
}
