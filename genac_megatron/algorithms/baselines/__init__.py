"""The algorithms that a generative critic must beat (method §5): one file of tensor maths each.

Words: a batch has G prompts with N responses each; a response has T tokens. Rewards are [G, N].
"""
