"""What Triton calls a model's configuration, as far as clients need it to send requests: load generators ask for it."""

from __future__ import annotations

from executor.dispatcher import DEFAULT_PRIORITY, LAST_PRIORITY
from executor.proto import open_inference_pb2 as pb

__all__ = ["model_config"]


def model_config(metadata: pb.ModelMetadataResponse, max_batch: int) -> pb.ModelConfig:
    """Return the configuration of a service.

    Args:
        metadata: What it takes and gives, the batch in front of every shape.
        max_batch: Items of its largest batch; 0 for one that generates, where a request is one sequence, and which
            ``ModelStreamInfer`` answers in many parts (``decoupled``).
    """
    start = 1 if max_batch else 0
    config = pb.ModelConfig(
        name=metadata.name,
        platform=metadata.platform,
        backend="foreplan",
        max_batch_size=max_batch,
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=not max_batch),
        dynamic_batching=pb.ModelDynamicBatching(
            priority_levels=LAST_PRIORITY, default_priority_level=DEFAULT_PRIORITY
        ),
    )
    for tensor in metadata.inputs:
        config.input.add(name=tensor.name, data_type=_data_type(tensor.datatype), dims=tensor.shape[start:])
    for tensor in metadata.outputs:
        config.output.add(name=tensor.name, data_type=_data_type(tensor.datatype), dims=tensor.shape[start:])
    return config


def _data_type(datatype: str) -> str:
    return f"TYPE_{datatype}"
