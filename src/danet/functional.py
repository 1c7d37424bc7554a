"""The attention of dual attention networks as functions."""

from danet.attention import channel_attention, position_attention

__all__ = ["channel_attention", "position_attention"]
