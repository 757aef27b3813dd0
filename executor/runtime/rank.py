"""One rank of a model over several devices: ``python -m executor.runtime.rank``, started by rank 0.

It reads commands from its standard input, one JSON object a line, and does them in order; when the input ends, so does
it. What fails here ends the process, which rank 0 notices as a closed connection.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from executor.runtime.parallel import Mesh, StageModel, cut
from executor.runtime.torch_runtime import TorchRuntime

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve rank 0 until it closes the input; return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; rank 0 ends its ranks
    runtime = TorchRuntime(options.device, options.dtype, options.threads, options.model_dir, options.seed)
    torch.set_num_threads(options.threads)
    mesh = Mesh(rank=options.rank, tp=options.tp, pp=options.pp, device=options.device, store_port=options.store_port)
    mesh.join()
    models: dict[str, StageModel] = {}
    for line in sys.stdin:
        command = json.loads(line)
        variant = command["variant"]
        if command["do"] == "load":
            models[variant] = StageModel(cut(runtime, variant, mesh.tp, mesh.pp, command["edges"]), mesh)
            mesh.gathered(models[variant].weight_bytes)
        elif command["do"] == "run":
            outputs = models[variant].step(None)
            if outputs is not None:
                models[variant].return_outputs(outputs)
        elif command["do"] == "times":
            mesh.gathered(models[variant].run_s)
        else:
            models.pop(variant, None)
    # Rank 0 has gone or is going: nobody is left to take leave of.
    sys.stdout.flush()
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m executor.runtime.rank", description="Started by a worker.")
    for name in ("rank", "tp", "pp", "threads", "seed", "store-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--model-dir", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
