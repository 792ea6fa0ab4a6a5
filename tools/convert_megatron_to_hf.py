"""A checkpoint's role to a Hugging Face folder: `genac convert to-hf` as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the clone itself need not be installed

from genac_megatron.conversion.options import add_to_hf, run_to_hf, script

if __name__ == "__main__":
    sys.exit(script(__doc__, add_to_hf, run_to_hf))
