"""`glm-core launch`: starts a script on every slot of one host or of a hostfile, by torchrun's
API."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from glm_core.errors import ConfigError

if TYPE_CHECKING:
    from glm_core.distributed.launch import Launch


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--hostfile", metavar="FILE", help="hosts as lines 'NAME slots=N', DeepSpeed's format"
    )
    parser.add_argument("--include", default="", metavar="A@B", help="use only these hosts")
    parser.add_argument("--exclude", default="", metavar="A@B", help="use all hosts but these")
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="processes on this host (default 1)"
    )
    parser.add_argument(
        "--master-addr", default="", metavar="NAME", help="default: the first host of the hostfile"
    )
    parser.add_argument("--master-port", type=int, default=29500, metavar="PORT")
    parser.add_argument("--ssh-port", type=int, default=22, metavar="PORT")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="restarts of all processes after one has failed (default %(default)s)",
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command of every host, start nothing"
    )
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exits 0 where every process succeeded, 1 where one failed."""
    from glm_core.distributed import launch

    launched = parse_launch(args)
    if args.hostfile:
        if args.dry_run:
            lines = launch.remote_commands(launched, os.environ.items())
            print("\n".join(shlex.join(words) for words in lines))
            return 0
        launch.run_on_hosts(launched)
        return 0
    words = launch.torchrun_arguments(launched, 0)
    if args.dry_run:
        print(shlex.join(["torchrun", *words]))
        return 0
    launch.run_torchrun(words)
    return 0


def parse_launch(args: argparse.Namespace) -> Launch:
    """Returns what the options describe. Raises ConfigError for options that exclude each other."""
    from glm_core.distributed import launch

    program = [*(["-m"] if args.module else []), args.script, *args.arguments]
    if not args.module and not Path(args.script).is_file():
        raise ConfigError(f"{args.script}: no such script; for a module write -m")
    if not args.hostfile:
        if args.include or args.exclude:
            raise ConfigError("--include, --exclude: choose from a --hostfile; give one")
        hosts = [
            launch.Host("localhost", 1 if args.nproc_per_node is None else args.nproc_per_node)
        ]
    elif args.nproc_per_node is not None:
        raise ConfigError("--nproc-per-node: the hostfile's slots= set it; give one of them")
    else:
        hosts = launch.read_hostfile(Path(args.hostfile))
        hosts = launch.select_hosts(hosts, args.include, args.exclude)
    if hosts[0].slots < 1:
        raise ConfigError(f"--nproc-per-node={hosts[0].slots}: must be at least 1")
    return launch.Launch(
        hosts=tuple(hosts),
        program=tuple(program),
        address=args.master_addr or hosts[0].name,
        port=args.master_port,
        restarts=args.max_restarts,
        ssh_port=args.ssh_port,
    )
