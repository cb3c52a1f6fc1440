"""One budget for all heads of a layer: against a plain sort, and the laws that compression leans on."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankkv.selection import CASCADE_SLACK, get_selector, select_tokens, select_tokens_across_heads

score = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, 1.0, float("nan")]))
SNAPKV, H2O = get_selector("snapkv"), get_selector("h2o", recent_fraction=0.5)


@st.composite
def competitions(draw):
    """Draw scores, the padding of every row, budgets, protections and the floor of a head."""
    keys, heads = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    padding = draw(st.lists(st.integers(0, keys - 1), min_size=1, max_size=3))
    size = len(padding) * heads * keys
    rows = [torch.cat([torch.full((pad,), -1), torch.arange(keys - pad)]) for pad in padding]
    return {
        "scores": torch.tensor(draw(st.lists(score, min_size=size, max_size=size))).view(-1, heads, keys),
        "real_index": torch.stack(rows)[:, None],
        "lengths": [keys - pad for pad in padding],
        "budgets": [draw(st.integers(1, keys)) for _ in padding],
        "selector": draw(st.sampled_from([SNAPKV, H2O])),
        "window_size": draw(st.integers(1, 8)),
        "sink_size": draw(st.integers(0, 5)),
        "head_floor": draw(st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.74, 0.8, 0.95, 1.0])),
    }


def select(case, keep=None):
    if keep is None:
        keep = [min(b, n) for b, n in zip(case["budgets"], case["lengths"], strict=True)]
    index, counts = select_tokens_across_heads(**case, keep=keep)
    assert counts == (index >= 0).sum(dim=-1).tolist()
    return index


def listed(kept):
    return [[[index for index in head if index >= 0] for head in row] for row in kept.tolist()]


def is_protected(case, row, token):
    recent, sinks = case["selector"].count_protected(
        case["budgets"][row], case["window_size"], case["sink_size"]
    )
    return token < sinks or token >= case["lengths"][row] - recent


def plain_competition(case):
    """Sort the entries of all heads by (protected or among the head's best, score, token, head)."""
    result = []
    for row, length in enumerate(case["lengths"]):
        padding = case["scores"].shape[-1] - length
        floor = int(case["head_floor"] * case["budgets"][row])
        entries = []
        for head, values in enumerate(case["scores"][row, :, padding:].tolist()):
            values = [torch.finfo(torch.float32).min if v != v else v for v in values]
            own = sorted((not is_protected(case, row, t), -v, t) for t, v in enumerate(values))
            entries += [(place >= floor and free, v, t, head) for place, (free, v, t) in enumerate(own)]
        heads = case["scores"].shape[1]
        taken = sorted(entries)[: heads * min(case["budgets"][row], length)]
        # Among those that are safe, the order does not matter.
        result.append([sorted(padding + t for *_, t, h in taken if h == head) for head in range(heads)])
    return result


@given(competitions())
def test_selection_equals_a_plain_sort(case):
    kept = select(case)
    assert listed(kept) == plain_competition(case)
    # As wide as the head that keeps most; the others start with empty slots.
    assert kept.shape[-1] == max(len(head) for row in listed(kept) for head in row)
    assert torch.equal(kept, kept.sort(-1).values)


@given(competitions())
def test_budget_protection_and_floor_hold(case):
    for row, heads in enumerate(listed(select(case))):
        budget, length = min(case["budgets"][row], case["lengths"][row]), case["lengths"][row]
        padding = case["scores"].shape[-1] - length
        assert sum(len(head) for head in heads) == budget * len(heads)
        protected = {padding + token for token in range(length) if is_protected(case, row, token)}
        for head in heads:
            assert protected <= set(head)
            assert len(head) >= min(length, int(case["head_floor"] * case["budgets"][row]))
            assert not head or min(head) >= padding


@given(competitions())
def test_a_floor_of_one_gives_all_heads_the_same(case):
    case["head_floor"] = 1.0
    uniform = {name: value for name, value in case.items() if name != "head_floor"}
    assert listed(select(case)) == listed(select_tokens(**uniform))


@given(competitions(), st.data())
def test_selecting_again_from_what_was_kept_changes_nothing(case, data):
    # What a cascade does: the budget falls, twice here, and each selection sees only what the one before left.
    steps = sorted(data.draw(st.lists(st.integers(0, 8), min_size=2, max_size=2)), reverse=True)
    scores, index = case["scores"], case["real_index"].expand_as(case["scores"])
    token, available = index, case["lengths"]
    for more, slack in [*((step, CASCADE_SLACK) for step in steps), (0, 0)]:
        budgets = [budget + more for budget in case["budgets"]]
        available = [min(b + slack, n) for b, n in zip(budgets, available, strict=True)]
        now = {**case, "scores": scores, "real_index": index, "budgets": budgets}
        kept = select(now, keep=available)
        where = kept.clamp(min=0)
        scores, token = scores.gather(-1, where), token.gather(-1, where).masked_fill(kept < 0, -1)
        index = index.gather(-1, where).masked_fill(kept < 0, -1)
    padding = [case["scores"].shape[-1] - length for length in case["lengths"]]
    expected = [
        [[t - pad for t in head] for head in row]
        for row, pad in zip(listed(select(case)), padding, strict=True)
    ]
    assert listed(token) == expected


def test_ties_go_to_the_earlier_token_then_to_the_lower_head():
    pick = lambda budget: select_tokens_across_heads(  # noqa: E731
        torch.zeros(1, 2, 6),
        torch.arange(6).view(1, 1, 6),
        [6],
        [budget],
        SNAPKV,
        0,
        0,
        head_floor=0.0,
        keep=[budget],
    )[0]
    assert listed(pick(2)) == [[[0, 1], [0, 1]]]
    # Where a head evicted before, its slots stand elsewhere, and its tokens count as before.
    index = torch.tensor([[[0, 1, 2], [-1, 2, 3]]])
    kept, _ = select_tokens_across_heads(
        torch.zeros(1, 2, 3), index, [4], [2], SNAPKV, 0, 0, head_floor=0.0, keep=[2]
    )
    assert listed(kept) == [[[0, 1, 2], [1]]]


@pytest.mark.parametrize("kept_fraction", [0.3, 0.6])
@pytest.mark.parametrize("head_floor", [0.0, 0.2, 0.6])
def test_equals_competition_with_a_safeguard_over_the_window(tiny_llama, kept_fraction, head_floor):
    """Ada-KV over SnapKV as NVIDIA's kvpress computes it, written down another way.

    There the window stands in every head, whatever the budget; so it does here, where half the budget holds it.
    """
    length, window = 120, 16
    observation = oracles.observe_layers(tiny_llama(), oracles.random_prompt(length), None, window, 0)[1]
    selector = get_selector("snapkv", pooling="avg")
    scores = selector.compute_scores(observation)
    budget = int(kept_fraction * length)
    kept, _ = select_tokens_across_heads(
        scores, observation.real_index, [length], [budget], selector, window, 0,
        head_floor=head_floor, keep=[budget],
    )  # fmt: skip
    weights = torch.nn.functional.avg_pool1d(
        observation.window_attention.mean(dim=-2)[..., :-window], 5, stride=1, padding=2
    )
    grouped = weights.view(2, 2, length - window).mean(dim=1)
    values = torch.cat([grouped, torch.full((2, window), float(grouped.max()) + 1)], dim=-1)
    safe = torch.zeros_like(values, dtype=torch.bool)
    safe.scatter_(-1, values.topk(max(1, int(budget * head_floor))).indices, True)
    values[safe] = float("inf")
    pruned = (-values.flatten()).topk(2 * (length - budget)).indices
    stays = torch.ones(2 * length, dtype=torch.bool)
    stays[pruned] = False
    expected = [row.nonzero()[:, 0].tolist() for row in stays.view(2, length)]
    assert listed(kept) == [expected]
