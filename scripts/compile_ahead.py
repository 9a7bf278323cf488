from ddpm_jax.cli.run import run_named

if __name__ == "__main__":
    run_named("compile_ahead")
