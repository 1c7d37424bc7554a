"""What the results of `danet predict` are called."""

import re


def mask_name(stem: str) -> str:
    """The file name of a picture's class ids."""
    return f"{stem}.png"


def overlay_name(stem: str) -> str:
    """The file name of a picture overlaid with its classes."""
    return f"{stem}_overlay.jpg"


def video_name(stem: str) -> str:
    """The file name of a video overlaid with its classes."""
    return f"{stem}_overlay.mp4"


def picture_results(stem: str, *, overlay: bool) -> dict[str, str]:
    """The names of a picture's results, by kind (`danet.manifest.RESULT_KINDS`)."""
    return {"mask": mask_name(stem)} | ({"overlay": overlay_name(stem)} if overlay else {})


def video_results(stem: str, *, overlay: bool, masks: bool) -> dict[str, str]:
    """The names of a video's results, by kind; the folder of frames' masks is named by the stem."""
    return ({"overlay": video_name(stem)} if overlay else {}) | ({"frames": stem} if masks else {})


def member_pattern(archive_stem: str) -> str:
    """A regular expression for the beginning of `member_stem`."""
    return rf"{re.escape(archive_stem)}_\d{{6,}}_"


def member_stem(archive_stem: str, index: int, name: str) -> str:
    """The stem of a picture in an archive; numbered, because names may occur twice."""
    return f"{archive_stem}_{index:06}_{name}"
