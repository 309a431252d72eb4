"""Adapters on models in memory: the trained model's codes and logits, and the base's own bits without them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kabrn_dist.adapters.adapter import Adapter, CodePatch, LowRankFactors, StateFactors
from kabrn_dist.adapters.folder import read_adapter, write_adapter
from kabrn_dist.inference.adapters import ModelAdapters, hash_model_codes, set_adapters
from kabrn_dist.inference.code_patches import list_matrices, patch_packed, patch_packed_naive
from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.frozen_codes import freeze_codes
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.make_adapter import collect_adapter
from kabrn_dist.inference.run import Run
from kabrn_dist.model.adapter import AdapterSpec, adapter_parameters, add_adapter, freeze_base
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.retention import Retention
from kabrn_dist.ops.low_rank import LowRank, LowRankModule
from kabrn_dist.ops.packing import pack
from kabrn_dist.runtime.file_plan import Packing
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.pack import pack_folder
from kabrn_dist.runtime.patch_file import hash_file_codes
from kabrn_dist.utils.errors import UserError
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.patched_models import make_patched_models
from tests.support.runs import make_shards, run_command, torchrun_command, write_small_config


def logits(model: MixKABRN) -> Tensor:
    tokens = torch.arange(24)[None] * 7 % 256
    with torch.no_grad():
        return model.decode(tokens, torch.zeros_like(tokens), torch.arange(24)[None], None)[0]


@pytest.mark.parametrize("kind", [kind for kind in MODEL_KINDS if not kind.startswith("plain")])
def test_a_patch_makes_the_trained_model_and_leaves_no_trace(kind: str) -> None:
    models = make_patched_models(*MODEL_KINDS[kind])
    base, adapter = models.base, models.adapter
    before = logits(base)
    set_adapters(base, [(adapter, 1)])
    assert hash_model_codes(base) == adapter.info.result_sha256
    assert torch.equal(logits(base), logits(models.trained)) and not torch.equal(logits(base), before)
    # Attached once more, it is not there twice.
    set_adapters(base, [(adapter, 1)])
    assert torch.equal(logits(base), logits(models.trained))
    set_adapters(base, [])
    assert torch.equal(logits(base), before) and hash_model_codes(base) == adapter.info.base_sha256
    assert all(not module.sources for module in base.modules() if hasattr(module, "sources"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_codes_stay_frozen(when: str) -> None:
    models = make_patched_models()
    base = models.base
    before = logits(base)
    if when == "before":
        freeze_codes(base)
    adapters = ModelAdapters(base)
    adapters.set([(models.adapter, 1)])
    if when == "after":
        freeze_codes(base)
    assert torch.equal(logits(base), logits(models.trained))
    assert are_kept(base)
    adapters.set([])
    assert torch.equal(logits(base), before) and are_kept(base)
    adapters.set([(models.adapter, 1)])
    assert torch.equal(logits(base), logits(models.trained)) and are_kept(base)


def are_kept(model: MixKABRN) -> bool:
    """Whether the model has its codes ready and does not find them anew in every pass."""

    def read() -> list[Tensor | None]:
        matrices = list_matrices(model).values()
        return [each.int8_codes if each.wide_codes is None else each.wide_codes for each in matrices]

    return all(first is not None and first is second for first, second in zip(read(), read(), strict=True))


def test_packed_codes_are_patched_where_they_lie() -> None:
    random = np.random.default_rng(0)
    for count, share in ((64 * 11 + 13, 0.3), (64 * 40, 1.0), (5, 0.5), (700, 0.0)):
        packed = pack(torch.from_numpy(random.integers(-1, 2, count).astype(np.int8)))
        places = np.flatnonzero(random.random(count) < share)
        steps = random.integers(1, 3, len(places)).astype(np.uint8)
        before = packed.clone()
        assert torch.equal(patch_packed(packed, places, steps), patch_packed_naive(packed, places, steps))
        assert torch.equal(packed, before)


def change(adapter: Adapter, name: str, patch: CodePatch) -> Adapter:
    return replace(adapter, patches=adapter.patches | {name: patch})


def test_an_adapter_that_does_not_fit_is_refused_and_the_model_stays() -> None:
    models = make_patched_models()
    base, adapter, name = models.base, models.adapter, "blocks.1.mixture.routed.down"
    before, patch, info = logits(base), models.adapter.patches["blocks.1.mixture.routed.down"], models.adapter.info
    other = replace(adapter, info=replace(info, base_sha256="7" * 64))
    found = f"sha256 {info.base_sha256[:12]}…, and adapter 'between' is for those of 777777777777…; name the model"
    for given, message in (
        ([(other, 1.0)], found),
        ([(adapter, 0.5)], "with weight 1"),
        ([(adapter, 1.0), (adapter, 1.0)], "a model takes one, with weight 1"),
        ([(change(adapter, "blocks.7.mixture.routed.down", patch), 1.0)], "no parameter of this model"),
        ([(change(adapter, "embedding.weight", patch), 1.0)], "no parameter of this model"),
        ([(change(adapter, name, patch._replace(shape=(4, 20, 40))), 1.0)], "in the adapter (4, 20, 40)"),
        ([(change(adapter, name, patch._replace(base_scales=patch.scales * 2)), 1.0)], "other scales"),
    ):
        with pytest.raises(UserError) as error:
            set_adapters(base, given)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert torch.equal(logits(base), before)


SPECS = {
    "lora": AdapterSpec("lora", 4, 8.0, ("mixer", "shared", "routed", "router", "head")),
    "ternary_lora": AdapterSpec("ternary_lora", 3, 10.0, ("mixer", "down")),
    "state": AdapterSpec("state", 2, 2.0, ()),
}


def train_adapter(spec: AdapterSpec, seed: int = 3, *overrides: str) -> MixKABRN:
    """The base with an adapter whose parameters are those of no zeros, as after training."""
    model = make_base(*overrides)
    freeze_base(model)
    add_adapter(model, spec, seed)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter_parameters(model):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_base(*overrides: str) -> MixKABRN:
    return make_model(make_model_config("model.layers=RAR", *overrides))


@pytest.mark.parametrize("overrides", [(), ("model.scale_group_size=7",), ("model.experts.type=relu2",)])
@pytest.mark.parametrize("method", SPECS)
def test_what_was_trained_survives_its_files(method: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    """In memory, in a file, and on a fresh base: the trained model's logits, and without it the base's."""
    model, spec = train_adapter(SPECS[method], 3, *overrides), SPECS[method]
    made = collect_adapter(model, spec, "x\x1by", 12, "runs/base")
    write_adapter(made, tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.info == made.info and made.info.name == "x?y" and made.info.targets == spec.targets
    held = {"lora": adapter.low_ranks, "ternary_lora": adapter.patches, "state": adapter.states}
    assert [each for each, values in held.items() if values] == [method]
    base = make_base(*overrides)
    before = logits(base)
    assert adapter.info.base_sha256 == hash_model_codes(base)
    set_adapters(base, [(adapter, 1)])
    # Of `lora`, alpha / rank is a power of two here; of `state`, a matrix is summed in fp64.
    tolerance = 0 if method != "state" else 1e-4
    assert torch.allclose(logits(base), logits(model), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(logits(base), before, atol=1e-3)
    assert hash_model_codes(base) == (adapter.info.result_sha256 or adapter.info.base_sha256) == hash_model_codes(model)
    set_adapters(base, [])
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("method", ["lora", "state"])
def test_several_adapters_add_up_with_their_weights(method: str) -> None:
    base, spec = make_base(), SPECS[method]
    first, second = (collect_adapter(train_adapter(spec, seed), spec, "a", 1) for seed in (3, 4))
    set_adapters(base, [(first, 0.5), (second, -0.25)])
    for name, (a, b) in first.low_ranks.items():
        ours, (c, d) = list_low_ranks(base)[name], second.low_ranks[name]
        expected = 0.5 * b.astype(np.float64) @ a - 0.25 * d.astype(np.float64) @ c
        assert np.allclose(ours.b.double() @ ours.a.double(), expected, atol=1e-6)
    for layer, state in first.states.items():
        mixer = base.get_submodule(f"blocks.{layer}.mixer")
        assert isinstance(mixer, Retention) and mixer.fixed_initial_state is not None
        expected = 0.5 * state.matrix() - 0.25 * second.states[layer].matrix()
        assert np.allclose(mixer.fixed_initial_state, expected, atol=1e-6)
    both = logits(base)
    set_adapters(base, [(first, 0.5), (first, 0.5)])
    twice = logits(base)
    set_adapters(base, [(first, 1)])
    # An input that is rounded to the next code moves a logit further than the sums' rounding.
    assert torch.allclose(logits(base), twice, atol=1e-2) and not torch.allclose(both, twice, atol=1e-2)


def list_low_ranks(model: MixKABRN) -> dict[str, LowRank]:
    """The factors beside a model's matrices, by the name of the parameter."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LowRankModule)}
    return {f"{name}.{leaf}": part for name, module in modules.items() for leaf, part in module.fixed_low_ranks.items()}


