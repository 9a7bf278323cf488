from ddpm_jax.cli import compile_ahead
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(compile_ahead.main)
