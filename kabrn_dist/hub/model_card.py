"""The model card of an export: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from kabrn_dist.config import ModelConfig
from kabrn_dist.hub.tensors import Flavor
from kabrn_dist.hub.training_record import TrainingRecord, TrainingText

_CITATIONS = """```bibtex
@software{mixkabrn,
  title = {MixKABRN: Mixtures of Kolmogorov-Arnold Bit Retentive Networks}
}
@article{sun2023retentive,
  title = {Retentive Network: A Successor to Transformer for Large Language Models},
  author = {Sun, Yutao and Dong, Li and Huang, Shaohan and Ma, Shuming and Xia, Yuqing and Xue, Jilong and
            Wang, Jianyong and Wei, Furu},
  journal = {arXiv:2307.08621}, year = {2023}
}
@article{liu2024kan,
  title = {KAN: Kolmogorov-Arnold Networks},
  author = {Liu, Ziming and Wang, Yixuan and Vaidya, Sachin and Ruehle, Fabian and Halverson, James and
            Solja{\\v{c}}i{\\'c}, Marin and Hou, Thomas Y. and Tegmark, Max},
  journal = {arXiv:2404.19756}, year = {2024}
}
@article{ma2024era,
  title = {The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits},
  author = {Ma, Shuming and Wang, Hongyu and Ma, Lingxiao and Wang, Lei and Wang, Wenhui and Huang, Shaohan and
            Dong, Li and Wang, Ruiping and Xue, Jilong and Wei, Furu},
  journal = {arXiv:2402.17764}, year = {2024}
}
```
"""


class CardFacts(NamedTuple):
    """What a model card says.

    Attributes:
        name: Of the model.
        model: Its configuration.
        step: Optimizer steps of the weights.
        tokens: Tokens that it was trained on; a token counts as often as it was read.
        parameters: Number of its parameters.
        num_bytes: Bytes of all tensors.
        flavor: Of the tensors.
        lam: How far its matrices are quantized.
        record: What is known about its training.
        license: Identifier of its license, such as "mit"; empty if none was given.
        has_template: Whether there is a chat template.
    """

    name: str
    model: ModelConfig
    step: int
    tokens: int
    parameters: int
    num_bytes: int
    flavor: Flavor
    lam: float
    record: TrainingRecord
    license: str
    has_template: bool


def write_card(facts: CardFacts) -> str:
    """Return the content of README.md."""
    sections = [
        f"# {facts.name}",
        _describe_model(facts),
        _explain_loading(facts),
        _list_figures(facts),
        _list_data(facts.record.sources),
        _list_limits(facts),
        f"## Cite\n\n{_CITATIONS}",
    ]
    front = yaml.safe_dump(make_card_metadata(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(section.strip() for section in sections if section) + "\n"


def make_card_metadata(facts: CardFacts) -> dict[str, Any]:
    """Return the metadata at the beginning of the card."""
    metadata: dict[str, Any] = {"license": facts.license} if facts.license else {}
    languages = sorted({tag for source in facts.record.sources for tag in source.languages if len(tag) in (2, 3)})
    if languages:
        metadata["language"] = languages
    tags = ["mixkabrn", "retnet", "kan", "mixture-of-experts", "custom_code"]
    tags += ["bitnet", "ternary"] if facts.model.quantize else []
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    results = _list_results(facts)
    if results:
        metadata["model-index"] = [{"name": facts.name, "results": results}]
    return metadata


def _list_results(facts: CardFacts) -> list[dict[str, Any]]:
    record, task = facts.record, {"type": "text-generation", "name": "Text Generation"}
    results = []
    named = (
        ("validation/loss", "loss", "Loss in nats per token"),
        ("validation/bits_per_byte", "bpb", "Bits per byte"),
    )
    metrics = [
        {"type": kind, "name": name, "value": round(record.figures[key], 4)}
        for key, kind, name in named
        if key in record.figures
    ]
    if metrics:
        dataset = {"name": "validation split of the training data", "type": "validation"}
        results.append({"task": task, "dataset": dataset, "metrics": metrics})
    for name in dict.fromkeys(score.task for score in record.scores):
        scores = [score for score in record.scores if score.task == name]
        metrics = [{"type": s.metric, "name": s.metric, "value": round(s.value, 4)} for s in scores]
        results.append({"task": task, "dataset": {"name": name, "type": name}, "metrics": metrics})
    return results


def _describe_model(facts: CardFacts) -> str:
    model, experts = facts.model, facts.model.experts
    mixers = f"{model.layers.count('R')} of retention" if "R" in model.layers else ""
    if "A" in model.layers:
        mixers += f"{' and ' if mixers else ''}{model.layers.count('A')} of softmax attention"
    if facts.flavor == "ternary":
        weights = "packed ternary codes of two bits and their scales, to run; they cannot be trained"
    elif model.quantize:
        weights = "latent weights, which the model rounds to ternary codes itself and which can be trained"
    else:
        weights = "plain weights"
    return f"""A Mixture of Kolmogorov-Arnold Bit Retentive Networks, trained with MixKABRN: a causal language model
