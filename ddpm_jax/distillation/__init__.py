"""Progressive distillation: students that sample in half the steps of their teacher."""
