from ddpm_jax.cli import code_images
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(code_images.main)
