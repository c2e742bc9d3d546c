"""The methods that take part: models that are trained, pretrained models that learn, optimizers."""

from nested_learning.evals.methods.chunks import CHUNKS
from nested_learning.evals.methods.lstm import LSTM
from nested_learning.evals.methods.mechanism import GRID, MORE
from nested_learning.evals.methods.models import BY_DGD, CONVOLVED, MODELS
from nested_learning.evals.methods.optimizers import OPTIMIZERS
from nested_learning.evals.methods.pretrained import PRETRAINED
from nested_learning.evals.registry import register_method

for _method in (*MODELS, CONVOLVED, BY_DGD, *CHUNKS, *GRID, *MORE, LSTM, *PRETRAINED, *OPTIMIZERS):
    register_method(_method)
