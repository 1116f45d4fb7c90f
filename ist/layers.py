"""Which modules are the decoder layers, and which adapter modules and parameters each of them holds.

Layers are found by structure: the ModuleList whose members contain the injected PEFT modules, or, in a model without
PEFT, parameters that train. No table of class names.
"""

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ist.config import ConfigError


def text_decoder(model: nn.Module) -> nn.Module:
    """The decoder by transformers' get_decoder, down to the innermost: the language model's in a larger model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
    return decoder if inner is decoder else text_decoder(inner)


def outside_decoder(model: nn.Module) -> list[str]:
    """Paths of the outermost lists of modules that are not part of the decoder: encoders, vision and audio towers."""
    decoder = text_decoder(model)
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return [path for path in outermost if not _within(decoder, model, path)]


def _enclosing_layer(model: nn.Module, name: str) -> tuple[str, int] | None:
    """(path of the outermost ModuleList around the module `name`, position in it); None where there is none."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        path = ".".join(parts[:i])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path, int(parts[i])
    return None


def _within(stack: nn.Module, model: nn.Module, path: str) -> bool:
    """Whether the list of layers at `path` of `model` is part of `stack`."""
    layers = model.get_submodule(path)
    return any(module is layers for module in stack.modules())


def _chosen_lists(model: nn.Module, lists: set[str], stack: str) -> list[str]:
    """Of the lists of layers that hold adapters, those of the decoder, of the encoder, or one of each.

    The text decoder of a vision-language model is its decoder; lists in its towers are never chosen from.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = text_decoder(base)
    encoder = base.get_encoder() if hasattr(base, "get_encoder") else base
    in_decoder = [path for path in sorted(lists) if _within(decoder, model, path)]
    in_encoder = [path for path in sorted(lists) if encoder is not base and _within(encoder, model, path)]
    if stack != "decoder" and encoder is base:
        raise ConfigError(f"`layer_stack={stack}`: the model has no encoder.", "layer_stack")
    chosen = {"decoder": [in_decoder], "encoder": [in_encoder], "both": [in_encoder, in_decoder]}[stack]
    if any(len(paths) != 1 for paths in chosen):
        raise ConfigError(
            f"`layer_stack={stack}` asks for one list of layers with adapters in each stack; they sit in "
            f"{', '.join(sorted(lists))}. Choose another stack, or `target_modules` in one list.",
            "layer_stack",
        )
    return [paths[0] for paths in chosen]


def _tuners_by_layer(model: nn.Module, stack: str) -> dict[tuple[str, int], list[BaseTunerLayer]]:
    """{(path of a list of layers, position in it): adapter modules}, in the order of the model.

    Of a model without an adapter the layers that have parameters which train, with empty lists.

    Raises:
        ConfigError: there are none.
    """
    tuners: dict[tuple[str, int], list[BaseTunerLayer]] = {}
    last_tuner = None
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or (last_tuner and name.startswith(f"{last_tuner}.")):
            continue
        last_tuner = name
        if (layer := _enclosing_layer(model, name)) is not None:
            tuners.setdefault(layer, []).append(module)
    plain = last_tuner is None and not hasattr(model, "peft_config")
    if plain:
        names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        tuners = {layer: [] for name in names if (layer := _enclosing_layer(model, name)) is not None}
        # Some decoders have more lists than that of their layers (Gemma 3n, XLM): the config has the number of layers.
        depth = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
        deep = [key for key in tuners if len(model.get_submodule(key[0])) == getattr(depth, "num_hidden_layers", 0)]
        tuners = {key: [] for key in deep} if deep and stack == "decoder" else tuners
    if not tuners:
        raise ConfigError(
            f"the model has no layer list: no {'parameter that trains' if plain else 'adapter module'} sits inside "
            "a torch.nn.ModuleList of decoder layers, so there is nothing to choose layers from. Check "
            "`target_modules` and the model's architecture."
        )
    return tuners


class LayerMap:
    """The decoder layers that carry adapters, in order; of a model without PEFT, those with parameters that train.

    Build it after `accelerator.prepare` (on the unwrapped model): sharding replaces parameters.

    A parameter that several layers share (VB-LoRA's vector bank) belongs to none of them, as one outside the layers.

    Args:
        stack: "decoder", "encoder" or "both": the lists that layers are chosen from. Other lists are outside.

    Attributes:
        names: [N_L] module path of each layer, e.g. "base_model.model.model.layers.0".
        blocks: [N_L] the layers themselves.
        all_blocks: [L] the lists that they were chosen from, whole: with layers that carry no adapter.
        positions: [N_L] where in all_blocks each layer stands.
        modules: [N_L] lists of the layer's tuner modules (outermost ones); empty without PEFT.
        parameters: [N_L] lists of the layer's trainable parameters, as they were when the map was built.
        outside: names of the trainable parameters of no layer: on the embeddings or the head, or shared.
        shared: those of `outside` that several layers share.
        n_scalars: entries of all trainable parameters together.

    Raises:
        ConfigError: no adapter module sits inside a list of layers, or in more than one list of a stack; or a layer
            has no trainable parameters of its own.
    """

    def __init__(self, model: nn.Module, stack: str = "decoder") -> None:
        tuners = _tuners_by_layer(model, stack)
        chosen = _chosen_lists(model, {path for path, _ in tuners}, stack)
        keys = sorted((key for key in tuners if key[0] in chosen), key=lambda key: (chosen.index(key[0]), key[1]))
        self.names = [f"{path}.{position}" for path, position in keys]
        self.blocks = [model.get_submodule(name) for name in self.names]
        self.all_blocks = [block for path in chosen for block in model.get_submodule(path)]
        order = {id(block): i for i, block in enumerate(self.all_blocks)}
        self.positions = [order[id(block)] for block in self.blocks]
        self.modules = [tuners[key] for key in keys]
        self.parameters: list[list[nn.Parameter]] = [[] for _ in keys]
        self.outside: list[str] = []
        self.shared: list[str] = []
        index = {name: i for i, name in enumerate(self.names)}
        owners: dict[nn.Parameter, set[int | None]] = {}
        first_name: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                layer = _enclosing_layer(model, name)
                owners.setdefault(parameter, set()).add(index.get(f"{layer[0]}.{layer[1]}") if layer else None)
                first_name.setdefault(parameter, name)
        for parameter, layers in owners.items():
            owner = next(iter(layers)) if len(layers) == 1 else None
            if owner is not None:
                self.parameters[owner].append(parameter)
            else:
                self.outside.append(first_name[parameter])
                if len(layers) > 1:
                    self.shared.append(first_name[parameter])
        self.n_scalars = sum(parameter.numel() for parameter in owners)
        if not all(self.parameters) and not self.shared:
            raise ConfigError("some layers are frozen: let all of them train before layers are chosen.")
        if not all(self.parameters):
            raise ConfigError(
                "the adapter's trainable parameters are shared between layers and some layer has none of its own, so "
                "no layer can rest while another trains. Use another method."
            )

    @property
    def n_layers(self) -> int:
        return len(self.names)

    def tuners_outside(self, kept: Iterable[int]) -> list[BaseTunerLayer]:
        """The tuner modules of every layer but `kept`."""
        kept = set(kept)
        return [module for i, modules in enumerate(self.modules) if i not in kept for module in modules]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """All that the adapters of a PEFT model add to its state_dict, by name: parameters and saved buffers.

    Buffers too: AdaLoRA's rank numbers, SHiRA's indices. A tensor that layers share has an entry for each of its names.
    """
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        wrapped = "model." if isinstance(module, BaseTuner) else "base_layer."
        if isinstance(module, (BaseTuner, BaseTunerLayer)):
            for key, tensor in module.state_dict(prefix=f"{path}.", keep_vars=True).items():
                if not key.startswith(f"{path}.{wrapped}"):
                    state[key] = tensor
    return state


def drop_input_grad_hooks(model: nn.Module) -> None:
    """Remove the hooks by which gradient checkpointing makes the embedding's output require gradients.

    transformers and PEFT add one such hook each and leak them; they exist for reentrant checkpointing. With them the
    backward runs through every layer below the lowest trained one, for nothing.
    """
    embedding = model.get_input_embeddings()
    for key, hook in list(embedding._forward_hooks.items()):
        if "make_inputs_require_grad" in getattr(hook, "__name__", ""):
            del embedding._forward_hooks[key]
