"""Model files: every dtype through the file and back."""

import h5py
import torch

from hpcavg.checkpoint import digest, load_model, save_model


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    state = {
        "layer.weight": torch.randn(3, 5),
        "double": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(4, 2).half(),
        "brain": torch.randn(7).bfloat16(),
        "count": torch.tensor(12),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 4).t(),
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    save_model(tmp_path / "model.h5", state)
    again = load_model(tmp_path / "model.h5")
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert digest({name: again[name] for name in state}) == digest(state)
    with h5py.File(tmp_path / "model.h5") as file:
        assert file["layer.weight"].shape == (3, 5)
        assert file["layer.weight"].dtype == "f4"


def test_the_digest_sees_one_bit():
    ones = torch.ones(4)
    changed = ones.clone()
    changed[2] = torch.nextafter(changed[2], torch.tensor(2.0))
    assert digest({"x": ones}) != digest({"x": changed})
