"""A run on a Slurm cluster: placement, batch scripts, preflight, heartbeats. No torch on the login node."""
