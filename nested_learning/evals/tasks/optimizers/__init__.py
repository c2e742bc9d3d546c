"""Tasks `optimizers-…`: the paper's claims about optimizers that are memories."""

from nested_learning.evals.tasks.optimizers.digits import DigitsTask
from nested_learning.evals.tasks.optimizers.language import HopeLanguageTask, TransformerLanguageTask
from nested_learning.evals.tasks.optimizers.orthogonal import OrthogonalTask
from nested_learning.evals.tasks.optimizers.regression import RegressionTask
from nested_learning.evals.tasks.optimizers.toy import ToyTask

__all__ = [
    "DigitsTask",
    "HopeLanguageTask",
    "OrthogonalTask",
    "RegressionTask",
    "ToyTask",
    "TransformerLanguageTask",
]
