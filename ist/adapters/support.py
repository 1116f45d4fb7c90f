"""The limits of each PEFT method when layers are trained in turn, and their reasons: one table for all commands."""

from typing import Any

from peft import AdaLoraConfig, PeftConfig

# Capabilities that a method may lack: a response of each layer; weights packed in 4 bits under it; FSDP2; a gate
# for each row of a batch (the cheap probe measures its candidates one by one without).
RESPONSE, FOUR_BIT, FSDP, ROW_GATES = "a response of each layer", "4-bit weights", "FSDP2", "a gate for each row"

# Packed weights look like floats, and give errors or nonsense.
_PLAIN = "it computes with the base weights themselves, which are packed (4-bit, or another quantisation)"
# By peft_type as text: an older PEFT lacks some of them.
LIMITS: dict[str, dict[str, str]] = {
    "ADAPTION_PROMPT": {RESPONSE: "it adds prompts inside attention"},
    "POLY": {RESPONSE: "it routes whole tasks to adapters, and there are no tasks here"},
    "SHADOW": {RESPONSE: "it runs a second model in parallel with the layers"},
    "XLORA": {RESPONSE: "it mixes adapters that were trained before"},
    "LILY": {ROW_GATES: "its router takes means over all rows of a batch"},
    **{
        kind: {FOUR_BIT: _PLAIN}
        for kind in (
            *("ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "HRA"),
            *("LOHA", "LOKR", "PEANUT", "PSOFT", "SUPERTUNING"),
        )
    },
    "OSF": {
        FOUR_BIT: _PLAIN,
        FSDP: "it projects gradients by hooks on parameters, which FSDP does not run: use DDP",
    },
}
# Initialisations of LoRA, by how they begin.
_FROM_WEIGHTS = ("pissa", "olora")
_FROM_DATA = ("eva", "corda", "lora_ga")
_REPLACING = ("loftq",)


def limit(config: PeftConfig, lack: str) -> str | None:
    """The reason why a method lacks RESPONSE, FOUR_BIT, FSDP or ROW_GATES; None where it does not."""
    if config.is_prompt_learning and lack == RESPONSE:
        return "it learns a prompt"
    initialisation = str(getattr(config, "init_lora_weights", ""))
    if lack == FOUR_BIT and initialisation.startswith(_FROM_WEIGHTS):
        return _PLAIN.replace("it", f"init_lora_weights {initialisation}", 1)
    return LIMITS.get(config.peft_type.value, {}).get(lack)


def refusal(config: PeftConfig, packed: bool, sharded: bool, selection: str) -> str | None:
    """The reason why a run with this adapter is refused; None where it is served.

    Refused are methods without a response of each layer, and those that would train otherwise than their papers say.
    """
    if reason := limit(config, RESPONSE):
        return f"{reason}, so no layer has a response of its own that can be suppressed"
    if reason := _adalora(config, selection) if isinstance(config, AdaLoraConfig) else None:
        return reason
    if getattr(config, "use_asa", False):
        return "use_asa chooses itself what trains; set it to false"
    initialisation = str(getattr(config, "init_lora_weights", ""))
    if initialisation in _FROM_DATA:
        return f"init_lora_weights {initialisation} needs a pass over data first, which is not made here"
    if initialisation in _REPLACING:
        return f"init_lora_weights {initialisation} replaces the base weights, which adapter/ does not hold"
    if getattr(config, "monteclora_config", None) or getattr(config, "kasa_config", None):
        return "its training loss has a term of its own, which is not added here"
    if packed and (reason := limit(config, FOUR_BIT)):
        return reason
    return limit(config, FSDP) if sharded else None


def _adalora(config: Any, selection: str) -> str | None:
    if config.target_r >= config.init_r:
        return f"target_r {config.target_r} must be below init_r {config.init_r}, or there is no rank to take away"
    if config.deltaT < 1:
        return f"deltaT {config.deltaT} must be 1 or more"
    if not (0 < config.beta1 < 1 and 0 < config.beta2 < 1):
        return f"beta1 {config.beta1} and beta2 {config.beta2} must be between 0 and 1"
    if selection == "id3":
        return "its budget prunes what id3 keeps masked; choose another --selection"
    return None
