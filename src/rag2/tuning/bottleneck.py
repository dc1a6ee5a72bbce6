"""Model -> model with small networks behind its sub-layers: what the kinds of it share.

Letters: B sequences, L tokens, H hidden.
"""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, StrictInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rag2.registry import UserError
from rag2.tuning.adapter import Adapter

FILE = "adapter.safetensors"
# The last layers of attention and of the MLP, by family.
KNOWN = (
    ("o_proj", "down_proj"),
    ("attn.c_proj", "mlp.c_proj"),
    ("attention.dense", "mlp.dense_4h_to_h"),
    ("self_attn.dense", "mlp.fc2"),
)


class Bottleneck(nn.Module):
    """A layer and behind it y + U relu(D y + d) + u, U = 0 and u = 0 at the start."""

    def __init__(self, layer: nn.Module, hidden: int, width: int) -> None:
        super().__init__()
        weight = next(layer.parameters())
        place: dict[str, Any] = {"device": weight.device}
        self.layer = layer
        self.down = nn.Linear(hidden, width, **place)
        self.up = nn.Linear(width, hidden, **place)
        nn.init.normal_(self.down.weight, std=0.01)  # as in Houlsby et al. 2019, section 3.6
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output and what the network adds to it, computed in its own precision."""
        out_BLH = self.layer(inputs)
        wide_BLH = out_BLH.to(self.up.weight.dtype)
        return (wide_BLH + self.up(self.down(wide_BLH).relu())).to(out_BLH.dtype)


class Adapted(nn.Module):
    """A model whose layers hold bottlenecks; it is saved without the base."""

    def __init__(self, base: PreTrainedModel, layers: list[str], width: int) -> None:
        super().__init__()
        base.requires_grad_(False)
        hidden = base.config.get_text_config().hidden_size
        for path in layers:
            parent, _, name = path.rpartition(".")
            layer = Bottleneck(base.get_submodule(path), hidden, width)
            setattr(base.get_submodule(parent), name, layer)
            layer.layer.requires_grad_(False)
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's."""
        return self.base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a language model is asked for, the base answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def get_base_model(self) -> PreTrainedModel:
        """The model that the bottlenecks are in."""
        return self.base

    def networks(self) -> dict[str, Tensor]:
        """The weights of all bottlenecks, by name."""
        inside = {id(p) for m in self.modules() if isinstance(m, Bottleneck) for p in _own(m)}
        return {name: p for name, p in self.base.named_parameters() if id(p) in inside}

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """The bottlenecks as safetensors."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        rows = {name: weight.detach().contiguous() for name, weight in self.networks().items()}
        save_file(rows, Path(directory) / FILE)


def _own(module: Bottleneck) -> list[nn.Parameter]:
    return [*module.down.parameters(), *module.up.parameters()]


class Bottlenecks(Adapter):
    """Bottlenecks behind some of the two sub-layers; the norms stay as they are."""

    behind: ClassVar[tuple[int, ...]]
    """0: attention, 1: the MLP"""

    width: StrictInt = Field(default=64, ge=1)
    """of the bottleneck"""

    def _around(self, model: PreTrainedModel) -> nn.Module:
        return Adapted(model, self._layers(model), self.width)

    def _from(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        adapted = Adapted(base, self._layers(base), self.width)
        saved, there = load_file(folder / FILE), adapted.networks()
        if saved.keys() != there.keys():
            odd = sorted(saved.keys() ^ there.keys())[0]
            raise UserError(f"adapter {folder}: tensor {odd!r} does not fit its base")
        for name, weight in there.items():
            weight.data = saved[name].to(weight.device)
        return adapted

    def _layers(self, model: PreTrainedModel) -> list[str]:
        """The paths of the layers that get a bottleneck, as many as the model has blocks of each.

        Raises UserError for a model whose blocks are built in an unknown way.
        """
        count = model.config.get_text_config().num_hidden_layers
        linear = [p for p, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
        for names in KNOWN:
            found = [[p for p in linear if f".{p}".endswith(f".{name}")] for name in names]
            if all(len(paths) == count for paths in found):
                return [path for which in self.behind for path in found[which]]
        raise UserError(
            f"tuning={self.called} does not know where attention and MLP end in a "
            f"{model.config.model_type}; use tuning=lora"
        )
