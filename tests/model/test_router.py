"""The router: choices, ties, groups, capacity, jitter, the balancing bias and the sums, each against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kabrn_dist.config import ModelConfig
from kabrn_dist.model.router import (
    Router,
    RouterStates,
    Routing,
    TokenCoordinates,
    expert_capacity,
    stable_topk,
    stable_topk_naive,
)
from kabrn_dist.ops.activation_quant import rms_norm
from kabrn_dist.ops.counter_rng import hash_combine, hash_uniform, noise_key

WIDTH, ROUTED = 16, 6


def settings(experts: dict[str, Any] | None = None, **router: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 9,
            "hidden_size": WIDTH,
            "layers": 1,
            "retention": {"num_heads": 1, "key_dim": 2, "value_dim": 2},
            "experts": {"num_experts": ROUTED, "top_k": 2, "expert_hidden_size": 4, **(experts or {})},
            "router": router,
        }
    )


def make(experts: dict[str, Any] | None = None, **router: Any) -> Router:
    made = Router(WIDTH, settings(experts, **router))
    made.initialize(1, "router")
    # Routers start nearly even; wider scores make experts differ.
    made.weight.data *= 30
    return made.double()


def inputs(rows: int = 4, time: int = 6) -> Tensor:
    torch.manual_seed(0)
    return rms_norm(torch.randn(rows, time, WIDTH, dtype=torch.float64))


def route(made: Router, x: Tensor, bias: Tensor | None = None, **more: Any) -> Routing:
    experts = made.experts_config.num_experts
    states = RouterStates.initial(1, experts, "cpu")
    return made(x, states.bias[0] if bias is None else bias, states.prev_load[0], **more)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ties_go_to_the_lowest_numbers(score: str) -> None:
    made = make({"top_k": 3}, score_func=score)
    made.weight.data.zero_()
    routing = route(made, inputs(2, 4))
    assert routing.expert_ids.tolist() == [[0, 1, 2]] * 8
    torch.testing.assert_close(routing.weights, torch.full_like(routing.weights, 1 / 3))
    # Sorts of many experts are where an unstable order would show.
    many = make({"num_experts": 512, "top_k": 3}, score_func=score)
    many.weight.data.zero_()
    assert route(many, inputs(2, 4)).expert_ids.tolist() == [[0, 1, 2]] * 8
    # A tie of two for the last place, behind one clear winner.
    made.weight.data[3] = 1
    assert route(made, torch.ones(1, 1, WIDTH, dtype=torch.float64)).expert_ids.tolist() == [[3, 0, 1]]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_first_best_is_a_stable_sort(count: int) -> None:
    torch.manual_seed(0)
    for scores in (torch.rand(5, 9), torch.randint(3, (40, 7)).float(), torch.zeros(2, 3, 8)):
        assert torch.equal(stable_topk(scores, count), stable_topk_naive(scores, count))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_scores_and_the_bias_only_chooses(score: str, renormalize: bool) -> None:
    made, x = make(score_func=score, norm_topk_prob=renormalize), inputs()
    bias = torch.zeros(ROUTED)
    bias[4] = 10.0
    routing = route(made, x, bias)
    assert (routing.expert_ids[:, 0] == 4).all(), "a large bias wins every choice"
    logits = x.flatten(0, 1) @ made.weight.T
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    expected = scores.gather(-1, routing.expert_ids)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected, atol=1e-12, rtol=0)
    noise = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((w * noise).sum(), made.weight)[0] for w in (routing.weights, expected))
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


def slow_groups(scores: list[float], groups: int, most: int, k: int) -> list[int]:
    """Group-limited choice for one token, by its definition (DeepSeek-V3: a group is rated by its k / M best)."""
    size = len(scores) // groups
    parts = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    rating = [sum(sorted((scores[e] for e in part), reverse=True)[: max(1, k // most)]) for part in parts]
    kept = sorted(range(groups), key=lambda g: (-rating[g], g))[:most]
    allowed = [e for g in sorted(kept) for e in parts[g]]
    return sorted(allowed, key=lambda e: (-scores[e], e))[:k]


@pytest.mark.parametrize(("routed", "groups", "most", "k"), [(6, 3, 1, 2), (6, 3, 2, 3), (12, 4, 2, 4), (8, 2, 1, 4)])
def test_group_limited_choice_is_its_definition(routed: int, groups: int, most: int, k: int) -> None:
    made = make({"num_experts": routed, "top_k": k}, n_group=groups, topk_group=most)
    routing = route(made, inputs())
    scores = routing.logits.sigmoid().flatten(0, 1)
    assert routing.expert_ids.tolist() == [slow_groups(row.tolist(), groups, most, k) for row in scores]
    used = [len({e // (routed // groups) for e in row}) for row in routing.expert_ids.tolist()]
    assert max(used) <= most
    free = route(make({"num_experts": routed, "top_k": k}), inputs())
    assert not torch.equal(free.expert_ids, routing.expert_ids), "the limit must bind for this to mean anything"


def test_bias_moves_once_towards_the_mean_and_stays_centered() -> None:
    states = RouterStates.initial(2, 4, "cpu")
    load = torch.tensor([[10.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0]])
    states.update(load, 0.1)
    raw = torch.tensor([-0.1, 0.1, 0.1, 0.1])
    torch.testing.assert_close(states.bias[0], raw - raw.mean())
    assert not bool(states.bias[1].any()), "an even load moves nothing"
    torch.testing.assert_close(states.prev_load, load / 16)
    assert states.step == 1
    for _ in range(200):
        states.update(load, 0.1)
    assert float(states.bias.mean(1).abs().max()) < 1e-4 and states.step == 201


def test_bias_evens_out_a_lopsided_router() -> None:
    made, x = make(), inputs(8, 64)
    made.weight.data[0] += 0.3
    states, worst = RouterStates.initial(1, ROUTED, "cpu"), []
    for _ in range(150):
        load = made.summarize(made(x, states.bias[0], states.prev_load[0])).tokens_per_expert[None]
        worst.append(float(load.max() / load.mean()))
        states.update(load, 0.01)
    assert worst[0] > 1.3 and worst[-1] < 1.1, (worst[0], worst[-1])


def slow_sums(made: Router, x: Tensor, share: list[float]) -> dict[str, Any]:
    """The sums by their formulas, one number at a time (DeepSeek-V3, eq. 17–20; ST-MoE, eq. 5; 2501.11873, eq. 3)."""
    k, experts = made.experts_config.top_k, made.experts_config.num_experts
    balance = global_balance = z = entropy = 0.0
    load = [0.0] * experts
    for sequence in x:
        fractions, means = [0.0] * experts, [0.0] * experts
        for token in sequence:
            logits = [sum(w * t for w, t in zip(row.tolist(), token.tolist(), strict=True)) for row in made.weight]
            raw = [
                1 / (1 + math.exp(-v)) if made.router_config.score_func == "sigmoid" else math.exp(v) for v in logits
            ]
            shares = [value / sum(raw) for value in raw]
            for expert in sorted(range(experts), key=lambda e: -shares[e])[:k]:
                load[expert] += 1
                fractions[expert] += experts / (k * len(sequence))
            means = [m + s / len(sequence) for m, s in zip(means, shares, strict=True)]
            z += math.log(sum(math.exp(v) for v in logits)) ** 2
            entropy -= sum(s * math.log(s) for s in shares)
            global_balance += experts * sum(f * s for f, s in zip(share, shares, strict=True))
        balance += sum(f * p for f, p in zip(fractions, means, strict=True))
    return {"balance": balance, "global_balance": global_balance, "z": z, "entropy": entropy, "tokens_per_expert": load}


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_sums_are_their_formulas_and_add_up(score: str, top_k: int) -> None:
    made, x = make({"top_k": top_k}, score_func=score), inputs()
    share = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.25, 0.05])
    bias = torch.zeros(ROUTED)
    routing = made(x, bias, share)
    sums = made.summarize(routing)
    for name, value in slow_sums(made, x, share.tolist()).items():
        found = getattr(sums, name)
        assert found.tolist() == pytest.approx(value, rel=1e-6), name
    assert sums.tokens_per_expert.tolist() == torch.bincount(routing.expert_ids.flatten(), minlength=ROUTED).tolist()
    assert all(len(set(row)) == top_k for row in routing.expert_ids.tolist()) and float(sums.dropped) == 0
    # Split invariance: the sums of the rows add up to the batch's.
    rows = [made.summarize(made(row[None], bias, share)) for row in x]
    for whole, parts in zip(sums, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, atol=1e-11, rtol=0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_capacity_drops_the_latest_of_each_sequence_and_counts_them(factor: float) -> None:
    made, x = make({"capacity_factor": factor}), inputs(3, 12)
    free = route(make(), x)
    routing = route(made, x)
    room = expert_capacity(made.experts_config, 12)
    assert room == math.ceil(factor * 12 * 2 / ROUTED)
    expected = free.expert_ids.view(3, 12, 2).clone()
    for sequence in expected:
        taken = [0] * ROUTED
        for token in sequence:
            for place, expert in enumerate(token.tolist()):
                taken[expert] += 1
                if taken[expert] > room:
                    token[place] = ROUTED
    assert routing.expert_ids.tolist() == expected.flatten(0, 1).tolist()
    sums = made.summarize(routing)
    assert float(sums.dropped) == int((expected == ROUTED).sum())
    assert (float(sums.dropped) > 0) == (factor < 1.5 or room < int(free.assignment.sum(1).max()))
    assert torch.equal(sums.tokens_per_expert, made.summarize(free).tokens_per_expert), "the load is what was asked for"
    torch.testing.assert_close(routing.weights, free.weights)
    assert torch.equal(route(made.eval(), x).expert_ids, free.expert_ids), "nothing is dropped outside training"


def places(rows: int, time: int) -> TokenCoordinates:
    torch.manual_seed(3)
    tokens = torch.randint(9, (rows, time))
    return TokenCoordinates(tokens, torch.zeros_like(tokens), torch.arange(time).expand(rows, -1))


def test_jitter_depends_on_the_token_and_the_step_only() -> None:
    made, x, where = make(jitter_eps=0.1), inputs(), places(4, 6)
    first = route(made, x, step=5, coordinates=where).logits
    assert torch.equal(route(made, x, step=5, coordinates=where).logits, first)
    assert not torch.equal(route(made, x, step=6, coordinates=where).logits, first)
    halves = [
        route(made, x[:, part], step=5, coordinates=TokenCoordinates(*(p[:, part] for p in where))).logits
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(torch.cat(halves, 1), first, atol=1e-12, rtol=0)
    first, plain = first.detach(), route(make(), x).logits.detach()
    assert 1e-3 < float((first - plain).abs().mean()) < float(plain.abs().mean())
    assert torch.equal(route(made.eval(), x, step=5, coordinates=where).logits, plain)


def test_forced_balance_is_even_and_unreachable_from_a_configuration() -> None:
    made = Router(WIDTH, settings(), force_load_balance=True)
    made.initialize(1, "router")
    routing = route(made, inputs(4, 6).float())
    assert made.summarize(routing).tokens_per_expert.tolist() == [8.0] * ROUTED
    reachable = {*type(made.router_config).model_fields, *type(made.experts_config).model_fields}
    assert not [name for name in reachable if "force" in name]


def test_noise_is_uniform_and_unrelated_between_keys() -> None:
    numbers = torch.arange(200_000)
    draws = [hash_uniform(numbers, torch.tensor(noise_key(1, name))) for name in ("a", "b")]
    for drawn in draws:
        assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
        assert float(drawn.mean()) == pytest.approx(0.5, abs=4e-3)
        assert float(drawn.var()) == pytest.approx(1 / 12, abs=2e-3)
        counts = torch.histc(drawn, 64, 0, 1)
        assert float((counts - 3125).abs().max()) < 6 * math.sqrt(3125)
    for left, right in ((draws[0], draws[1]), (draws[0][1:], draws[0][:-1])):
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 0.01
    assert len(set(hash_combine(torch.arange(1000)[:, None], torch.arange(100)).flatten().tolist())) == 100_000
