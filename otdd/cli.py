"""The `otdd` command. Nothing heavy is imported before a command has understood its flags."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otdd import joblog
from otdd.distill.config import ConfigError, RunConfig, printable, require_path
from otdd.distill.inputs.problems import DataError
from otdd.flags import Log, asks_help, flags_of, nearest, parse, value
from otdd.heap import keep_freed
from otdd.remarks import noted

ABOUT = {
    "run": "All stages: images, soft labels, students, table.",
    "sample": "Stage 1: the images of every set.",
    "relabel": "Stage 2: soft labels of teachers; --out is all it needs.",
    "train": "Stage 3: students of every set; --out is all it needs.",
    "evaluate": "Table, transport costs, pictures; --out is all it needs.",
}

TOOLS = {  # functions of otdd.tools
    "fit": "A small generator for a data set, or a DiT further (--from).",
    "fit-surrogate": "The networks of influence guidance for a data set.",
    "encode": "The latents of a data set, once.",
    "report": "A run as one HTML page, with its figures.",
    "export": "A distilled set in the format of others.",
    "push": "An exported set to the Hugging Face Hub.",
}

COMMANDS = {**ABOUT, **TOOLS, "env": "Versions, backends, why some are missing."}

LOGGED = (*ABOUT, "fit", "fit-surrogate", "encode", "report")  # they have --log

HINTS = (
    "otdd COMMAND --help: the flags of a command, with units and defaults",
    "first try: otdd run --data digits --ipc 1 --out runs/digits-ipc1",
    'completion: eval "$(otdd --print-completion bash)"   (or zsh)',
    "in fish: otdd --print-completion fish | source",
)


@dataclass(frozen=True)
class RunFlags(RunConfig):
    """Flags of the stages: the settings of a run, and how to show it."""

    config: str | None = None
    """YAML or JSON file of settings, under the flags; by default none."""
    dry_run: bool = False
    """Check everything, time some steps, print what it takes, and write nothing."""
    log: Log = "auto"
    """What is told while it works, on standard error; auto: bars on a terminal, else lines."""
    quiet: bool = False
    """The same as --log quiet."""
    debug: bool = False
    """Show the stack trace of an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with a code of `otdd.helptext.EXIT_CODES`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # terminals without some character
    keep_freed()
    sys.exit(_guarded(_with_log(arguments)))


def _with_log(arguments: list[str]) -> list[str]:
    """The arguments, with OTDD_LOG as the flag: torchrun takes `--log` for one of its own."""
    wanted, given = os.environ.get("OTDD_LOG"), value(arguments, "--log")
    shows = arguments[:1] and arguments[0] in LOGGED
    return [*arguments, "--log", wanted] if wanted and shows and given is None else arguments


def _guarded(arguments: list[str]) -> int:
    as_json = value(arguments, "--log") == "json"
    start = time.perf_counter()
    if as_json:
        from otdd import __version__

        joblog.write("start", command=arguments[0], version=__version__)
    code = _caught(arguments, as_json)
    if as_json:
        spent = round(time.perf_counter() - start, 3)
        joblog.write("end", command=arguments[0], exit_code=code, seconds=spent)
    return code


def _caught(arguments: list[str], as_json: bool) -> int:
    try:
        with noted(as_json, value(arguments, "--out")):
            try:
                return _dispatch(arguments)
            finally:
                sys.stdout.flush()  # a reader that went away is noticed here, not after the end
    except KeyboardInterrupt as stop:
        kept = str(stop) or "what is finished is kept"
        text = f"stopped; {kept}, and the same command continues from there"
        code, text = 130, ("" if as_json else "\n") + f"otdd: {text}"
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # what is still buffered has no reader
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, text = _explained(error)
    if as_json:
        joblog.write("error", "error", message=text.removeprefix("otdd: "), exit_code=code)
    else:
        sys.stderr.write(text + "\n")
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments in (["-h"], ["--help"], ["help"]):
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from otdd import __version__

        sys.stdout.write(f"otdd {__version__}\n")
        return 0
    if arguments[0] == "--print-completion":
        return _completion(arguments[1:])
    if arguments[0] in ("-h", "--help", "help"):
        arguments = [arguments[1], "--help"]
    command, flags = arguments[0], arguments[1:]
    if command in ABOUT:
        return _run(command, flags)
    if command == "env":
        return _env(flags)
    if command in TOOLS:
        from otdd import tools

        return int(getattr(tools, command.replace("-", "_"))(flags))
    if command.startswith("-"):
        raise ConfigError(f"unknown flag {command}; flags follow a command: otdd COMMAND [flags]")
    hint = nearest(command, COMMANDS) or "known: " + ", ".join(COMMANDS)
    raise ConfigError(f"unknown command {command!r}; {hint}")


def _usage() -> str:
    from otdd.helptext import exit_codes, wrapped

    rows = (wrapped(f"{name:<14} {text}", "  ", " " * 17) for name, text in COMMANDS.items())
    lines = ["usage: otdd COMMAND [flags]", "", *itertools.chain.from_iterable(rows), ""]
    for hint in HINTS:
        lines += wrapped(hint, "", "  ")
    return "\n".join([*lines, "", *exit_codes()]) + "\n"


