"""What Torch-Pruning makes of ResNet-20, for comparison (pip install -e '.[benchmarks]').

It narrows the inner convolutions of blocks: what it makes of shortcuts that pad channels does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from distill.data import Augment, DataOptions, Dataset
from distill.teachers import build_architecture, load_weights

WEIGHTS = "resnet20-12fca82f.th"
PRECISION = 2e-3  # in the share of channels that goes
BATCHES = 8  # whose gradients Taylor importances are of
IMPORTANCES = {"magnitude": "GroupMagnitudeImportance", "taylor": "GroupTaylorImportance"}


def cifar10(root: Path, *, batch_size: int) -> DataOptions:
    """Return CIFAR-10 as the job reads it with data=hf."""
    return DataOptions(
        name="hf",
        root=str(root.absolute()),
        image_size=32,
        augment=Augment.crop_flip,
        batch_size=batch_size,
        validation_fraction=0.02,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def teacher_network(folder: Path) -> nn.Module:
    network = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    load_weights(network, str(folder / WEIGHTS))
    return network.eval()


def params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def narrowed_until(
    small_enough: Callable[[nn.Module], bool], make: Callable[[], nn.Module], dataset: Dataset, importance: str
) -> nn.Module:
    """Return a network of make(), narrowed by as little as makes it small enough (by bisection)."""
    low, high = 0.0, 1.0
    while high - low > PRECISION:
        ratio = (low + high) / 2
        enough = small_enough(narrowed(make(), dataset, importance, ratio))
        low, high = (low, ratio) if enough else (ratio, high)
    return narrowed(make(), dataset, importance, high)


def narrowed(network: nn.Module, dataset: Dataset, importance: str, ratio: float) -> nn.Module:
    """Return the network without that share of its blocks' inner channels, the least important ones."""
    if importance == "taylor":
        for batch in map(dataset.train_batch, range(BATCHES)):
            F.cross_entropy(network(batch.images), batch.labels).backward()
    pruner_of(network, dataset, importance, ratio).step()
    network.zero_grad(set_to_none=True)
    return network


def pruner_of(network: nn.Module, dataset: Dataset, importance: str, ratio: float) -> Any:
    import torch_pruning

    inner = {module for path, module in network.named_modules() if path.startswith("layer") and path.endswith("conv1")}
    others = [one for one in network.modules() if isinstance(one, nn.Conv2d | nn.Linear) and one not in inner]
    return torch_pruning.pruner.GroupNormPruner(
        network,
        dataset.train_batch(0).images[:1],
        importance=getattr(torch_pruning.importance, IMPORTANCES[importance])(),
        pruning_ratio=ratio,
        ignored_layers=others,
    )
