"""Describe GPUs as XLA's compiler wants them described where none is at hand."""

from __future__ import annotations

from dataclasses import dataclass

# The version of cuDNN that the programs are for; a choice, as no library is there to ask.
CUDNN = "major: 9 minor: 10 patch: 0"


@dataclass(frozen=True)
class Gpu:
    """One GPU, with the figures of XLA's published device descriptions.

    Attributes:
      name: the driver's name of it.
      capability: its compute capability, (major, minor).
      features: the feature extension of the capability that code is generated for.
      memory: bytes.
      bandwidth: bytes/s of the memory.
      cache: bytes of the level 2 cache.
      cores: streaming multiprocessors.
      units: float32 units of each of them.
      clock: GHz.
      shared: bytes of shared memory of a multiprocessor.
      shared_a_block: bytes of it that one block of threads may ask for.
    """

    name: str
    capability: tuple[int, int]
    features: str
    memory: int
    bandwidth: int
    cache: int
    cores: int
    units: int
    clock: float
    shared: int
    shared_a_block: int

    @property
    def description(self) -> str:
        """Return the text of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_a_block}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {self.features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ {CUDNN} }}
device_description_str: "{self.name}"
"""


GPUS = {
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        features="ACCELERATED_FEATURES",
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        cache=52_428_800,
        cores=132,
        units=128,
        clock=1.98,
        shared=233_472,
        shared_a_block=232_448,
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        features="NONE",
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        cache=41_943_040,
        cores=108,
        units=64,
        clock=1.41,
        shared=167_936,
        shared_a_block=166_912,
    ),
}
