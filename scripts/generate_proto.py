"""Generate executor/proto/*_pb2*.py from the .proto files, or with --check say which are stale."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "executor" / "proto"


def generate(into: Path) -> None:
    """Run protoc over every .proto file, writing below ``into``."""
    sources = sorted(str(path.relative_to(ROOT)) for path in FOLDER.glob("*.proto"))
    include = Path(grpc_tools.__file__).parent / "_proto"
    flags = [f"-I{ROOT}", f"-I{include}", f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}"]
    if protoc.main(["protoc", *flags, *sources]) != 0:
        sys.exit("protoc failed")
    (into / "executor" / "proto" / "worker_pb2_grpc.py").unlink()  # messages only, no service


def main() -> None:
    """Write the generated files, or compare them."""
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name))
        fresh = {path.name: path.read_bytes() for path in (Path(name) / "executor" / "proto").iterdir()}
    stored = {path.name: path.read_bytes() for path in FOLDER.glob("*_pb2*")}
    stale = sorted(name for name in fresh.keys() | stored.keys() if fresh.get(name) != stored.get(name))
    if stale:
        sys.exit(f"stale generated code: {', '.join(stale)}; run `make proto`")


if __name__ == "__main__":
    main()
