"""The result of a run: an adapter as stock PEFT writes it, or a model as stock transformers does."""

from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ist.config import LayerCounts
from ist.training.checkpoint import gathered
from ist.training.encoding import load_tokenizer
from ist.training.files import publishing
from ist.training.job import Job

MODEL_CARD = """---
{{ card_data }}
---
{{ kind }} `{{ base }}`, by the training scripts of Importance-aware Sparse Tuning (arXiv 2410.11772).
Selection `{{ selection }}`: {{ trained }} of {{ n_layers }} layers per step, {{ steps }} steps of {{ batch }} rows.
`run.json` in the folder above has everything else.

```python
{{ loading }}
```
"""

ADAPTER_LOADING = """{registration}from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")"""

MODEL_LOADING = """from transformers import AutoTokenizer, {name}
model, tokenizer = {name}.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")"""


def save_adapter(job: Job, model: PeftModel, adapter: dict[str, Tensor], counts: LayerCounts, write: bool) -> Path:
    """output_dir/adapter as stock PEFT writes it, with a model card; whole or not there. All ranks call it.

    `adapter` has, by name, all tensors that PEFT may look for in the model's state_dict.
    """
    args, final, temporary = job.args, job.output_dir / "adapter", job.output_dir / ".saving-adapter"
    whole = gathered(adapter, write)
    if not write:
        return final
    method = model.peft_config["default"].peft_type.value
    ours = "import ist.adapters  # makes this method known to PEFT\n" if method in ("SERIES", "PARALLEL") else ""
    loading = ADAPTER_LOADING.format(registration=ours, base=args.model_name_or_path, folder=final)
    data = ModelCardData(base_model=args.model_name_or_path, library_name="peft", tags=["ist", method])
    with publishing(temporary, final):
        model.save_pretrained(temporary, state_dict=whole)
        _write_card(temporary, job, counts, data, f"A {method} adapter for", loading)
    return final


def save_model(job: Job, model: PreTrainedModel, counts: LayerCounts, write: bool) -> Path:
    """output_dir/model as stock transformers writes it, tokenizer and model card with it. All ranks call it.

    In float32, as the weights train: the saved model is the validated one.
    """
    args, final, temporary = job.args, job.output_dir / "model", job.output_dir / ".saving-model"
    whole = gathered(model.state_dict(keep_vars=True), write)
    if not write:
        return final
    wide = {id(tensor): tensor.float() if tensor.is_floating_point() else tensor for tensor in whole.values()}
    whole = {name: wide[id(tensor)] for name, tensor in whole.items()}
    # FSDP2 makes a class of its own of each that it shards, FSDP<Name>, derived from it.
    name = next(kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers"))
    loading = MODEL_LOADING.format(name=name, folder=final)
    data = ModelCardData(base_model=args.model_name_or_path, library_name="transformers", tags=["ist"])
    tokenizer = load_tokenizer(
        "model_name_or_path",
        args.model_name_or_path,
        chat_template=args.chat_template,  # the one that it was trained with
        trust_remote_code=args.trust_remote_code,
    )
    with publishing(temporary, final):
        model.save_pretrained(temporary, state_dict=whole)
        config = AutoConfig.from_pretrained(temporary, trust_remote_code=args.trust_remote_code)
        config.dtype = torch.float32
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_card(temporary, job, counts, data, "Fine-tuned from", loading)
    return final


def _write_card(folder: Path, job: Job, counts: LayerCounts, data: ModelCardData, kind: str, loading: str) -> None:
    card = ModelCard.from_template(
        data,
        template_str=MODEL_CARD,
        base=job.args.model_name_or_path,
        kind=kind,
        loading=loading,
        selection=job.args.selection,
        trained=counts.trained,
        n_layers=counts.n_layers,
        steps=job.max_steps,
        batch=job.batch_size,
    )
    # A path that is no text in this locale's encoding is no text in the card either.
    text = str(card).encode("utf-8", "backslashreplace").decode()
    (folder / "README.md").write_text(text, encoding="utf-8")
