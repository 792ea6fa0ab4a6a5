"""The command line of conversions: `genac convert`, `genac inspect` and the two scripts in tools/."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import EXIT_OK, GenacError, InputError
from genac_megatron.observe.voice import one_voice

if TYPE_CHECKING:
    from genac_megatron.conversion.job import Conversion
    from genac_megatron.models.families.base import Shape

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
ROLES = ("actor", "critic")
EPILOG = """An interrupted conversion goes on where it stopped when the same command is run again; after
SIGUSR1 it ends with code 75 once the shards in work are written. Ranks that torchrun or srun started share
the work; they need to see one folder."""


def add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`convert to-megatron|to-hf`."""
    convert = commands.add_parser("convert", help="Hugging Face folders to checkpoints and back")
    directions = convert.add_subparsers(dest="direction", required=True)
    to_megatron = directions.add_parser("to-megatron", help="make a checkpoint of a folder", epilog=EPILOG)
    add_to_megatron(to_megatron)
    to_hf = directions.add_parser("to-hf", help="make a folder of a checkpoint's role", epilog=EPILOG)
    add_to_hf(to_hf)


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`inspect`."""
    inspect = commands.add_parser("inspect", help="list what is in a checkpoint")
    inspect.add_argument("checkpoint", help="a checkpoint, or a run folder: its newest")
    inspect.add_argument("--role", help="this role alone")
    inspect.add_argument("--json", action="store_true", help="as JSON")


def add_to_megatron(parser: argparse.ArgumentParser) -> None:
    """The options of Hugging Face to Megatron."""
    parser.add_argument("src", help="a Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("dst", help="the checkpoint folder to make; name it in roles.<role>.model.checkpoint")
    parser.add_argument(
        "--role",
        action="append",
        help="a role that can start from it; may be repeated, and costs no room (default: actor and critic)",
    )
    _add_common(parser)


def add_to_hf(parser: argparse.ArgumentParser) -> None:
    """The options of Megatron to Hugging Face."""
    parser.add_argument("src", help="a checkpoint, or a run folder: its newest")
    parser.add_argument("dst", help="the Hugging Face folder to make")
    parser.add_argument("--role", default="actor", help="which role of the checkpoint (default: actor)")
    parser.add_argument(
        "--merge",
        metavar="BASE",
        nargs="?",
        const="",
        help="of an adapter: merge it with the model in this folder; without one: with the base in the "
        "checkpoint, which holds it where adapters are merged into it as they train",
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("keep", "fp32", "bf16"), default="keep", help="of the weights written (keep)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, such as 500MB or 4GiB (5GB)")
    parser.add_argument("--workers", type=int, default=1, help="processes to share the work (1)")
    parser.add_argument("--assets", help="a folder with the tokenizer (and config), or builtin:tiny")
    parser.add_argument("--verify", action="store_true", help="load both sides and compare their logits")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def script(
    doc: str | None,
    add: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> int:
    """One direction as a script of its own (tools/convert_*.py); its exit code."""
    parser = argparse.ArgumentParser(description=doc, epilog=EPILOG)
    add(parser)
    try:
        return run(parser.parse_args())
    except GenacError as error:
        print(f"convert: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def run_convert(options: argparse.Namespace) -> int:
    """`genac convert`; its exit code. Raises InputError."""
    return run_to_megatron(options) if options.direction == "to-megatron" else run_to_hf(options)


def run_to_megatron(options: argparse.Namespace) -> int:
    """Hugging Face to Megatron. Raises InputError."""
    one_voice()
    from genac_megatron.conversion.assets import of_folder
    from genac_megatron.conversion.to_megatron import ToMegatron
    from genac_megatron.models.registry import shape_from_folder

    src = Path(options.src).expanduser()
    shape = shape_from_folder(src, str(src))
    assets = of_folder(src, options.assets)
    roles = tuple(dict.fromkeys(options.role or ROLES))
    job = ToMegatron(src, shape, *_common(options), assets, roles)
    job.folder.check(shape)
    assets.check(shape)
    _run(job, options)
    if options.verify:
        _verify(src, job.dst, roles[0], shape, job)
    return EXIT_OK


def run_to_hf(options: argparse.Namespace) -> int:
    """Megatron to Hugging Face. Raises InputError."""
    one_voice()
    from genac_megatron.conversion.assets import of_checkpoint
    from genac_megatron.conversion.to_hf import ToHf
    from genac_megatron.models.families.base import Shape
    from genac_megatron.observe.manifest import WEIGHTS, find_checkpoint, read_manifest

    path = find_checkpoint(Path(options.src).expanduser())
    manifest = read_manifest(path)
    roles = manifest["roles"]
    if options.role not in roles:
        what = f"it holds no role {options.role}, only {', '.join(sorted(roles))}"
        raise InputError(what, where=str(path), way_out="name one of them with --role")
    shape = Shape(**roles[options.role])
    said = manifest.get("adapters", {}).get(options.role)
    if said is not None or options.merge is not None:
        return _adapter_to_hf(options, path, shape, said)
    assets = of_checkpoint(path, options.role, options.assets).of(shape)
    job = ToHf(path / WEIGHTS, shape, *_common(options), assets, options.role)
    job.stored.check()
    assets.check(shape)
    _run(job, options)
    if options.verify:
        _verify(job.dst, path, options.role, shape, job)
    return EXIT_OK


def _adapter_to_hf(options: argparse.Namespace, path: Path, shape: Shape, said: Any) -> int:
    """Adapters as a PEFT folder, or merged with what --merge names."""
    from genac_megatron.conversion.assets import of_checkpoint, trained_from
    from genac_megatron.conversion.to_peft import Adapted, Merged, write_peft
    from genac_megatron.training.checkpoint import WEIGHTS

    if said is None:
        what = f"its {options.role} is a whole model, which --merge has nothing to merge with"
        raise InputError(what, where=str(path), way_out="leave --merge out")
    adapted = Adapted(path / WEIGHTS, options.role, shape, said)
    dst, _, _ = common = _common(options)
    _check_merge(options, path, said)
    if options.merge is None:
        for key, default in (("verify", False), ("dtype", "keep")):
            if getattr(options, key) != default:
                what = f"--{key} is of whole models, and its {options.role} is an adapter beside one"
                raise InputError(what, where=str(path), way_out=f"add --merge BASE, or leave --{key} out")
        if _rank()[0] == 0:  # it is small: others have no part of it
            write_peft(adapted, dst, trained_from(path, options.role))
            print(dst)
        return EXIT_OK
    adapted.need_language_model()
    base = Path(options.merge).expanduser() if options.merge else None
    assets = of_checkpoint(path, options.role, options.assets or (str(base) if base is not None else None))
    assets.check(shape)
    if base is not None:
        adapted.need_base(base)
    if options.verify:
        raise InputError("--verify reads whole models", where="--verify", way_out="leave it out with --merge")
    holder = options.role if base is not None else said["base_in"]
    _run(Merged(path / WEIGHTS, shape, *common, assets, holder, adapted, base), options)
    return EXIT_OK


def _check_merge(options: argparse.Namespace, path: Path, said: Mapping[str, Any]) -> None:
    """Raise InputError where what --merge says, or leaves out, is not the adapter's base."""
    moved, inside = said.get("merges", 0), said.get("base_in") is not None
    if options.merge == "" and not inside:
        what, way_out = (
            "does not hold the base of its " + options.role,
            "name that model's folder: --merge BASE",
        )
    elif options.merge and moved:
        what = f"{options.role}'s adapter is beside a base that has moved {moved} times since, and is in here"
        way_out = "give --merge without a folder"
    elif options.merge is None and moved:
        what = (
            f"{options.role}'s base has moved {moved} times: a PEFT folder would be beside no model of yours"
        )
        way_out = "give --merge without a folder: the base is in the checkpoint"
    else:
        return
    raise InputError(what, where=str(path), way_out=way_out)


