"""`glm-core backend new`: writes a working package for a new backend, from which a port starts."""

from __future__ import annotations

import argparse
import keyword
import re
import shutil
import tempfile
from pathlib import Path

from glm_core.cli.options import add_json, emit


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand `new`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="write a package that passes its own conformance tests")
    new.add_argument(
        "name", metavar="NAME", help="the backend's name, a lower-case Python identifier"
    )
    new.add_argument(
        "--device",
        default="cpu",
        metavar="TYPE",
        help="torch's name for the device (default %(default)s)",
    )
    new.add_argument("--dir", metavar="DIR", help="folder to write (default glm-core-NAME)")
    add_json(new)
    new.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the package and exits 0; raises ConfigError for a name or folder that is taken."""
    for kind, text in (("backend name", args.name), ("device type", args.device)):
        require_identifier(kind, text)
    require_free(args.name)
    folder = Path(args.dir or f"glm-core-{args.name}")
    lines = write(args.name, args.device, folder)
    steps = [f"cd {folder}", "pip install -e .", f"glm-core conformance --backend {args.name}"]
    table = [f"{n:5} {folder / file}" for file, n in lines.items()]
    text = "\n".join([*table, f"{sum(lines.values()):5} lines; next: {' && '.join(steps)}"])
    emit(args, {"folder": str(folder), "lines": lines, "next": steps}, text)
    return 0


def require_identifier(kind: str, text: str) -> None:
    """Raises ConfigError unless `text` is a lower-case Python identifier; suggests one."""
    from glm_core.errors import ConfigError

    if re.fullmatch("[a-z][a-z0-9_]*", text) and not keyword.iskeyword(text):
        return
    near = re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")
    near = (
        near if re.match("[a-z]", near) and not keyword.iskeyword(near) else f"my_{near or 'npu'}"
    )
    raise ConfigError(
        f"{kind} {text!r}: must be a lower-case Python identifier (a-z, 0-9, _); e.g. {near}"
    )


def require_free(name: str) -> None:
    """Raises ConfigError where a backend has the name, or an importable package glm_core_NAME
    exists."""
    from importlib.util import find_spec

    from glm_core.backends import registry
    from glm_core.errors import ConfigError

    if name in registry.names():
        taken = ", ".join(registry.names())
        raise ConfigError(f"backend name {name!r}: taken; choose one other than {taken}")
    if find_spec(f"glm_core_{name}"):
        raise ConfigError(f"backend name {name!r}: a package glm_core_{name} is here already")


def write(name: str, device: str, folder: Path) -> dict[str, int]:
    """Writes the skeleton into a new folder, completely or not at all; returns the lines of each
    file. Raises ConfigError where the folder exists or cannot be written."""
    from string import Template

    from glm_core.cli.skeleton import FILES
    from glm_core.errors import ConfigError

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists; choose another folder with --dir")
    names = {"name": name, "device": device}
    texts = {Template(f).substitute(names): Template(t).substitute(names) for f, t in FILES.items()}
    scratch = ""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}")
        for file, text in texts.items():
            path = Path(scratch) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        Path(scratch).chmod(0o755)
        Path(scratch).replace(folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose --dir") from None
    return {file: text.count("\n") for file, text in texts.items()}
