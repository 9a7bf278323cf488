from ddpm_jax.cli import distill
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(distill.main)
