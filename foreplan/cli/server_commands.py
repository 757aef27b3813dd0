"""``agent`` and ``gateway``: the processes that serve."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foreplan.cli.command import command
from foreplan.cli.options import ClusterFile
from foreplan.cli.output import Output
from foreplan.cli.tls_options import Insecure, RootCert, ServerCert, ServerKey, server_files

if TYPE_CHECKING:
    from plans.errors import Fault

__all__ = ["register"]

StateDir = Annotated[Path, typer.Option("--state-dir", metavar="DIR", help="Where state that survives a kill is kept.")]
Metrics = Annotated[str, typer.Option("--metrics", metavar="HOST:PORT", help="Answer Prometheus there: /metrics.")]
KeepAwake = Annotated[
    bool,
    typer.Option("--keep-awake", help="Let no core of this machine fall asleep: sooner answers for more power."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "agent")(agent)
    command(app, "gateway")(gateway)


def agent(
    out: Output,
    cluster: ClusterFile,
    node: Annotated[str, typer.Option(metavar="NAME", help="Which node of the cluster this is.")],
    state_dir: StateDir,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Instead of the node's address.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.")] = "cpu",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="What models compute in.")] = "fp32",
    threads: Annotated[int, typer.Option(help="CPU threads of one device's worker.", min=1)] = 1,
    model_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of local models (safetensors).")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run batches by torch.compile.")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Replay CUDA graphs.")] = False,
    host_cache: Annotated[
        str, typer.Option(metavar="BYTES", help="Weights kept in host memory for each device, to swap models quickly.")
    ] = "0B",
    swap: Annotated[
        bool, typer.Option("--swap", help="Swap models that a device cannot hold together; takes a --host-cache.")
    ] = False,
    pin_cores: Annotated[
        bool, typer.Option("--pin-cores", help="Give each device's worker --threads cores of its own.")
    ] = False,
    keep_awake: KeepAwake = False,
    runtime: Annotated[
        str, typer.Option(metavar="MODULE:FACTORY", help="What runs the models.")
    ] = "executor.runtime.group_runtime:TorchGroupRuntime",
    metrics: Metrics = "",
    forward_port: Annotated[
        int, typer.Option(help="Port where gateways hand over requests; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    spare_worker: Annotated[bool, typer.Option(help="Start a worker ahead, for the first model.")] = True,
    server_cert: ServerCert = None,
    server_key: ServerKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Run the agent of one node: hosts workers, loads models, serves requests. Stops on SIGTERM."""
    # Read when grpc is imported: otherwise it remarks on every worker that is started, which it has no part in.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    import uvloop

    from executor.agent import AgentConfig, serve_agent
    from executor.cores import cores_awake
    from executor.logs import configure_logging
    from plans.cluster import Cluster
    from plans.documents import read_document
    from plans.errors import Fault, InvalidInput

    inventory = read_document(cluster, Cluster)
    known = {one.name: one for one in inventory.nodes}
    if node not in known:
        raise InvalidInput.of(f"one of {', '.join(known)}", where=cluster, field="--node", found=repr(node))
    address = listen or known[node].address
    if not address:
        raise InvalidInput.of("an address for the node, or --listen", where=cluster, field=node, found="none")
    host_cache_bytes = _size_bytes(host_cache, "--host-cache")
    faults = [*_device_faults(device, cuda_graphs=cuda_graphs), *_place_faults(model_dir, runtime)]
    if swap and (host_cache_bytes < 1 or compiled or cuda_graphs):
        expected = "a --host-cache, and neither --compile nor --cuda-graphs"
        faults.append(Fault(where="--swap", found="swapping without", expected=expected))
    if faults:
        raise InvalidInput(faults)
    log_level = (out.log_level or "info").upper()
    configure_logging(log_level)
    config = AgentConfig(
        node=node,
        address=address,
        device_count=known[node].gpus.count,
        memory_bytes=inventory.gpu_type_of(node).memory_bytes,
        state_dir=state_dir,
        device=device,
        runtime=runtime,
        dtype=dtype,
        threads=threads,
        model_dir=model_dir,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        host_cache_bytes=host_cache_bytes,
        swap_models=swap,
        pin_cores=pin_cores,
        log_level=log_level,
        metrics=metrics,
        forward_port=forward_port,
        spare_worker=spare_worker,
        tls=server_files(server_cert, server_key, root_cert),
        insecure=insecure,
    )
    host = address.rpartition(":")[0]

    def ready(port: int) -> None:
        gc.freeze()  # a round of the collector over all modules holds up requests for some 50 ms
        _ready(out, "agent", f"{host}:{port}", node)

    with cores_awake() if keep_awake else contextlib.nullcontext():
        uvloop.run(serve_agent(config, on_ready=ready))


