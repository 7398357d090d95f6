"""How a rotary position embedding rotates keys."""

from typing import Any

import torch
from torch import Tensor


class Rotation:
    """A rotary position embedding with fixed frequencies.

    Pair `i` of the rotating dimensions of a key is a complex number. Each position rotates it by `inv_freq[i]` radians
    (RoFormer, arXiv 2104.09864). The scale that YaRN puts on cos and sin belongs to the key, not to the rotation.

    Args:
        inv_freq: radians per position, shape `[rotary_dim / 2]`.
        start: index of the first rotating dimension. The rotating dimensions are contiguous.
        interleaved: True if the dimensions of a pair are neighbours (`0, 1`), as in GPT-J. False if they lie half the
            rotating dimensions apart (`0, rotary_dim / 2`), as in Llama.
        in_values: True if the rotating states are cached as values, as in multi-head latent attention.
        head_dim: number of all dimensions of such a state; None if it is not known.
    """

    def __init__(
        self,
        inv_freq: Tensor,
        start: int = 0,
        interleaved: bool = False,
        in_values: bool = False,
        head_dim: int | None = None,
    ) -> None:
        # float64 holds the float32 frequencies of a model exactly, and their angles at any position.
        self.inv_freq = inv_freq.double()
        self.start = start
        self.interleaved = interleaved
        self.in_values = in_values
        self.head_dim = head_dim

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rotation":
        return self  # it never changes, and compiled steps know it

    @property
    def rotary_dim(self) -> int:
        """Number of rotating dimensions."""
        return 2 * self.inv_freq.numel()

    def __repr__(self) -> str:
        pairing = "interleaved" if self.interleaved else "halves"
        where = "values" if self.in_values else "keys"
        return f"Rotation({where}, dims {self.start} to {self.start + self.rotary_dim - 1}, {pairing})"

    def pairs(self, key_states: Tensor) -> Tensor:
        """Return the rotating dimensions of keys `[..., head_dim]` as a view of shape `[..., rotary_dim / 2, 2]`."""
        is_whole = key_states.shape[-1] == self.rotary_dim
        rotating = key_states if is_whole else key_states.narrow(-1, self.start, self.rotary_dim)
        num_pairs = self.inv_freq.numel()
        if self.interleaved:
            return rotating.view(*rotating.shape[:-1], num_pairs, 2)
        return rotating.view(*rotating.shape[:-1], 2, num_pairs).transpose(-1, -2)

    def cos_sin(self, shift: int | Tensor, dtype: torch.dtype) -> Tensor:
        """Return cos and sin of the angles of `shift` positions, shape `[2, rotary_dim / 2]`.

        A tensor of shifts, shape `[..., 1]`, gives shape `[2, ..., rotary_dim / 2]`. The angles are computed in float64
        on the device of `inv_freq`.
        """
        angles = self.inv_freq * shift
        return torch.stack([angles.cos(), angles.sin()]).to(dtype)

    def to(self, device: torch.device) -> "Rotation":
        """Return the same rotation with its frequencies on `device`."""
        return Rotation(self.inv_freq.to(device), self.start, self.interleaved, self.in_values, self.head_dim)

    def rotate(self, key_states: Tensor, shift: int) -> Tensor:
        """Return keys `[..., head_dim]` moved forward by `shift` positions, as a new tensor."""
        cos_sin = self.cos_sin(shift, torch.promote_types(key_states.dtype, torch.float32))
        return self.rotate_by(cos_sin, key_states).to(key_states.dtype)

    def rotate_by(self, cos_sin: Tensor, key_states: Tensor) -> Tensor:
        """Return keys `[..., head_dim]` rotated by the angles of `cos_sin`, as a new tensor of its dtype.

        `cos_sin`: shape `[2, ..., rotary_dim / 2]`, in float32 or wider, so that half-precision keys are rounded once,
        by the caller.
        """
        cos, sin = cos_sin.unbind()
        x, y = self.pairs(key_states).unbind(-1)
        rotated = key_states.to(cos_sin.dtype, copy=True)
        rotated_x, rotated_y = self.pairs(rotated).unbind(-1)
        rotated_x.mul_(cos).addcmul_(y, sin, value=-1)
        rotated_y.mul_(cos).addcmul_(x, sin)
        return rotated