whose retention layers keep a state of one size at any length.

- {facts.parameters:,} parameters, {facts.num_bytes:,} bytes of tensors: {weights}.
- {len(model.layers)} layers of width {model.hidden_size}: {mixers}, {model.retention.num_heads} heads each.
- Feed-forwards: `{experts.type}` experts; {len(model.moe_layers)} layers have {experts.num_experts} routed experts, of
  which a token visits {experts.top_k}, and {experts.num_shared_experts} shared.
- Step {facts.step:,}, {facts.tokens:,} tokens read in training. A vocabulary of {model.vocab_size:,} rows."""


def _explain_loading(facts: CardFacts) -> str:
    chat = ""
    if facts.has_template:
        chat = """
The tokenizer has a chat template: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
"""
    return f"""## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{facts.name}"  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

It needs torch and transformers 4.57 or newer; `modeling_mixkabrn.py` is all of the model's code. Texts begin with the
document token, which the tokenizer puts in front. In fp32 on a CPU the logits are those of the trainer's package.
{chat}"""


def _list_figures(facts: CardFacts) -> str:
    record, lines = facts.record, ["## Measured", ""]
    if "validation/loss" in record.figures:
        text = f"- Validation at step {record.figures_step:,}: {record.figures['validation/loss']:.4f} nats per token"
        if "validation/bits_per_byte" in record.figures:
            text += f", {record.figures['validation/bits_per_byte']:.4f} bits per byte"
        if "validation/gzip_bits_per_byte" in record.figures:
            text += f" (gzip -9 on the same texts: {record.figures['validation/gzip_bits_per_byte']:.4f})"
        lines.append(text + ".")
    if record.scores:
        lines += ["", "| task | metric | value | standard error | examples |", "|---|---|---:|---:|---:|"]
        for score in record.scores:
            stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
            examples = "" if score.examples is None else f"{score.examples:,}"
            lines.append(f"| {score.task} | {score.metric} | {score.value:.4f} | {stderr} | {examples} |")
    return "\n".join(lines) if len(lines) > 2 else "## Measured\n\nNothing was recorded beside this step."


def _list_data(sources: list[TrainingText]) -> str:
    if not sources:
        return "## Training data\n\nThe shards were not at hand when this card was written."
    lines = [
        "## Training data",
        "",
        "| source | reader | documents | bytes of text | license |",
        "|---|---|---:|---:|---|",
    ]
    for each in sources:
        known = each.license or "not recorded"
        lines.append(f"| {each.name} | {each.kind} | {each.documents:,} | {each.text_bytes:,} | {known} |")
    return "\n".join(lines)


def _list_limits(facts: CardFacts) -> str:
    license_line = "" if facts.license else "\n- No license was given: ask its authors before you use it."
    warmed = (
        "" if facts.lam in (0.0, 1.0) else f"\n- Its quantization was still being warmed up ({facts.lam:.2f} of 1)."
    )
    return f"""## Limits

- It continues text as its training data did, and can be wrong, biased or harmful. Nobody has tested it for any use.
- States cannot go back: no assisted generation, and no cropping of a cache.{warmed}{license_line}"""
