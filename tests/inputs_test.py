"""What is a window and what is not."""

import numpy as np
import pytest

from ralenet_jax.errors import UserError
from ralenet_jax.models.inputs import check_windows


@pytest.mark.parametrize("shape", [(1, 8, 2), (0, 16, 12), (3, 24, 1)])
def test_windows_pass(shape):
    check_windows(np.zeros(shape), 8)


@pytest.mark.parametrize("shape", [(1, 12, 2), (16, 2), (1, 0, 2), (1, 1, 16, 2)])
def test_others_are_refused_with_their_shape(shape):
    with pytest.raises(UserError) as error:
        check_windows(np.zeros(shape), 8)
    assert str(error.value).startswith(f"x has shape {shape}; expected [B, L, leads] with L divisible by 8")
