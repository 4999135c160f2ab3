"""A LoRA adapter of random weights, in the files that training leaves."""

import json
from pathlib import Path
from typing import Any, Final

_SEED: Final = 7
_HIDDEN: Final = 128
_LAYERS: Final = 2
# What LLaMA-Factory and ms-swift write beside PEFT's own files.
_LEFT_BY_TRAINING: Final = ("README.md", "trainer_state.json", "train_results.json", "args.json", "training_args.bin")


def make_tiny_adapter(
    folder: Path, *, rank: int = 8, hidden: int = _HIDDEN, layers: int = _LAYERS, **config: Any
) -> Path:
    """An adapter for the tiny Llama of the tests; `hidden` and `layers` make it one for another model."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/training/machine/tiny-llama",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written), encoding="utf-8")
    random = torch.Generator().manual_seed(_SEED)
    tensors = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=random)
            tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, rank, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    for name in _LEFT_BY_TRAINING:
        (folder / name).write_text("{}", encoding="utf-8")
    return folder
