"""Runs where this package is not installed: checks exports with transformers, and prints what it found as JSON.

    python clean_check.py FOLDER

FOLDER holds `checks.json`, which names the exports and what is expected of them; tensors lie in `NAME.safetensors`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
)

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


def difference(left: Tensor, right: Tensor) -> float:
    return (left.double() - right.double()).abs().max().item()


def refused(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def check_logits(folder: Path, expected: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for flavor in ("latent", "ternary"):
        if (folder / flavor).is_dir():
            model = load(folder / flavor)
            hidden = model.model(expected["tokens"]).last_hidden_state
            pairs = (hidden, expected["logits"]), (hidden[:, -1], expected["last"])
            found[flavor] = max(difference(model.lm_head(each), logits) for each, logits in pairs)
    return found


def check_tokenizer(folder: Path, texts: dict[str, list[int]]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    wrong = [text for text, ids in texts.items() if tokenizer(text, split_special_tokens=True)["input_ids"] != ids]
    back = [text for text, ids in texts.items() if tokenizer.decode(ids, skip_special_tokens=True) != text]
    batch = tokenizer(list(texts)[:3], padding=True, return_tensors="pt")
    names = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    found = {"wrong": wrong, "back": back, "keys": sorted(batch), "names": names, "side": tokenizer.padding_side}
    if tokenizer.chat_template:
        said = [{"role": "user", "content": "né"}]
        found["chat"] = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
        found["chat_ids"] = ids
    return found


@torch.no_grad()
def check_cache(model: Any, tokens: Tensor) -> dict[str, Any]:
    """One call, several calls, and rows of other lengths with pads on the left."""
    whole = model(tokens, use_cache=False).logits
    cache, parts, sizes = None, [], []
    for part in tokens.split([1, 9, 1, tokens.shape[1] - 11], 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
        sizes.append(sum(each.numel() for layer in cache.layers for each in [layer.retained] if each is not None))
    found: dict[str, Any] = {"chunked": difference(torch.cat(parts, 1), whole), "sizes": sizes[1:]}
    found["seen"] = cache.get_seq_length()
    short = tokens[1:, :-7]
    padded = torch.cat([tokens[:1], torch.cat([torch.full((1, 7), 256), short], 1)])
    mask = torch.ones_like(padded)
    mask[1, :7] = 0
    for name, options in (("padded", {}), ("padded without cache", {"use_cache": False})):
        out = model(padded, attention_mask=mask, **options).logits
        found[name] = max(difference(out[1, 7:], model(short).logits[0]), difference(out[:1], model(tokens[:1]).logits))
    right = mask.flip(1)
    found["right"] = refused(lambda: model(padded, attention_mask=right, use_cache=True))
    # Two documents in a row, as packing has them.
    positions = torch.cat([torch.arange(20), torch.arange(tokens.shape[1] - 20)])[None]
    packed = model(tokens[:1], position_ids=positions).logits
    found["packed"] = difference(packed[:, 20:], model(tokens[:1, 20:]).logits)
    # Sums in another order: now and again an input becomes the next int8 code.
    model.config.retention_form, cache, parts = "chunkwise", None, []
    for part in tokens.split([1, 9, 1, tokens.shape[1] - 11], 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    model.config.retention_form = "auto"
    found["chunkwise"] = ((torch.cat(parts, 1) - whole).abs().mean() / whole.abs().mean()).item()
    return found


def check_generation(model: Any, folder: Path, expected: dict[str, Tensor], prompt: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    count = expected["greedy"].shape[1]
    fixed = {"max_new_tokens": count, "min_new_tokens": count}
    greedy = model.generate(**inputs, do_sample=False, **fixed)
    new = greedy[:, inputs["input_ids"].shape[1] :]
    found: dict[str, Any] = {"greedy": new.tolist()}
    found["greedy without cache"] = torch.equal(
        model.generate(**inputs, do_sample=False, use_cache=False, **fixed), greedy
    )
    longer = tokenizer([prompt, f"{prompt} and more"], padding=True, return_tensors="pt")
    batch = model.generate(**longer, do_sample=False, **fixed)
    found["greedy padded"] = torch.equal(batch[0, -count:], greedy[0, -count:])
    beams = [
        model.generate(**longer, do_sample=False, num_beams=3, use_cache=cached, **fixed).tolist()
        for cached in (True, False)
    ]
    found["beams"] = beams[0] == beams[1]
    torch.manual_seed(0)
    samples = [model.generate(**inputs, max_new_tokens=5, num_return_sequences=3, do_sample=True) for _ in range(2)]
    found["samples"] = [list(each.shape) for each in samples]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, do_sample=False, streamer=streamer, **fixed)
    found["streamed"] = "".join(streamer) == tokenizer.decode(new[0])
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipe(prompt, do_sample=False, **fixed)[0]["generated_text"]
    found["pipeline"] = text == tokenizer.decode(greedy[0], skip_special_tokens=True)
    found["assisted"] = refused(lambda: model.generate(**inputs, assistant_model=model, max_new_tokens=3))
    return found


def check_training(folder: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
    model = load(folder).train()
    tokens = expected["tokens"]
    grads = {name.removeprefix("grad."): each for name, each in expected.items() if name.startswith("grad.")}
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    found: dict[str, Any] = {"loss": difference(loss.detach(), expected["loss"])}
    largest = max(each.abs().max().item() for each in grads.values())
    found["gradient"] = max(difference(ours[name], each) for name, each in grads.items()) / largest
    found["unexpected"] = sorted(set(ours) ^ set(grads))
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    again = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["checkpointed"] = max(difference(ours[name], again[name]) for name in ours)
    model.gradient_checkpointing_disable()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    with tempfile.TemporaryDirectory() as out:
        options = {"max_steps": 2, "learning_rate": 1e-3, "report_to": [], "use_cpu": True, "save_strategy": "no"}
        arguments = TrainingArguments(output_dir=out, disable_tqdm=True, logging_strategy="no", **options)
        result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    found["trainer"] = result.training_loss
    found["unmoved"] = [name for name, each in model.named_parameters() if torch.equal(each, before[name])]
    return found


@torch.no_grad()
def check_saving(folder: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for flavor in ("latent", "ternary"):
        if not (folder / flavor).is_dir():
            continue
        with tempfile.TemporaryDirectory() as out:
            load(folder / flavor).save_pretrained(out)
            found[flavor] = difference(load(Path(out))(expected["tokens"]).logits, expected["logits"])
            base = AutoModel.from_pretrained(out, trust_remote_code=True)
            found[f"{flavor} base"] = list(base(expected["tokens"]).last_hidden_state.shape)
        half = load(folder / flavor, torch_dtype=torch.bfloat16)
        kept = {name for name, each in half.named_parameters() if each.dtype == torch.float32}
        apart = (half(expected["tokens"]).logits.float() - expected["logits"]).abs().mean()
        found[f"{flavor} bf16"] = (apart / expected["logits"].abs().mean()).item()
        found[f"{flavor} bf16 dtype"] = [str(half.dtype), "model.blocks.0.mixture.router.weight" in kept]
    return found


def check_fully(folder: Path, expected: dict[str, Tensor], check: dict[str, Any]) -> dict[str, Any]:
    model = load(folder / "latent")
    found = {
        "tokenizer": check_tokenizer(folder / "latent", check["texts"]),
        "cache": check_cache(model, expected["tokens"]),
        "generation": check_generation(model, folder / "latent", expected, check["prompt"]),
        "training": check_training(folder / "latent", expected),
        "saving": check_saving(folder, expected),
    }
    if (folder / "ternary").is_dir():
        packed = load(folder / "ternary").train()
        found["packed training"] = refused(lambda: packed(expected["tokens"], labels=expected["tokens"]))
    return found


def main(folder: Path) -> None:
    checks = json.loads((folder / "checks.json").read_text())
    found: dict[str, Any] = {
        "transformers": importlib.metadata.version("transformers"),
        "package": importlib.util.find_spec("kabrn_dist") is not None,
    }
    for name, check in checks.items():
        expected = load_file(folder / f"{name}.safetensors")
        found[name] = {"logits": check_logits(folder / name, expected)}
        if check:
            found[name] |= check_fully(folder / name, expected, check)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
