"""Stands in for what the peer's packages leave out; imported before them."""

import sys
import warnings
from unittest import mock

# mmseg imports mmcv's compiled operators, which mmcv-lite leaves out; nothing here calls them.
sys.modules["mmcv._ext"] = mock.MagicMock()
warnings.filterwarnings("ignore", module="mmseg")  # notices about loss defaults, unused here