def _run(command: str, flags: list[str]) -> int:
    base = _under_flags(command, flags)
    given = parse(RunFlags, flags, f"otdd {command}", ABOUT[command], base)
    plain = {f.name: getattr(given, f.name) for f in dataclasses.fields(RunConfig)}
    config = RunConfig(**plain)
    # Threads that spin while they wait make a busy machine ten times slower; before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given.dry_run:
        return _preview(command, config)
    from otdd.terminal import print_metrics, shown

    first = os.environ.get("RANK", "0") == "0"  # of several processes one is heard
    with shown(given.log, given.quiet or not first) as bars:
        from otdd.distill.evaluate import wants_soft
        from otdd.distill.pipeline import STAGES, run_stages

        stages = STAGES if command == "run" else (command,)
        told = _tell_stage if given.log == "json" and first else None
        metrics = run_stages(config, stages, bars, told)
    if first and given.log == "json":
        kept = {k: metrics[k] for k in ("accuracy", "ot_cost", "timings")}
        joblog.write("metrics", out=config.out, **kept)
    if first and command in ("run", "train", "evaluate"):
        print_metrics(metrics, config.out)
    elif first and command == "relabel" and not wants_soft(config):
        sys.stdout.write("nothing to relabel: no loss has soft labels; --train.losses kl does\n")
    elif first:  # there is no table yet
        sys.stdout.write(f"written to {config.out}\n")
    return 0


def _under_flags(command: str, flags: list[str]) -> dict[str, Any]:
    """Settings of the folder, over them a preset and a protocol, and over these a file."""
    from otdd.distill import settings

    file, name = value(flags, "--config"), value(flags, "--preset")
    filed = settings.load_yaml(file) if file is not None else {}
    settings.require_known(RunConfig, filed)
    out = value(flags, "--out") or filed.get("out")
    stored = {} if command == "run" else _stored(out)
    named = value(flags, "--data") is not None or "data" in filed
    homeless = command in ("relabel", "train", "evaluate") and not (stored or named)
    if homeless and not asks_help(flags):
        if not out:
            raise ConfigError(f"missing: --out (otdd {command} --help explains)")
        raise ConfigError(f"--out: there is no run in {out} (no config.json); otdd run makes one")
    ipc = value(flags, "--ipc") or filed.get("ipc", stored.get("ipc"))
    how = value(flags, "--train.protocol") or settings.named_protocol(filed)
    base = settings.merge(stored, settings.preset(name or filed.get("preset")))
    base = settings.merge(settings.merge(base, settings.protocol(how, ipc)), filed)
    if asks_help(flags):
        settings.convert_fields(RunConfig, base)
        base |= dict.fromkeys(("data", "ipc"), "that of the folder") if homeless else {}
    return base


def _tell_stage(stage: str, seconds: float | None) -> None:
    if seconds is None:
        joblog.write("stage_start", stage=stage)
    else:
        joblog.write("stage_end", stage=stage, seconds=round(seconds, 3))


def _preview(command: str, config: RunConfig) -> int:
    from otdd.distill.pipeline import STAGES
    from otdd.distill.preview import preview

    lines = preview(config, STAGES if command == "run" else (command,))
    sys.stdout.write("\n".join([*lines, "nothing was written (--dry-run)"]) + "\n")
    return 0


def _completion(shells: list[str]) -> int:
    """Print the script that teaches a shell the commands, their flags and the words they take."""
    from otdd import tools
    from otdd.completion import SHELLS, script

    if len(shells) != 1 or shells[0] not in SHELLS:
        seen = " ".join(shells) or "nothing"
        raise ConfigError(f"--print-completion: {seen} is not accepted; one of {', '.join(SHELLS)}")
    classes: dict[str, type] = dict.fromkeys(ABOUT, RunFlags)
    classes |= {name: tools.flags_class(name) for name in TOOLS}
    commands: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, cls in classes.items():
        known = {word: flag.choices() for flag in flags_of(cls) for word in flag.spellings()}
        commands[name] = {**known, "--help": ()}
    commands["env"] = {"--json": (), "--debug": (), "--help": ()}
    commands["help"] = {"": tuple(COMMANDS)}
    commands["--print-completion"] = {"": SHELLS}
    sys.stdout.write(script(shells[0], commands))
    return 0


def _env(flags: list[str]) -> int:
    unknown = [flag for flag in flags if flag not in ("--json", "--debug", "-h", "--help")]
    if unknown:
        raise ConfigError(f"unknown flag {unknown[0]}; otdd env knows --json")
    if "-h" in flags or "--help" in flags:
        sys.stdout.write("usage: otdd env [--json]\n\nversions, backends, why some are missing\n")
        return 0
    from otdd import environment

    environment.show("--json" in flags)
    return 0


def _stored(out: str | None) -> dict[str, Any]:
    """Settings of a folder, so that a stage needs no more than --out."""
    require_path(out, "out")
    if out is None or not (Path(out) / "config.json").is_file():
        return {}
    from otdd.distill.store import Store

    Store(out).sums.verify(["config.json"])
    try:
        return dict(json.loads((Path(out) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out}/config.json cannot be read: {error}") from None


def _explained(error: Exception) -> tuple[int, str]:
    """The exit code, and one line that says what is wrong."""
    if isinstance(error, ModuleNotFoundError):
        return 1, f'otdd: {error}; this command needs: pip install "otdd[distill]"'
    listing = bool(getattr(error, "problems", None))  # a `DataError` names every file in a line
    text = str(error) if listing else printable(" ".join(str(error).split()))
    code = _exit_code(error)
    if code == 1:
        return 1, f"otdd: failed: {type(error).__name__}: {text} (--debug shows where)"
    return code, f"otdd: {text}"


def _exit_code(error: Exception) -> int:
    from otdd.distill.sums import InUseError, StoreError, WriteError

    refused: list[type[Exception]] = [ConfigError, DataError, StoreError]
    loaded = sys.modules.get("otdd.distill.generator")  # which imports torch
    if loaded is not None:
        refused.append(loaded.GeneratorError)
    if isinstance(error, InUseError):
        return 3
    if isinstance(error, WriteError):
        return 4
    return 2 if isinstance(error, tuple(refused)) else 1
