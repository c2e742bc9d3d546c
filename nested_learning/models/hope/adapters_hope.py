"""Default targets of adapters in Hope, for peft where it is used."""

from __future__ import annotations

import sys

# Every matrix of the blocks but the gates of the memories, which have a handful of outputs.
TARGETS = [
    *("in_proj", "gate_proj", "out_proj", "q_proj", "k_proj", "v_proj", "qkv_proj"),
    *("recall_proj", "recall_out", "attention_out", "up", "gate", "down"),
]


def tell_peft(model_type: str) -> None:
    """Enter the modules that an adapter takes by default, for `LoraConfig(task_type="CAUSAL_LM")`.

    peft has a table for each kind of adapter (here those that change matrices as LoRA does, and IA3) and no
    way for a library to add to them. This is called where peft asks a model for its configuration as a dict,
    which is before it looks there, whichever of the two was imported first; where peft is not imported it
    does nothing.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    for name, table in vars(constants).items():
        if name.endswith("_IA3_FEEDFORWARD_MODULES_MAPPING"):
            table.setdefault(model_type, ["down"])
        elif name.endswith("_MODULES_MAPPING") and ("_IA3_" in name or table.get("llama") == lora):
            table.setdefault(model_type, list(TARGETS))
