from __future__ import annotations

import pytest

from executor.model_config import model_config
from executor.proto import open_inference_pb2 as pb
from executor.runtime.protocol import NUMPY_TYPES


def described(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 3, 2)) -> pb.ModelMetadataResponse:
    metadata = pb.ModelMetadataResponse(name="s", versions=["1"], platform="foreplan")
    metadata.inputs.add(name="x", datatype=datatype, shape=shape)
    metadata.outputs.add(name="y", datatype=datatype, shape=shape)
    return metadata


@pytest.mark.parametrize("datatype", NUMPY_TYPES)
def test_every_datatype_that_models_take_has_a_name_there(datatype: str) -> None:
    config = model_config(described(datatype), max_batch=1)
    assert pb.DataType.Name(config.input[0].data_type) == f"TYPE_{datatype}"


def test_shapes_leave_out_the_batch() -> None:
    config = model_config(described(), max_batch=8)
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (8, [3, 2], [3, 2])
    assert not config.model_transaction_policy.decoupled


def test_a_service_that_generates_takes_single_sequences_and_answers_in_parts() -> None:
    config = model_config(described("INT64", (1, -1)), max_batch=0)
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [1, -1])
    assert config.model_transaction_policy.decoupled
