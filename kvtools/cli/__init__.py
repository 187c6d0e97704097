"""The command `kvtools`: what can run here, generation, samples, search, scores, caches, the demo.

An error is one line on standard error; --debug shows the traceback. A command is a file of this
folder: HELP and EXAMPLE for its help, `add` for its options, `run` for what it does. What several
need is in `options` and `output`.
"""

import argparse
import difflib
import itertools
import os
import sys
from typing import Any, NoReturn

import kvtools

from . import demo, env, generate, quality, sample, score, search
from .options import Usage, default_device, message
from .output import progress

__all__ = ["Usage", "default_device", "main", "progress"]

COMMANDS = {
    "env": env,
    "generate": generate,
    "sample": sample,
    "search": search,
    "quality": quality,
    "score": score,
    "demo": demo,
}
CODES = """\
exit codes:
  0  done
  1  it failed: a model does not load, a package is missing, a line of input is wrong
  2  the command line is wrong, and nothing has run
  130  interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads has seen enough; Python must not flush to it at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"kvtools: {message(error)}", file=sys.stderr)
        return 2 if isinstance(error, Usage) else 1
    return 0


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and name a mistyped option before others."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if self._subparsers is not None:  # what comes behind the command is the command's
            given = list(itertools.takewhile(lambda x: x.startswith("-"), given))
        for x in itertools.takewhile(lambda x: x != "--", given):
            name = x.partition("=")[0]
            if not name.startswith("--") or " " in x:
                continue
            known = list(self._option_string_actions)
            if not any(option.startswith(name) for option in known):
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.error(f"unrecognized argument: {name}{hint}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    raw = argparse.RawDescriptionHelpFormatter
    root = Parser(
        prog="kvtools", description="N continuations of one prompt for little more than one.",
        epilog=CODES, formatter_class=raw,
    )  # fmt: skip
    root.add_argument("--version", action="version", version=f"kvtools {kvtools.__version__}")
    commands = root.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, parents=[common], help=module.HELP, description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}\n\n{CODES}", formatter_class=raw,
        )  # fmt: skip
        module.add(command)
        command.set_defaults(run=module.run)
    return root
