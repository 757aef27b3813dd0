"""A stock tritonclient speaking HTTP to a running gateway; prints what it found as JSON. A process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def main() -> None:
    """Ask everything that the protocol offers about the service ``sys.argv[2]``."""
    client = triton.InferenceServerClient(sys.argv[1])
    service = sys.argv[2]
    found: dict[str, object] = {"live": client.is_server_live(), "ready": client.is_server_ready()}
    found["server"] = client.get_server_metadata()["name"]
    client.load_model(service)
    found["model_ready"] = client.is_model_ready(service)
    found["unknown_ready"] = client.is_model_ready("nobody")
    metadata = client.get_model_metadata(service)
    found["inputs"] = [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in metadata["inputs"]]
    config = client.get_model_config(service)
    found["config"] = (config["name"], config["max_batch_size"], config["input"], config["output"][0]["dims"])
    found["index"] = [(model["name"], model["state"]) for model in client.get_model_repository_index()]
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    found["sent"] = values.tolist()
    found["got"] = [
        _infer(client, service, values, sent, asked).tolist() for sent in (True, False) for asked in (True, False)
    ]
    statistics = client.get_inference_statistics(service)["model_stats"][0]
    found["statistics"] = (statistics["inference_count"], statistics["inference_stats"]["success"]["count"])
    found["errors"] = {
        "infer": _refusal(lambda: _infer(client, "nobody", values, True, True)),
        "unload": _refusal(lambda: client.unload_model(service)),
        "wrong_shape": _refusal(lambda: _infer(client, service, values.reshape(4, 2), True, True)),
    }
    client.close()
    sys.stdout.write(json.dumps(found))


def _infer(client: Any, service: str, values: Any, binary_in: bool, binary_out: bool) -> Any:
    tensor = triton.InferInput("x", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values, binary_data=binary_in)
    output = triton.InferRequestedOutput("y", binary_data=binary_out)
    return client.infer(service, [tensor], outputs=[output]).as_numpy("y")


def _refusal(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except InferenceServerException as error:
        return str(error.status()), str(error.message())
    return "OK", ""


if __name__ == "__main__":
    main()
