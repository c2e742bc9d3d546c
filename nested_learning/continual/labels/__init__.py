"""Labels of texts: classifiers on the hidden states of a frozen model."""
