"""Devices, hosts and compiled programs: the only place that names them."""

# Of several hosts. They stand here because hosts.py imports JAX, and help shows them.
START_TIMEOUT = 300  # seconds for all hosts to come; clusters start theirs minutes apart
HOST_TIMEOUT = 100  # seconds of silence after which a host counts as dead
