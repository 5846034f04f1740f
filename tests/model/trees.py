"""Random groups of calls that share beginnings, and their tree in pre-order, token by token."""

import random
from dataclasses import dataclass

import torch

from model.visible import Visibility


def random_calls(seed: int, calls: int, longest: int, vocab: int) -> list[list[int]]:
    """Each call goes on from a random point of an earlier one, or starts anew; two are alike."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    for _ in range(calls):
        begin = rng.choice(made)[: rng.randint(0, longest)] if made and rng.random() < 0.8 else []
        own = [rng.randrange(vocab) for _ in range(rng.randint(1, longest))]
        made.append((begin + own)[: 3 * longest])
    return [*made, made[0][:]]


@dataclass(frozen=True)
class Tree:
    ids_M: torch.Tensor
    visibility: Visibility
    places: list[list[int]]
    """For each call, where its tokens are in the pack."""


def tree_of(calls: list[list[int]]) -> Tree:
    """The trie of the calls, every node one token, walked depth first."""
    children: list[dict[int, int]] = [{}]
    for call in calls:
        node = 0
        for id in call:
            if id not in children[node]:
                children[node][id] = len(children)
                children.append({})
            node = children[node][id]
    ids: list[int] = []
    depths: list[int] = []
    touts: list[int] = []
    place_of: dict[int, int] = {}

    def walk(node: int, depth: int) -> None:
        for id, child in children[node].items():
            place_of[child] = len(ids)
            ids.append(id)
            depths.append(depth)
            touts.append(0)
            walk(child, depth + 1)
            touts[place_of[child]] = len(ids)

    walk(0, 0)
    places = []
    for call in calls:
        node, path = 0, []
        for id in call:
            node = children[node][id]
            path.append(place_of[node])
        places.append(path)
    made = Visibility(torch.tensor(touts), torch.tensor(depths))
    return Tree(torch.tensor(ids), made, places)


def naive_attention(q_TND, k_TKD, v_TKD, window=None, sinks=0):
    """One text by itself, one query at a time; (T, N·D)."""
    share = q_TND.shape[1] // k_TKD.shape[1]
    k_TND, v_TND = (x.repeat_interleave(share, dim=1) for x in (k_TKD, v_TKD))
    out = []
    for t, q_ND in enumerate(q_TND):
        near = [s for s in range(t + 1) if window is None or t - s < window or s < sinks]
        score_SN = (k_TND[near] * q_ND).sum(-1) / q_TND.shape[-1] ** 0.5
        out.append((score_SN.softmax(0)[..., None] * v_TND[near]).sum(0))
    return torch.stack(out).flatten(1)


class NaiveAttend:
    """`naive_attention` in every layer of one text."""

    def __init__(self, config):
        self.config = config

    def __call__(self, layer, q_MND, k_MKD, v_MKD):
        window = self.config.window_of(layer)
        return naive_attention(q_MND, k_MKD, v_MKD, window, self.config.num_sink_tokens)
