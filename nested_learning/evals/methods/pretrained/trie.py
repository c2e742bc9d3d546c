"""Log-probabilities of many labels after one prompt, in one forward pass.

The labels' tokens form a trie. Its nodes are read behind the prompt in the same pass: each sees the prompt
and its own ancestors and nothing else, at the position that it has in its label. So labels with a common
beginning share it, all of them share the prompt, and every score is that of the label read alone behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.context import Context


@dataclass(frozen=True)
class Trie:
    """Labels as paths of a tree of tokens. An edge leads to a token; a node is an edge that others follow.

    Attributes:
        nodes: [N] ids that have to be read; the ends of labels need not be.
        depths: [N] tokens before each node in its label.
        sees: [N, N] whether a node sees another: its ancestors and itself.
        sources: [E] position that predicts the token of an edge: 0 is the prompt's last token, i + 1 node i.
        targets: [E] id of the token of an edge.
        paths: [labels, E] 1 where the edge belongs to the label, else 0.
    """

    nodes: Tensor
    depths: Tensor
    sees: Tensor
    sources: Tensor
    targets: Tensor
    paths: Tensor

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> Trie:
        """The trie of labels, each as its ids.

        Raises:
            ValueError: no labels, one without ids, or one that begins like another and ends there: their
                probabilities are not those of exclusive events. End all labels with the same token.
        """
        edges: dict[tuple[int, ...], int] = {}  # prefix of a label: its edge
        for ids in labels:
            for end in range(1, len(ids) + 1):
                edges.setdefault(tuple(ids[:end]), len(edges))
        inner = {prefix[:-1] for prefix in edges} - {()}
        whole = {tuple(ids) for ids in labels}
        if not labels or () in whole or len(whole) < len(labels) or whole & inner:
            raise ValueError("expected at least one label, none empty, and none that another begins with")
        nodes = {prefix: i for i, prefix in enumerate(p for p in edges if p in inner)}
        sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        paths = torch.zeros(len(labels), len(edges))
        for prefix, node in nodes.items():
            sees[node, [nodes[prefix[:end]] for end in range(1, len(prefix) + 1)]] = True
        for label, ids in enumerate(labels):
            paths[label, [edges[tuple(ids[:end])] for end in range(1, len(ids) + 1)]] = 1
        return cls(
            nodes=torch.tensor([prefix[-1] for prefix in nodes], dtype=torch.long),
            depths=torch.tensor([len(prefix) - 1 for prefix in nodes], dtype=torch.long),
            sees=sees,
            sources=torch.tensor([nodes[p[:-1]] + 1 if len(p) > 1 else 0 for p in edges]),
            targets=torch.tensor([prefix[-1] for prefix in edges]),
            paths=paths,
        )

    @property
    def lengths(self) -> Tensor:
        """[labels] tokens of each label."""
        return self.paths.sum(1)

    @torch.no_grad()
    def scores(self, model: Any, prompt: Sequence[int], context: Context | None = None) -> Tensor:
        """Log-probabilities [labels] (nats, on the CPU) of the labels right behind the prompt.

        Args:
            model: a causal language model with rotary or learned positions, in evaluation mode.
            prompt: ids, at least one.
            context: keys and values of what stands before the prompt.
        """
        context = context or Context()
        before, read = len(context), len(prompt)
        ids = torch.cat([torch.tensor(prompt), self.nodes]).to(model.device)
        positions = before + torch.cat([torch.arange(read), read + self.depths]).to(model.device)
        hidden = model.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=self._mask(before, read, model.dtype).to(model.device),
            past_key_values=context.open(),
            use_cache=True,
        ).last_hidden_state[0, read - 1 :]
        logits = model.get_output_embeddings()(hidden).to(torch.promote_types(model.dtype, torch.float32))
        sources, targets = self.sources.to(model.device), self.targets.to(model.device)
        found = (logits[sources, targets] - logits.logsumexp(1)[sources]).cpu()
        return self.paths.to(found.dtype) @ found

    def _mask(self, before: int, read: int, dtype: torch.dtype) -> Tensor:
        """Additive attention mask [1, 1, read + N, before + read + N]: 0 where a token is seen."""
        nodes = len(self.nodes)
        visible = torch.ones(read + nodes, before + read + nodes, dtype=torch.bool)
        visible[:read, before:] = torch.ones(read, read + nodes).tril().bool()
        visible[read:, before + read :] = self.sees
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[
            None, None
        ]
