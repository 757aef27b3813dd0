"""One rank of a model over several devices: ``python -m executor.runtime.rank``, started by rank 0.

It reads commands from its standard input, one JSON object a line, and does them in order; when the input ends, so does
it. What fails here ends the process, which rank 0 notices as a closed connection.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from executor.cores import at_low_priority

if TYPE_CHECKING:
    from executor.runtime.generation import LlamaSequences
    from executor.runtime.generation_group import PhasePass
    from executor.runtime.stage_model import Built, StageModel

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Serve rank 0 until it closes the input."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; rank 0 ends its ranks
    commands: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_read, args=(commands,), name="commands", daemon=True).start()
    at_low_priority(lambda: importlib.import_module("executor.runtime.stage_model"))  # as in a worker
    import torch

    from executor.runtime.mesh import World
    from executor.runtime.parallel_generation import follow
    from executor.runtime.protocol import OutOfDeviceMemory
    from executor.runtime.stage_model import StageModel, cut
    from executor.runtime.torch_runtime import TorchRuntime

    runtime = TorchRuntime(options.device, options.dtype, options.threads, options.model_dir, options.seed)
    torch.set_num_threads(options.threads)
    world = World(rank=options.rank, size=options.size, device=options.device, store_port=options.store_port)
    world.join()
    models: dict[int, StageModel] = {}
    sequences: dict[int, LlamaSequences] = {}
    passes: dict[int, PhasePass] = {}
    building: dict[int, tuple[str, Future[Built]]] = {}
    builder = ThreadPoolExecutor(max_workers=1)
    while True:
        command = commands.get()
        number = command["model"]
        if command["do"] == "build":
            build = functools.partial(runtime.build, command["variant"])
            if not models:  # as in a worker: beside models of its own it would hold them up
                build = functools.partial(at_low_priority, build)
            building[number] = command["variant"], builder.submit(build)
        elif command["do"] == "load":
            variant, built = building.pop(number)
            tp, pp = command["shape"]
            mesh = world.mesh(tp, pp)
            whole = cut(runtime, variant, tp, pp, built=built.result(), edges=command["edges"])
            with contextlib.suppress(OutOfDeviceMemory):  # rank 0 knows, since all agree
                models[number] = StageModel(whole, mesh, variant)
                mesh.gathered(models[number].weight_bytes)
        elif command["do"] == "run":
            models[number].step(None)
        elif command["do"] == "times":
            models[number].gather_times()
        elif command["do"] == "sequences":
            facts = models[number].facts()
            with contextlib.suppress(OutOfDeviceMemory):  # rank 0 knows, since all agree
                sequences[number] = models[number].sequences(command["kv_tokens"], facts, command["name"])
        elif command["do"] == "prepare":
            passes.pop(number, None)
            with contextlib.suppress(OutOfDeviceMemory):
                passes[number] = models[number].phase_pass(
                    command["phase"], command["batch"], command["tokens"], command["name"]
                )
        elif command["do"] == "pass":
            models[number].hand_back(models[number].run_pass(passes[number]))
        elif command["do"] == "iterate":
            models[number].hand_back(follow(sequences[number], command))
        else:
            passes.pop(number, None)
            sequences.pop(number, None)
            models.pop(number, None)
            building.pop(number, None)


def _read(commands: SimpleQueue[dict[str, Any]]) -> None:
    """Queue the commands, and end the process with the input: whatever waits for rank 0 then waits in vain."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m executor.runtime.rank", description="Started by a worker.")
    for name in ("rank", "size", "threads", "seed", "store-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--model-dir", type=Path)
    return parser


if __name__ == "__main__":
    main()