def run_inspect(options: argparse.Namespace) -> int:
    """`genac inspect`; its exit code. Raises InputError."""
    one_voice()
    from genac_megatron.conversion.inspect import describe, inspect
    from genac_megatron.observe.manifest import find_checkpoint

    found = inspect(find_checkpoint(Path(options.checkpoint).expanduser()), options.role)
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return EXIT_OK


def _common(options: argparse.Namespace) -> tuple[Path, str, int]:
    return Path(options.dst).expanduser().absolute(), options.dtype, shard_bytes(options.max_shard_size)


def shard_bytes(text: str) -> int:
    """Bytes of a size such as 500MB, 4GiB or 1000000. Raises InputError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise InputError(
            f"{text!r} is no size", where="--max-shard-size", way_out="for example 500MB or 4GiB"
        )
    return max(1, int(float(match[1]) * UNITS[match[2].upper()]))


def _run(job: Conversion, options: argparse.Namespace) -> None:
    from genac_megatron.conversion.job import convert
    from genac_megatron.stages.stopping import StopFlag

    stop = StopFlag().install(signal.SIGUSR1)  # others end it at once: a shard is lost
    if options.workers < 1:
        raise InputError(f"{options.workers} workers", where="--workers", way_out="give at least 1")
    rank, ranks = _rank()
    if ranks > 1 and options.verify:
        raise InputError("--verify needs one process", where="--verify", way_out="leave it out under ranks")
    convert(job, workers=options.workers, rank=rank, ranks=ranks, quiet=options.quiet, stop=stop)
    if rank == 0:
        print(job.dst)


def _rank() -> tuple[int, int]:
    """This process's rank and their number. They do not talk, so that they need no address to meet at."""
    from genac_megatron.launch import adopt_slurm

    world = {**os.environ, **adopt_slurm({"MASTER_ADDR": "", "MASTER_PORT": "", **os.environ})}
    return int(world.get("RANK", "0")), int(world.get("WORLD_SIZE", "1"))


def _verify(hf: Path, checkpoint: Path, role: str, shape: Shape, job: Conversion) -> None:
    from genac_megatron.conversion.verify import compared, verify

    found = verify(hf, checkpoint, role, shape, job.torch_dtype)
    print(
        f"verified: {compared(shape)} differ by at most {found:.2g} of the largest",
        file=sys.stderr,
        flush=True,
    )
