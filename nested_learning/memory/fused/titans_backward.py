"""The backward pass of one chunk of Titans' memory; shapes and method as in titans_chunk.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.fused.scratch import Hidden, Scratch, hidden_derivatives, silu_backward_, unscale_
from nested_learning.memory.fused.titans_chunk import Decays, Saved, end_keys, ends, left_factor


class ChunkGradients(NamedTuple):
    """The gradients to what one chunk was computed from, besides the weights."""

    k: Tensor  # [M, C, d]
    v: Tensor  # [M, C, d]
    q: Tensor  # [M, C, d]
    log_rate: Tensor  # [M, C] to the logarithm of the rate
    logs: Tensor  # [2, M, C] to the logs of retention and momentum decay


class _Logs(NamedTuple):
    """Gradients to P [M, C, C], and to the cumulative logs T and U [M, C] but for what passes through P.

    The upper triangle of that to P is not used.
    """

    P: Tensor
    T: Tensor
    U: Tensor

    def add_c(self, decay: Decays, g_c: Tensor, rows: slice) -> None:
        """From the gradient to c_t = m_0 P_t0 (0 the first token) at some rows, [M, rows]."""
        self.P[:, rows, 0].addcmul_(g_c, decay.m[:, 0])
        self.U[:, 0].add_((g_c * decay.c[:, rows, 0]).sum(-1))

    def finish(self, ws: Scratch, decay: Decays) -> Tensor:
        """The gradients to the logs themselves [2, M, C]."""
        through_P = ws.mul("g_P P", self.P, decay.P)
        carried = torch.bmm(decay.alpha.mT, self.P, out=ws("carried", self.P.shape)).mul_(decay.mu).sum(-1)
        g_T = self.T.add_(through_P.sum(-1)).sub_(carried)
        g_U = self.U.sub_(through_P.sum(-2)).add_(carried)
        return torch.stack([g_T, g_U]).flip(-1).cumsum(-1).flip(-1)


def backward_chunk(
    ws: Scratch,
    saved: Saved,
    k: Tensor,
    q: Tensor,
    rate: Tensor,
    g_after: tuple[Tensor, Tensor],
    g_before: tuple[Tensor, Tensor],
    gy: Tensor,
) -> ChunkGradients:
    """From the gradients at a chunk's end to those at its start.

    Args:
        g_after: to weights, momenta and W2_init after the chunk, in the rows of R1 and R2 where those are.
        g_before: where those before the chunk go.
        gy: [M, C, d].
    """
    decay, (g_R1, g_R2), d = saved.decay, g_before, k.shape[-1]
    rows = slice(2 * d, 3 * d)  # of W2_init
    e = saved.z.shape[-1]
    g = _Logs(*(ws(name, saved.raw1.shape[:n]).zero_() for name, n in (("g_P", 3), ("g_T", 2), ("g_U", 2))))
    at_key = hidden_derivatives(ws, saved.z, saved.f)
    u = at_key.u
    g_u = _advance_backward(ws, "u", decay, u, saved.R1, g_after[0], g_R1, g)
    g_k = _advance_backward(ws, "k", decay, k, saved.R2, g_after[1], g_R2, g)
    g_R2[:, rows] = g_after[1][:, rows]

    u_q = ws.silu("u_q", saved.z_q).mul_(saved.f_q)
    g_z = _read_backward(ws, "left 1", decay, u_q, u, saved.raw1, saved.R1, g_R1, gy, g_u, g)
    g_z = silu_backward_(unscale_(ws, g_z, u_q, saved.f_q), saved.z_q)
    g_q = _read_backward(ws, "left 2", decay, q, k, saved.raw2, saved.R2, g_R2, g_z, g_k, g).add_(gy)

    g_error, g_z, log_rate = _write_backward(ws, saved, at_key, rate, g_R1, g_R2[:, 3 * d :], g_u)
    W2 = torch.add(saved.R2[:, :d], saved.R2[:, rows], out=ws("W2", (len(k), d, e)))
    g_W2 = ws.bmm(k.mT, g_z, out=ws("g_W2", W2.shape))
    g_R2[:, :d] += g_W2
    g_R2[:, rows] += g_W2
    ws.add_bmm(g_k.sub_(g_error), g_z, W2.mT)
    return ChunkGradients(g_k, g_error, g_q, log_rate, g.finish(ws, decay))


def _write_backward(
    ws: Scratch, saved: Saved, at_key: Hidden, rate: Tensor, g_R1: Tensor, g_A2: Tensor, g_u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the writes: the gradients to the error [M, C, d], to z [M, C, e] and to log rate [M, C].

    Adds that to W1 into its rows of g_R1; overwrites g_u.
    """
    u, first, second = at_key
    e, f, clip = u.shape[-1], saved.f, saved.clip
    W1, A1, g_A1 = saved.R1[:, :e], saved.R1[:, 2 * e :], g_R1[:, 2 * e :]
    across = torch.addcmul(saved.g, u, saved.along, value=-1, out=ws("across", u.shape))
    direction = ws.mul("direction", across, first).mul_(f * clip)
    dot = ws.rows_dot(direction, g_A2)
    log_rate = ws.rows_dot(A1, g_A1).addcmul_(dot, rate).squeeze(-1)
    g_gradient = torch.addcmul(g_A2, direction, dot.mul_(clip < 1), value=-1, out=direction)
    g_gradient.mul_(clip * rate)
    g_z = across.mul_(g_gradient).mul_(second)
    p = g_gradient.mul_(first).mul_(f)
    along_p = ws.rows_dot(u, p)
    dot = ws.rows_dot(p, saved.g).addcmul_(saved.along, along_p, value=-3)
    g_g = torch.addcmul(p, u, along_p, value=-1, out=second)
    g_error = ws.add_bmm(torch.mul(g_A1, rate), g_g, W1)
    ws.add_bmm(g_u, g_error, W1.mT, alpha=-1)
    g_W1 = ws.bmm(g_g.mT, saved.error, out=ws("g_W1", W1.shape))
    g_R1[:, :e] += ws.add_bmm(g_W1, u.mT, g_error, alpha=-1)
    dot.add_(ws.rows_dot(u, g_u))
    g_u.addcmul_(p, saved.along, value=-1).addcmul_(saved.g, along_p, value=-1).addcmul_(u, dot, value=-1)
    return g_error, g_z.addcmul_(g_u, first).mul_(f), log_rate


