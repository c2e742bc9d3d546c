"""The exact recurrence of one linear memory, token by token and chunk by chunk (README.md beside this file).

S_t = mu_t S_{t-1} + a_t x_t^T                        (S_t = a_t x_t^T without log_mu)
W_t = W_init + alpha_t (W_{t-1} - W_init) - erase_t (W_{t-1} x_t) x_t^T + write_t S_t
o_t = W_t q_t
"""

from nested_learning.ops.delta_rule.chunk import Chunk, Decay, chunked
from nested_learning.ops.delta_rule.naive import naive, step
from nested_learning.ops.delta_rule.one_token import OneToken

__all__ = ["Chunk", "Decay", "OneToken", "chunked", "naive", "step"]
