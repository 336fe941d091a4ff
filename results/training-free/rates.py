"""Learned rates on the images that a search sees: the idea of DiffRate (arXiv 2305.17997), from the paper's formulas.

    python results/training-free/rates.py imagenet IMAGES WEIGHTS --splits 0 1 2

Before every block a softmax over candidate counts says how many tokens are kept. Tokens are sorted by the attention from
CLS; that at rank r is kept with probability π_r, the sum over candidates above r. The forward pass takes the hard choice,
whether r is below the expected count, the backward one π (straight through), and masks of earlier blocks multiply. A token
that is masked weighs nothing in attention: exp(score)·mask, normalised. The loss is the divergence from the dense model's
answers plus the squared excess of the MACs, which follow from the expected counts; weights are frozen. The paper learns on
ImageNet's 1.28 million training images with labels, prunes and merges; here the images are those of the search, without
labels, and what leaves is dropped. The counts are tested with the operators of --test, as uniform schedules are.
Rates begin at the uniform schedule. Writes <setting>-rates-<split>.json.
"""

from __future__ import annotations

import json
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F
from reproduce import around, block, scheduled, tested
from safetensors.torch import load_file
from setting import DEPTH, MODEL, SIDE, Losses, Scorer, Setting, arguments
from torch import nn

from poolshare.space import SearchSpace

EXCESS = 100.0  # nats for the squared share of the MACs above the budget


class Rates(nn.Module):
    """A frozen model whose tokens are kept or masked before each block but the first."""

    def __init__(self, model: nn.Module, patches: int, start: list[int], step: int):
        super().__init__()
        self.model, self.patches = model.eval().requires_grad_(False), patches
        self.register_buffer("candidates", torch.arange(patches, 0, -step).float())
        begun = -(((self.candidates - torch.tensor(start[1:]).float()[:, None]) / (2 * step)) ** 2) / 2
        self.logits = nn.Parameter(begun)  # (blocks - 1, candidates)

    def expected(self) -> torch.Tensor:
        """(blocks - 1,) counts, never rising."""
        return torch.cummin(self.logits.softmax(-1) @ self.candidates, dim=0).values

    def share(self, counts: torch.Tensor) -> torch.Tensor:
        """Of the dense blocks' MACs."""
        return (1 + sum(block(count) for count in counts) / block(self.patches)) / DEPTH  # type: ignore[arg-type]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes)."""
        model, mask, importance = self.model, None, None
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        chances = self.logits.softmax(-1)
        counts = self.expected()
        for index, layer in enumerate(model.blocks):
            if index:
                keep = (self.candidates[None, :] > torch.arange(self.patches)[:, None]).float()
                chance = keep @ chances[index - 1]  # (ranks,)
                hard = (torch.arange(self.patches) < counts[index - 1].round()).float()
                ranks = importance.masked_fill(mask == 0, -1).argsort(1, descending=True).argsort(1)
                mask = mask * (hard + chance - chance.detach())[ranks]  # (B, patches)
            else:
                mask = torch.ones(len(images), self.patches)
            attended, importance = self.attention(layer.attn, layer.norm1(tokens), mask)
            tokens = tokens + attended
            tokens = tokens + layer.mlp(layer.norm2(tokens))
        return model.forward_head(model.norm(tokens))

    def attention(self, attn: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked attention's output, and what CLS attends to, (B, patches)."""
        B, N, C = tokens.shape
        q, k, v = attn.qkv(tokens).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        weights = weights * torch.cat([torch.ones(B, 1), mask], 1)[:, None, None, :]
        weights = weights / weights.sum(-1, keepdim=True)
        return attn.proj((weights @ v).transpose(1, 2).reshape(B, N, C)), weights[:, :, 0, 1:].mean(1).detach()


def exact(counts: list[int], budget: float, operator: str, dense: int, setting: Setting, losses: Losses):
    """The schedule of these counts, all moved alike so that it just keeps the budget, and what scores it."""
    for shift in range(setting.patches, -setting.patches, -1):
        moved = [setting.patches, *(int(np.clip(count + shift, 1, setting.patches)) for count in counts)]
        if dense - DEPTH * block(setting.patches) + sum(map(block, moved)) > budget:
            continue
        schedule = scheduled(moved, operator)
        scorer = Scorer(around([schedule], (operator,)), setting, losses)
        if scorer.costs.total(schedule) <= budget:
            return [schedule], scorer
    raise ValueError("no shift keeps the budget")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--test", nargs="+", default=["topk", "evit", "tome_prop"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting.open(options)
    losses = Losses(setting)
    sizes = {"img_size": SIDE[options.setting], "num_classes": int(setting.labels.max()) + 1}
    model = timm.create_model(MODEL, **sizes)
    model.load_state_dict(load_file(options.weights))
    dense_scorer = Scorer(SearchSpace(DEPTH, (setting.patches,), (), 1, has_cls=True), setting, losses)
    dense = dense_scorer.costs.total(dense_scorer.net.space[0])
    for split in options.splits:
        places, test = setting.places(split)
        images = setting.images[torch.from_numpy(places)]
        with torch.inference_mode():
            wanted = torch.cat([model.eval()(part) for part in images.split(50)]).log_softmax(-1)
        wanted, rows = wanted.clone(), []
        reference = dense_scorer([dense_scorer.net.space[0]], test)
        for share in options.shares:
            torch.manual_seed(split)
            gap = (1 - share) * 2 * setting.patches / (DEPTH - 1)
            begun = [round(setting.patches - gap * index) for index in range(DEPTH)]
            rates = Rates(model, setting.patches, begun, max(1, setting.patches // 28))
            optimizer = torch.optim.AdamW([rates.logits], lr=options.lr, weight_decay=0)
            steps = [part for _ in range(options.epochs) for part in torch.randperm(len(images)).split(20)]
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
            start = time.monotonic()
            for part in steps:
                answers = rates(images[part]).log_softmax(-1)
                divergence = F.kl_div(answers, wanted[part], log_target=True, reduction="batchmean")
                over = rates.share(rates.expected()) - share
                optimizer.zero_grad()
                (divergence + EXCESS * over**2).backward()
                optimizer.step()
                schedule.step()
            counts = rates.expected().detach().round().int().tolist()
            print(
                f"split {split}, {share}: {time.monotonic() - start:.0f} s, {divergence.item():.3f} nats, {counts}",
                flush=True,
            )
            for operator in options.test:
                one = exact(counts, share * dense, operator, dense, setting, losses)
                rows += tested(f"learned rates, {operator}", *one, test, reference)
        result = {"split": split, "epochs": options.epochs, "lr": options.lr, "images": len(places), "rows": rows}
        (options.out / f"{options.setting}-rates-{split}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
