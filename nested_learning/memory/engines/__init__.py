"""Engines: what runs a system of memories over a sequence."""
