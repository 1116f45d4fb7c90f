"""The default target modules of each method, by the names that architectures give them (paper, Table 9)."""

from torch import nn

# The paper's targets (Table 9), and the modules of the same roles under other names (fused, or of older architectures).
ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # through low ranks, as DeepSeek has it
)
_UP = ("up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h")
_GATE = ("gate_proj",)
_DOWN = ("down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h")
DEFAULT_TARGETS = {"lora": (*ATTENTION, *_UP, *_DOWN), "series": (*_UP, *_DOWN), "parallel": (*_UP, *_GATE)}
# Of a Mamba block. Its GPU kernels take the weights of the other projections past their modules, and so past adapters.
_STATE_SPACE = ("in_proj",)


def default_target_modules(model: nn.Module, method: str = "lora") -> list[str]:
    """The names of `DEFAULT_TARGETS` that `model` has."""
    names = [f".{name}" for name, _ in model.named_modules()]
    targets = [target for target in DEFAULT_TARGETS[method] if any(name.endswith(f".{target}") for name in names)]
    if not targets and method == "lora":
        targets = [target for target in _STATE_SPACE if any(name.endswith(f".{target}") for name in names)]
    return targets
