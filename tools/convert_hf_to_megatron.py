"""A Hugging Face folder to a checkpoint: `genac convert to-megatron` as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the clone itself need not be installed

from genac_megatron.conversion.options import add_to_megatron, run_to_megatron, script

if __name__ == "__main__":
    sys.exit(script(__doc__, add_to_megatron, run_to_megatron))
