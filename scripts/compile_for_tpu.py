from ddpm_jax.cli import compile_for_tpu
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(compile_for_tpu.main)
