"""Run a command as `python -m ddpm_jax.cli train ...`, where `ddpm` is not on the path."""

from ddpm_jax.cli.main import main

if __name__ == "__main__":
    main("python -m ddpm_jax.cli")
