from ddpm_jax.cli import export_weights
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(export_weights.main)
