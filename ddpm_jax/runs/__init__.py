"""What lies in a run directory: config, checkpoints, metrics, evaluations, curves."""
