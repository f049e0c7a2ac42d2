"""Command line: ``python -m flows COMMAND``; the commands are in `flows.commands`."""

from __future__ import annotations

import importlib
import sys

from flows.checkpoint import CheckpointError
from flows.commands import COMMANDS
from flows.integrate import IntegrationError
from flows.interrupt import Interrupted, NonFiniteLoss
from flows.loader import WorkerDied
from flows.settings import ConfigError

_LIST = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
USAGE = f"""usage: python -m flows COMMAND [options]

{_LIST}

python -m flows COMMAND --help lists the options of a command.
A first run:  python -m flows train --data digits --out runs/digits
Several processes:  torchrun --nproc-per-node N -m flows train ..."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name = arguments[0]
    if name not in COMMANDS:
        print(f"unknown command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    command = getattr(importlib.import_module(f"flows.commands.{name}"), name)
    try:
        command(arguments[1:])
    except Interrupted as stop:
        print(f"{stop}; run the same command with --resume to go on", file=sys.stderr)
        return int(stop.code or 0)
    except CheckpointError as error:
        hint = f"\n  {error.flag} {error.previous}" if error.previous else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 3
    except WorkerDied as error:
        print(f"error: {error} (--resume)", file=sys.stderr)
        return 3
    except (NonFiniteLoss, IntegrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except (ConfigError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