def test_methods_go_together_and_come_off_together() -> None:
    base = make_base()
    before = logits(base)
    adapters = [(collect_adapter(train_adapter(spec), spec, "a", 1), 1.0) for spec in SPECS.values()]
    held = ModelAdapters(base)
    held.set(adapters)
    together = logits(base)
    seen = [together]
    for given in ([each] for each in adapters):
        held.set(given)
        assert not any(torch.equal(logits(base), other) for other in seen)
        seen.append(logits(base))
    held.set(adapters[::-1])
    assert torch.equal(logits(base), together)
    held.set([])
    assert torch.equal(logits(base), before) and list_low_ranks(base) == {}


def test_factors_and_states_of_other_sizes_are_refused() -> None:
    base = make_base()
    before = logits(base)
    lora, _, state = (collect_adapter(train_adapter(spec), spec, "a", 1) for spec in SPECS.values())
    name = "blocks.1.mixture.routed.down"
    a, b = lora.low_ranks[name]
    half = replace(lora, low_ranks={name: LowRankFactors(a[:, :, ::2], b)})
    small = StateFactors(*(part[:, :, :3] for part in state.states[0]))
    for given, message in (
        ([(half, 1.0)], "use the adapter of this model"),
        ([(half, 1.0), (lora, 1.0)], "of different sizes"),
        ([(replace(lora, low_ranks={"blocks.0.mixer": lora.low_ranks[name]}), 1.0)], "no matrix of this model"),
        ([(lora, 1.0), (replace(state, states={0: small}), 1.0)], "use the adapter of this model"),
        ([(replace(state, states={1: state.states[0]}), 1.0)], "of layer 1"),
        ([(state, 1.0), (replace(state, states={0: small}), 1.0)], "of different sizes"),
        ([(lora, float("nan"))], "weight nan is no weight"),
        ([(lora, 1e38)], "weight 1e+38 is no weight"),
    ):
        with pytest.raises(UserError) as error:
            set_adapters(base, given)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert torch.equal(logits(base), before) and list_low_ranks(base) == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its experts spread over two processes, and groups of outputs with scales of their own."""
    folder = tmp_path_factory.mktemp("adapters")
    changes = {"parallel__expert_parallel": 2, "parallel__zero_stage": 1, "training__steps": 2}
    shards = make_shards(folder)
    config = write_small_config(folder / "run.yaml", shards, folder / "run", model__scale_group_size=5, **changes)
    result = run_command(torchrun_command(2, "launch/train.py", "--config", str(config)))
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_its_exports_and_its_files_have_one_identity(precision: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp32", f"precision: {precision}"))
    expected = hash_model_codes(Run.open(run).model())
    assert (expected == hash_model_codes(Run.open(trained).model())) == (precision == "fp32")
    for name, dtype in (("own", None), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        write_export(plan_export(run, dtype), tmp_path / name)
        assert hash_model_codes(load_export(tmp_path / name)[0]) == expected, name
    for folder in (run, tmp_path / "own", tmp_path / "bf16"):
        for ternary in ("tiles", "base3"):
            out = tmp_path / f"{folder.name}-{ternary}.mkb"
            pack_folder(folder, out, Packing(ternary=ternary))
            file = read_model_file(out)
            assert file.header["codes_sha256"].hex() == hash_file_codes(file) == expected
