"""One torch thread: the tests' tensors are tiny, and a second thread costs more than it brings."""

import torch

torch.set_num_threads(1)
