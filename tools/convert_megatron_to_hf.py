"""A checkpoint's role to a Hugging Face folder: `genac convert to-hf` as a script."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the clone itself need not be installed

from genac_megatron.conversion.options import EPILOG, add_to_hf, run_to_hf
from genac_megatron.errors import GenacError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_to_hf(parser)
    try:
        return run_to_hf(parser.parse_args())
    except GenacError as error:
        print(f"convert: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
