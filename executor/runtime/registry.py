"""The models that can be built by name, from their configuration alone: transformers architectures, and a U-Net.

Nothing is downloaded. The names say the architecture and its size; the weights are seeded random numbers, so latency
and memory are those of the real architecture, and the answers mean nothing. Importing this module imports neither
torch nor transformers: they are imported when a model is built.

Every model has variants by input size: ``segformer-b0-160`` is ``segformer-b0`` on images of 160x160, and
``bert-base-64`` is ``bert-base`` on 64 tokens (`architecture_of`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from executor.runtime.protocol import TensorSpec
from executor.runtime.sizes import split_size
from plans.errors import InvalidInput

__all__ = ["REGISTRY", "Architecture", "architecture_of"]

_SIDES = range(32, 2049, 32)
"""Sides of images for models that halve them five times, pixels."""

_PATCHED_SIDES = range(16, 2049, 16)
"""Sides of images for models that cut them into patches of 16, or halve them four times, pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How to build one model.

    Attributes:
        build: Returns a new ``torch.nn.Module`` with weights drawn from torch's generator, on the default device.
        inputs: Tensors per item.
        outputs: Names of the tensors to return.
        description: One line for people.
        build_as: The same with weights held as the given torch dtype from the start, for models whose fp32 weights
            would be too much for the host; None where they are drawn in fp32, to be cast.
        resized: Returns the same model for inputs of another size; None where there is one size only.
        sizes: What ``resized`` takes: sides of the image in pixels, or tokens.
    """

    build: Callable[[], Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    description: str
    build_as: Callable[[Any], Any] | None = None
    resized: Callable[[int], Architecture] | None = None
    sizes: range = range(0)

    @property
    def size(self) -> int:
        """Side of its images in pixels, or tokens of its texts."""
        return self.inputs[0].shape[-1]


def _image(side: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("pixel_values", "FP32", (3, side, side)),)


def _tokens(length: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("input_ids", "INT64", (length,)),)


def _of_images(
    build: Callable[[], Any],
    side: int,
    outputs: tuple[str, ...],
    description: str,
    resized: Callable[[int], Architecture],
    sizes: range = _SIDES,
) -> Architecture:
    """Return a model of square images."""
    return Architecture(
        build=build,
        inputs=_image(side),
        outputs=outputs,
        description=description,
        resized=resized,
        sizes=sizes,
    )


def _labelled(config: Any, labels: int) -> Any:
    """Return ``config`` with a head of ``labels`` classes."""
    config.num_labels = labels
    return config


def _mobilenet(width: float, side: int = 224) -> Architecture:
    def build() -> Any:
        from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

        config = MobileNetV2Config(depth_multiplier=width)
        return MobileNetV2ForImageClassification(_labelled(config, 1000))

    description = f"MobileNetV2, width {width}: image classification, {side}x{side}"
    resized = functools.partial(_mobilenet, width)
    return _of_images(build, side, ("logits",), description, resized)


def _deeplab(side: int = 256) -> Architecture:
    def build() -> Any:
        from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

        return MobileNetV2ForSemanticSegmentation(_labelled(MobileNetV2Config(output_stride=16), 21))

    description = f"DeepLabV3+ head on MobileNetV2: segmentation into 21 classes, {side}x{side}"
    return _of_images(build, side, ("logits",), description, _deeplab)


def _segformer(
    size: str, widths: tuple[int, ...], depths: tuple[int, ...], decoder: int, side: int = 256
) -> Architecture:
    def build() -> Any:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        config = SegformerConfig(hidden_sizes=list(widths), depths=list(depths), decoder_hidden_size=decoder)
        return SegformerForSemanticSegmentation(_labelled(config, 19))

    description = f"Segformer {size}: segmentation into 19 classes, {side}x{side}"
    resized = functools.partial(_segformer, size, widths, depths, decoder)
    return _of_images(build, side, ("logits",), description, resized)


def _unet(width: int, side: int = 256) -> Architecture:
    def build() -> Any:
        from executor.runtime.unet import UNet

        return UNet(width, 4, 21)

    description = f"U-Net, width {width}: segmentation into 21 classes, {side}x{side}"
    resized = functools.partial(_unet, width)
    return _of_images(build, side, ("logits",), description, resized, _PATCHED_SIDES)


def _llama(size: str, tokens: int, *, kv_heads: int, **shape: Any) -> Architecture:
    def build(**dtype: Any) -> Any:
        from executor.runtime.quick_weights import drawn_llama

        model = drawn_llama(num_key_value_heads=kv_heads, use_cache=False, **shape, **dtype)
        # Of a prompt only the last position's logits matter: they say the first token of the answer.
        model.forward = functools.partial(model.forward, logits_to_keep=1)
        return model

    return Architecture(
        build=build,
        inputs=_tokens(tokens),
        outputs=("logits",),
        description=f"Llama {size}: logits of the token after a prompt of {tokens}",
        build_as=lambda dtype: build(dtype=dtype),
        resized=lambda length: _llama(size, length, kv_heads=kv_heads, **shape),
        sizes=range(1, shape["max_position_embeddings"] + 1),
    )


def _bert(hidden: int, layers: int, size: str, tokens: int = 128) -> Architecture:
    def build() -> Any:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
        )
        return BertForSequenceClassification(_labelled(config, 2))

    return Architecture(
        build=build,
        inputs=_tokens(tokens),
        outputs=("logits",),
        description=f"Bert {size} ({layers} layers of {hidden}): text classification, {tokens} tokens",
        resized=functools.partial(_bert, hidden, layers, size),
        sizes=range(1, 513),
    )


def _resnet(kind: str, depths: tuple[int, ...], widths: tuple[int, ...], side: int = 224) -> Architecture:
    def build() -> Any:
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(layer_type=kind, depths=list(depths), hidden_sizes=list(widths))
        return ResNetForImageClassification(_labelled(config, 1000))

    layers = sum(depths) * (2 if kind == "basic" else 3) + 2
    description = f"ResNet-{layers}: image classification, {side}x{side}"
    return _of_images(build, side, ("logits",), description, functools.partial(_resnet, kind, depths, widths))


def _yolos(hidden: int, size: str, side: int = 256) -> Architecture:
    def build() -> Any:
        from transformers import YolosConfig, YolosForObjectDetection

        config = YolosConfig(
            hidden_size=hidden,
            num_hidden_layers=12,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            image_size=[side, side],
            num_detection_tokens=100,
        )
        return YolosForObjectDetection(_labelled(config, 91))

    description = f"YOLOS {size}: detection of 100 boxes, {side}x{side}"
    resized = functools.partial(_yolos, hidden, size)
    return _of_images(build, side, ("logits", "pred_boxes"), description, resized, _PATCHED_SIDES)


def _vit(hidden: int, size: str, side: int = 224) -> Architecture:
    def build() -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden, image_size=side
        )
        return ViTForImageClassification(_labelled(config, 1000))

    description = f"ViT {size}: image classification, {side}x{side}"
    resized = functools.partial(_vit, hidden, size)
    return _of_images(build, side, ("logits",), description, resized, _PATCHED_SIDES)


REGISTRY: Mapping[str, Architecture] = {
    "bert-base": _bert(768, 12, "base"),
    "bert-large": _bert(1024, 24, "large"),
    "bert-small": _bert(512, 4, "small"),
    "bert-small-16": _bert(512, 4, "small", 16),
    "bert-tiny-16": _bert(128, 2, "tiny", 16),
    "deeplab-mobilenet-v2": _deeplab(),
    "llama-1b": _llama(
        "1B",
        128,
        kv_heads=8,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama-8b": _llama(
        "8B",
        128,
        kv_heads=8,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "llama-tiny": _llama(
        "tiny",
        16,
        kv_heads=2,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=1024,
        max_position_embeddings=1024,
    ),
    "mobilenet-v2-0.35": _mobilenet(0.35),
    "mobilenet-v2-0.5": _mobilenet(0.5),
    "mobilenet-v2-1.0": _mobilenet(1.0),
    "mobilenet-v2-1.4": _mobilenet(1.4),
    "resnet-18": _resnet("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet-50": _resnet("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "segformer-b0": _segformer("B0", (32, 64, 160, 256), (2, 2, 2, 2), 256),
    "segformer-b1": _segformer("B1", (64, 128, 320, 512), (2, 2, 2, 2), 256),
    "segformer-b2": _segformer("B2", (64, 128, 320, 512), (3, 4, 6, 3), 768),
    "unet-32": _unet(32),
    "vit-base": _vit(768, "base"),
    "vit-small": _vit(384, "small"),
    "vit-tiny": _vit(192, "tiny"),
    "yolos-base": _yolos(768, "base"),
    "yolos-small": _yolos(384, "small"),
    "yolos-tiny": _yolos(192, "tiny"),
}
"""Every model that can be built by name, sorted."""


def architecture_of(variant: str, registry: Mapping[str, Architecture] = REGISTRY) -> tuple[str, Architecture] | None:
    """Return the registered model that ``variant`` names, and how to build it at the size that it names; None if none.

    Raises:
        InvalidInput: The model cannot have inputs of that size.
    """
    found = split_size(variant, registry)
    if found is None:
        return None
    model, size = found
    architecture = registry[model]
    if size is None or size == architecture.size:
        return model, architecture
    if architecture.resized is None or size not in architecture.sizes:
        raise InvalidInput.of(_expected(architecture), where=variant, field="input size", found=size)
    return model, architecture.resized(size)


def _expected(architecture: Architecture) -> str:
    sizes = architecture.sizes
    if not sizes:
        return f"{architecture.size}, its only size"
    return f"{sizes[0]} to {sizes[-1]}" + (f" in steps of {sizes.step}" if sizes.step > 1 else "")
