"""A stock tritonclient that streams from a running gateway; prints what it found as JSON.

A process of its own: tritonclient and `executor.proto` register the same protobuf names.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

_WAIT_S = 30.0


def main() -> None:
    """Generate with the service ``sys.argv[2]``: three requests on a stream, one of them wrong, and a whole answer."""
    client = triton.InferenceServerClient(sys.argv[1])
    service = sys.argv[2]
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    asked = {"long": (3, 6), "short": (40, 2), "wrong": (1000, 2)}
    for name, (prompt, count) in asked.items():
        client.async_stream_infer(service, [_prompt([1, prompt])], request_id=name, parameters={"max_tokens": count})
    got: dict[str, list[int]] = {name: [] for name in asked}
    finals, errors = [], []
    while len(finals) + len(errors) < len(asked):
        result, error = answers.get(timeout=_WAIT_S)
        if error is not None:
            errors.append(str(error))
            continue
        response = result.get_response()
        got[response.id] += result.as_numpy("output_ids").ravel().tolist()
        if response.parameters["triton_final_response"].bool_param:
            finals.append((response.id, sorted(response.parameters)))
    client.stop_stream()
    whole = client.infer(service, [_prompt([7])], parameters={"max_tokens": 4})
    metadata = client.get_model_metadata(service, as_json=True)
    sys.stdout.write(
        json.dumps(
            {
                "got": got,
                "finals": dict(finals),
                "errors": errors,
                "whole": whole.as_numpy("output_ids").tolist(),
                "told": sorted(whole.get_response().parameters),
                "inputs": [(one["name"], one["datatype"], one["shape"]) for one in metadata["inputs"]],
            }
        )
    )
    client.close()


def _prompt(tokens: list[int]) -> triton.InferInput:
    values = np.array([tokens], dtype=np.int64)
    tensor = triton.InferInput("input_ids", list(values.shape), "INT64")
    tensor.set_data_from_numpy(values)
    return tensor


if __name__ == "__main__":
    main()
