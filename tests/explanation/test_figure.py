import warnings
from pathlib import Path

import numpy as np
from matplotlib.text import Text
from PIL import Image

import danet
from danet.figure import draw_explanation
from networks import attentive_danet
from pictures import WIDTH


def explained_with_every_class(image: Image.Image, names: tuple[str, ...]) -> danet.Explanation:
    """Of five classes with these names, each of which has pixels in every branch."""
    model = attentive_danet()
    model.metadata = model.metadata.model_copy(update={"classes": names})
    explanation = danet.explain(model, image, (20, 30))
    for branch in explanation.branches.values():
        branch[:2] = np.arange(2 * WIDTH).reshape(2, WIDTH) % 5
    return explanation


def test_class_names_of_any_letters_are_drawn(image: Image.Image, tmp_path: Path) -> None:
    """As plain text; as an id where no font has a letter."""
    names = (r"$\frac$", "_road_", "мост", "\U000103a0", "car")
    explanation = explained_with_every_class(image, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation.save(tmp_path / "figure.svg")
        legend = draw_explanation(explanation).legends[0]
    labels = [text.get_text().strip("\N{ZERO WIDTH SPACE}") for text in legend.get_texts()]
    drawn = {label.rpartition(" ")[0].rpartition(" ")[0] for label in labels}
    assert drawn == {r"$\frac$", "_road_", "мост", "class 3", "car"}


def test_long_names_are_shortened_and_keep_their_bars_apart(image: Image.Image) -> None:
    names = tuple(f"a_kind_of thing whose name says a lot, the {n}th" for n in range(5))
    explanation = explained_with_every_class(image, names)
    figure = draw_explanation(explanation)
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert not any("says a lot" in text for text in texts)
    assert any("a_kind_of thing whose n…" in text for text in texts)
    assert len(figure.axes[3].patches) == 5
    assert len({bar.get_y() for bar in figure.axes[3].patches}) == 5
