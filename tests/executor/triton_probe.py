"""A stock tritonclient against a running gateway; prints what it found as JSON.

It runs as a process of its own: tritonclient and `executor.proto` register the same protobuf names.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main() -> None:
    """Ask everything that the protocol offers about the service ``sys.argv[2]``."""
    client = triton.InferenceServerClient(sys.argv[1])
    service = sys.argv[2]
    found: dict[str, object] = {"live": client.is_server_live(), "ready": client.is_server_ready()}
    found["server"] = client.get_server_metadata().name
    client.load_model(service)
    found["model_ready"] = client.is_model_ready(service)
    found["unknown_ready"] = client.is_model_ready("nobody")
    metadata = client.get_model_metadata(service, as_json=True)
    found["inputs"] = [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in metadata["inputs"]]
    found["outputs"] = [tensor["name"] for tensor in metadata["outputs"]]
    config = client.get_model_config(service).config
    batched = (tensor.name, tensor.data_type, list(tensor.dims)) if (tensor := config.input[0]) else None
    found["config"] = (config.name, config.max_batch_size, batched, config.model_transaction_policy.decoupled)
    index = client.get_model_repository_index()
    found["index"] = [(model.name, model.state) for model in index.models]
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    tensor = triton.InferInput("x", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    result = client.infer(service, [tensor], outputs=[triton.InferRequestedOutput("y")], client_timeout=10.0)
    found["sent"], found["got"] = values.tolist(), result.as_numpy("y").tolist()
    found["errors"] = {
        "config": _refusal(lambda: client.get_model_config("nobody")),
        "infer": _refusal(lambda: client.infer("nobody", [tensor])),
        "load": _refusal(lambda: client.load_model("nobody")),
        "unload": _refusal(lambda: client.unload_model(service)),
        "wrong_shape": _refusal(lambda: client.infer(service, [_wrong_shape()])),
    }
    client.close()
    sys.stdout.write(json.dumps(found))


def _wrong_shape() -> triton.InferInput:
    tensor = triton.InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3), np.float32))
    return tensor


def _refusal(call: object) -> tuple[str, str]:
    assert callable(call)
    try:
        call()
    except InferenceServerException as error:
        return str(error.status()), str(error.message())
    return "OK", ""


if __name__ == "__main__":
    main()
