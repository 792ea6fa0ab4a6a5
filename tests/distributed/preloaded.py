"""What the fork server of `pool` imports once, so that no rank has to."""

from genac_megatron.platform import uncollected
from genac_megatron.platform.megatron import install

install()
with uncollected():  # a rank collects garbage after every case: over all this it would take half a second
    import genac_megatron.stages.pipeline  # noqa: F401  with models, training, publication and engines
