import numpy as np
from PIL import Image

from danet.attention_overlay import SMALLEST_TIMES_EVEN, attention_overlay


def test_overlay_is_brightest_where_attention_is() -> None:
    shares = np.full((4, 6), SMALLEST_TIMES_EVEN / 1000, dtype=np.float32)
    shares[1, 4] = 1 - shares.sum()
    drawn = np.asarray(attention_overlay(Image.new("RGB", (60, 40), "black"), shares, None))
    row, column = np.unravel_index(drawn.sum(2).argmax(), drawn.shape[:2])
    assert 10 <= row < 20
    assert 40 <= column < 50
