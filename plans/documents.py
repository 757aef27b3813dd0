"""Reading and writing documents: every fault at once, with file and line; every write atomic.

A *document* is a frozen pydantic model. YAML and JSON files are read alike (JSON is YAML), except that what Foreplan
wrote itself is JSON.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from plans.errors import BadStoredData, Fault, InvalidInput

__all__ = [
    "FORMAT_VERSION",
    "Document",
    "atomic_writer",
    "canonical_digest",
    "check_format_version",
    "check_writable",
    "parse_document",
    "read_document",
    "reading_stored",
    "write_document",
    "write_text",
]

FORMAT_VERSION = "1.0"
"""Major.minor of every document. A minor version only adds fields; an unknown major is refused."""

_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")


class Document(BaseModel):
    """Base of every document and of its parts: frozen, keyword-only, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)


AnyDocument = TypeVar("AnyDocument", bound=Document)


def read_document(path: Path, kind: type[AnyDocument]) -> AnyDocument:
    """Read ``path`` as a ``kind``.

    Raises:
        InvalidInput: The file is missing, is no YAML or JSON, or breaks the document's rules; all faults at once, each
            with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput.of("a readable file", where=path, found=getattr(error, "strerror", None) or error) from error
    return parse_document(text, kind, where=str(path))


@contextmanager
def reading_stored(path: Path, *, remedy: str) -> Iterator[None]:
    """Turn `InvalidInput` about ``path``, which Foreplan wrote, into `BadStoredData` that ends with ``remedy``.

    What cannot be opened may be whole, and is not to be mended by that.
    """
    try:
        yield
    except InvalidInput as error:
        if isinstance(error.__cause__, OSError):
            remedy = "it may be whole: correct its permissions, or close other files, and try again"
        problems = [dataclasses.replace(fault, where="", line=None, remedy="") for fault in error.faults]
        text = "; ".join(map(str, problems))
        raise BadStoredData(path, f"{text}; {remedy}", line=error.faults[0].line) from error


def parse_document(text: str, kind: type[AnyDocument], *, where: str) -> AnyDocument:
    """Parse YAML or JSON ``text`` as a ``kind``; ``where`` names the input in faults.

    Raises:
        InvalidInput: As for `read_document`.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = _construct(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InvalidInput(
            [
                Fault(
                    where=where,
                    line=mark.line + 1 if mark else None,
                    found=(error.problem or "a syntax error").removeprefix("found "),
                    expected="well-formed YAML or JSON",
                    remedy="the file may be cut short or damaged",
                )
            ]
        ) from error
    except RecursionError as error:
        found = "an alias that holds itself, or more levels than can be read"
        raise InvalidInput.of("well-formed YAML or JSON", where=where, found=found) from error
    except yaml.YAMLError as error:
        raise InvalidInput.of("well-formed YAML or JSON", where=where, found=str(error).splitlines()[0]) from error
    if not isinstance(data, dict):
        found = "an empty file" if data is None else _kind(data)
        raise InvalidInput.of("a mapping at the top level", where=where, found=found)
    if "format_version" in kind.model_fields:
        data = check_format_version(data, kind, where=where)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InvalidInput(_faults(error, root, where)) from error


def check_format_version(data: dict[str, Any], kind: type[Document], *, where: str) -> dict[str, Any]:
    """Refuse an unknown major version; from a newer minor version, drop the fields not known here.

    The version known here is the default of the kind's own ``format_version``.

    Raises:
        InvalidInput: The version is malformed or of another major.
    """
    found = data.get("format_version", FORMAT_VERSION)
    if not isinstance(found, str) or not _VERSION.fullmatch(found):
        expected = f'a text such as "{FORMAT_VERSION}"'
        raise InvalidInput.of(expected, where=where, field="format_version", found=repr(found))
    major, _, minor = found.partition(".")
    ours_major, _, ours_minor = str(kind.model_fields["format_version"].default).partition(".")
    if major != ours_major:
        raise InvalidInput.of(
            f"major version {ours_major}",
            where=where,
            field="format_version",
            found=found,
            remedy="read it with the Foreplan that wrote it",
        )
    if int(minor) <= int(ours_minor):
        return data
    return _without_unknown_fields(data, kind)


def _without_unknown_fields(data: dict[str, Any], kind: type[Document]) -> dict[str, Any]:
    """Return ``data`` without the fields, at any depth, that ``kind`` does not know."""
    try:
        kind.model_validate(data)
    except ValidationError as error:
        data = copy.deepcopy(data)
        for detail in error.errors(include_url=False):
            if detail["type"] == "extra_forbidden":
                _remove(data, detail["loc"])
    return data


def _remove(node: Any, location: tuple[int | str, ...]) -> None:
    """Remove what is at ``location``; parts that are no key of the file name the branch of a union."""
    for part in location[:-1]:
        if isinstance(node, list) and isinstance(part, int):
            node = node[part]
        elif isinstance(node, dict):
            node = node.get(part, node)
    if isinstance(node, dict):
        node.pop(location[-1], None)


def write_document(path: Path, document: Document) -> None:
    """Write ``document`` as indented JSON, atomically."""
    write_text(path, document.model_dump_json(indent=2, by_alias=True, exclude_none=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically: a reader, or a power cut, sees the old file or the new one."""
    with atomic_writer(path) as stream:
        stream.write(text.encode())


def check_writable(path: Path) -> None:
    """Check that a file can be written to ``path``, before it takes long to make one.

    Raises:
        InvalidInput: It is a folder, or its folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise InvalidInput.of("the name of a file", where=path, found="a folder")
    if not path.parent.is_dir():
        raise InvalidInput.of("a writable folder", where=path.parent, found="no such folder")
    if not os.access(path.parent, os.W_OK):
        raise InvalidInput.of("a writable folder", where=path.parent, found="no permission to write")


@contextmanager
def atomic_writer(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Yield a binary stream whose content replaces ``path`` when the block ends well, and vanishes otherwise.

    The file gets the permissions ``mode``.

    Raises:
        InvalidInput: The folder does not exist or cannot be written.
        OSError: The disk is full or failed; names ``path``.
    """
    check_writable(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInput.of("a writable folder", where=path.parent, found=error.strerror) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the system does not say which file a full disk has no room for
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def canonical_digest(documents: Iterable[Document]) -> str:
    """Return ``sha256:…`` over the content of ``documents``; comments, key order and spelling of units do not count."""
    digest = hashlib.sha256()
    for document in documents:
        text = json.dumps(document.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
        digest.update(text.encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2 booleans and scientific floats, and dates left as text."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of ``node``; one that its tag does not allow, or no message could quote, is an error."""
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int):
                str(value)  # Python refuses what has thousands of digits
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            problem = f"{str(node.value)[:_QUOTED]!r}, which cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error
        return value


_QUOTED = 40
"""Characters of a value that a fault tells."""


_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$"),
    list("-+0123456789."),
)


def _construct(root: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        for node in _mappings(root):
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
                seen.add(str(key.value))
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _faults(error: ValidationError, root: yaml.Node | None, where: str) -> list[Fault]:
    details = error.errors(include_url=False)
    # A list that lost its bad items is "too short" as well: that is an echo of the faults inside it.
    real = [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(other["loc"][: len(detail["loc"])] == detail["loc"] != other["loc"] for other in details)
    ]
    return [_fault(detail, root, where) for detail in real]


def _fault(detail: Any, root: yaml.Node | None, where: str) -> Fault:
    location, found, expected = detail["loc"], _found(detail), _expected(detail)
    if detail["type"] == "union_tag_invalid":
        location, found = (*location, _DISCRIMINATOR), repr(detail["ctx"]["tag"])
    if detail["type"] == "value_error" and isinstance(detail["input"], dict | list | tuple):
        # A rule about several fields says itself what it found, and may name the field: `nodes[1].name to be ...`.
        expected, _, found = expected.partition(": found ")
        if named := _NAMED.match(expected):
            within = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", named["field"]))
            location, expected = (*location, *within), named["rule"]
    line, field = _line_of(root, location), _dotted(location)
    return Fault(where=where, line=line, field=field, found=found, expected=expected)


_DISCRIMINATOR = "class"
"""The only field by which Foreplan's documents tell the members of a union."""

_NAMED = re.compile(r"(?P<field>\w+\[\d+\](?:\.\w+)*) to be (?P<rule>.+)")


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    previous: int | str = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (isinstance(previous, int) and part in _UNION_TAGS):
            text += f".{part}" if text else part
        previous = part
    return text


_UNION_TAGS = {"latency", "frequency", "generation"}


def _found(detail: Any) -> str:
    if detail["type"] == "missing":
        return "nothing"
    if detail["type"] == "extra_forbidden":
        return "an unknown field"
    value = detail["input"]
    if detail["type"] == "too_short":
        return "none" if not value else str(detail["ctx"]["actual_length"])
    return repr(value) if isinstance(value, str | int | float | bool | None) else _kind(value)


def _kind(value: object) -> str:
    """Return what the user would call ``value``."""
    names = {dict: "a mapping", list: "a list", tuple: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")


def _expected(detail: Any) -> str:
    if detail["type"] == "missing":
        return "this field"
    if detail["type"] == "too_short":
        return f"at least {detail['ctx']['min_length']}"
    if detail["type"] == "union_tag_invalid":
        return f"one of {detail['ctx']['expected_tags']}"
    if detail["type"] in _SHAPES:
        return _SHAPES[detail["type"]]
    if detail["type"] == "extra_forbidden":
        return "one of the fields that `foreplan schema` lists"
    message: str = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    return message[:1].lower() + message[1:]


_SHAPES = {"tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping"}


def _line_of(node: yaml.Node | None, location: tuple[int | str, ...]) -> int | None:
    """Walk as far along ``location`` as the file goes; the parts that pydantic adds (union tags) are passed over."""
    if node is None:
        return None
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    node, line = value, key.start_mark.line + 1
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
