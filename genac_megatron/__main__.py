"""`python -m genac_megatron` is `genac`."""

from genac_megatron.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
