"""Rates and starts for each matrix that levels write to, learned beforehand."""
