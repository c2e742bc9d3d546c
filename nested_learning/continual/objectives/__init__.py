"""Objectives of levels beside the next token of their chunk: re-reading, closed windows, anchors."""
