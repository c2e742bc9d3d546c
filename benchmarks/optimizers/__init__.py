"""What optimizers that are memories are worth: `python -m benchmarks.optimizers PART`, see `__main__`."""
