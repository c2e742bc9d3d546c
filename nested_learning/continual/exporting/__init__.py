"""Ways out: what was learned as a checkpoint or a LoRA adapter."""
