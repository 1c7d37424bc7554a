import pytest
from PIL import Image

import danet
from networks import attentive_danet
from pictures import noise


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return noise()


@pytest.fixture(scope="session")
def predictor() -> danet.Predictor:
    return danet.Predictor(attentive_danet(), device="cpu", precision="fp32")
