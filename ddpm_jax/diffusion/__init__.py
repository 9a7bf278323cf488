"""Pure functions of arrays: schedules, processes, losses, samplers and the reverse chain."""
