"""Who says what a drawn digit shows: a classifier that has seen real digits alone, and no part of what drew it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.digits_data import SIZE, Digits
from unclip.evaluation.metrics import frechet_distance

FEATURES = 64


class Classifier(nn.Module):
    """A small convolutional network; `features` (B, 64) is what the last layer reads."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.body = nn.Sequential(
            block(1, 16), nn.MaxPool2d(2), block(16, 32), block(32, 32), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * (SIZE // 4) ** 2, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, SIZE, SIZE) in [-1, 1] -> (B, FEATURES)."""
        return self.body(pictures.mean(1, keepdim=True))  # type: ignore[no-any-return]

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))  # type: ignore[no-any-return]


def train_classifier(digits: Digits, epochs: int = 20, seed: int = 0) -> Classifier:
    """AdamW with a falling rate, on digits shifted by up to a sixteenth of the edge either way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier()
        steps = epochs * (len(digits) // 64 + 1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(digits)).chunk(steps // epochs):
                x, y = _shifted(digits.pictures[rows]), digits.labels[rows]
                loss = F.cross_entropy(network(x), y, label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return network.eval().requires_grad_(False)


def _shifted(pictures: Tensor) -> Tensor:
    """Each moved by -1, 0 or 1 pixel both ways; what comes in is paper."""
    padded = F.pad(pictures, (1, 1, 1, 1), value=1.0)
    down, right = torch.randint(3, (2, len(pictures))).tolist()
    return torch.stack(
        [one[:, y : y + SIZE, x : x + SIZE] for one, y, x in zip(padded, down, right, strict=True)]
    )


@torch.no_grad()
def accuracy(classifier: Classifier, digits: Digits) -> dict[str, Any]:
    """Share of pictures that show what they ought to, over all and by digit."""
    right = classifier(digits.pictures).argmax(1) == digits.labels
    by_digit = [
        float(right[digits.labels == label].float().mean()) if (digits.labels == label).any() else None
        for label in range(10)
    ]
    return {"accuracy": float(right.float().mean()), "by_digit": by_digit, "pictures": len(digits)}


class SupportVectors:
    """A second opinion of another kind: scikit-learn's SVC on the 64 numbers of the 8×8 digits."""

    def __init__(self, digits: Digits) -> None:
        from sklearn.svm import SVC

        self.model = SVC(gamma="scale", C=10.0).fit(_stored(digits), digits.labels.numpy())

    def accuracy(self, digits: Digits) -> float:
        return float(self.model.score(_stored(digits), digits.labels.numpy()))


def _stored(digits: Digits) -> Any:
    return F.avg_pool2d(digits.pictures.mean(1, keepdim=True), SIZE // 8).flatten(1).numpy()


def measure(
    drawn: Digits, held_out: Digits, classifier: Classifier, second: SupportVectors, embed: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Accuracy by both judges, and Fréchet distances from the held-out digits in the classifier's features and in
    `embed`'s.
    """
    with torch.no_grad():
        seen, real = (classifier.features(one.pictures) for one in (drawn, held_out))
        distances = {
            "fd_classifier": frechet_distance(seen, real),
            "fd_clip": frechet_distance(embed(drawn.pictures), embed(held_out.pictures)),
        }
    return {**accuracy(classifier, drawn), "accuracy_svc": second.accuracy(drawn), **distances}
