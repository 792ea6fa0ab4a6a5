"""Benchmarks for a GPU, one command each: python -m benchmarks.gpu.training | logprobs | publication |
joint_step | memory. With --tiny the same code runs on a CPU, over gloo, with tiny shapes: that is what tests
run, and its figures say nothing. Figures of a GPU go to benchmarks/results/gpu/. None has run on a GPU yet.
"""
