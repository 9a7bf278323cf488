from ddpm_jax.cli import import_weights
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(import_weights.main)
