"""GenAC-Megatron: LLM reinforcement learning with a generative critic, on Megatron-core."""

__version__ = "0.1.0"
