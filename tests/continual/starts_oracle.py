"""Gradients by rates and starts from the definition alone: one loop, one graph, one call of autograd.

The model is called as a function of its weights, with transformers' own cache. First order and exact differ
by what is cut from the graph. Nothing of the package is used but the names of slots.
"""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import DynamicCache


def with_double_norms(model):
    """The model with RMS norms that do not go through float32, so that differences can be taken of it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=1e-6, dtype=torch.float64)
                norm.weight.data.copy_(child.weight.data)
                setattr(module, name, norm)
    return model


class StartsOracle:
    """Args: the model; per level a dict of size, lr, names (of its weights), and perhaps rank, learn_down,
    clip, decay, rule; per level the starts and the logarithms of the rates by slot, leaves of the graph."""

    def __init__(self, model, levels, starts, log_rates, exact, window=10**9, overlap=1):
        self.model, self.levels, self.starts, self.log_rates = model, levels, starts, log_rates
        self.exact, self.window, self.overlap = exact, window, overlap
        self.base = {name: p.detach() for name, p in model.named_parameters()}
        self.deltas = [dict(own) for own in starts]
        self.shares = [dict.fromkeys(own, 1.0) for own in log_rates]
        self.sums = [{} for _ in levels]
        self.rules = [{} for _ in levels]
        self.losses = []

    def slots(self, level):
        """The slots that a level writes to."""
        if "rank" not in level:
            return list(level["names"])
        ends = (":down", ":up") if level.get("learn_down", True) else (":up",)
        return [name + end for name in level["names"] for end in ends]

    def weights(self, deltas):
        found = dict(self.base)
        for level, own in zip(self.levels, deltas, strict=True):
            for name in level["names"]:
                if "rank" in level:
                    found[name] = found[name] + own[name + ":up"] @ own[name + ":down"]
                elif name in own:
                    found[name] = found[name] + own[name]
        return found

    def read(self, ids, targets, cache):
        """Gradients by slot, per level, of the summed losses of `targets`, at deltas that the losses of
        earlier calls do not know."""
        if not len(ids):
            return [{} for _ in self.levels]
        own = [{s: t.view_as(t) for s, t in deltas.items()} for deltas in self.deltas]
        for level, deltas in zip(self.levels, own, strict=True):
            for slot in self.slots(level):
                if slot not in deltas:
                    deltas[slot] = torch.zeros_like(self.base[slot], requires_grad=True)
                elif not deltas[slot].requires_grad:
                    deltas[slot].requires_grad_()
        options = {"past_key_values": cache, "use_cache": True}
        logits = functional_call(self.model, self.weights(own), (ids[None],), options).logits[0]
        if not self.exact:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if targets is None:
            return []
        losses = cross_entropy(logits, targets, reduction="none")
        self.losses.append(losses)
        grads = []
        for level, deltas in zip(self.levels, own, strict=True):
            leaves = [deltas[slot] for slot in self.slots(level)]
            found = torch.autograd.grad(losses.sum(), leaves, create_graph=self.exact, retain_graph=True)
            grads.append(dict(zip(self.slots(level), found, strict=True)))
        return grads

    @sdpa_kernel(SDPBackend.MATH)  # the fused kernel has no second derivative
    def gradient(self, ids):
        """(mean loss, gradients by starts, by log rates), each a list of dicts."""
        cache, begins = DynamicCache(), 0
        sizes = [level["size"] for level in self.levels]
        ends = sorted({t for t in range(1, len(ids)) if any(t % size == 0 for size in sizes)} | {len(ids)})
        start = 0
        for end in ends:
            # a segment opens a new window where it would not fit whole, were the text to go on
            whole = min((start // size + 1) * size for size in sizes)
            if whole - begins > self.window:
                begins, cache = start - self.overlap, DynamicCache()
                self.cut()
                self.read(ids[begins : start - 1], None, cache)
            crossing = inside = [{} for _ in self.levels]
            if start:
                crossing = self.read(ids[start - 1 : start], ids[start : start + 1], cache)
            if end - start > 1:
                inside = self.read(ids[start : end - 1], ids[start + 1 : end], cache)
            for i, size in enumerate(sizes):
                for grads in (crossing, inside) if start % size else (inside,):
                    for slot, g in grads[i].items():
                        self.sums[i][slot] = self.sums[i].get(slot, 0) + g
                if end % size == 0:
                    self.write(i)
            start = end
        loss = torch.cat(self.losses).mean()
        leaves = [t for own in (*self.starts, *self.log_rates) for t in own.values() if t.requires_grad]
        found = dict(zip(map(id, leaves), torch.autograd.grad(loss, leaves, allow_unused=True), strict=True))
        by_slot = [
            [{s: found[id(t)] for s, t in own.items() if found.get(id(t)) is not None} for own in group]
            for group in (self.starts, self.log_rates)
        ]
        return float(loss.detach()), *by_slot

    def write(self, i):
        level, sums = self.levels[i], self.sums[i]
        self.sums[i] = {}
        if not self.exact:
            sums = {slot: g.detach() for slot, g in sums.items()}
        for slot in list(self.deltas[i]):
            if slot.endswith(":down"):
                continue
            self.deltas[i][slot] = self.deltas[i][slot] * (1 - level.get("decay", 0.0))
            self.shares[i][slot] = self.shares[i].get(slot, 1.0) * (1 - level.get("decay", 0.0))
        norm = torch.stack([g.square().sum() for g in sums.values()]).sum().sqrt()
        clip = level.get("clip", 1.0)
        scale = 1.0 if clip is None or float(norm.detach()) <= clip else clip / norm
        for slot, g in sums.items():
            direction = self.direction(self.rules[i].setdefault(slot, {}), g * scale, level.get("rule", "gd"))
            step = level["lr"] * self.log_rates[i][slot].exp() * direction
            self.deltas[i][slot] = self.deltas[i].get(slot, 0) - step

    def direction(self, state, g, rule):
        if rule == "gd":
            return g
        if rule == "momentum":
            state["m"] = 0.9 * state.get("m", 0) + g
            return state["m"]
        state["t"] = state.get("t", 0) + 1
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
        state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
        root = (state["v"] / (1 - 0.999 ** state["t"])).sqrt()
        return state["m"] / (1 - 0.9 ** state["t"]) / (root + 1e-8)

    def cut(self):
        """What was written so far counts in proportion to the rate; nothing else flows back."""
        for i, own in enumerate(self.deltas):
            for slot in self.slots(self.levels[i]):
                if slot in own:
                    start = self.starts[i].get(slot, torch.zeros_like(own[slot])) * self.shares[i].get(
                        slot, 1.0
                    )
                    log_rate = self.log_rates[i][slot]
                    written = (own[slot] - start).detach()
                    own[slot] = start + (log_rate - log_rate.detach()).exp() * written
            self.sums[i] = {slot: g.detach() for slot, g in self.sums[i].items()}
            self.rules[i] = {
                slot: {k: v.detach() if torch.is_tensor(v) else v for k, v in state.items()}
                for slot, state in self.rules[i].items()
            }
