"""Engines: ways to run a system of memories over tokens, each with `can_run` and `run`; see engine.py."""
