"""Running on a Slurm cluster: placement, scripts, preflight, heartbeats. Imports no torch on the login node."""