def _advance_backward(
    ws: Scratch, name: str, decay: Decays, x: Tensor, R: Tensor, g_after: Tensor, g_R: Tensor, g: _Logs
) -> Tensor:
    """Through what the end of the chunk holds: the gradient to x, a buffer.

    Sets g_R but for what reads add to it (the rows of W2_init are left alone); adds to `g`.
    """
    width, C = x.shape[-1], x.shape[1]
    gamma, c, m, P_end, M_end = ends(decay)
    W, S, A = R[:, :width], R[:, width : 2 * width], R[:, -C:]
    g_W, g_S, g_end = g_after[:, :width], g_after[:, width : 2 * width], g_after[:, : 2 * width]
    keys = end_keys(ws, x, P_end, M_end)
    g_R[:, -C:] = ws.bmm(keys, g_end, out=ws(("g_A", name), A.shape))
    g_keys = ws.bmm(A, g_end.mT, out=ws(("g_keys", width), keys.shape))
    g_ends = torch.mul(g_keys.unflatten(-1, (2, width)), x.unsqueeze(-2)).sum(-1)  # [M, C, 2]
    g_M = g_ends[..., 1] * M_end.squeeze(-1)
    g.P[:, -1].add_(g_ends[..., 0])
    g.add_c(decay, _dot(ws, S, g_W), slice(-1, None))
    g.T[:, -1:].addcmul_(_dot(ws, W, g_W), gamma[:, 0])
    g.U.sub_(g_M)[:, -1:].add_(g_M.sum(-1, keepdim=True)).addcmul_(_dot(ws, S, g_S), m[:, 0])
    torch.mul(g_W, gamma, out=g_R[:, :width])
    torch.mul(g_W, c, out=g_R[:, width : 2 * width]).addcmul_(g_S, m)
    g_x = torch.mul(g_keys[..., :width], P_end, out=ws(("g_x", name), x.shape))
    return g_x.addcmul_(g_keys[..., width:], M_end)


def _dot(ws: Scratch, a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of matrices, [M, 1]."""
    return ws.mul(("matrices", *a.shape), a, b).sum((1, 2)).unsqueeze(-1)


def _read_backward(
    ws: Scratch,
    name: str,
    decay: Decays,
    x: Tensor,
    keys: Tensor,
    raw: Tensor,
    R: Tensor,
    g_R: Tensor,
    g_o: Tensor,
    g_keys: Tensor,
    g: _Logs,
) -> Tensor:
    """Through o = left_factor(x) R: the gradient to x. Adds to g_R, g_keys and `g`."""
    width, C = x.shape[-1], raw.shape[-1]
    left = left_factor(ws, name, x, raw, decay, R.shape[1] == 3 * width + C)
    g_left = ws.bmm(g_o, R.mT, out=ws(("g_left", name), left.shape))
    ws.add_bmm(g_R, left.mT, g_o)
    g_gamma, g_c, g_scores = g_left[..., :width], g_left[..., width : 2 * width], g_left[..., -C:]
    scales = torch.mul(g_left[..., : 2 * width].unflatten(-1, (2, width)), x.unsqueeze(-2)).sum(-1)
    g.T.addcmul_(scales[..., 0], decay.gamma.squeeze(-1))
    g.add_c(decay, scales[..., 1], slice(None))
    g.P.addcmul_(g_scores, raw)
    g_scores.mul_(decay.P)
    g_x = torch.mul(g_gamma, decay.gamma).addcmul_(g_c, decay.c)
    if R.shape[1] > 2 * width + C:
        g_x.add_(g_left[..., 2 * width : 3 * width])
    ws.add_bmm(g_keys, g_scores.mT, x)
    return ws.add_bmm(g_x, g_scores, keys)
