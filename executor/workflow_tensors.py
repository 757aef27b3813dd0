"""What the calls of a workflow's stages take and give: tensors by name, dealt to calls and gathered from them by rows.

Rows are elements of the first dimension. A request for a workflow names its tensors ``<service>.<input>``, its answer
``<service>.<output>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from executor.tensors import Array
from executor.workflow import Release, Structure
from plans.errors import Fault, InvalidInput

__all__ = ["Arrays", "by_stage", "dealt", "gathered", "inputs_of", "qualified"]

Arrays = Mapping[str, Array]


def qualified(stage: str, arrays: Arrays) -> dict[str, Array]:
    """Return ``arrays`` by names that say whose they are."""
    return {f"{stage}.{name}": array for name, array in arrays.items()}


def by_stage(arrays: Arrays, stages: Sequence[str], *, plain: str = "") -> dict[str, dict[str, Array]]:
    """Return tensors of a request by stage and by the stage's own name for them.

    Args:
        arrays: Named ``<service>.<input>``.
        stages: Services that there are; of several that fit a name, the longest.
        plain: The stage whose inputs may be named without it; empty for none.

    Raises:
        InvalidInput: A name is of no stage; with every fault.
    """
    found: dict[str, dict[str, Array]] = {stage: {} for stage in stages}
    faults = []
    for name, array in arrays.items():
        stage = max((stage for stage in stages if name.startswith(f"{stage}.")), key=len, default="")
        if stage:
            found[stage][name[len(stage) + 1 :]] = array
        elif plain:
            found[plain][name] = array
        else:
            expected = f"<service>.<input> of one of {', '.join(stages)}"
            faults.append(Fault(where="request", field="inputs", found=repr(name), expected=expected))
    if faults:
        raise InvalidInput(faults)
    return found


def inputs_of(
    structure: Structure, release: Release, client: Arrays, outputs: Mapping[str, Sequence[Arrays | None]]
) -> list[dict[str, Array]]:
    """Return the inputs of each call of a stage.

    What a taken edge hands over goes before what the client has sent along; of several edges the first one counts.

    Args:
        structure: The workflow.
        release: The stage, and which edges hand over.
        client: What the client has sent along for the stage, by name of the input.
        outputs: Of every finished call of the sources, by stage.

    Raises:
        InvalidInput: A source has not the output that an edge names, or calls differ in shape.
    """
    arrays = dict(client)
    for number in reversed(release.edges):
        edge = structure.rules.edges[number]
        calls = outputs[edge.source]
        came = gathered(edge.source, calls if release.first_call is None else [calls[release.first_call]])
        for name, output in edge.inputs:
            if output not in came:
                where = f"workflow {structure.rules.name!r}"
                expected = f"an output of {edge.source!r}: {', '.join(came)}"
                raise InvalidInput.of(expected, where=where, field=f"edges[{number}].inputs", found=repr(output))
            arrays[name] = came[output]
    return dealt(arrays, release.calls)


def dealt(arrays: Arrays, calls: int) -> list[dict[str, Array]]:
    """Deal the rows of every array to ``calls`` calls, in order and as evenly as can be.

    Where there are fewer rows than calls they are dealt again from the first.
    """
    return [{name: _part(array, call, calls) for name, array in arrays.items()} for call in range(calls)]


def _part(array: Array, call: int, calls: int) -> Array:
    rows = len(array)
    if rows < calls:
        start = call % rows
        return array[start : start + 1]
    return array[call * rows // calls : (call + 1) * rows // calls]


def gathered(stage: str, calls: Iterable[Arrays | None]) -> dict[str, Array]:
    """Return the outputs of all calls of a stage that have finished, one below the other.

    Raises:
        InvalidInput: They differ in names, types or shapes, which variants of a service may.
    """
    parts = [arrays for arrays in calls if arrays is not None]
    if len(parts) == 1:
        return dict(parts[0])
    kinds = [{name: (array.dtype, array.shape[1:]) for name, array in part.items()} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        expected = "the same outputs from every call"
        raise InvalidInput.of(expected, where=f"stage {stage!r}", field="outputs", found="different ones")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
