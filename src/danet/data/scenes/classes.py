"""Train ids of the generated scenes: CamVid's order."""

from danet.data.spec import IGNORE_INDEX

(
    SKY,
    BUILDING,
    POLE,
    ROAD,
    PAVEMENT,
    TREE,
    SIGN,
    FENCE,
    CAR,
    PEDESTRIAN,
    BICYCLIST,
) = range(11)
VOID = IGNORE_INDEX
