"""``certs init``, ``certs issue`` and ``certs rotate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from executor.certificates import Certificate

__all__ = ["register"]

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the authority.")]
Days = Annotated[int, typer.Option(help="How long it is valid.", min=1)]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    certs = typer.Typer(
        name="certs", help="Certificates for agents, gateways, operators and clients.", no_args_is_help=True
    )
    command(certs, "init")(init)
    command(certs, "issue")(issue)
    command(certs, "rotate")(rotate)
    app.add_typer(certs)


def init(out: Output, folder: Folder, days: Days = 3650) -> None:
    """Make a certificate authority: ca.pem for everybody, ca-key.pem for nobody else."""
    from executor.certificates import init_authority

    _tell(out, (init_authority(folder, days=days),))


def issue(
    out: Output,
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the node, gateway, person or program.")],
    role: Annotated[str, typer.Option(metavar="ROLE", help="operator, gateway, agent or client.")],
    host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Name or address at which it serves; repeat for each.")
    ] = None,
    days: Days = 90,
    replace: Annotated[bool, typer.Option("--replace", help="Let one of that name, and its key, give way.")] = False,
) -> None:
    """Issue a certificate and its key; the role in it says what its holder may do."""
    from executor.certificates import issue as make
    from executor.roles import Role
    from plans.errors import InvalidInput

    if role not in set(Role):
        raise InvalidInput.of(f"one of {', '.join(Role)}", field="--role", found=repr(role))
    _tell(out, (make(folder, name, Role(role), hosts=host or (), days=days, replace=replace),))


def rotate(
    out: Output,
    folder: Folder,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Which; all when left out.")] = None,
    authority: Annotated[
        bool, typer.Option("--ca", help="The authority instead; the old one stays trusted while it is needed.")
    ] = False,
    days: Annotated[int | None, typer.Option(help="How long they are valid; 90, and 3650 for the authority.")] = None,
) -> None:
    """Replace certificates and keys; running processes take the new files up by themselves."""
    from executor.certificates import rotate as renew
    from executor.certificates import rotate_authority
    from plans.errors import InvalidInput

    if authority and names:
        expected = "no names with --ca, which replaces the authority alone"
        raise InvalidInput.of(expected, field="NAME", found=", ".join(names))
    if authority:
        _tell(out, (rotate_authority(folder, days=3650 if days is None else days),))
        out.note("now copy ca.pem to every process, and then replace the certificates: `foreplan certs rotate`")
    else:
        _tell(out, renew(folder, names or (), days=90 if days is None else days))
        out.note("now copy the certificates and keys to their processes, which take them up by themselves")


def _tell(out: Output, certificates: tuple[Certificate, ...]) -> None:
    rows = [
        {
            "name": one.name,
            "role": one.role.value if one.role else "",
            "hosts": list(one.hosts),
            "expires": one.expires.isoformat(timespec="seconds"),
            "certificate": str(one.path),
        }
        for one in certificates
    ]
    out.result({"certificates": rows})
    out.table(
        ["name", "role", "hosts", "expires", "certificate"],
        [
            [one["name"], one["role"] or None, ", ".join(one["hosts"]) or None, one["expires"], one["certificate"]]
            for one in rows
        ],
    )
