"""Replay: what was read is kept, read again, forgotten, looked up."""
