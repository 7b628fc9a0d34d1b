"""State dicts as files of tensors keep them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.storage.aliases import load_state, versioned
from distill.student.assemble import assemble
from distill.teachers import load_weights


class Strict(nn.Linear):
    """Takes weights of its own version alone, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, metadata: dict[str, int], *more: object
    ) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *more)  # type: ignore[no-untyped-call]


def test_a_module_that_asks_for_its_version_loads_from_a_file_without_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    there, here = (nn.Sequential(Strict(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    save_file(there.state_dict(), tmp_path / "weights.safetensors")
    state = load_file(tmp_path / "weights.safetensors")
    load_state(here, state)
    assert torch.equal(here[0].weight, there[0].weight)
    assert versioned(here, state).keys() == state.keys()
    assert torch.equal(assemble(here, changed=[], blocks=[state])[0].weight, there[0].weight)  # type: ignore[index]
    load_weights(here, str(tmp_path / "weights.safetensors"))
