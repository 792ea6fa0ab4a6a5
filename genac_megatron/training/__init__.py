"""Training: layouts, roles, packing, log-probs, checkpoints. Prepares megatron.core for this machine."""

from genac_megatron.platform.megatron import install

install()
