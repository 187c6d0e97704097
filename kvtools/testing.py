"""The error rule that every kernel is held to."""

import torch
from torch import Tensor


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Assert that `actual` errs at most twice as much as `eager`, both measured against `exact`.

    Args:
        name: what is compared, for the message.
        actual: result under test.
        exact: the same function in float64 on the same rounded inputs.
        eager: the same function in plain PyTorch in the dtype of `actual`.
        dtype: of the arithmetic, where that is coarser than `actual` shows.

    Raises:
        AssertionError: non-finite entries do not coincide, or
            max|actual - exact| > 2 (max|eager - exact| + eps(dtype) max|exact|).
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    finite = torch.isfinite(exact)
    torch.testing.assert_close(
        actual[~finite].double(),
        exact[~finite].double(),
        equal_nan=True,
        msg=f"{name}: non-finite entries",
    )
    assert torch.isfinite(actual[finite]).all(), (
        f"{name}: non-finite where the exact value is finite"
    )
    if not finite.any():
        return
    error = (actual[finite].double() - exact[finite]).abs()
    allowed = 2 * (
        (eager[finite].double() - exact[finite]).abs().max()
        + torch.finfo(dtype or actual.dtype).eps * exact[finite].abs().max()
    )
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3e} exceeds {allowed:.3e} at flat index {worst}: "
        f"actual {actual[finite][worst]}, exact {exact[finite][worst]}, "
        f"eager {eager[finite][worst]}"
    )
