"""What makes a release: one version everywhere, its notes, a wheel and an sdist that work.

CONTRIBUTING.md has the steps.
"""
