"""What stands in for CUDA on machines without it; with CUDA nothing here is read (platform/megatron.py)."""
