"""Descriptions of modules and optimizers: which memories and weights they are."""
