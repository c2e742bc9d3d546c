"""Hope with a head for labels in the place of one for tokens, as transformers builds it for any decoder."""

from __future__ import annotations

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from nested_learning.models.hope.pretrained_hope import HopePreTrainedModel


class _HopeClassifier(HopePreTrainedModel):
    """Base of the heads for labels; `cms_update="lm"` needs tied embeddings, which give it its logits."""

    # Their losses are means over the labels: Trainer has to divide by the steps of gradient accumulation.
    accepts_loss_kwargs = False


class HopeForSequenceClassification(GenericForSequenceClassification, _HopeClassifier):
    """Hope that classifies a text: logits [B, num_labels] from the output at its last token.

    That is the last one in the row which is not `config.pad_token_id`, on whichever side the padding is;
    without such an id a batch has one row. With `inputs_embeds` it is the last column: pad those on the left.
    """


class HopeForTokenClassification(GenericForTokenClassification, _HopeClassifier):
    """Hope that classifies each token: logits [B, T, num_labels], with dropout 0.1 before the head."""


class HopeForQuestionAnswering(GenericForQuestionAnswering, _HopeClassifier):
    """Hope that finds where an answer starts and ends: logits [B, T] each."""
