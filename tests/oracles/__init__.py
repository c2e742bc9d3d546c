"""Slow, plain reimplementations that the library is compared with. They import nothing from it."""
