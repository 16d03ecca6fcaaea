"""Edits in place, on CPU tensors: packed rows, tensor-parallel shards, exact restores, and what must not be edited in place."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.serving.in_place_edit import InPlaceEdit, Untraceable
from sku_vllm.serving.worker_extension import edits

HEADS = {"q_proj": (0, 128), "k_proj": (128, 64), "v_proj": (192, 64)}
GATES = {"gate_proj": (0, 256), "up_proj": (256, 256)}


class Shard(nn.Module):
    """Parameters as vLLM keeps them on one of `ranks` ranks (q, k, v in one weight, gate and up in another), and a loader that narrows
    both sides of every copy as vLLM's does."""

    def __init__(self, reader, rank, ranks):
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.kept = nn.ParameterDict()
        for name in reader.names:
            home, _, shape = self.place(name, reader.info(name).shape)
            if home.replace(".", "_") not in self.kept:
                self.kept[home.replace(".", "_")] = nn.Parameter(torch.full(shape, -7.0), requires_grad=False)

    def place(self, name, shape):
        """(parameter, first row there, its shape) of a checkpoint tensor on this rank."""
        part = name.split(".")[-2]
        for packed, rows in (("qkv_proj", HEADS), ("gate_up_proj", GATES)):
            if part in rows:
                total = sum(size for _, size in rows.values())
                return name.replace(part, packed), rows[part][0] // self.ranks, (total // self.ranks, shape[1])
        if part in ("o_proj", "down_proj"):
            return name, 0, (shape[0], shape[1] // self.ranks)
        return name, 0, tuple(shape)

    def load_weights(self, pairs):
        for name, loaded in pairs:
            home, row, shape = self.place(name, loaded.shape)
            parameter = self.kept[home.replace(".", "_")].data
            if len(shape) == 2 and shape[1] < loaded.shape[1]:
                loaded = loaded.narrow(1, self.rank * shape[1], shape[1])
            elif home != name:
                rows = loaded.shape[0] // self.ranks
                loaded, parameter = loaded.narrow(0, self.rank * rows, rows), parameter.narrow(0, row, rows)
            self.copy(parameter, loaded)

    def copy(self, parameter, loaded):
        parameter.copy_(loaded)

    def bits(self):
        return {name: parameter.clone() for name, parameter in self.kept.items()}


def loaded(reader, rank=0, ranks=1):
    model = Shard(reader, rank, ranks)
    model.load_weights((name, reader.tensor(name)) for name in reader.names)
    return model


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_edit_in_place_is_what_a_fuse_writes_and_restores_to_the_bit(tiny, tmp_path, ranks):
    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest

    fuse_checkpoint(FuseRequest(tiny / "base", [(tiny / "adapter", 0.7)], tmp_path / "fused"))
    reader, fused = CheckpointReader(tiny / "base"), CheckpointReader(tmp_path / "fused")
    for rank in range(ranks):
        model = loaded(reader, rank, ranks)
        before, expected = model.bits(), loaded(fused, rank, ranks).bits()
        edit = InPlaceEdit(model, reader)
        assert all(torch.equal(model.bits()[name], each) for name, each in before.items()), "tracing must not write"
        half, whole = (edits(str(tiny / "base"), {"adapter": str(tiny / "adapter"), "scale": scale}) for scale in (0.3, 0.7))
        edit.check(list(half))
        edit.subtract(half)
        stats = edit.subtract(whole)  # from the base, not from what the first edit left
        assert sum(each.changed for each in stats) > 0
        after = model.bits()
        assert {name for name, each in after.items() if not torch.equal(each, before[name])} == {
            name for name in before if any(part in name for part in ("qkv", "o_proj", "gate_up", "down"))
        }
        assert all(torch.equal(after[name], each) for name, each in expected.items())
        edit.restore()
        assert all(torch.equal(model.bits()[name], each) for name, each in before.items()) and edit.edited == []


def test_dense_edits_go_a_part_at_a_time_to_the_same_bits(tiny, tmp_path, monkeypatch):
    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest

    base = load_file(tiny / "base/model.safetensors")
    (tmp_path / "dense").mkdir()
    deltas = {name: torch.randn_like(each) * 0.01 for name, each in base.items() if "layers.0" in name}
    save_file(deltas, tmp_path / "dense/task_vector.safetensors")
    fuse_checkpoint(FuseRequest(tiny / "base", [(tmp_path / "dense", 0.5)], tmp_path / "fused"))
    reader, fused = CheckpointReader(tiny / "base"), CheckpointReader(tmp_path / "fused")
    model = loaded(reader, 1, 2)
    before, edit = model.bits(), InPlaceEdit(model, reader)
    monkeypatch.setattr("sku_vllm.serving.in_place_edit.AT_ONCE", 1)
    edit.subtract(edits(str(tiny / "base"), {"adapter": str(tmp_path / "dense"), "scale": 0.5}))
    expected = loaded(fused, 1, 2).bits()
    assert all(torch.equal(model.bits()[name], each) for name, each in expected.items())
    edit.restore()
    assert all(torch.equal(model.bits()[name], each) for name, each in before.items())


def test_every_element_of_a_packed_weight_has_one_source(tiny):
    reader = CheckpointReader(tiny / "base")
    windows = InPlaceEdit(loaded(reader, 1, 2), reader).windows
    rows = [
        (each.row, each.column, tuple(each.part.shape))
        for part in ("q", "k", "v")
        for each in windows[f"model.layers.1.self_attn.{part}_proj.weight"]
    ]
    assert rows == [(64, 0, (64, 128)), (32, 0, (32, 128)), (32, 0, (32, 128))]
    down = windows["model.layers.0.mlp.down_proj.weight"]
    assert [(each.row, each.column, tuple(each.part.shape)) for each in down] == [(0, 128, (128, 128))]


class Casting(Shard):
    def copy(self, parameter, loaded):
        parameter.copy_(loaded.to(torch.bfloat16))


class Transposing(Shard):
    def copy(self, parameter, loaded):
        square = loaded.ndim == 2 and loaded.shape[0] == loaded.shape[1]
        parameter.copy_(loaded.t() if square else loaded)


class Scaling(Shard):
    def copy(self, parameter, loaded):
        parameter.copy_(loaded)
        parameter.mul_(2)


class Replacing(Shard):
    def copy(self, parameter, loaded):
        for kept in self.kept.values():
            if kept.shape == loaded.shape:
                kept.data = loaded.clone()


@pytest.mark.parametrize("kind", [Casting, Transposing, Scaling, Replacing])
def test_a_loader_that_does_more_than_copy_is_not_traced_and_writes_nothing(tiny, kind):
    reader = CheckpointReader(tiny / "base")
    model = loaded(reader)
    before, places = model.bits(), [parameter.data_ptr() for parameter in model.parameters()]
    model.__class__ = kind
    with pytest.raises(Untraceable):
        InPlaceEdit(model, reader)
    assert all(torch.equal(model.bits()[name], each) for name, each in before.items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_weights_that_were_repacked_after_loading_are_not_edited(tiny):
    """Same shape, other order: what a kernel's own layout looks like from outside."""
    reader = CheckpointReader(tiny / "base")
    model = loaded(reader)
    name = "model.layers.0.self_attn.o_proj.weight"
    packed = model.kept[name.replace(".", "_")]
    packed.copy_(packed.flip(0).clone())
    edit = InPlaceEdit(model, reader)
    with pytest.raises(Untraceable, match="o_proj"):
        edit.check([name])
    edit.check(["model.layers.0.mlp.down_proj.weight"])
    assert load_file(tiny / "base/model.safetensors")[name].shape == packed.shape
