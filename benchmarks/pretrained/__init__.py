"""Pretrained models that keep learning, measured: facts, class-incremental intents, new languages, speed."""
