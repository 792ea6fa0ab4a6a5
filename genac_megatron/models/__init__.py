"""Models: families, the weight mapping, layer specs, building. Prepares megatron.core for this machine."""

from genac_megatron.platform.megatron import install

install()
