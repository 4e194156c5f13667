# SPDX-License-Identifier: Apache-2.0
"""`expertyard pack`: converts a checkpoint once, so that it loads without any work ever after."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from expertyard.errors import ConfigError

EXAMPLES = """examples:
  expertyard pack ./Qwen3-30B-A3B -o ./Qwen3-30B-A3B-int4 --format int4
  expertyard pack ./Qwen3-30B-A3B -o ./Qwen3-30B-A3B-int4 --format int4-g64 --search
  expertyard pack ./Kimi-K2-Thinking -o ./Kimi-packed          keeps the experts' own int4
  expertyard pack ./model-Q4_K_M.gguf -o ./model-packed
  expertyard pack --verify ./Kimi-packed                       reads every byte again
interrupted, the same command goes on where it was; the result loads like any other model:
  expertyard run ./Kimi-packed
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `pack` command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "pack",
        help="convert a checkpoint once; it then loads without any work",
        description="Writes a checkpoint with its experts in the layout that kernels read, on the "
        "CPU and on GPUs. Such a folder loads by mapping its files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "path", metavar="PATH", help="a folder of safetensors files, quantised or not; a .gguf file"
    )
    add("-o", "--out", metavar="OUT", help="the folder to write")
    add(
        "--format",
        metavar="FORMAT",
        help="int4, int4-g32, int8, fp8, mxfp4 ... (default: the format that quantised experts "
        "have)",
    )
    add(
        "--search",
        action="store_true",
        help="quantise with the scales that have the least squared error; slower",
    )
    add(
        "--dense",
        choices=("keep", "plain"),
        default="keep",
        help="quantised layers that are no experts: keep their codes (default), or write numbers",
    )
    add(
        "--verify",
        action="store_true",
        help="compare every file of the packed folder with its hash; without -o: of PATH",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Packs, or verifies. Raises ExpertyardError."""
    if args.out is None and not args.verify:
        raise ConfigError("expertyard pack: say where to with -o OUT.")
    if args.out is None and (args.format or args.search):
        raise ConfigError("expertyard pack --verify PATH takes no --format and no --search.")
    if args.format is not None:
        from expertyard.formats import get_format

        get_format(args.format)
    from expertyard.loading.packed_folder import MANIFEST, PackedFolder, is_packed
    from expertyard.loading.progress import metered

    if args.out is None:
        folder = Path(args.path)
        if not is_packed(folder):
            raise ConfigError(f"{folder}: is no packed folder: there is no {MANIFEST} in it.")
        packed = PackedFolder(folder)
    else:
        from expertyard.cli.run import import_hf, starting

        with starting():
            import_hf(verbose=False)
            from expertyard.hf.pack import pack
        packed = pack(args.path, args.out, args.format, search=args.search, dense=args.dense)
    total = sum(file.bytes for file in packed.files.values())
    if args.verify:
        with metered(total, "Reading every byte") as meter:
            packed.verify(meter.advance)
    formats = ", ".join(sorted({layer.format for layer in packed.layers.values()}))
    if packed.matrices:
        others = ", ".join(sorted({matrix.format for matrix in packed.matrices.values()}))
        formats += f", {len(packed.matrices)} other layers in {others}"
    state = "every byte is what was packed" if args.verify else "ready"
    print(
        f"{packed.folder}: {len(packed.layers)} layers of experts in {formats}, "
        f"{total / 2**30:.2f} GiB; {state}"
    )
    return 0
