"""Generated street scenes with exact labels.

A scene is a street in metres (x right, y up, z forward from the camera) seen by a pinhole camera,
drawn from far to near onto the picture and, with the same corners, onto a map of codes from which
label and texture are read.
"""

from danet.data.scenes.compose import render

__all__ = ["render"]