def _device_faults(device: str, *, cuda_graphs: bool) -> Iterator[Fault]:
    """Yield what no worker could start with; which GPUs there are, where there is a driver, it sees itself."""
    from plans.errors import Fault

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        yield Fault(where="--device", found=repr(device), expected="cpu, cuda or cuda:INDEX")
    elif device != "cpu" and not _has_cuda_driver():
        found, expected = f"{device}, without a driver for CUDA", "a machine with a GPU and its driver (libcuda.so.1)"
        yield Fault(where="--device", found=found, expected=expected, remedy="install the driver, or use cpu")
    elif cuda_graphs and device == "cpu":
        yield Fault(where="--cuda-graphs", found="--device cpu", expected="a CUDA device", remedy="leave them off")


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _place_faults(model_dir: Path | None, runtime: str) -> Iterator[Fault]:
    """Yield which folder or module is not there. Without importing what it names: a runtime may take seconds."""
    from plans.errors import Fault

    if model_dir is not None and not model_dir.is_dir():
        found = f"{model_dir} ({'no folder' if model_dir.exists() else 'no such folder'})"
        yield Fault(where="--model-dir", found=found, expected="a folder of models")
    module, _, factory = runtime.partition(":")
    try:
        is_there = bool(module and factory) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of the package that it is in
        is_there = False
    if not is_there:
        yield Fault(
            where="--runtime", found=repr(runtime), expected="MODULE:FACTORY, with a module that can be imported"
        )


def _size_bytes(text: str, option: str) -> int:
    from plans.errors import InvalidInput
    from plans.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InvalidInput.of(str(error), where="command line", field=option, found=repr(text)) from error


def gateway(
    out: Output,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")],
    state_dir: StateDir,
    processes: Annotated[int, typer.Option(help="Processes that share the port.", min=1)] = 1,
    http: Annotated[str, typer.Option(metavar="HOST:PORT", help="The protocol's HTTP form, under /v2.")] = "",
    metrics: Metrics = "",
    pin_cores: Annotated[bool, typer.Option("--pin-cores", help="Keep each process on a core of its own.")] = False,
    keep_awake: KeepAwake = False,
    routing: Annotated[
        Literal["corrected", "least-finish", "weighted"],
        typer.Option(help="By plan weight corrected by waits, to the least expected finish, or by weight alone."),
    ] = "corrected",
    server_cert: ServerCert = None,
    server_key: ServerKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Run a gateway: the front door that routes requests by the plan in force. Stops on SIGTERM."""
    from executor.cores import cores_awake
    from executor.gateway import GatewayConfig
    from executor.gateway_processes import run_gateway
    from executor.logs import configure_logging

    log_level = (out.log_level or "info").upper()
    configure_logging(log_level)
    config = GatewayConfig(
        listen=listen,
        state_dir=state_dir,
        http=http,
        metrics=metrics,
        routing=routing,
        pin_cores=pin_cores,
        tls=server_files(server_cert, server_key, root_cert),
        insecure=insecure,
    )
    with cores_awake() if keep_awake else contextlib.nullcontext():
        run_gateway(config, lambda address: _ready(out, "gateway", address), processes=processes, log_level=log_level)


def _ready(out: Output, role: str, address: str, name: str = "") -> None:
    """Say that a server listens: one line, or one JSON value, which a supervisor can wait for."""
    out.result({"ready": role, "node": name, "address": address})
    out.say(f"{role} {name} listens on {address}".replace("  ", " "))
    out.flush()
