"""What one GPU can tell in some fifteen minutes: the steps of tools/gpu_minutes.sh, most telling first.

Each step is a process of its own (`python -m benchmarks.gpu.minutes STEP`) in a time box of the script's. It
asks the other benchmarks and the cases of tests/gpu with sizes cut to the minutes there are, and appends a
line of JSON to a file after each figure, so what ran before a stop counts. Not run on a GPU.
"""
