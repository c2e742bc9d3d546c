"""The commands' runs have blank plots too."""

from tests.training.conftest import blank_plots  # noqa: F401 - a fixture
