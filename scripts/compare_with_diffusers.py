from ddpm_jax.cli import compare_with_diffusers
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(compare_with_diffusers.main)
