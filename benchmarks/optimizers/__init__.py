"""The worth of optimizers that are memories: `python -m benchmarks.optimizers PART`, see `__main__`."""
