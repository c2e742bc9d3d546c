"""Measurements, one command each: `python -m benchmarks.NAME`. Results go into docs/log.md."""
